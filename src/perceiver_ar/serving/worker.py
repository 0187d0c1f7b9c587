"""A separate process that reads uploaded files and writes results, in bounded memory and time.

A small upload may unpack to any size (zip bombs, false headers), and many libraries read it. So a failure ends only
that process. The processes exchange JSON and bytes, no paths.
"""

import json
import multiprocessing
import sys
import tempfile
import threading
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from perceiver_ar.data.codec import load_codec
from perceiver_ar.errors import InputError

MEMORY = 2 * 2**30
"""Bytes that reading or writing a file may take besides the process's own memory."""
SECONDS = 60.0


class TooMuch(Exception):
    """A file that exceeds the limit of memory or time."""


class Worker:
    """The process; it starts at the first task, and again after it has ended. Methods are slow: do not call them on the
    event loop."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._lock = threading.Lock()
        self._process: Any = None
        self._pipe: Connection | None = None

    def encode(self, data: bytes) -> np.ndarray:
        """The ids (n,) int64 of a file. Raises InputError if the codec cannot read it; TooMuch."""
        [ids] = self._ask({"do": "encode"}, [data]).values()
        return np.frombuffer(ids, dtype=np.int64)

    def show(self, rows: list[np.ndarray], prompt_len: int, original: np.ndarray | None) -> dict[str, bytes]:
        """The files that `codec.show` writes, content by name. Raises InputError, TooMuch."""
        blobs = [
            np.asarray(row, dtype=np.int64).tobytes() for row in [*rows, *([] if original is None else [original])]
        ]
        return self._ask({"do": "show", "prompt_len": prompt_len, "rows": len(rows)}, blobs)

    def close(self) -> None:
        with self._lock:
            self._end()

    def _ask(self, task: dict[str, Any], blobs: list[bytes]) -> dict[str, bytes]:
        with self._lock:
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
                raise TooMuch from None
        if answer["error"] == "too much":
            raise TooMuch
        if answer["error"] is not None:
            raise InputError(answer["error"])
        return dict(zip(answer["names"], contents, strict=True))

    def _begin(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._end()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, str(self.run)), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv_bytes()  # it has loaded everything

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
                pieces = list(codec.encode_stream([blobs[0]], "the file"))
                contents = {"ids": np.array([*codec.separator, *chain.from_iterable(pieces)], dtype=np.int64).tobytes()}
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
