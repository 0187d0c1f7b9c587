"""Files written by perceiver_ar.files are whole or absent, whatever happens while they are written."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perceiver_ar.errors import InputError
from perceiver_ar.files import atomic_directory, atomic_path, check_out, write_text


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


# Few examples, as each waits for the disk; in the same directory, as files are replaced.
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(codec="utf-8")))
def test_the_text_is_on_disk_as_utf8_and_nothing_beside_it(tmp_path: Path, text: str):
    write_text(tmp_path / "notes.txt", text)
    assert content(tmp_path) == {"notes.txt": text.encode()}


@pytest.mark.skipif(sys.platform != "linux", reason="has /dev/full")
@pytest.mark.usefixtures("bound_by_modes")
def test_errors_name_the_file_to_write_not_the_temporary_one(tmp_path: Path):
    with pytest.raises(OSError, match="No space") as full, atomic_path(tmp_path / "notes.txt") as temporary:
        descriptor = os.open("/dev/full", os.O_WRONLY)
        try:
            os.write(descriptor, temporary.name.encode())
        finally:
            os.close(descriptor)
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(PermissionError) as closed:
        write_text(tmp_path / "closed" / "notes.txt", "text")
    for error, path in ((full, tmp_path / "notes.txt"), (closed, tmp_path / "closed" / "notes.txt")):
        assert error.value.filename == os.path.realpath(path)
    assert content(tmp_path / "closed") == {} and os.listdir(tmp_path) == ["closed"]


@pytest.mark.usefixtures("bound_by_modes")
def test_a_place_for_results_is_checked_before_the_work(tmp_path: Path):
    (tmp_path / "closed").mkdir(mode=0o500)
    write_text(tmp_path / "file", "")
    for path in ("closed/a.csv", "closed/new/a.csv", "file/a.csv", "file/new/a.csv"):
        with pytest.raises(InputError, match=f"--out .*{path}: .*{path.split('/')[0]} is no folder in which you may"):
            check_out(tmp_path / path, "--out")
    (tmp_path / "dark").mkdir(mode=0)
    for path in ("dark/a.csv", "dark/new/a.csv"):
        with pytest.raises(InputError, match="dark is no folder in which you may"):
            check_out(tmp_path / path, "--out")
    os.mkfifo(tmp_path / "pipe", 0)
    with pytest.raises(InputError, match="no permission to write to it"):
        check_out(tmp_path / "pipe", "--out")
    with pytest.raises(InputError, match="is a folder"):
        check_out(tmp_path, "--out")
    for path in (tmp_path / "file", tmp_path / "new" / "deeper" / "a.csv", os.devnull):
        check_out(path, "--out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["closed", "dark", "file", "pipe"]


def test_the_locale_does_not_choose_the_encoding(tmp_path: Path):
    program = "import sys; from perceiver_ar.files import write_text; write_text(sys.argv[1], chr(0xE9))"
    plain = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-X", "utf8=0", "-c", program, tmp_path / "notes.txt"], env=plain, check=True)
    assert content(tmp_path) == {"notes.txt": "é".encode()}


def test_missing_folders_are_made(tmp_path: Path):
    write_text(tmp_path / "run" / "samples" / "1.txt", "hello")
    assert (tmp_path / "run" / "samples" / "1.txt").read_text() == "hello"


def test_a_path_may_be_a_string(tmp_path: Path):
    write_text(str(tmp_path / "config.json"), "{}")
    assert content(tmp_path) == {"config.json": b"{}"}


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert content(tmp_path) == {"model.safetensors": b"new"}


def test_the_temporary_file_is_hidden_in_the_same_folder_and_keeps_the_suffix(tmp_path: Path):
    with atomic_path(tmp_path / "loss.png") as temporary:
        assert temporary.parent == tmp_path  # a rename across file systems is not atomic
        assert temporary.name.startswith(".")
        assert temporary.suffix == ".png"


@pytest.mark.parametrize("before", [{}, {"config.json": b"old"}], ids=["no file before", "a file before"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_what_was_there_and_no_litter(
    tmp_path: Path, before: dict[str, bytes], error: type[BaseException]
):
    for name, data in before.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(error), atomic_path(tmp_path / "config.json") as temporary:
        temporary.write_text("half")
        raise error
    assert content(tmp_path) == before


def test_names_that_are_not_utf8_are_written_with_their_bytes_named(tmp_path: Path):
    write_text(tmp_path / "report.html", f"one {os.fsdecode(bytes([0xFF]))}.txt")
    assert content(tmp_path) == {"report.html": b"one \\udcff.txt"}


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o077], ids=oct)
def test_the_permissions_are_those_of_any_new_file(tmp_path: Path, umask: None, mask: int):
    os.umask(mask)
    write_text(tmp_path / "ours", "")
    (tmp_path / "any").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "any").stat().st_mode
    assert os.umask(mask) == mask  # left as it was


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def visible(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))


HALF = """
import sys, time
from perceiver_ar.files import atomic_path

with atomic_path(sys.argv[1]) as temporary, open(temporary, "w") as file:
    file.write("half")
    file.flush()
    print("written", flush=True)
    time.sleep(60)
"""


def test_a_kill_in_the_middle_of_writing_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_text("old")
    with start(HALF, path) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "written\n"
        child.kill()
    assert child.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert visible(tmp_path) == ["model.safetensors"]


AGAIN_AND_AGAIN = """
import itertools, sys
from perceiver_ar.files import write_text

for version in itertools.count():
    write_text(sys.argv[1], f"{version:09d} " * 100_000)
    if version == 0:
        print("written", flush=True)
"""


@pytest.mark.parametrize("milliseconds", [0, 3, 11, 29])
def test_a_kill_at_any_moment_leaves_one_whole_version(tmp_path: Path, milliseconds: int):
    path = tmp_path / "metrics.csv"
    with start(AGAIN_AND_AGAIN, path) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "written\n"
        time.sleep(milliseconds / 1000)
        child.kill()
    assert child.returncode == -signal.SIGKILL
    words = path.read_text().split()
    assert len(words) == 100_000
    assert len(set(words)) == 1
    assert visible(tmp_path) == ["metrics.csv"]


@pytest.mark.parametrize("before", [False, True], ids=["no directory before", "an empty one before"])
def test_a_directory_is_whole_or_absent(tmp_path: Path, umask: None, before: bool):
    path = tmp_path / "folder" / "run"
    if before:
        path.mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt), atomic_directory(path) as temporary:
        (temporary / "half").touch()
        raise KeyboardInterrupt
    assert list(path.parent.iterdir()) == ([path] if before else [])
    with atomic_directory(path) as temporary:
        write_text(temporary / "config.json", "{}")
        assert temporary.parent == path.parent
        assert not before or not list(path.iterdir())
    assert content(path) == {"config.json": b"{}"}
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o755


def test_a_directory_that_holds_something_is_not_replaced(tmp_path: Path):
    write_text(tmp_path / "run" / "mine", "")
    with pytest.raises(OSError), atomic_directory(tmp_path / "run") as temporary:
        write_text(temporary / "config.json", "{}")
    assert content(tmp_path / "run") == {"mine": b""}
    assert len(list(tmp_path.iterdir())) == 1
