"""A directory is one process's at a time, whatever happens to the process."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from perceiver_ar.errors import InputError
from perceiver_ar.lock import LOCK, locked, may_run, named_in

HOLD = """
import sys
from pathlib import Path
from perceiver_ar.lock import locked

with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Meanwhile another process holds the folder, until its standard input ends."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        yield process


def test_a_second_process_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with held(folder) as process:
        message = rf"process {process.pid} on {socket.gethostname()} is training in {folder}: wait until it ends, or"
        for _ in range(2):
            with pytest.raises(InputError, match=message), locked(folder):
                pass
        assert [path.name for path in folder.iterdir()] == [LOCK]
    assert list(tmp_path.iterdir()) == []  # what it made is gone with it
    with locked(folder):
        assert named_in((folder / LOCK).read_bytes()) == {"host": socket.gethostname(), "pid": os.getpid()}
        with pytest.raises(InputError, match=f"process {os.getpid()} on"), locked(folder):
            pass


def test_a_process_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    with held(tmp_path / "run") as process:
        process.kill()
        process.wait()
        assert named_in((tmp_path / "run" / LOCK).read_bytes())["pid"] == process.pid
        with locked(tmp_path / "run"):
            assert named_in((tmp_path / "run" / LOCK).read_bytes())["pid"] == os.getpid()
    assert list((tmp_path / "run").iterdir()) == []


def test_only_what_was_made_is_removed(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "mine").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "mine"]
    (tmp_path / "empty").mkdir()
    with locked(tmp_path / "empty"):
        pass
    with locked(tmp_path / "a"):
        (tmp_path / "a").rename(tmp_path / "moved")
        with locked(tmp_path / "a"):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "moved"]


COUNT = """
import sys, time
from pathlib import Path
from perceiver_ar.errors import InputError
from perceiver_ar.lock import locked

folder, counter = Path(sys.argv[1]), Path(sys.argv[2])
done = 0
while done < 50:
    try:
        with locked(folder):
            count = int(counter.read_text())
            time.sleep(0.0005)
            counter.write_text(str(count + 1))
            done += 1
    except InputError:
        pass
"""


def test_processes_that_come_and_go_never_share_it(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    command = [sys.executable, "-c", COUNT, str(tmp_path / "run"), str(counter)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert counter.read_text() == "150"


def test_where_locks_are_refused_the_name_in_the_file_decides() -> None:
    """Such as on a network disk."""
    here = socket.gethostname()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert may_run({"host": here, "pid": process.pid})
        assert may_run({"host": "elsewhere", "pid": process.pid})
        assert not may_run({"host": here, "pid": os.getpid()})
        process.kill()
    assert not may_run({"host": here, "pid": process.pid})
    assert may_run({"host": "elsewhere", "pid": process.pid})
    for content in (b"", b"{", b"[]", json.dumps({"host": here, "pid": "?"}).encode()):
        assert named_in(content) == {} and not may_run(named_in(content))
