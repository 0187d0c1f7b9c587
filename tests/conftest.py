"""What all tests share: how many threads they take, how hypothesis draws its examples, some files."""

import ctypes
import gc
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

# One thread, also in the processes that tests start: on models so small, threads cost more than they bring,
# and two of them wait for each other whenever something else runs.
os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network
os.environ["MATPLOTLIBRC"] = str(Path(__file__).with_name("matplotlibrc"))

import pytest
import torch
from hypothesis import settings
from processes import Server

pytest.register_assert_rewrite("helpers", "reference")

torch.set_num_threads(1)
gc.disable()  # until all is imported: what an import makes stays

# A shell starts what it puts into the background with SIGINT ignored; tests that interrupt would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: the first example of a test pays for torch's warm-up, and machines are shared. With CI set, as every CI
# system does, the examples are the same in each run, so that a failure belongs to the change under test.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_finish() -> None:
    """From here on garbage is collected, and searched for only among what the tests make."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six documents of some 800 bytes."""
    folder = tmp_path_factory.mktemp("corpus")
    words, rng = ["the ", "cat ", "sat ", "on ", "a ", "mat ", "and ", "ran\n"], random.Random(0)
    for number in range(6):
        (folder / f"{number}.txt").write_text("".join(rng.choice(words) for _ in range(200)))
    return folder


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four documents that differ from those of `corpus`."""
    folder = tmp_path_factory.mktemp("letters")
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"Dear cat {number}, the mat is yours.\n" * 30)
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture
def bound_by_modes() -> Iterator[None]:
    """Root, too, may only read what modes allow: meanwhile it lacks the capabilities that let it read everything."""
    if os.geteuid() != 0:
        yield
        return
    if sys.platform != "linux":
        pytest.skip("root may read everything")
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)
    before, without = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()  # twice effective, permitted, inheritable
    assert libc.capget(header, before) == 0
    without[:] = before
    without[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, without) == 0
    yield
    assert libc.capset(header, before) == 0
