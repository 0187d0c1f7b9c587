"""The ids of a large corpus, encoded by several processes and kept on disk until its token files are finished.

A shard `FOLDER/DIGEST.npz` holds the ids of successive pieces of documents. DIGEST is the hash of these pieces and of
the codec. So whoever encodes the same pieces again, such as after a kill, finds their ids, and pieces that have changed
are encoded anew.
"""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import numpy as np

from perceiver_ar.data.codec import Codec, WrongModality
from perceiver_ar.data.codec_file import load_codec, save_codec
from perceiver_ar.errors import InputError, require
from perceiver_ar.files import atomic_path
from perceiver_ar.threads import available_cores

SHARDS = "shards"
"""The usual name of the folder."""
SHARD = 1 << 21  # characters or bytes that a process encodes in one go: a second's work on text
LARGE = 8  # shards that are worth the start of processes

Piece = tuple[str, str | bytes]
"""The name of a document and its content, or the text of a part of it."""
Encoded = np.ndarray | InputError
"""Ids (n,), or why there are none."""


class Encoders:
    """Worker processes that encode pieces, each with one thread. Leaving the `with` block ends them, at any moment."""

    def __init__(self, codec: Codec, folder: Path, processes: int | None = None, shard: int = SHARD) -> None:
        """`processes`: their number; None: one per core. `shard`: characters or bytes in a shard."""
        self.folder, self.processes, self.shard = folder, processes or available_cores(), shard
        folder.mkdir(parents=True, exist_ok=True)
        save_codec(codec, folder)
        files = [folder / "codec.json", *sorted(file for pattern in codec.files for file in folder.glob(pattern))]
        self.key = b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)
        self._lock, self._closed = threading.Lock(), False
        self._all, self._idle = list[subprocess.Popen[bytes]](), list[subprocess.Popen[bytes]]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        for pipe in (pipe for process in self._all for pipe in (process.stdin, process.stdout) if pipe):
            with suppress(BrokenPipeError):  # a request that was not sent
                pipe.close()

    def kill(self) -> None:
        """Ends the processes; `encode` then raises in the threads that wait for one."""
        with self._lock:
            self._closed = True
        for process in self._all:
            process.kill()
            process.wait()

    def encode(self, pieces: Sequence[Piece]) -> list[Encoded]:
        """The ids of each piece, from their shard if it is there, else by an idle process, which writes the shard.

        Can be called by up to `processes` threads. Raises `InputError` if the process dies, and what it raised.
        """
        digest = hashlib.sha256(self.key)
        for where, content in pieces:
            data = content.encode() if isinstance(content, str) else content
            digest.update(f"{where}\0{type(content).__name__}{len(data)}\0".encode(errors="surrogateescape"))
            digest.update(data)
        path = self.folder / f"{digest.hexdigest()}.npz"
        if (found := _read(path)) is not None:
            return found
        process = self._take()
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump((path, pieces), process.stdin)
            process.stdin.flush()
            failure = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            if damaged := isinstance(error, pickle.UnpicklingError):
                process.kill()  # it may be alive
            status = process.wait()
            how = f"was killed (signal {-status})" if status < 0 else f"failed (exit status {status})"
            how = "gave a damaged answer" if damaged else how
            raise InputError(
                f"{pieces[0][0]}: the process that encoded it {how}; look for the reason, such as too little memory, "
                "and start again"
            ) from None
        with self._lock:
            self._idle.append(process)
        if failure is not None:
            raise failure
        found = _read(path)
        assert found is not None, path
        return found

    def _take(self) -> subprocess.Popen[bytes]:
        """An idle process, or a new one."""
        with self._lock:
            require(not self._closed, "interrupted")
            if self._idle:
                return self._idle.pop()
            # Not multiprocessing: it would import the user's main module again. A session of its own keeps Ctrl-C and
            # a hangup away from the process; it ends when this process does, which closes its standard input.
            script = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import work; work()"
            one_thread = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **one_thread},
                start_new_session=True,
            )
            self._all.append(process)
            return process


def work() -> None:
    """The main function of a worker process: encodes what comes on stdin until that is closed."""
    requests, answers, sys.stdout = sys.stdin.buffer, sys.stdout.buffer, sys.stderr
    codec = None
    while True:
        try:
            path, pieces = pickle.load(requests)
        except EOFError:
            return
        failure = None
        try:
            codec = codec or load_codec(path.parent)
            _write(path, encode_pieces(codec, pieces), codec.dtype)
        except (InputError, OSError) as error:
            failure = error
        try:
            pickle.dump(failure, answers)
            answers.flush()
        except BrokenPipeError:
            os._exit(1)  # whoever asked is gone; a normal end would try to flush once more


def encode_pieces(codec: Codec, pieces: Sequence[Piece]) -> list[Encoded]:
    """The ids of texts that `codec.pieces` cut, and of whole documents."""
    if codec.encodes_in_threads:
        return list[Encoded](codec.encode_pieces([content for _, content in pieces]))
    encoded = list[Encoded]()
    for where, content in pieces:
        assert isinstance(content, bytes)
        try:
            encoded.append(np.concatenate(list(codec.encode_stream([content], where))))
        except InputError as error:
            encoded.append(error)
    return encoded


def _write(path: Path, encoded: Sequence[Encoded], dtype: np.dtype) -> None:
    errors = {
        number: (isinstance(error, WrongModality), str(error))
        for number, error in enumerate(encoded)
        if isinstance(error, InputError)
    }
    ids = [np.empty(0, dtype) if isinstance(part, InputError) else part for part in encoded]
    with atomic_path(path) as temporary:
        np.savez(
            temporary,
            ids=np.concatenate([np.empty(0, dtype), *ids]),
            lengths=np.array([len(part) for part in ids], np.int64),
            errors=np.frombuffer(json.dumps(errors).encode(), np.uint8),
        )


_READING = threading.Lock()
"""Of shards: numpy reads their headers by `ast`, which in Python 3.11 may fail in several threads (cpython #106905)."""


def _read(path: Path) -> list[Encoded] | None:
    """None if the shard is missing or damaged."""
    try:
        with _READING, np.load(path, allow_pickle=False) as content:
            encoded = list[Encoded](np.split(content["ids"], np.cumsum(content["lengths"])[:-1]))
            errors = json.loads(content["errors"].tobytes())
    except (FileNotFoundError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    for number, (wrong_modality, message) in errors.items():
        encoded[int(number)] = (WrongModality if wrong_modality else InputError)(message)
    return encoded
