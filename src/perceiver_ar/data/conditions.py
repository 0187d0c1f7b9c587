"""Conditions: fields of documents, such as a composer, from a table beside the files, as tokens in front of documents.

A field has a token for each of its values. One column may be free text instead: a fixed number of tokens, one a byte.
The codec of a run with conditions is a `ConditionedCodec` around the one of its files.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.data.codec import Codec
from perceiver_ar.data.rows import read_rows
from perceiver_ar.data.sources import Source, file_beside
from perceiver_ar.errors import InputError, require

FILE = "file"
"""The column that names a document's file, relative to the table's folder; the others are fields."""
MOST_VALUES = 1000
"""Maximum number of different values of a field."""
MOST_BYTES = 256
"""Maximum number of bytes of a free text."""
BYTES = tuple(f"0x{byte:02x}" for byte in range(256))
"""The values of each token of a free text."""
FORGOTTEN = 0.1
"""Share of training windows whose conditions are all unknown; in as many, half of the fields are."""
SHOWN = 20
"""Values listed in a message."""


class ConditionedCodec(Codec):
    """Another codec, and a token for each field between the separator and the document: its value, or unknown.

    A free text has `conditions[field]` tokens: its bytes, then unknown ones.

    The ids of the other codec stay as they are. After them come those of each field: unknown, then its values; those of
    a free text are the 256 bytes. They stand for no bytes of the document, and none is ever allowed next.
    """

    def __init__(self, plain: Codec, conditions: Mapping[str, Sequence[str] | int]) -> None:
        self._plain = plain
        self.conditions = {
            field: values if isinstance(values, int) else tuple(values) for field, values in conditions.items()
        }
        kept = ("name", "files", "ending", "writes_text", "reads_text", "separator", "index_dims", "document_length")
        for name in (*kept, "encodes_in_threads", "encodes_slowly", "header_conditions"):
            setattr(self, name, getattr(plain, name))
        self.first = plain.vocab_size
        self.vocab_size = self.first
        self._field_ids, self._token_ids = list[range](), list[range]()
        for values in self.conditions.values():
            count, values = (values, BYTES) if isinstance(values, int) else (1, values)
            self._field_ids.append(range(self.vocab_size, self.vocab_size + 1 + len(values)))
            self._token_ids += [self._field_ids[-1]] * count
            self.vocab_size = self._field_ids[-1].stop
        self.unknown = tuple(ids[0] for ids in self._token_ids)

    @property
    def plain(self) -> Codec:
        return self._plain

    def condition_ids(self, conditions: Mapping[str, str]) -> list[int]:
        """The ids of each field's value in `conditions`, or of unknown.

        Raises `InputError` for an unknown condition or value, and for a free text that is too long.
        """
        ids = super().condition_ids(conditions)
        for (field, values), own in zip(self.conditions.items(), self._field_ids, strict=True):
            value = conditions.get(field)
            if isinstance(values, int):
                data = text_bytes(field, value or "", values)
                ids += [own[1 + byte] for byte in data] + [own[0]] * (values - len(data))
            elif value is None:
                ids.append(own[0])
            else:
                require(value in values, f"there is no condition {field}={value}: known are {listed(values)}")
                ids.append(own[1 + values.index(value)])
        return ids

    def conditions_of(self, ids: np.ndarray) -> list[int]:
        first, count = len(self.separator), len(self.unknown)
        found = np.asarray(ids)[first : first + count].tolist()
        given = len(found) == count and all(id in own for id, own in zip(found, self._token_ids, strict=True))
        return found if given else list(self.unknown)

    def header_ids(self, conditions: Mapping[str, str]) -> list[int]:
        return self.plain.header_ids(conditions)

    def forget(self, ids: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """A training window (n,), with all or some of its conditions unknown in two shares `FORGOTTEN` of the windows.

        So generation with some conditions, or none, is trained, too.
        """
        draw = random.random()
        lost = random.random(len(self._field_ids)) < (1.0 if draw < FORGOTTEN else 0.5)
        if draw < 2 * FORGOTTEN:
            for own, chosen in zip(self._field_ids, lost, strict=True):
                ids = np.where(chosen & (ids >= own.start) & (ids < own.stop), own.start, ids)
        return ids

    def _documents(self, ids: ArrayLike) -> np.ndarray:
        """`ids` without conditions."""
        ids = np.asarray(ids)
        return ids[ids < self.first]

    def encode(self, data: bytes) -> np.ndarray:
        return self.plain.encode(data).astype(self.dtype)

    def encode_stream(self, chunks: Iterable[bytes], where: str) -> Iterator[np.ndarray]:
        return (ids.astype(self.dtype) for ids in self.plain.encode_stream(chunks, where))

    def pieces(self, chunks: Iterable[bytes], where: str) -> Iterator[Any]:
        return self.plain.pieces(chunks, where)

    def encode_pieces(self, pieces: Sequence[Any]) -> list[np.ndarray]:
        return self.plain.encode_pieces(pieces)

    def decode(self, ids: ArrayLike) -> bytes:
        return self.plain.decode(self._documents(ids))

    def file_of(self, document: bytes) -> bytes:
        return self.plain.file_of(document)

    def fit(self, config: PerceiverARConfig) -> PerceiverARConfig:
        return self.plain.fit(config).replace(vocab_size=self.vocab_size)

    def allowed_next(self, ids: np.ndarray) -> np.ndarray:
        allowed = None if self.plain.constraint() is None else self.plain.allowed_next(self._documents(ids))
        mask = np.arange(self.vocab_size) < self.first
        if allowed is not None:
            mask[: self.first] = allowed
        return mask

    def augment(self, ids: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Each document in the window is augmented separately: conditions and separators stay where they are."""
        ids = ids.copy()
        fixed = (ids >= self.first) | np.isin(ids, self.separator)
        for start, stop in np.flatnonzero(np.diff(fixed, prepend=True, append=True)).reshape(-1, 2):
            variant = self.plain.augment(ids[start:stop], random)
            while stop < len(ids) and np.isin(variant[-1], self.separator):  # the document has one already
                variant = self.plain.augment(ids[start:stop], random)
            ids[start:stop] = variant
        return ids

    def infill(self, ids: np.ndarray, first: int, last: int, room: int) -> tuple[np.ndarray, np.ndarray, int]:
        ids, place = np.asarray(ids), len(self.separator)
        conditions = ids[ids >= self.first]
        row, prompt, most = self.plain.infill(self._documents(ids), first, last, room - len(conditions))
        return np.insert(row, place, conditions), np.insert(prompt, place, conditions), most

    def amounts(self, ids: np.ndarray) -> dict[str, float]:
        return self.plain.amounts(self._documents(ids))

    def result_names(self, stem: str, count: int) -> list[str]:
        return self.plain.result_names(stem, count)

    def show(self, rows: Sequence[np.ndarray], prompt_len: int, *args: Any, **options: Any) -> list[Path]:
        kept = len(self._documents(rows[0][:prompt_len]))
        if options.get("original") is not None:
            options["original"] = self._documents(options["original"])
        return self.plain.show([self._documents(row) for row in rows], kept, *args, **options)

    def draw_bits(self, ids: np.ndarray, bits: np.ndarray, path: Path) -> None:
        self.plain.draw_bits(self._documents(ids), bits[np.asarray(ids) < self.first], path)

    def byte_lengths(self) -> np.ndarray:
        return np.pad(self.plain.byte_lengths(), (0, self.vocab_size - self.first))

    def settings(self) -> dict[str, Any]:
        return self.plain.settings()

    def save(self, directory: Path) -> None:
        self.plain.save(directory)


