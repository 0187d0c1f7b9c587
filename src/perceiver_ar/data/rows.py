"""Documents that are rows: a column of text in a table.

.jsonl, .ndjson, .csv and .tsv files are read line by line. Hugging Face datasets reads .parquet and .arrow files: they
are streamed, so nothing is copied to that library's cache, and memory holds a part of a file, such as a row group.
"""

import csv
import glob
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from perceiver_ar.data.codec import WrongModality, importing
from perceiver_ar.data.genome import find_records
from perceiver_ar.data.modalities import NOTES, find_members
from perceiver_ar.data.sources import Source, find_files, refused, split_documents
from perceiver_ar.data.text import column_separator, decode_utf8, text_only
from perceiver_ar.errors import InputError

TABLE = re.compile(r".+\.(?:(parquet|arrow)|(jsonl|ndjson|csv|tsv)(?:\.(?:gz|xz|bz2|zst))?)", re.IGNORECASE)
CACHED = re.compile(r"cache-.*\.arrow")
"""Cache files that `map` and `filter` of datasets leave in a folder of `save_to_disk`."""
MISSING = object()
ROWS_AT_ONCE = 100  # of Parquet
ROWS_TO_SEARCH = 1000  # rows without the column after which it counts as missing


@dataclass(frozen=True)
class Rows(Source):
    """A file of rows. Each row is a document: the text in `column`, which may be a field of a field (doc.text).

    Empty: no column is the document's, and all are read.
    """

    of_rows: ClassVar[bool] = True
    column: str = "text"

    def documents(
        self, separator: bytes | None, advance: Callable[[int], Any] = lambda num_bytes: None, text: bool = True
    ) -> Iterator[tuple[str, Iterator[bytes]]]:
        """As `Source.documents`; `separator` separates several documents in one row.

        Raises `InputError` if there is no such column, if it does not hold text, or as `chunks` does.
        """
        columns, lacking, found = dict[str, None](), list[str](), False
        for number, row in enumerate(self._rows(advance), 1):
            where = f"{self.name}, row {number},"
            if isinstance(row, str):
                yield where, refused(WrongModality(f"{where} {row}"))
                continue
            value = field_of(row, self.column)
            if value is MISSING:
                if row and not found:  # an empty row is an empty document
                    lacking.append(where)
                    columns |= dict.fromkeys(row)
                    if len(lacking) == ROWS_TO_SEARCH:
                        break
                elif row:
                    yield self._without_column(where)
                continue
            if not found:
                yield from map(self._without_column, lacking)
            found = True
            if isinstance(value, dict):
                fields = ", ".join(f"{self.column}.{name}" for name in value)
                raise InputError(f"{where} has fields in column {self.column!r}; set data.column to one of {fields}")
            if not isinstance(value, str | None):
                reason = f"has {value!r:.40} in column {self.column!r}, not text; set data.column"
                yield where, refused(WrongModality(f"{where} {reason}"))
                continue
            for document in split_documents([(value or "").encode(errors="surrogatepass")], separator):
                yield where, document
        if columns and not found:
            raise self._no_column(columns)

    def _without_column(self, where: str) -> tuple[str, Iterator[bytes]]:
        return where, refused(WrongModality(f"{where} has no column {self.column!r}"))

    def _no_column(self, columns: Iterable[str]) -> InputError:
        known = ", ".join(columns)
        return InputError(
            f"{self.name} has no column {self.column!r}; set data.column to one of {known}, "
            "or use --modality bytes for the file as it is"
        )

    def _rows(self, advance: Callable[[int], Any]) -> Iterator[dict[str, Any] | str]:
        """Yields what is wrong with a row that cannot be read."""
        reader = _reader(self)
        if reader in ("parquet", "arrow"):
            if next(self.chunks(), None) is not None:  # raises, too, if the file cannot be read
                yield from self._table(reader)
            advance(self.size)
            return
        lines = _lines(decode_utf8(text_only(self.chunks(advance), self.name, allow_nul=True), self.name))
        yield from self._objects(lines) if reader in ("jsonl", "ndjson") else self._records(lines, reader)

    def _objects(self, lines: Iterable[str]) -> Iterator[dict[str, Any] | str]:
        """The rows of JSON Lines."""
        for number, line in enumerate(filter(str.strip, lines), 1):
            try:
                row = json.loads(line, strict=False)  # allows control characters
            except (ValueError, RecursionError) as error:
                if "\0" in line:  # a row that a crash cut short
                    yield NUL
                    continue
                raise self._damaged(f"row {number}: {error}") from None
            if not isinstance(row, dict):
                raise self._damaged(f"row {number} is no JSON object")
            yield NUL if "\0" in line and self._has_nul(row) else row

    def _records(self, lines: Iterator[str], reader: str) -> Iterator[dict[str, Any] | str]:
        """The rows of a .csv or .tsv file. Its first line names the columns."""
        csv.field_size_limit(2**31 - 1)  # texts are long
        first = next(filter(str.strip, lines), "")
        delimiter = "\t" if reader == "tsv" else column_separator(first)
        try:
            (header,) = csv.reader([first], delimiter=delimiter)
            wanted = {self.column} if self.column else {*header} - {""}
            if again := [name for name in header if header.count(name) > 1 and name in wanted]:
                raise InputError(f"{self.name} has two columns {again[0]!r}: rename one of them")
            for record in csv.reader(lines, delimiter=delimiter, strict=True):  # or a lost quote swallows rows
                row = dict(zip(header, record, strict=False))
                longer = f"has {len(record)} fields for {len(header)} columns: write texts with {delimiter!r} in quotes"
                yield NUL if self._has_nul(row) else longer if len(record) > len(header) else row
        except InputError:
            raise
        except (ValueError, csv.Error) as error:
            raise self._damaged(str(error)) from None

    def _table(self, reader: str) -> Iterator[dict[str, Any]]:
        """The rows of a .parquet or .arrow file."""
        from datasets import load_dataset
        from pyarrow.dataset import ParquetFragmentScanOptions

        if "::" in os.path.abspath(self.path):
            raise InputError(f"{self.name} has :: in its path, which the package datasets cannot read: rename it")
        path = glob.escape(os.path.abspath(self.path))  # datasets treats names as patterns
        # pre_buffer keeps what it reads until the file ends, so memory would grow with the file. The default batch_size
        # is the number of rows in the first row group, which may be 0.
        options = {"fragment_scan_options": ParquetFragmentScanOptions(pre_buffer=False), "batch_size": ROWS_AT_ONCE}
        options = options if reader == "parquet" else {}
        try:
            rows = load_dataset(reader, data_files=path, split="train", streaming=True, **options)
            if self.column and (names := rows.column_names):  # without names it is empty or damaged; reading finds out
                column = self.column if self.column in names else self.column.partition(".")[0]
                if column not in names:
                    if next(iter(rows), None) is None:
                        return
                    raise self._no_column(names)
                rows = rows.select_columns(column)
            yield from rows
        except InputError:
            raise
        except Exception as error:  # the libraries below raise many kinds for damaged files
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise self._damaged(str(error) or type(error).__name__) from None

    def _has_nul(self, row: dict[str, Any]) -> bool:
        value = field_of(row, self.column)
        return isinstance(value, str) and "\0" in value

    def _damaged(self, reason: str) -> InputError:
        reason = reason.splitlines()[0]
        return InputError(f"{self.name} is damaged, or its ending is wrong ({reason}); write it again")


