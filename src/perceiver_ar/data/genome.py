"""Nucleotide sequences: FASTA and FASTQ files as records, and their bases as ids."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar

import numpy as np

from perceiver_ar.data.codec import WrongModality
from perceiver_ar.data.sources import Source, split_documents
from perceiver_ar.data.tars import TAR
from perceiver_ar.data.text import FixedBytesCodec
from perceiver_ar.errors import InputError, require

BASES = b"ACGTN"
LONGEST_KMER = 8
LINE = 80  # bases of a line that is written
WRITTEN_AS = {"A": "a", "C": "c", "G": "g", "T": "tUu", "N": "nRYSWKMBDHVryswkmbdhv"}
"""Base -> the letters that count as it: lower (soft-masked) ones, U as T, and IUPAC letters of several bases as N."""
_LETTERS = bytes.maketrans(
    "".join(WRITTEN_AS.values()).encode(), "".join(base * len(letters) for base, letters in WRITTEN_AS.items()).encode()
)
_SPACE = b" \t\r\n"
_COMPLEMENT = np.array([3, 2, 1, 0, 4])
_CODES = np.zeros(256, np.int64)  # of each letter
_CODES[np.frombuffer(BASES, np.uint8)] = np.arange(len(BASES))

Regions = dict[str, list[tuple[int, int]]]
"""Name of a record -> disjoint (start, end) in it, in order: bases start ... end - 1, counted from 0."""


@dataclass(frozen=True)
class Records(Source):
    """A FASTA or FASTQ file. Each record is a document: its bases, without its header.

    With `regions`, the documents are what lies in the regions (`inside`) or between and beside them.
    """

    of_rows: ClassVar[bool] = True
    regions: Regions | None = None
    inside: bool = False
    unseen: set[str] = field(default_factory=set, compare=False)
    """Records of `regions` that are in none of the files read so far; one set for all files."""

    @property
    def identity(self) -> tuple[str, bool]:
        return os.path.realpath(self.path), self.inside

    @property
    def without_documents(self) -> str:
        if self.regions is None:
            return super().without_documents
        if self.inside:
            return "without a base in the regions of the .bed file; correct its places"
        return "empty, or held out by the .bed file as a whole; hold out less"

    def documents(
        self, separator: bytes | None, advance: Callable[[int], Any] = lambda num_bytes: None, text: bool = False
    ) -> Iterator[tuple[str, Iterator[bytes]]]:
        """As `Source.documents`; `separator` is not used.

        Raises `InputError` if it is not such a file, or if none of the regions inside is in it.
        """
        chunks = filter(None, self.chunks(advance))
        first = next(chunks, b"")
        records = {b">": _fasta, b"@": _fastq}.get(first.lstrip(_SPACE)[:1])
        if records is None:
            if not first.strip(_SPACE):
                return
            raise WrongModality(f"{self.name} begins with neither '>' nor '@', so it is no FASTA or FASTQ file")
        names, found = list[str](), False
        for name, sequence in records(chain([first.lstrip(_SPACE)], chunks), self.name):
            where = f"{self.name}, record {name},"
            names = [*names[:4], name]
            self.unseen.discard(name)
            if self.regions is None:
                yield where, sequence
                continue
            spans = self.regions.get(name, [])
            found = found or bool(spans)
            for document in _cut(sequence, spans if self.inside else _between(spans)):
                yield where, document
        if self.inside and not found:
            raise InputError(f"{self.name} has no record that the .bed file names; its records are {', '.join(names)}")


def find_records(
    sources: Iterable[Source], held_out: Iterable[Source] | None
) -> tuple[list[Source], list[Source] | None]:
    """Training and validation files as `Records`. A .bed file in `held_out` holds out its regions of all files.

    Raises `InputError` for a .bed file that cannot be read.
    """
    sources, regions = list(sources), Regions()
    for source in sources:
        if TAR.fullmatch(source.path.name):
            raise InputError(f"{source.name} is a tar file, from which no genomes are read: unpack it")
    beds = [source for source in held_out or () if source.path.suffix.lower() == ".bed"]
    for bed in beds:
        for name, spans in read_bed(bed).items():
            regions[name] = merged([*regions.get(name, []), *spans])
    train: list[Source] = [Records(**vars(source), regions=regions if beds else None) for source in sources]
    validation: list[Source] = [Records(**vars(source)) for source in held_out or () if source not in beds]
    unseen = set(regions)
    for source in sources if beds else ():
        found = {**vars(source), "named": False}  # a region is in one of several files
        validation.append(Records(**found, regions=regions, inside=True, unseen=unseen))
    return train, None if held_out is None else validation


def read_bed(source: Source) -> dict[str, list[tuple[int, int]]]:
    """The spans of each record in a .bed file: lines of name, start and end; of a line with a name alone, all of it.

    Raises `InputError` naming a line that is neither.
    """
    regions: dict[str, list[tuple[int, int]]] = {}
    for number, line in enumerate(b"".join(source.chunks()).decode(errors="replace").splitlines(), 1):
        fields = line.split()
        if not fields or line.startswith("#") or fields[0] in ("track", "browser"):
            continue
        try:
            start, end = map(int, fields[1:3]) if len(fields) > 1 else (0, sys.maxsize)
        except ValueError:
            start, end = 0, 0
        if not 0 <= start < end:
            raise InputError(f"{source.name}, line {number}: {line!r:.60} is no region; write NAME START END, or NAME")
        regions.setdefault(fields[0], []).append((start, end))
    require(len(regions) > 0, f"{source.name} has no regions; write a line NAME START END for each")
    return regions


def merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same places as disjoint spans, in order."""
    result = list[tuple[int, int]]()
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def _between(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """What lies before, between and after the spans."""
    edges = [0, *(place for span in spans for place in span), sys.maxsize]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]


