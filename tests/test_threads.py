"""OpenMP's settings and the limits of control groups, from files as Linux writes them."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from perceiver_ar.threads import SPARE, SPINS, adaptive_spins, available_cores, cgroup_quota, share_cores


def quota(tmp_path: Path, groups: str, files: dict[str, str]) -> float:
    (tmp_path / "cgroup").write_text(groups)
    mount = tmp_path / "mount"
    for name, text in files.items():
        (mount / name).parent.mkdir(parents=True, exist_ok=True)
        (mount / name).write_text(text)
    return cgroup_quota(tmp_path / "cgroup", mount)


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, float("inf")),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2.0),
        ("0::/a/b\n", {"a/cpu.max": "800000 100000\n", "a/b/cpu.max": "300000 100000\n"}, 3.0),
        (
            "5:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "50000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
            0.5,
        ),
        (
            "3:cpu:/\n0::/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            float("inf"),
        ),
        ("0::/gone\n", {}, float("inf")),
    ],
)
def test_the_smallest_limit_of_all_groups_counts(
    tmp_path: Path, groups: str, files: dict[str, str], cores: float
) -> None:
    assert quota(tmp_path, groups, files) == cores


def test_a_machine_without_control_groups_has_no_limit(tmp_path: Path) -> None:
    assert cgroup_quota(tmp_path / "cgroup", tmp_path) == float("inf")
    assert available_cores() >= 1


def test_variables_that_the_user_has_set_stay() -> None:
    mine = {"GOMP_SPINCOUNT": "7", "OMP_NUM_THREADS": "3"}
    passive = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "3"}
    for variables in (mine, passive):
        given = dict(variables)
        share_cores(variables)
        assert variables == given


def test_the_command_sets_openmp_before_torch_reads_it() -> None:
    script = """
import os, sys
from perceiver_ar.cli import main
assert "torch" not in sys.modules
main(["--version"])
assert "torch" not in sys.modules
print(os.environ["GOMP_SPINCOUNT"])
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env={})
    assert result.stdout.splitlines()[-1] == SPINS


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux lists them")
def test_a_thread_of_its_own_takes_its_openmp_threads_with_it() -> None:
    script = """
import os, time, torch
from perceiver_ar.threads import in_own_thread
def count():
    return len(os.listdir("/proc/self/task"))
def compute():
    torch.zeros(1 << 20)
    return count() - before
def fail():
    raise ValueError("no")
torch.set_num_threads(3)
before = count()
assert in_own_thread(compute) == 3
while count() > before:
    time.sleep(0.01)
try:
    in_own_thread(fail)
except ValueError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout == "no\n"


def test_openmp_threads_are_held_only_while_others_use_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat, ticks = tmp_path / "stat", 0

    def write() -> None:
        lines = [f"cpu{core} {ticks} 0 0 0 0 0 0 0 0 0\n" for core in os.sched_getaffinity(0)]
        (tmp_path / "new").write_text(f"cpu  {ticks} 0 0 0 0 0 0 0 0 0\n" + "".join(lines) + "intr 1 2\n")
        (tmp_path / "new").replace(stat)

    def held() -> bool:
        return any(thread.name == SPARE for thread in threading.enumerate())

    write()
    monkeypatch.setenv("GOMP_SPINCOUNT", SPINS)
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)) + 1)  # two at least
    try:
        with adaptive_spins(stat, interval=0.01):
            assert not held()
            while not held():  # others use much time
                ticks += 100
                write()
                time.sleep(0.01)
            while held():  # none
                time.sleep(0.01)
            ticks += 1_000_000
            write()
        monkeypatch.setenv("GOMP_SPINCOUNT", "7")  # the user's
        with adaptive_spins(stat, interval=0.01):
            ticks += 1_000_000
            write()
            time.sleep(0.1)
            assert not held()
    finally:
        torch.set_num_threads(threads)
    while held():
        time.sleep(0.01)