def field_of(row: Any, column: str) -> Any:
    """The value of `column` in a row, or of the field of a field that it names; MISSING if the row has neither."""
    if column in row:
        return row[column]
    for name in column.split("."):
        if not isinstance(row, dict) or name not in row:
            return MISSING
        row = row[name]
    return row


NUL = "is damaged (it holds NUL)"


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
    """`sources`, with files of rows as `Rows`.

    Beside files of rows, files that were found in folders are left out if they describe others (README, .json) or were
    made from others (cached results). A .csv file, too, may describe others.

    Raises `InputError` for .parquet and .arrow files if the package datasets is not installed.
    """
    sources = list(sources)
    readers = {_reader(source) for source in sources} - {""}
    if readers & {"parquet", "arrow"}:
        with importing("datasets"):
            from datasets import load_dataset  # noqa: F401  # pyright: ignore[reportUnusedImport]
        logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it logs what it raises
    lists = bool(readers - {"csv", "tsv"})  # these never describe other files
    only_notes = all(NOTES.fullmatch(source.path.name) for source in sources)
    found = list[Source]()
    for source in sources:
        name, reader = source.path.name, _reader(source)
        beside = not source.named and (NOTES.fullmatch(name) or CACHED.fullmatch(name))
        if not (beside and (lists or (readers and only_notes and not reader))):
            found.append(Rows(**vars(source), column=column) if reader else source)
    return found


def find_within(sources: Sequence[Source], modality: str, column: str) -> list[Source]:
    """The sources with their documents: members of tar archives, rows of tables of text, or records of genomes.

    column: as in `data.column`.
    """
    if modality == "genome":
        return find_records(sources, None)[0]
    found = find_members(sources, modality, column)
    return find_rows(found, column) if modality == "text" else found


def read_rows(path: str) -> Iterator[dict[str, Any]]:
    """The rows of one table, with all their columns. Raises `InputError` if it is no table, or damaged."""
    if os.path.isdir(path) or not TABLE.fullmatch(os.path.basename(path)):
        raise InputError(f"{path} is no table: name a .csv, .tsv, .jsonl or .parquet file")
    (source,) = find_rows(find_files([path]), "")
    assert isinstance(source, Rows)
    for number, row in enumerate(source._rows(lambda num_bytes: None), 1):
        if isinstance(row, str):
            raise InputError(f"{source.name}, row {number}, {row}")
        if row:
            yield row


def _reader(source: Source) -> str:
    """The kind of a file of rows, such as "jsonl"; empty for other files."""
    match = TABLE.fullmatch(source.path.name)
    return (match[1] or match[2]).lower() if match else ""
