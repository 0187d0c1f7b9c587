"""Documents that are rows: a column of text in .parquet, .arrow and .jsonl files, read by Hugging Face datasets.

Nothing is copied to that library's cache: files are streamed, and memory holds a part of one, such as a row group.
"""

import glob
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from perceiver_ar.data.codec import missing_extra
from perceiver_ar.data.modalities import NOTES
from perceiver_ar.data.sources import Source, split_documents
from perceiver_ar.errors import InputError

TABLE = re.compile(r".+\.(?:(parquet|arrow)|(json)l(?:\.(?:gz|xz|bz2|zst))?)", re.IGNORECASE)
CACHED = re.compile(r"cache-.*\.arrow")
"""What datasets leave in a folder of `save_to_disk` after `map` and `filter`."""


@dataclass(frozen=True)
class Rows(Source):
    """A file of rows, each of which is a document: the text in `column`."""

    column: str = "text"

    def documents(
        self, separator: bytes | None, advance: Callable[[int], Any] = lambda num_bytes: None, text: bool = True
    ) -> Iterator[tuple[str, Iterator[bytes]]]:
        """As `Source.documents`; `separator` separates several documents in one row.

        Raises `InputError` if there is no such column, if it holds something else than text, or where `chunks` does.
        """
        from datasets import load_dataset
        from pyarrow.dataset import ParquetFragmentScanOptions

        if next(self.chunks(), None) is None:  # which says, too, what keeps a file from being read
            return
        reader, path = _reader(self), glob.escape(os.path.abspath(self.path))  # datasets take names for patterns
        # What is read ahead of a Parquet file is kept to its end, so that memory would grow with the file.
        options = {"fragment_scan_options": ParquetFragmentScanOptions(pre_buffer=False)} if reader == "parquet" else {}
        try:
            rows = load_dataset(reader, data_files=path, split="train", streaming=True, **options)
            if names := rows.column_names:  # or it is empty, or damaged, which reading will show
                if self.column not in names:
                    known = ", ".join(names)
                    raise InputError(f"{self.name} has no column {self.column!r}; set data.column to one of {known}")
                rows = rows.select_columns(self.column)
            for number, row in enumerate(rows, 1):
                where, text = f"{self.name}, row {number},", row[self.column]
                if not isinstance(text, str | None):
                    kind = type(text).__name__
                    raise InputError(f"{where} has a {kind} in column {self.column!r}, not text; set data.column")
                for document in split_documents([(text or "").encode()], separator):
                    yield where, document
        except InputError:
            raise
        except Exception as error:  # whatever the many libraries below raise at a damaged file
            if isinstance(error, OSError) and error.errno is not None:
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(
                f"{self.name} is damaged, or not what its ending says ({reason}); write it again"
            ) from None
        advance(self.size)


def find_rows(sources: Iterable[Source], column: str) -> list[Source]:
    """`sources`, those that are files of rows as `Rows`. Beside them, what lies in their folders is left out if it is
    about them (README, .json) or was made from them (cached results).

    Raises `InputError` where there are such files, but not the package datasets.
    """
    sources = list(sources)
    if not any(map(_reader, sources)):
        return sources
    try:
        from datasets import load_dataset  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise missing_extra("datasets", error) from None
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it logs what it raises
    return [
        Rows(**vars(source), column=column) if _reader(source) else source
        for source in sources
        if source.named or not (CACHED.fullmatch(source.path.name) or NOTES.fullmatch(source.path.name))
    ]


def _reader(source: Source) -> str:
    """What datasets call the reader of a file of rows; empty for other files."""
    match = TABLE.fullmatch(source.path.name)
    return (match[1] or match[2]).lower() if match else ""
