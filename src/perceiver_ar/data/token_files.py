"""Token files: ids on disk, memory-mapped.

A token file is three files: `STEM.bin` (the ids of all documents, little-endian), `STEM.documents.npy` (where each
document starts) and `STEM.json` (what the other two must contain; written last). The codec's separator precedes every
document, so that its first token, too, has a token to be predicted from.
"""

import hashlib
import json
import os
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from perceiver_ar.data.codec import Codec, WrongModality
from perceiver_ar.data.encoding import Part
from perceiver_ar.errors import InputError, require
from perceiver_ar.files import atomic_path, write_text

VERSION = 1
BLOCK = 1 << 22  # tokens moved in one piece
NAMED = 5  # maximum number of skipped files or rows to name, with the reason


@dataclass(frozen=True)
class TokenFile:
    """A finished token file. Opening it reads none of the ids; pickling it (to a data loader's worker) opens it again.

    num_bytes: bytes of the documents that the ids came from, without separators and `split_on`.
    conditions: where in each document its conditions stand, and how many there are.
    """

    stem: Path
    codec: str
    vocab_size: int
    dtype: np.dtype
    num_tokens: int
    num_documents: int
    num_bytes: int
    conditions: tuple[int, int] = (0, 0)

    @classmethod
    def open(cls, stem: str | Path) -> "TokenFile":
        """Opens `STEM.bin` with its two companions. Raises `InputError` if one is missing, cut short or damaged."""
        path = Path(f"{stem}.json")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content["version"]
            numbers = {key: int(content[key]) for key in ("vocab_size", "num_tokens", "num_documents", "num_bytes")}
            first, count = content.get("conditions", (0, 0))
            dtype = np.dtype(content["dtype"]).newbyteorder("<")
            file = cls(Path(stem), content["codec"], dtype=dtype, conditions=(int(first), int(count)), **numbers)
        except FileNotFoundError:
            raise InputError(
                f"{path} does not exist: there is no finished token file; prepare the data again"
            ) from None
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is damaged ({error}); prepare the data again") from None
        require(version == VERSION, f"{path} is of version {version}, not {VERSION}; prepare the data again")
        file._check_size()
        try:
            intact = file.documents.shape == (file.num_documents,) and file.documents.dtype == np.uint64
        except (OSError, ValueError, EOFError):
            intact = False
        require(intact, f"{stem}.documents.npy is damaged or missing; prepare the data again")
        return file

    @property
    def tokens(self) -> np.ndarray:
        """All ids, (num_tokens,), memory-mapped and read-only. Raises `InputError` if the file has another size now."""
        self._check_size()  # behind the end of a file that has become shorter, memory is zero, or cannot be read
        return self._mapped

    @cached_property
    def _mapped(self) -> np.ndarray:
        return np.memmap(f"{self.stem}.bin", dtype=self.dtype, mode="r")

    def _check_size(self) -> None:
        binary, expected = Path(f"{self.stem}.bin"), self.num_tokens * self.dtype.itemsize
        size = binary.stat().st_size if binary.exists() else 0
        require(size == expected, f"{binary} is damaged: {size} bytes instead of {expected}; prepare the data again")

    @cached_property
    def documents(self) -> np.ndarray:
        """Where each document starts, its separator included: (num_documents,) uint64, memory-mapped."""
        return np.load(f"{self.stem}.documents.npy", mmap_mode="r")

    def bounds(self) -> list[int]:
        """Where each document starts, and the number of all tokens, where the last one ends."""
        return [*self.documents.tolist(), len(self)]

    def conditions_before(self, start: int) -> np.ndarray:
        """The conditions of a document that begins before token `start` and goes on there; empty if it begins there.

        They stand in place of the first tokens of a context that starts at `start`, so that no document is without.
        There are no more than tokens of the document from `start` on.
        """
        first, count = self.conditions
        number = int(np.searchsorted(self.documents, np.uint64(start), side="right"))
        begin = int(self.documents[number - 1])
        end = int(self.documents[number]) if number < self.num_documents else len(self)
        return self.read(begin + first, begin + first + (min(count, end - start) if begin < start else 0))

    def are_conditions(self, start: int, stop: int) -> np.ndarray:
        """Which of tokens[start:stop] are conditions: (stop - start,) bool."""
        first, count = self.conditions
        places = np.arange(start, stop, dtype=np.uint64)
        begins = self.documents[np.searchsorted(self.documents, places, side="right") - 1]
        return (places >= begins + np.uint64(first)) & (places < begins + np.uint64(first + count))

    @cached_property
    def _descriptor(self) -> int:
        descriptor = os.open(f"{self.stem}.bin", os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def read(self, start: int, stop: int) -> np.ndarray:
        """A copy of tokens[start:stop] (stop - start,). Use it for random places in a large file.

        A window of 9 kB from a file not yet in memory takes 0.1 ms this way and 2 ms through the memory map, whose
        pages also count as the process's memory from then on.
        """
        if not hasattr(os, "pread"):  # Windows
            return np.array(self.tokens[start:stop])
        size = self.dtype.itemsize
        data = os.pread(self._descriptor, (stop - start) * size, start * size)
        short = f"{self.stem}.bin is damaged: it has become shorter; prepare the data again"
        require(len(data) == (stop - start) * size, short)
        return np.frombuffer(data, dtype=self.dtype)

    def __len__(self) -> int:
        return self.num_tokens

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenFile.open, (self.stem,)


class TokenWriter:
    """An unfinished token file: documents are added at its end, and can be taken back or moved to another writer."""

    def __init__(self, file: BinaryIO, codec: Codec):
        self.file = file
        self.codec = codec
        self.dtype = codec.dtype.newbyteorder("<")
        self.lengths = array("Q")  # tokens of each document, with its separator
        self.sizes = array("Q")  # bytes of each document
        self.digests = array("Q")  # hash of each document's ids: the same for equal documents
        self.groups = array("Q")  # group number of each document: a split keeps a group together
        self.conditions: Sequence[int] = codec.unknown  # of the documents added next
        self.group: int | None = None  # of the documents added next; None: each is a group of its own
        self.num_tokens = 0

    def write(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Returns the bytes written."""
        data = np.asarray(ids, dtype=self.dtype).tobytes()
        self.file.write(data)
        self.num_tokens += len(ids)
        return data

    def add_source(self, parts: Iterable[Part]) -> list[str]:
        """Adds the documents of one file: all, or none if it raises. Leaves out rows that the codec cannot read and
        returns a reason for each (an empty one after the first `NAMED`)."""
        before, refused = len(self.lengths), list[str]()
        try:
            for document, own in groupby(parts, key=lambda part: part.document):
                if document is None:
                    (end,) = own
                    if end.error is not None:
                        raise end.error
                    break
                try:
                    self.add(own)
                except WrongModality as error:  # of rows
                    self.take_back(len(self.lengths) - 1)
                    refused.append(str(error) if len(refused) < NAMED else "")
            if refused and len(self.lengths) == before:
                raise InputError(f"none of its rows can be read: {refused[0]}")
        except InputError:
            self.take_back(before)
            raise
        return refused

    def add(self, parts: Iterable[Part]) -> None:
        """Adds one document, unless it is empty."""
        start, size, digest = self.num_tokens, 0, hashlib.sha256()
        skipped = 0 if self.codec.document_length is None else self.dtype.itemsize  # a start id may name a class
        try:
            self.write([*self.codec.separator, *self.conditions])
            for part in parts:
                size += part.num_bytes
                if part.error is not None:
                    raise part.error
                if part.content is not None:
                    digest.update(self.write(part.content)[skipped:])
                    skipped = 0
        finally:
            self.lengths.append(self.num_tokens - start)
            self.sizes.append(size)
            self.digests.append(int.from_bytes(digest.digest()[:8], "little"))
            self.groups.append(len(self.groups) if self.group is None else self.group)
        if self.num_tokens == start + len(self.codec.separator) + len(self.conditions):
            self.take_back(len(self.lengths) - 1)

    def take_back(self, num_documents: int) -> None:
        """Drops all documents after the first `num_documents`."""
        self.num_tokens -= sum(self.lengths[num_documents:])
        for values in (self.lengths, self.sizes, self.digests, self.groups):
            del values[num_documents:]
        self.file.seek(self.num_tokens * self.dtype.itemsize)
        self.file.truncate()

    def move(self, chosen: np.ndarray, other: "TokenWriter | None") -> None:
        """Moves the documents where the mask `chosen` is true to `other`, or drops them; closes the gaps in place."""
        self.file.flush()
        ids = np.memmap(self.file.name, dtype=self.dtype, mode="r+")
        ends = np.cumsum(np.frombuffer(self.lengths, np.uint64)).tolist()
        edges = [0, *(np.flatnonzero(np.diff(chosen)) + 1).tolist(), len(chosen)]
        kept = 0
        for first, last in pairwise(edges):  # successive documents that are all chosen, or all kept
            for start in range(ends[first - 1] if first else 0, ends[last - 1], BLOCK):
                block = ids[start : min(start + BLOCK, ends[last - 1])]
                if chosen[first]:
                    if other is not None:
                        other.write(block)
                else:
                    ids[kept : kept + len(block)] = block
                    kept += len(block)
        ids.flush()
        del ids
        for name in ("lengths", "sizes"):
            values = np.frombuffer(getattr(self, name), np.uint64).copy()
            if other is not None:
                setattr(other, name, array("Q", values[chosen].tobytes()))
            setattr(self, name, array("Q", values[~chosen].tobytes()))
        self.num_tokens = kept
        self.file.truncate(kept * self.dtype.itemsize)


@contextmanager
def token_writer(stem: Path, codec: Codec) -> Iterator[TokenWriter]:
    """Yields a writer; at the end its documents become a token file. After an error nothing is written."""
    with atomic_path(f"{stem}.bin") as binary, atomic_path(f"{stem}.documents.npy") as documents:
        with open(binary, "w+b", buffering=1 << 20) as file:
            writer = TokenWriter(file, codec)
            yield writer
        lengths = np.frombuffer(writer.lengths, np.uint64)
        np.save(documents, np.cumsum(lengths) - lengths)
        Path(f"{stem}.json").unlink(missing_ok=True)  # from here on the old file is gone, the new one not yet finished
    content = {
        "version": VERSION,
        "codec": codec.name,
        "vocab_size": codec.vocab_size,
        "dtype": codec.dtype.name,
        "num_tokens": writer.num_tokens,
        "num_documents": len(writer.lengths),
        "num_bytes": sum(writer.sizes),
        "conditions": [len(codec.separator), len(codec.unknown)],
    }
    write_text(f"{stem}.json", json.dumps(content, indent=2) + "\n")
