"""Tables on disk: CSV, JSON Lines or Parquet, by the ending of the file's name."""

import csv
import json
import os
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from perceiver_ar.errors import InputError, require
from perceiver_ar.files import atomic_path, check_out

FORMATS = ".csv", ".jsonl", ".parquet"
GROUP = 1 << 14
"""Rows of a Parquet row group."""


def check_table(path: str | os.PathLike[str], option: str, also: tuple[str, ...] = ()) -> None:
    """Raises InputError if `path` is no name for a table, or needs a package that is missing. `also`: endings allowed
    beside `FORMATS`."""
    check_out(path, option)
    ending = Path(path).suffix.lower()
    endings = *also, *FORMATS
    require(ending in endings, f"{option} is {path}: its name must end in {', '.join(endings[:-1])} or {endings[-1]}")
    if ending == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise InputError(f"writing {path} needs the package pyarrow: pip install pyarrow, or use .csv") from None


def write_rows(path: str | os.PathLike[str], columns: Mapping[str, type], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a table atomically, row by row. None is an empty cell.

    Args:
        path: its ending is one of `FORMATS`.
        columns: name -> int, float, str, bytes, or list (of floats). In CSV and JSON, bytes are text: UTF-8, with \\xNN
            for what is not; a list is JSON. A str may be a file name that is not UTF-8: its bytes become \\udcNN.
    """
    with atomic_path(path) as temporary:
        if Path(path).suffix.lower() == ".parquet":
            _write_parquet(temporary, columns, iter(rows))
            return
        with open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            # The writer quotes the characters of its line end alone: with LF a carriage return would end a row.
            lines: Any = SimpleNamespace(write=lambda line: file.write(line.removesuffix("\r\n") + "\n"))
            writer = csv.DictWriter(lines, list(columns), lineterminator="\r\n")
            as_json = Path(path).suffix.lower() == ".jsonl"
            if not as_json:
                writer.writeheader()
            for row in rows:
                cells = {name: _text(row[name]) for name in columns}
                if as_json:
                    file.write(json.dumps(cells) + "\n")
                else:
                    writer.writerow({name: json.dumps(x) if isinstance(x, list) else x for name, x in cells.items()})


def _text(value: Any) -> Any:
    return value.decode("utf-8", errors="backslashreplace") if isinstance(value, bytes) else value


def _utf8(value: Any) -> Any:
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def _write_parquet(path: Path, columns: Mapping[str, type], rows: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {int: pa.int64(), float: pa.float64(), str: pa.string(), bytes: pa.binary(), list: pa.list_(pa.float32())}
    schema = pa.schema([(name, kinds[kind]) for name, kind in columns.items()])
    with pq.ParquetWriter(path, schema) as writer:
        while group := [{name: _utf8(value) for name, value in row.items()} for row in islice(rows, GROUP)]:
            writer.write_table(pa.Table.from_pylist(group, schema))
