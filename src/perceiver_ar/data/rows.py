"""Documents that are rows: a column of text in a table.

.jsonl, .ndjson, .csv and .tsv files are read line by line, so of each row only the column matters. .parquet and .arrow
files are read by Hugging Face datasets. Nothing is copied to that library's cache: files are streamed, and memory holds
a part of one, such as a row group.
"""

import csv
import glob
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from perceiver_ar.data.codec import WrongModality, missing_extra
from perceiver_ar.data.modalities import NOTES
from perceiver_ar.data.sources import Source, split_documents
from perceiver_ar.data.text import decode_utf8, text_only
from perceiver_ar.errors import InputError

TABLE = re.compile(r".+\.(?:(parquet|arrow)|(jsonl|ndjson|csv|tsv)(?:\.(?:gz|xz|bz2|zst))?)", re.IGNORECASE)
CACHED = re.compile(r"cache-.*\.arrow")
"""What datasets leave in a folder of `save_to_disk` after `map` and `filter`."""
MISSING = object()
ROWS_AT_ONCE = 100  # of Parquet
ROWS_TO_SEARCH = 1000  # for a column, before it is taken to be missing


@dataclass(frozen=True)
class Rows(Source):
    """A file of rows, each of which is a document: the text in `column`, which may be a field of a field (doc.text)."""

    of_rows: ClassVar[bool] = True
    column: str = "text"

    def documents(
        self, separator: bytes | None, advance: Callable[[int], Any] = lambda num_bytes: None, text: bool = True
    ) -> Iterator[tuple[str, Iterator[bytes]]]:
        """As `Source.documents`; `separator` separates several documents in one row.

        Raises `InputError` if there is no such column, if it holds something else than text, or where `chunks` does.
        """
        columns, found = dict[str, None](), False
        for number, row in enumerate(self._rows(advance), 1):
            where = f"{self.name}, row {number},"
            if row is None:
                yield where, _refused(WrongModality(f"{where} is damaged (it holds NUL)"))
                continue
            value = _field(row, self.column)
            if not found and value is MISSING:
                columns |= dict.fromkeys(row)
                if number == ROWS_TO_SEARCH:
                    break
            if value is MISSING:
                continue
            found = True
            if isinstance(value, dict):
                fields = ", ".join(f"{self.column}.{name}" for name in value)
                raise InputError(f"{where} has fields in column {self.column!r}; set data.column to one of {fields}")
            if not isinstance(value, str | None):
                kind = type(value).__name__
                raise InputError(f"{where} has a {kind} in column {self.column!r}, not text; set data.column")
            for document in split_documents([(value or "").encode(errors="surrogatepass")], separator):
                yield where, document
        if columns and not found:
            raise self._no_column(columns)

    def _no_column(self, columns: Iterable[str]) -> InputError:
        known = ", ".join(columns)
        return InputError(
            f"{self.name} has no column {self.column!r}; set data.column to one of {known}, "
            "or use --modality bytes for the file as it is"
        )

    def _rows(self, advance: Callable[[int], Any]) -> Iterator[dict[str, Any] | None]:
        """None is a row that cannot be read."""
        reader = _reader(self)
        if reader in ("parquet", "arrow"):
            if next(self.chunks(), None) is not None:  # which says, too, what keeps a file from being read
                yield from self._table(reader)
            advance(self.size)
            return
        lines = _lines(decode_utf8(text_only(self.chunks(advance), self.name, allow_nul=True), self.name))
        yield from self._objects(lines) if reader in ("jsonl", "ndjson") else self._records(lines, reader)

    def _objects(self, lines: Iterable[str]) -> Iterator[dict[str, Any] | None]:
        """The rows of JSON Lines."""
        number = 0
        for line in lines:
            if not line.strip():
                continue
            number += 1
            try:
                row = json.loads(line, strict=False)  # that is: with control characters
            except (ValueError, RecursionError) as error:
                if "\0" in line:  # what a crash leaves of a row
                    yield None
                    continue
                raise self._damaged(f"row {number}: {error}") from None
            if not isinstance(row, dict):
                raise self._damaged(f"row {number} is no JSON object")
            yield None if "\0" in line and self._has_nul(row) else row

    def _records(self, lines: Iterator[str], reader: str) -> Iterator[dict[str, Any] | None]:
        """The rows of a .csv or .tsv file, the first line of which names its columns."""
        csv.field_size_limit(2**31 - 1)  # long texts are what this is for
        first = next(lines, "")
        delimiter = "\t" if reader == "tsv" else max(",;\t|", key=first.count)
        try:
            (header,) = csv.reader([first], delimiter=delimiter)
            for record in csv.reader(lines, delimiter=delimiter):
                row = dict(zip(header, record, strict=False))
                yield None if self._has_nul(row) else row
        except (ValueError, csv.Error) as error:
            raise self._damaged(str(error)) from None

    def _table(self, reader: str) -> Iterator[dict[str, Any]]:
        """The rows of a file that datasets read."""
        from datasets import load_dataset
        from pyarrow.dataset import ParquetFragmentScanOptions

        path = glob.escape(os.path.abspath(self.path))  # datasets take names for patterns
        # What is read ahead of a Parquet file is kept to its end, so that memory would grow with the file.
        # By default they read as many rows at once as the first row group has, which may be none.
        options = {"fragment_scan_options": ParquetFragmentScanOptions(pre_buffer=False), "batch_size": ROWS_AT_ONCE}
        options = options if reader == "parquet" else {}
        try:
            rows = load_dataset(reader, data_files=path, split="train", streaming=True, **options)
            if names := rows.column_names:  # or it is empty, or damaged, which reading will show
                column = self.column if self.column in names else self.column.partition(".")[0]
                if column not in names:
                    if next(iter(rows), None) is None:
                        return
                    raise self._no_column(names)
                rows = rows.select_columns(column)
            yield from rows
        except InputError:
            raise
        except Exception as error:  # whatever the many libraries below raise at a damaged file
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise self._damaged(str(error) or type(error).__name__) from None

    def _has_nul(self, row: dict[str, Any]) -> bool:
        value = _field(row, self.column)
        return isinstance(value, str) and "\0" in value

    def _damaged(self, reason: str) -> InputError:
        reason = reason.splitlines()[0]
        return InputError(f"{self.name} is damaged, or not what its ending says ({reason}); write it again")


