"""metrics.csv: a row for each measurement of a run."""

import csv
from collections.abc import Mapping
from itertools import count
from pathlib import Path

from perceiver_ar.files import atomic_path
from perceiver_ar.training.console import say

COLUMNS: tuple[str, ...] = (
    *("step", "tokens", "seconds", "train_bits", "validation_bits"),
    *("lr", "grad_norm", "tokens_per_second"),
)


class Metrics:
    """The rows up to `step`. Later ones are removed: a resumed run repeats their steps."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        rows = _read(path)
        if rows is None:
            names = (path.with_stem(f"{path.stem}-before-{number}") for number in count(1))
            aside = next(name for name in names if not name.exists())
            path.rename(aside)
            say(f"{path} has other columns than {', '.join(COLUMNS)}: it is now {aside.name}, and a new one begins")
        self.rows = [row for row in rows or () if int(row["step"]) <= step]
        self.write_all()

    def add(self, row: Mapping[str, object], whole: bool) -> None:
        """Adds a row. `whole`: rewrites the file, because its last row may be cut off."""
        self.rows.append({name: str(row.get(name, "")) for name in COLUMNS})
        if whole:
            self.write_all()
        else:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, COLUMNS).writerow(self.rows[-1])

    def write_all(self) -> None:
        with atomic_path(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The complete rows of metrics.csv, without one that a kill or an editor damaged; [] if it has other columns."""
    return _read(path) or []


def _read(path: Path) -> list[dict[str, str]] | None:
    """As `read_metrics`; None if the file has other columns."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:  # Excel writes a byte order mark
        reader = csv.DictReader(file)
        if reader.fieldnames is not None and tuple(reader.fieldnames) != COLUMNS:
            return None
        return [row for row in reader if _is_complete(row)]


def _is_complete(row: Mapping[str, str]) -> bool:
    """Whether step, tokens and seconds are there, and all cells are numbers or empty."""
    try:
        numbers = {name: float(cell) for name, cell in row.items() if cell != ""}
    except (TypeError, ValueError):
        return False
    return row["step"].isdigit() and {"tokens", "seconds"} <= numbers.keys()