def _cut(chunks: Iterator[bytes], spans: Iterable[tuple[int, int]]) -> Iterator[Iterator[bytes]]:
    """These spans of a sequence, each to be used up before the next."""
    place, rest = 0, b""

    def read(end: int) -> Iterator[bytes]:
        nonlocal place, rest
        while place < end and (rest := rest or next(chunks, b"")):
            piece, rest = rest[: end - place], rest[end - place :]
            place += len(piece)
            yield piece

    for start, end in spans:
        for _ in read(start):
            pass
        yield read(end)


def _fasta(chunks: Iterable[bytes], where: str) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Pairs of a record's name (the first word of its header) and its sequence, without white space. The first chunk
    begins with ">"."""
    for document in split_documents(_with_line_feeds(chunks), b"\n>"):
        header = b""
        for chunk in document:
            header += chunk
            if b"\n" in header:
                break
        header, _, start = header.removeprefix(b">").partition(b"\n")
        sequence = (piece.translate(None, _SPACE) for piece in chain([start], document))
        yield _name(header), filter(None, sequence)


def _fastq(chunks: Iterable[bytes], where: str) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Pairs of a read's name and its sequence; qualities are left out. A record has four lines."""
    lines = (b"".join(line) for line in split_documents(_with_line_feeds(chunks), b"\n"))
    for header in filter(None, lines):
        sequence, plus, quality = next(lines, b""), next(lines, b""), next(lines, b"")
        name = _name(header[1:])
        if header[:1] != b"@" or plus[:1] != b"+" or len(quality) != len(sequence):
            raise InputError(f"{where}, record {name}, is damaged, or not of four lines; write it again")
        yield name, iter([sequence] if sequence else [])


