"""Token files and the sampler: ids on disk, memory-mapped, and the endless sequence of training windows over them.

A token file is three files: `STEM.bin` (the ids of all documents, little-endian), `STEM.documents.npy` (where each
document starts) and `STEM.json` (what the others must be; written last). Every document is preceded by the codec's
separator, so that its first token, too, is predicted from something.

Shapes: B batch, T context_length, N num_latents; n is the number of tokens in the file.
"""

import hashlib
import json
import math
import os
import re
import sys
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from perceiver_ar.data.codec import Codec, WrongModality
from perceiver_ar.data.encoding import Part, encode_documents
from perceiver_ar.data.sources import Source, find_files, read_text, standard_library
from perceiver_ar.errors import InputError
from perceiver_ar.files import atomic_path, write_text

__all__ = ["Source", "TokenFile", "Windows", "find_files", "prepare", "read_text", "standard_library"]

VERSION = 1
BLOCK = 1 << 22  # tokens moved at once
NAMED = 5  # so many of the files that are skipped are named, with the reason


@dataclass(frozen=True)
class TokenFile:
    """A finished token file. Opening it reads none of the ids; pickling it (to a data loader's worker) opens it again.

    num_bytes is the size of the documents the ids came from, separators and split marks not counted.
    """

    stem: Path
    codec: str
    vocab_size: int
    dtype: np.dtype
    num_tokens: int
    num_documents: int
    num_bytes: int

    @classmethod
    def open(cls, stem: str | Path) -> "TokenFile":
        """Opens `STEM.bin` with its two companions. Raises `InputError` if one is missing, cut short or damaged."""
        path = Path(f"{stem}.json")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content["version"]
            numbers = {key: int(content[key]) for key in ("vocab_size", "num_tokens", "num_documents", "num_bytes")}
            file = cls(Path(stem), content["codec"], dtype=np.dtype(content["dtype"]).newbyteorder("<"), **numbers)
        except FileNotFoundError:
            raise InputError(
                f"{path} does not exist: there is no finished token file; prepare the data again"
            ) from None
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is damaged ({error}); prepare the data again") from None
        if version != VERSION:
            raise InputError(f"{path} is of version {version}, not {VERSION}; prepare the data again")
        binary, expected = Path(f"{stem}.bin"), file.num_tokens * file.dtype.itemsize
        size = binary.stat().st_size if binary.exists() else 0
        if size != expected:
            raise InputError(f"{binary} is damaged: {size} bytes instead of {expected}; prepare the data again")
        try:
            intact = file.documents.shape == (file.num_documents,) and file.documents.dtype == np.uint64
        except (OSError, ValueError, EOFError):
            intact = False
        if not intact:
            raise InputError(f"{stem}.documents.npy is damaged or missing; prepare the data again")
        return file

    @cached_property
    def tokens(self) -> np.ndarray:
        """All ids, (num_tokens,), memory-mapped and read-only."""
        return np.memmap(f"{self.stem}.bin", dtype=self.dtype, mode="r")

    @cached_property
    def documents(self) -> np.ndarray:
        """Where each document starts, its separator included: (num_documents,) uint64, memory-mapped."""
        return np.load(f"{self.stem}.documents.npy", mmap_mode="r")

    @cached_property
    def _descriptor(self) -> int:
        descriptor = os.open(f"{self.stem}.bin", os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def read(self, start: int, stop: int) -> np.ndarray:
        """A copy of tokens[start:stop]. For random places in a large file this is what to use.

        A window of 9 kB from a file not yet in memory takes 0.1 ms this way and 2 ms through the memory map, whose
        pages also count as the process's memory from then on.
        """
        if not hasattr(os, "pread"):  # Windows
            return np.array(self.tokens[start:stop])
        size = self.dtype.itemsize
        return np.frombuffer(os.pread(self._descriptor, (stop - start) * size, start * size), dtype=self.dtype)

    def __len__(self) -> int:
        return self.num_tokens

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenFile.open, (self.stem,)


class _Writer:
    """A token file in the making: documents are added at its end, and can be taken back or moved to another one."""

    def __init__(self, file: BinaryIO, codec: Codec):
        self.file = file
        self.codec = codec
        self.dtype = codec.dtype.newbyteorder("<")
        self.lengths = array("Q")  # tokens of each document, with its separator
        self.sizes = array("Q")  # bytes of each document
        self.digests = array("Q")  # of the ids of each document: equal documents have equal ones
        self.groups = array("Q")  # which group each document is of: those of a group stay together in a split
        self.group: int | None = None  # of the documents that come; None: each is one of its own
        self.num_tokens = 0

    def write(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Returns what was written."""
        data = np.asarray(ids, dtype=self.dtype).tobytes()
        self.file.write(data)
        self.num_tokens += len(ids)
        return data

    def add_source(self, parts: Iterable[Part]) -> list[str]:
        """Adds the documents of one file: all, or none if it raises. Rows that the codec cannot read are left out;
        returns why, of the first ones."""
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
        """Adds one document; nothing if it is empty."""
        start, size, digest = self.num_tokens, 0, hashlib.sha256()
        try:
            self.write(self.codec.separator)
            for part in parts:
                size += part.num_bytes
                if part.error is not None:
                    raise part.error
                if part.content is not None:
                    digest.update(self.write(part.content))
        finally:
            self.lengths.append(self.num_tokens - start)
            self.sizes.append(size)
            self.digests.append(int.from_bytes(digest.digest()[:8], "little"))
            self.groups.append(len(self.groups) if self.group is None else self.group)
        if self.num_tokens == start + len(self.codec.separator):
            self.take_back(len(self.lengths) - 1)

    def take_back(self, num_documents: int) -> None:
        """Drops all documents after the first `num_documents`."""
        self.num_tokens -= sum(self.lengths[num_documents:])
        for values in (self.lengths, self.sizes, self.digests, self.groups):
            del values[num_documents:]
        self.file.seek(self.num_tokens * self.dtype.itemsize)
        self.file.truncate()

    def move(self, chosen: np.ndarray, other: "_Writer | None") -> None:
        """Moves the documents where the mask `chosen` is true to `other`, or drops them; closes the gaps in place."""
        self.file.flush()
        ids = np.memmap(self.file.name, dtype=self.dtype, mode="r+")
        ends = np.cumsum(np.frombuffer(self.lengths, np.uint64)).tolist()
        edges = [0, *(np.flatnonzero(np.diff(chosen)) + 1).tolist(), len(chosen)]
        kept = 0
        for first, last in pairwise(edges):  # runs of documents that go the same way
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
def _writer(stem: Path, codec: Codec) -> Iterator[_Writer]:
    """Yields a writer; what it was given becomes a token file at the end, or nothing at all after an error."""
    with atomic_path(f"{stem}.bin") as binary, atomic_path(f"{stem}.documents.npy") as documents:
        with open(binary, "w+b", buffering=1 << 20) as file:
            writer = _Writer(file, codec)
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
    }
    write_text(f"{stem}.json", json.dumps(content, indent=2) + "\n")


def prepare(
    sources: Iterable[Source],
    codec: Codec,
    directory: str | Path,
    *,
    validation_fraction: float = 0.05,
    validation_sources: Iterable[Source] | None = None,
    split_on: str | None = None,
    group_by: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[TokenFile, TokenFile | None]:
    """Encodes `sources` into the token files `train` and `validation` in `directory`, replacing those that are there.

    A file is one document, or, with `split_on`, as many as that string separates, and `Rows` have at least one a row.
    Empty documents are left out.
    Validation is `validation_sources` (which then are not trained on, should they be among `sources`), or whole
    documents, chosen by `seed`, of about `validation_fraction` of all bytes; None if the fraction is 0 or there is only
    one document. Files stay on one side of that choice if the pattern `group_by` (a regular expression) finds the same
    in their names: what its first group has, or the whole match without groups. Equal documents stay on one side, too:
    of those that are held out, no copy is trained on. Each source is read once and memory is
    constant. Files that were found but that cannot be read are skipped, and named on stderr with the reason, as are
    those that hold nothing. `progress` shows a bar there, or, where it is no terminal, one line at the end.
    Raises `InputError` if there is nothing to train on, or for a file that was named and cannot be read.
    """
    sources, directory = list(sources), Path(directory)
    if not 0 <= validation_fraction < 1:
        raise InputError(f"validation_fraction {validation_fraction} is not at least 0 and below 1; 0.05 is usual")
    if split_on == "":
        raise InputError("split_on is empty; give the string between documents, or leave it out")
    mark = split_on.encode() if split_on else None
    held_out = [] if validation_sources is None else list(validation_sources)
    if held_out:
        reserved = {os.path.realpath(source.path) for source in held_out}
        sources = [source for source in sources if os.path.realpath(source.path) not in reserved]
        if not sources:
            raise InputError("all training files are validation files as well; give other files for validation")

    total = sum(source.size for source in [*sources, *held_out])
    groups = None if group_by is None else _groups(sources, group_by)
    with _progress_bar(total, progress) as advance, _writer(directory / "train", codec) as train:
        _add_all(train, sources, mark, advance, groups)
        if held_out:
            with _writer(directory / "validation", codec) as validation:
                _add_all(validation, held_out, mark, advance)
                _drop_held_out(train, validation)
        elif (chosen := _choose_groups(train, validation_fraction, seed)).any():
            with _writer(directory / "validation", codec) as validation:
                train.move(chosen, validation)
        else:
            validation = None
            for suffix in ("json", "documents.npy", "bin"):  # of an earlier split
                (directory / f"validation.{suffix}").unlink(missing_ok=True)

    train_file = TokenFile.open(directory / "train")
    validation_file = TokenFile.open(directory / "validation") if validation else None
    if progress:
        amounts = f"{train_file.num_documents:,} documents ({train_file.num_tokens:,} tokens) to train on"
        if validation_file:
            amounts += f", {validation_file.num_documents:,} ({validation_file.num_tokens:,}) to validate"
        print(amounts, file=sys.stderr)
    return train_file, validation_file


def _groups(sources: Sequence[Source], pattern: str) -> list[int]:
    """Which group each source is of, by what `pattern` finds in its name; alone where it finds nothing."""
    keys: dict[str, int] = {}
    groups, found = [], False
    for source in sources:
        match = re.search(pattern, source.name)
        found = found or match is not None
        key = f"/{match[1 if match.re.groups else 0]}" if match else source.name + "\0"
        groups.append(keys.setdefault(key, len(keys)))
    if not found:
        raise InputError(f"group_by {pattern!r} finds nothing in any file name, such as {sources[0].name}; correct it")
    return groups


def _add_all(
    writer: _Writer,
    sources: Sequence[Source],
    split_on: bytes | None,
    advance: Callable[[int], Any],
    groups: Sequence[int] | None = None,
) -> None:
    wrong, empty, rows = list[str](), list[str](), list[str]()
    with closing(encode_documents(sources, writer.codec, split_on, advance)) as encoded:
        for number, parts in groupby(encoded, key=lambda part: part.source):
            source, before = sources[number], len(writer.lengths)
            writer.group = None if groups is None else groups[number]
            try:
                rows += writer.add_source(parts)
                if len(writer.lengths) == before and (source.size > 0 or source.named):
                    empty.append(f"{source.name} has nothing in it")
            except InputError as error:
                if source.named:
                    raise
                wrong.append(str(error))
    if not sources:
        raise InputError("no files given; name files, folders or patterns")
    if not writer.lengths and wrong:
        raise InputError(f"none of {len(sources)} files can be read: {wrong[0]}")
    if not writer.lengths:
        names = f"{sources[0].name} is" if len(sources) == 1 else f"{sources[0].name} and all other files are"
        raise InputError(f"{names} empty; give files with something in them")
    for reasons, amount in (
        ([*wrong, *empty], f"{len(wrong) + len(empty)} of {len(sources)} files"),
        (rows, f"{len(rows):,} rows"),
    ):
        if reasons:
            more = [f"and {len(reasons) - NAMED:,} more"] if len(reasons) > NAMED else []
            print(f"skipped {amount}:", *reasons[:NAMED], *more, sep="\n  ", file=sys.stderr)


def _drop_held_out(train: _Writer, validation: _Writer) -> None:
    """Takes out of `train` what is held out as well. Raises `InputError` if that is all."""
    copies = np.isin(np.array(train.digests, np.uint64), np.array(validation.digests, np.uint64))
    if copies.all():
        raise InputError("all training documents are validation documents as well; give other files for validation")
    if copies.any():
        train.move(copies, None)
        print(f"{copies.sum():,} documents are held out as well, so they are not trained on", file=sys.stderr)


def _choose_groups(writer: _Writer, fraction: float, seed: int) -> np.ndarray:
    """Which documents are for validation: a mask (documents,). Of a group, and of equal documents, all are or none."""
    _, groups = np.unique(np.array(writer.groups, np.int64), return_inverse=True)
    sizes = np.zeros(groups.max(initial=-1) + 1, np.uint64)
    np.add.at(sizes, groups, np.array(writer.sizes, np.uint64))
    _, firsts, inverse = np.unique(np.array(writer.digests, np.uint64), return_index=True, return_inverse=True)
    firsts = firsts[inverse]  # of each document the first one that is equal
    copies = np.flatnonzero(firsts != np.arange(len(firsts)))
    together = list(range(len(sizes)))  # groups with equal documents: the way to one of them, which stands for all

    def root(group: int) -> int:
        while together[group] != group:
            together[group] = group = together[together[group]]
        return group

    for group, other in zip(groups[copies].tolist(), groups[firsts[copies]].tolist(), strict=True):
        together[root(group)] = root(other)
    roots = np.array(list(map(root, range(len(sizes)))), np.int64)
    chosen = _choose(sizes, roots, fraction, seed)[groups]
    if len(copies) and fraction > 0:
        amounts = f"{len(copies):,} of {len(firsts):,} documents are copies of others"
        print(f"{amounts}; all copies are on one side of the split", file=sys.stderr)
    return chosen


def _choose(sizes: np.ndarray, together: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which groups are for validation: a mask. Random ones until `fraction` of all bytes is reached.

    Groups with the same number in `together` go together. Those that would overshoot the fraction by half are passed
    over; if all would, the smallest is taken. At least one is taken and at least one left, so that a single one is
    never split.
    """
    chosen = np.zeros(len(sizes), dtype=bool)
    order = together[np.random.default_rng(seed & (1 << 64) - 1).permutation(len(sizes))]
    order = order[np.sort(np.unique(order, return_index=True)[1])]  # each once
    if len(order) < 2 or fraction == 0:
        return chosen
    wanted, taken = fraction * float(sizes.sum()), 0
    whole = np.zeros(len(sizes), np.uint64)
    np.add.at(whole, together, sizes)
    for index in order[:-1].tolist():
        if taken >= wanted:
            break
        if taken + int(whole[index]) <= 1.5 * wanted:
            chosen[index] = True
            taken += int(whole[index])
    if not chosen.any():
        chosen[order[np.argmin(whole[order])]] = True
    return chosen[together]


@contextmanager
def _progress_bar(total: int, enabled: bool) -> Iterator[Callable[[int], Any]]:
    """Yields what is to be told how many more bytes have been read."""
    if not (enabled and sys.stderr.isatty()):
        yield lambda num_bytes: None
        return
    from rich import progress as rich
    from rich.console import Console

    columns = rich.TextColumn("reading"), rich.BarColumn(), rich.DownloadColumn(), rich.TimeRemainingColumn()
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=total)
        yield lambda num_bytes: bar.advance(task, num_bytes)


class Windows:
    """An endless sequence of training windows, each a pure function of its index: to resume, go on at the next index.

    The sequence is pass after pass over the tokens x[0..n-1]. In each pass every target x[1..n-1] is in exactly one
    window, with the T tokens before the window's last target as context, or as many as there are. A pass cuts the
    targets every N tokens, from a random point on, and takes the pieces in a random order; both follow from (seed,
    pass) alone, so that no list of windows is ever kept.

    Where all documents have `document_length` tokens (pictures), each is cut for itself: its first token is no target,
    and no context reaches beyond its start, so that a token's place in the context is its place in the document.

    `augment` (`codec.augment`) may change a window's ids; its randomness follows from (seed, index) alone, too.
    """

    def __init__(
        self,
        tokens: TokenFile | np.ndarray,
        context_length: int,
        num_latents: int,
        seed: int = 0,
        *,
        document_length: int | None = None,
        augment: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None,
    ):
        """Raises `InputError` if there are fewer than T + 1 tokens, or documents of another length."""
        length = len(tokens) if document_length is None else document_length
        if not 1 <= num_latents <= context_length:
            raise InputError(f"num_latents {num_latents} is not between 1 and context_length {context_length}")
        if length < context_length + 1:
            raise InputError(
                f"the data holds {length} tokens, but a window takes context_length + 1 = {context_length + 1}; "
                f"give more data or a context_length of at most {max(length - 1, 0)}"
            )
        if document_length is not None and length != context_length + 1:
            raise InputError(
                f"context_length is {context_length}, but it must hold documents of {length} tokens but for their last "
                f"one; give {length - 1}"
            )
        if len(tokens) % length:
            raise InputError(f"{len(tokens)} tokens are not documents of {length}; prepare the data again")
        self.context_length = context_length
        self.num_latents = num_latents
        self.seed = seed
        self.document_length = document_length
        self._augment = augment
        self._data = tokens
        self._length = length
        self._num_documents = len(tokens) // length
        self._firsts = np.zeros(1, dtype=np.int64)  # index of the first window of each pass; grows when needed

    @property
    def windows_per_pass(self) -> int:
        """Windows in a pass: this many or, depending on where the pass begins to cut, one more for each document."""
        return self._num_documents * math.ceil((self._length - 1) / self.num_latents)

    def first_window(self, number: int) -> int:
        """The index of the first window of pass `number` (0, 1, ...)."""
        while len(self._firsts) <= number:
            self._extend()
        return int(self._firsts[number])

    def passes(self, index: int) -> float:
        """How many passes the windows before `index` make, such as 1.25."""
        number = int(self._passes_of(np.array([index]))[0])
        first = self.first_window(number)
        return number + (index - first) / (self.first_window(number + 1) - first)

    def spans(self, first: int, count: int) -> np.ndarray:
        """The targets x[a:b] of windows first..first+count-1: (count, 2) int64 of a, b."""
        indices = np.arange(first, first + count)
        numbers = self._passes_of(indices)
        places = np.empty(count, dtype=np.int64)  # of the window within its pass, in the order of the tokens
        for number in np.unique(numbers):
            here = numbers == number
            size = self.first_window(number + 1) - self.first_window(number)
            places[here] = _permute(indices[here] - self._firsts[number], size, _hash(self.seed, 1, number))
        leads = self._leads(numbers)
        documents, pieces = np.divmod(places, self._pieces(leads))
        starts = 1 - leads + pieces * self.num_latents
        ends = np.minimum(starts + self.num_latents, self._length)
        return np.stack([np.maximum(starts, 1), ends], axis=1) + documents[:, None] * self._length

    def batch(self, first: int, count: int) -> dict[str, torch.Tensor]:
        """Windows first..first+count-1 as `tokens` (B, T) and `labels` int64 (B, N), both right-aligned.

        Tokens are uint8 where they are stored so, else of a larger type (torch does little with uint16). The last
        token's label is the last label. Labels that are not targets of the window are -100. Where a row has fewer than
        T tokens it starts with zeros, and only then there is a `mask` bool (B, T), True for real tokens.
        Of windows within documents, T loses what is padding in all rows, by quarters (kernels are made for each shape).
        """
        size = 8 if self._augment is not None else self._data.dtype.itemsize
        tokens = np.zeros((count, self.context_length), dtype={1: np.uint8, 2: np.int32}.get(size, np.int64))
        labels = np.full((count, self.num_latents), -100, dtype=np.int64)
        mask = np.ones(tokens.shape, dtype=bool)
        for row, (a, b) in enumerate(self.spans(first, count).tolist()):
            document = (b - 1) // self._length * self._length
            first_token = max(document, b - 1 - self.context_length)
            window = self._read(first_token, b)  # the context and, one further, the last target
            if self._augment is not None:
                window = self._augment(window, np.random.default_rng((self.seed % 2**63, 2, first + row)))
            padding = self.context_length - (len(window) - 1)
            tokens[row, padding:] = window[:-1]
            labels[row, self.num_latents - (b - a) :] = window[a - b :]
            mask[row, :padding] = False
        if self.document_length is not None:
            quarter = max(1, self.context_length // 4)
            cut = int((~mask).sum(axis=1).min()) // quarter * quarter
            cut = max(0, min(cut, self.context_length - self.num_latents))
            tokens, mask = tokens[:, cut:], mask[:, cut:]
        arrays = {"tokens": tokens, "labels": labels} | ({} if mask.all() else {"mask": mask})
        return {name: torch.from_numpy(values) for name, values in arrays.items()}

    def _read(self, start: int, stop: int) -> np.ndarray:
        return self._data.read(start, stop) if isinstance(self._data, TokenFile) else self._data[start:stop]

    def _leads(self, numbers: np.ndarray) -> np.ndarray:
        """How far before the first target each pass begins to cut: 0..N-1; not at all where one window has it all."""
        if self.document_length is not None and self.num_latents >= self._length - 1:
            return np.zeros(len(numbers), dtype=np.int64)
        return (_hash(self.seed, 0, numbers) % np.uint64(self.num_latents)).astype(np.int64)

    def _pieces(self, leads: np.ndarray) -> np.ndarray:
        """Into how many windows a pass cuts each document: ceil((length - 1 + lead) / N)."""
        return -((1 - self._length - leads) // self.num_latents)

    def _extend(self) -> None:
        known = len(self._firsts) - 1
        counts = self._num_documents * self._pieces(self._leads(np.arange(known, 2 * known + 16)))
        self._firsts = np.append(self._firsts, self._firsts[-1] + np.cumsum(counts))

    def _passes_of(self, indices: np.ndarray) -> np.ndarray:
        """The pass that each window belongs to."""
        while self._firsts[-1] <= indices.max(initial=0):
            self._extend()
        return np.searchsorted(self._firsts, indices, side="right") - 1


def _hash(*parts: int | np.ndarray) -> np.ndarray:
    """Integers, broadcast against each other -> evenly spread uint64: splitmix64's finalizer for each part."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        part = np.uint64(part & (1 << 64) - 1) if isinstance(part, int) else np.asarray(part).astype(np.uint64)
        state = (state ^ part) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def _permute(places: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """A pseudo-random permutation of 0..size-1, given by `key`, at `places` (int64): needs no memory for the rest of
    it.

    A Feistel network permutes 0..4^half-1; what lands outside 0..size-1 goes through it again until it lands inside.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    values = places.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        left, right = values[outside] >> half, values[outside] & low
        for step in range(8):
            left, right = right, left ^ (_hash(key, step, right) & low)
        values[outside] = (left << half) | right
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)
