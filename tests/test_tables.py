"""Tables on disk: what is written is what a reader gets back."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from perceiver_ar.tables import write_rows

COLUMNS = {"file": str, "bytes": bytes, "bits": float}
ROWS: list[dict[str, Any]] = [
    {"file": "a,b.txt", "bytes": data, "bits": 0.5} for data in (b"\r", b"\n", b"\r\n", b'"', b",", b" ", b"\xff", None)
]


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file]


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_any_bytes_come_back(ending: str, tmp_path: Path) -> None:
    write_rows(tmp_path / f"t{ending}", COLUMNS, ROWS)
    expected = [row["bytes"] for row in ROWS]
    if ending != ".parquet":
        expected = [None if data is None else data.decode(errors="backslashreplace") for data in expected]
    found = read(tmp_path / f"t{ending}")
    assert [row["bytes"] or None for row in found] == expected
    assert {float(row["bits"]) for row in found} == {0.5}


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_names_that_are_not_utf8_are_written_as_escapes(ending: str, tmp_path: Path) -> None:
    write_rows(tmp_path / f"t{ending}", COLUMNS, [{**ROWS[0], "file": "na\udcffme"}])
    assert read(tmp_path / f"t{ending}")[0]["file"] in ("na\\udcffme", "na\udcffme")