def _field(row: Any, column: str) -> Any:
    """What a row has in `column`, or in the field of a field that this names; MISSING if there is no such thing."""
    if column in row:
        return row[column]
    for name in column.split("."):
        if not isinstance(row, dict) or name not in row:
            return MISSING
        row = row[name]
    return row


def _refused(error: WrongModality) -> Iterator[bytes]:
    """A document that cannot be read."""
    yield from ()
    raise error


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Text cut anywhere -> its lines, with their ends."""
    parts: list[str] = []
    for text in texts:
        first, *more = text.split("\n")
        parts.append(first)
        for start in more:
            yield "".join(parts) + "\n"
            parts = [start]
    if rest := "".join(parts):
        yield rest


def find_rows(sources: Iterable[Source], column: str) -> list[Source]:
    """`sources`, those that are files of rows as `Rows`. Beside them, what lies in their folders is left out if it is
    about them (README, .json) or was made from them (cached results). A .csv file may itself be about others.

    Raises `InputError` where there are .parquet or .arrow files, but not the package datasets.
    """
    sources = list(sources)
    readers = {_reader(source) for source in sources} - {""}
    if readers & {"parquet", "arrow"}:
        try:
            from datasets import load_dataset  # noqa: F401  # pyright: ignore[reportUnusedImport]
        except ImportError as error:
            raise missing_extra("datasets", error) from None
        logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it logs what it raises
    lists = readers - {"csv", "tsv"}  # which are never about other files

    def is_left_out(source: Source) -> bool:
        name = source.path.name
        if source.named or not readers or not (NOTES.fullmatch(name) or CACHED.fullmatch(name)):
            return False
        return bool(lists) or (only_notes and not _reader(source))

    only_notes = all(NOTES.fullmatch(source.path.name) for source in sources)
    return [
        Rows(**vars(source), column=column) if _reader(source) else source
        for source in sources
        if not is_left_out(source)
    ]


def _reader(source: Source) -> str:
    """How a file of rows is read; empty for other files."""
    match = TABLE.fullmatch(source.path.name)
    return (match[1] or match[2]).lower() if match else ""