@dataclass(frozen=True)
class ConditionTable:
    """A table of conditions, read."""

    path: str
    fields: dict[str, dict[str, str]]
    """Real path of a file -> field -> value, without empty cells; in the order of rows."""

    @classmethod
    def read(cls, path: str) -> "ConditionTable":
        """Raises `InputError`, naming the row, if the table cannot be read, or does not say what each file's fields
        are."""
        files: dict[str, dict[str, str]] = {}
        rows: dict[str, int] = {}
        for number, row in enumerate(read_rows(path), 1):
            where = f"{path}, row {number},"
            require(FILE in row, f"{where} has no column {FILE!r}: name each document's file there")
            cells = {column: _cell(value, f"{where} column {column!r}") for column, value in row.items()}
            name = cells.pop(FILE)
            require(name != "", f"{where} names no file: fill in the column {FILE!r}, or remove the row")
            real = file_beside(path, name, where)
            require(real not in rows, f"{where} names {name} again, as row {rows.get(real)} does: keep one of them")
            for column in cells:
                require(
                    column != "" and "=" not in column,
                    f"{path} has a column {column!r}: give it a name without =, for --condition NAME=VALUE",
                )
            rows[real], files[real] = number, {column: value for column, value in cells.items() if value != ""}
        require(any(files.values()), f"{path} has no field with a value: give it columns beside {FILE!r}")
        return cls(path, files)

    def without_itself(self, sources: Iterable[Source]) -> list[Source]:
        return [source for source in sources if os.path.realpath(source.path) != os.path.realpath(self.path)]

    def codec(self, plain: Codec, sources: Iterable[Source], text: str | None = None) -> ConditionedCodec:
        """`plain` with the fields and values that `sources` have, and the free text of the column `text`.

        Raises `InputError` for too many values, a text of more than `MOST_BYTES`, or no text.
        """
        values: dict[str, set[str]] = {}
        longest = 0
        for source in sources:
            for field, value in self.fields.get(os.path.realpath(source.path), {}).items():
                values.setdefault(field, set()).add(value)
                if field == text:
                    with self._naming_row(source):
                        longest = max(longest, len(text_bytes(field, value, MOST_BYTES)))
        require(
            bool(values), f"{self.path} says nothing of any of these files: it names them relative to its own folder"
        )
        require(
            text is None or text in values,
            f"{self.path} has no text in a column {text!r} for these files: set data.condition_text to one of the "
            f"columns {listed(values)}, or leave it out",
        )
        for field, found in values.items():
            require(
                field == text or len(found) <= MOST_VALUES,
                f"{self.path} has {len(found):,} different values in the column {field!r}, of at most "
                f"{MOST_VALUES:,}: "
                + (f"if it is free text, set data.condition_text to {field}, else " if text is None else "")
                + "remove the column",
            )
            require(
                field not in plain.header_conditions,
                f"{self.path} has a column {field!r}, which is a condition of {plain.name} already: rename the column",
            )
        columns = dict.fromkeys(field for fields in self.fields.values() for field in fields if field != text)
        conditions = {field: sorted(values[field]) for field in columns if field in values}
        return ConditionedCodec(plain, conditions if text is None else {**conditions, text: longest})

    def apply(self, sources: Iterable[Source], codec: Codec) -> list[Source]:
        """`sources` with their conditions. Raises `InputError` for fields, values or long texts that `codec` lacks.

        stderr gets the number of files that are not in the table.
        """
        sources, missing = list(sources), list[str]()
        if not isinstance(codec, ConditionedCodec):
            raise InputError(f"{self.path}: the run was trained without conditions: leave it out")
        for i, source in enumerate(sources):
            fields = self.fields.get(os.path.realpath(source.path))
            if fields is None:
                missing.append(source.name)
                continue
            with self._naming_row(source):
                codec.condition_ids(fields)
            sources[i] = replace(source, conditions=fields)
        if missing:
            amount = f"{len(missing):,} of {len(sources):,} files are not in {self.path}, such as {missing[0]}"
            print(f"{amount}: their conditions are unknown", file=sys.stderr)
        return sources

    @contextmanager
    def _naming_row(self, source: Source) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            row = list(self.fields).index(os.path.realpath(source.path)) + 1
            raise InputError(f"{self.path}, row {row}, {source.name}: {error}") from None


def text_bytes(field: str, text: str, most: int) -> bytes:
    """A free text as UTF-8, without spaces at its ends. Raises `InputError` for more than `most` bytes."""
    try:
        data = text.strip().encode()
    except UnicodeEncodeError:  # JSON can hold half of a surrogate pair, the command line any bytes
        raise InputError(f"condition {field} is not Unicode text: write it again, as UTF-8") from None
    require(len(data) <= most, f"condition {field} has {len(data):,} bytes of text, of at most {most:,}: shorten it")
    return data


def _cell(value: Any, where: str) -> str:
    if value is None or value != value:  # NaN
        return ""
    require(isinstance(value, str | int | float), f"{where} holds {value!r:.40}: a condition is a text or a number")
    whole = isinstance(value, float) and value.is_integer()  # Parquet has columns of integers with gaps as floats
    return str(int(value) if whole else value).strip()


def listed(names: Iterable[str] | int) -> str:
    """Names for a message; an int is the length of a free text."""
    if isinstance(names, int):
        return f"text of at most {names:,} bytes"
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")
