"""Settings of the C library's allocator for training on a CPU."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MEBIBYTE = 2**20


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Inside, freed memory stays with this process for its next allocations; afterwards it is returned.

    Each training step allocates what the step before freed. By default glibc returns it to the kernel in between, and
    the kernel clears every page again, which takes about a tenth of a step's time. Blocks above 32 MiB, the highest
    threshold of glibc's own rule, are still returned. Only glibc's allocator changes, and only if no environment
    variable configures it.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    configured = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if libc is None or not hasattr(libc, "gnu_get_libc_version") or configured:
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, 32 * MEBIBYTE)
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
    try:
        yield
    finally:
        libc.mallopt(M_TRIM_THRESHOLD, 64 * MEBIBYTE)
        libc.malloc_trim(0)
