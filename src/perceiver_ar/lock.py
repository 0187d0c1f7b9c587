"""One process at a time in a directory.

The lock is the operating system's (`flock`) on the file `.lock` in the directory. It ends with its process, also at a
kill -9 or a power cut, so a leftover file locks nothing. The file names the process that holds the lock. Network file
systems support such locks or refuse them; if they refuse, the process named in the file decides.
"""

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from perceiver_ar.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
REFUSED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)  # by a file system without locks


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks `folder` for this process. Folders that this makes are removed at the end if they are empty.

    Raises InputError, naming the other process, if another one holds the lock.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    file = folder / LOCK
    descriptor = _locked_file(file)
    try:
        with suppress(OSError):  # the disk is full; the lock holds nevertheless
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
        yield
    finally:
        if _is_at(file, descriptor):  # the folder may have been moved
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
                file.unlink()
            with suppress(OSError):  # not empty
                for each in made:
                    each.rmdir()
        os.close(descriptor)


def _locked_file(file: Path) -> int:
    """The lock file, open and locked. Holders remove it at the end, so it must still be the one at `file`."""
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another process has just removed the folder
            continue
        except FileExistsError:
            if file.parent.exists() and not file.parent.is_dir():
                raise
            continue  # removed between mkdir's refusal and its look at what is there
        try:
            _lock(descriptor, file)
            if _is_at(file, descriptor):
                os.lseek(descriptor, 0, os.SEEK_SET)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, file: Path) -> None:
    """Raises InputError if another process holds the lock."""
    try:
        if fcntl is not None:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            holder = named_in(os.read(descriptor, 1000))
            who = f"process {holder['pid']} on {holder.get('host')}" if holder else "another process"
            raise InputError(f"{who} is training in {file.parent}: wait until it ends, or stop it") from None
        if error.errno not in REFUSED:
            raise
    holder = named_in(os.read(descriptor, 1000))
    if may_run(holder):
        raise InputError(
            f"according to {file}, process {holder['pid']} on {holder.get('host')} is training there: wait until it "
            "ends, or stop it; if it has been killed, remove that file"
        )


def named_in(content: bytes) -> dict[str, Any]:
    """The process that a lock file names; empty if it names none."""
    try:
        process = json.loads(content)
    except ValueError:  # incomplete
        return {}
    return process if isinstance(process, dict) and isinstance(process.get("pid"), int) else {}


def may_run(process: dict[str, Any]) -> bool:
    """Whether `process` is another one and may be running. Processes on other machines cannot be checked."""
    if not process or (process.get("host"), process["pid"]) == (socket.gethostname(), os.getpid()):
        return False
    if process.get("host") != socket.gethostname() or os.name != "posix":
        return True
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def _is_at(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except (FileNotFoundError, NotADirectoryError):
        return False
