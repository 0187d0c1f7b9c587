"""Files that are either whole or absent: written under a temporary name, flushed, renamed."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from perceiver_ar.errors import require

TEMPORARY = ".unfinished-"
"""Prefix of the names of unfinished files."""


def check_out(path: str | os.PathLike[str], option: str, inputs: Iterable[str | os.PathLike[str] | None] = ()) -> None:
    """Raises InputError unless a file can be written to `path`: to find this out before hours of work.

    inputs: files that are read; `path` must be none of them.
    """
    require(not os.path.isdir(path), f"{option} {path} is a folder: name a file in it")
    if os.path.exists(path) and not os.path.isfile(path):  # a device or a pipe
        require(_allows(path, os.W_OK), f"{option} {path}: no permission to write to it; name another place")
        return
    for file in inputs if os.path.exists(path) else ():
        same = file is not None and os.path.exists(file) and os.path.samefile(path, file)
        require(not same, f"{option} {path} is among the files that are read: name another file")
    folder = os.path.dirname(os.path.realpath(path))
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    writable = os.path.isdir(folder) and _allows(folder, os.W_OK | os.X_OK)
    require(writable, f"{option} {path}: {folder} is no folder in which you may write; name another place")


def _allows(path: str | os.PathLike[str], mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it replaces `path`, on any error it is removed.

    A kill at any moment leaves `path` as it was. The temporary name keeps the suffix, because some writers (matplotlib,
    numpy) choose their format by it.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    if path.exists() and not path.is_file() and not path.is_dir():  # a device or a pipe cannot be replaced
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = None
    try:
        handle, name = tempfile.mkstemp(prefix=f"{TEMPORARY}{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp lets only the owner read its files
        os.replace(temporary, path)
    except OSError as error:  # names the file that the user knows
        if TEMPORARY in str(error.filename) or (error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT)):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary directory beside `path`; on success it becomes `path`, which must be missing or empty."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{path.name}-", dir=path.parent))
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o777 & ~umask)  # mkdtemp lets only the owner read its directories
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` as UTF-8, atomically. Bytes of file names that are not UTF-8 are written as \\udcff."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
