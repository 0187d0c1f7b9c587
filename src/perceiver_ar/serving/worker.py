"""A separate process that reads uploaded files and writes results, in bounded memory and time.

A small upload may unpack to any size (zip bombs, false headers), and many libraries read it. So a failure ends only
that process. The processes exchange JSON and bytes, no paths.
"""

import asyncio
import json
import multiprocessing
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from perceiver_ar.data.codec_file import load_codec
from perceiver_ar.errors import InputError
from perceiver_ar.serving.engine import Busy

MEMORY = 2 * 2**30
"""Bytes that reading or writing a file may take besides the process's own memory."""
SECONDS = 60.0
MAX_IDS = 2**22
"""Maximum number of ids of a file."""
QUEUE = 8
"""Maximum number of files that wait to be read."""


class TooMuch(Exception):
    """A file that exceeds the limit of memory, time or ids."""


class Stopping(Exception):
    """The server stops before a file was read or written."""


class Worker:
    """The process; it starts at the first task, and again after it has ended. Tasks run one after another, in the order
    in which they come, and one thread waits for them; a task whose caller is cancelled before it runs is left out."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="worker")
        self._waiting = 0
        self._closed = False
        self._process: Any = None
        self._pipe: Connection | None = None

    async def encode(self, data: bytes, front: Sequence[int] = ()) -> np.ndarray:
        """The ids (n,) int64 of a file, after `front`, those of its conditions.

        Raises InputError if the codec cannot read it; TooMuch; Busy.
        """
        if self._waiting >= QUEUE:
            raise Busy
        self._waiting += 1
        try:
            [ids] = (await self._in_turn(self._ask, {"do": "encode", "front": front}, [data])).values()
        finally:
            self._waiting -= 1
        return np.frombuffer(ids, dtype=np.int64)

    async def show(self, rows: list[np.ndarray], prompt_len: int, original: np.ndarray | None) -> dict[str, bytes]:
        """The files that `codec.show` writes, content by name. Raises InputError, TooMuch."""
        return await self._in_turn(self._show, rows, prompt_len, original)

    def stop(self) -> None:
        """Ends the process, whatever it does: tasks that run or wait raise Stopping."""
        self._closed, process = True, self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """Stops, and waits until the process has ended."""
        self.stop()
        self._thread.shutdown(cancel_futures=True)
        self._end()

    async def _in_turn(self, task: Callable[..., dict[str, bytes]], *args: Any) -> dict[str, bytes]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, task, *args)

    def _show(self, rows: list[np.ndarray], prompt_len: int, original: np.ndarray | None) -> dict[str, bytes]:
        blobs = [row.tobytes() for row in [*rows, *([] if original is None else [original])]]
        return self._ask({"do": "show", "prompt_len": prompt_len, "rows": len(rows)}, blobs)

    def _ask(self, task: dict[str, Any], blobs: list[bytes]) -> dict[str, bytes]:
        if self._closed:
            raise Stopping
        if self._process is None or not self._process.is_alive():
            self._begin()
        assert self._pipe is not None
        try:
            self._pipe.send_bytes(json.dumps(task | {"blobs": len(blobs)}).encode())
            for blob in blobs:
                self._pipe.send_bytes(blob)
            if not self._pipe.poll(SECONDS):
                raise TooMuch
            answer = json.loads(self._pipe.recv_bytes())
            contents = [self._pipe.recv_bytes() for _ in answer["names"]]
        except (OSError, EOFError, TooMuch):  # it has ended, or takes too long
            self._end()
            raise (Stopping if self._closed else TooMuch) from None
        if answer["error"] == "too much":
            raise TooMuch
        if answer["error"] is not None:
            raise InputError(answer["error"])
        return dict(zip(answer["names"], contents, strict=True))

    def _begin(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._end()
        self._pipe, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, str(self.run)), daemon=True)
        process.start()
        self._process = process
        theirs.close()
        try:
            ready = not self._closed and self._pipe.poll(SECONDS) and self._pipe.recv_bytes()
        except (OSError, EOFError):
            ready = False
        if not ready:
            self._end()
            if self._closed:
                raise Stopping
            raise RuntimeError(f"the process that reads and writes files of {self.run} did not start")

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None


def limit_memory() -> None:
    """Limits further memory of this process to MEMORY bytes, on Linux."""
    if sys.platform != "linux":
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def work(pipe: Connection, run: str) -> None:
    """The process's main loop: one task after another, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches it too, but the server ends it
    codec = load_codec(run)
    limit_memory()
    pipe.send_bytes(b"ready")
    while True:
        try:
            task = json.loads(pipe.recv_bytes())
            blobs = [pipe.recv_bytes() for _ in range(task["blobs"])]
        except EOFError:
            return
        error, contents = None, dict[str, bytes]()
        try:
            if task["do"] == "encode":
                ids = [*codec.separator, *task["front"]]
                for piece in codec.encode_stream([blobs[0]], "the file"):
                    if len(ids) + len(piece) > MAX_IDS:
                        raise OverflowError
                    ids.extend(piece)
                contents = {"ids": np.array(ids, dtype=np.int64).tobytes()}
            else:
                rows = [np.frombuffer(blob, dtype=np.int64) for blob in blobs]
                original = rows.pop() if len(rows) > task["rows"] else None
                with tempfile.TemporaryDirectory(prefix="perceiver-ar-") as folder:
                    paths = codec.show(rows, task["prompt_len"], Path(folder), "generated", original=original)
                    contents = {path.name: path.read_bytes() for path in paths}
        except InputError as wrong:
            error = str(wrong)
        except (MemoryError, OverflowError):
            error = "too much"
        except Exception as wrong:  # libraries raise many kinds for damaged files
            error = f"the file cannot be read ({type(wrong).__name__})"
        pipe.send_bytes(json.dumps({"error": error, "names": list(contents)}).encode())
        for content in contents.values():
            pipe.send_bytes(content)
