"""Memory that is freed and allocated again: page faults counted in processes of their own."""

import os
import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, statistics, torch
from perceiver_ar.training.memory import keep_freed_memory

def faults():
    counts = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
    for _ in range(20):
        blocks = [torch.ones(2**22) for _ in range(8)]  # 16 MiB each, freed together
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return statistics.median(late - early for early, late in zip(counts, counts[1:]))

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

with keep_freed_memory():
    kept = faults()
    held = resident()
returned = held - resident()
print(kept, faults(), returned)
"""
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="changes glibc")


def count(**variables: str) -> list[float]:
    """Page faults of the median round inside and after `keep_freed_memory`, and the bytes given back at its end."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    result = subprocess.run(
        [sys.executable, "-c", COUNT], capture_output=True, text=True, check=True, env=environment | variables
    )
    return [float(number) for number in result.stdout.split()]


def test_freed_memory_stays_for_the_next_step_unless_the_user_has_configured_the_allocator() -> None:
    kept, _, returned = count()
    configured, _, _ = count(MALLOC_MMAP_THRESHOLD_="100000")
    assert configured >= 64  # a round has 32,768 pages of 4 KiB, or 64 of 2 MiB
    assert kept < configured / 4  # the heap may still grow by one of the eight blocks
    assert returned > 2**25  # at the end