def _with_line_feeds(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same file with LF at the end of every line, also where it has CR LF or CR alone."""
    held = b""  # a CR at the end of a chunk, whose LF may follow
    for chunk in chunks:
        chunk = held + chunk
        held = chunk[-1:] if chunk.endswith(b"\r") else b""
        yield chunk[: len(chunk) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if held:
        yield b"\n"


def _name(header: bytes) -> str:
    return header.decode(errors="replace").split(maxsplit=1)[0] if header.strip() else "without a name"


class NucleotideCodec(FixedBytesCodec):
    """A base, or `kmer` bases of a record in a row, is one id.

    Lower case counts as upper case, U as T, and letters for several bases (IUPAC) as N. Ids are the k-mers in the order
    A C G T of their bases, then the single bases A C G T N (with k-mers of one base, N alone), then the separator.
    A k-mer with an N, and what is left at the end of a record, are written base by base.
    """

    name = "nucleotides"
    saved = ("kmer",)
    ending = ".fasta"

    def __init__(self, kmer: int = 1) -> None:
        require(1 <= kmer <= LONGEST_KMER, f"data.kmer is {kmer}: it must be in 1 ... {LONGEST_KMER}")
        self.kmer = kmer
        self.first_base = 0 if kmer == 1 else 4**kmer
        self.vocab_size = self.first_base + len(BASES) + 1
        self.separator = (self.vocab_size - 1,)
        self.powers = 4 ** np.arange(kmer)[::-1]
        digits = np.arange(self.first_base)[:, None] // self.powers % 4
        reverse = (_COMPLEMENT[digits[:, ::-1]] * self.powers).sum(axis=1)
        self._complement = np.concatenate([reverse, self.first_base + _COMPLEMENT, self.separator]).astype(self.dtype)
        letters = np.frombuffer(BASES, np.uint8)
        self._bytes = [*(letters[row].tobytes() for row in digits), *(bytes([base]) for base in BASES), b""]

    def encode_stream(self, chunks: Iterable[bytes], where: str) -> Iterator[np.ndarray]:
        """A sequence, or a FASTA file with one record."""
        codes, chunks = np.empty(0, np.int64), iter(chunks)
        first = next(chunks, b"").lstrip(_SPACE)
        if first[:1] == b">":
            records = [b"".join(bases) for _, bases in _fasta(chain([first], chunks), where)]
            if len(records) > 1:
                raise WrongModality(f"{where} has {len(records)} records: give a file with one")
            first, chunks = records[0], iter(())
        for chunk in chain([first], chunks):
            letters = chunk.translate(_LETTERS, _SPACE)
            if wrong := letters.translate(None, BASES):
                raise WrongModality(f"{where} is no nucleotide sequence ({wrong[:1]!r} is no base); a protein is text")
            codes = np.append(codes, _CODES[np.frombuffer(letters, np.uint8)])
            whole = len(codes) // self.kmer * self.kmer
            yield self._kmers(codes[:whole])
            codes = codes[whole:]
        yield (self.first_base + codes).astype(self.dtype)

    def _kmers(self, codes: np.ndarray) -> np.ndarray:
        """The ids of bases (n,), n a multiple of `kmer`."""
        rows = codes.reshape(-1, self.kmer)
        unknown = (rows == BASES.index(b"N")).any(axis=1)
        ids = np.repeat(rows @ self.powers, np.where(unknown, self.kmer, 1))
        ids[np.repeat(unknown, np.where(unknown, self.kmer, 1))] = self.first_base + rows[unknown].reshape(-1)
        return ids.astype(self.dtype)

    def file_of(self, document: bytes) -> bytes:
        """A FASTA file with one record."""
        lines = [document[start : start + LINE] for start in range(0, len(document), LINE)]
        return b"\n".join([b">generated", *lines, b""])

    def augment(self, ids: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Every other window becomes its reverse complement, the other strand."""
        return self._complement[ids[::-1]].astype(ids.dtype) if random.random() < 0.5 else ids

    def amounts(self, ids: np.ndarray) -> dict[str, float]:
        return {"base": float(self.num_bytes(ids))}
