"""metrics.csv: a row for each measurement of a run."""

import csv
from collections.abc import Mapping
from pathlib import Path

from perceiver_ar.files import atomic_path

COLUMNS: tuple[str, ...] = (
    *("step", "tokens", "seconds", "train_bits", "validation_bits"),
    *("lr", "grad_norm", "tokens_per_second"),
)


class Metrics:
    """The rows up to `step`. Later ones are removed: a resumed run repeats their steps."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.rows = [row for row in read_metrics(path) if int(row["step"]) <= step]
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
    """The complete rows of metrics.csv, without one that a kill cut off; [] if the file has other columns."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            return []
        return [row for row in reader if None not in row.values() and row["step"].isdigit()]
