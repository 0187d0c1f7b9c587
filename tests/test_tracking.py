"""Metrics reach the trackers themselves: W&B's offline file and trackio's local database, where they are installed."""

import csv
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from perceiver_ar import InputError, Recipe, train
from perceiver_ar.config import PerceiverARConfig, TrainerConfig

MODEL = PerceiverARConfig(context_length=32, num_latents=8, dim=16, num_layers=1, num_heads=2)
NAMES: tuple[Literal["wandb", "trackio"], ...] = ("wandb", "trackio")


def recipe_for(corpus: Path, out: Path, tracker: Literal["none", "wandb", "trackio"]) -> Recipe:
    trainer = TrainerConfig(device="cpu", precision="32", evaluations=2, evaluation_tokens=200, sample_tokens=0)
    trainer = replace(trainer, tracker=tracker)
    return Recipe(paths=(str(corpus),), out=str(out), max_steps=6, model=MODEL, trainer=trainer)


def read_wandb(run: Path) -> list[dict[str, Any]]:
    """Rows of the offline files: records of LevelDB's log format behind seven bytes, with a message of W&B's each."""
    from wandb.proto import wandb_internal_pb2  # pyright: ignore[reportMissingImports]

    rows = []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        data, place, message = file.read_bytes(), 7, b""
        while place + 7 <= len(data):
            if (left := 32768 - place % 32768) < 7:  # no header fits the block
                place += left
                continue
            size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
            message, place = message + data[place + 7 : place + 7 + size], place + 7 + size
            if kind in (1, 4):  # all of a record, or its last part
                record = wandb_internal_pb2.Record.FromString(message)
                items, message = record.history.item, b""
                rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    return [{"step": row.pop("_step"), **row} for row in rows if "_step" in row]


def read_trackio(run: Path) -> list[dict[str, Any]]:
    """Rows of the local database, found as the environment says."""
    name = f"{run.name}-{(run / 'tracker_id').read_text()}"
    program = (
        "import json, sys; from trackio.sqlite_storage import SQLiteStorage;"
        "print(json.dumps(SQLiteStorage.get_logs('perceiver-ar', sys.argv[1])))"
    )
    output = subprocess.run([sys.executable, "-c", program, name], capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_has_the_rows_of_the_table_and_goes_on_with_a_resumed_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Literal["wandb", "trackio"]
) -> None:
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    recipe = recipe_for(corpus, tmp_path / "run", name)
    for i, steps in enumerate((6, 12)):  # in processes of their own, as users have them
        file = tmp_path / "recipe.json"
        file.write_text(json.dumps(replace(recipe, max_steps=steps).to_dict()))
        command = [sys.executable, "-m", "perceiver_ar.cli", "train", "--config", str(file), "--out", recipe.out]
        run = subprocess.run([*command, *["--resume"] * i], capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        assert json.loads(run.stdout)["steps"] == steps  # and nothing else on stdout
    rows = {"wandb": read_wandb, "trackio": read_trackio}[name](Path(recipe.out))
    with open(Path(recipe.out) / "metrics.csv", newline="") as table:
        for row in csv.DictReader(table):
            for column in ("train_bits", "validation_bits"):
                if row[column]:
                    values = [
                        tracked[column] for tracked in rows if tracked["step"] == int(row["step"]) and column in tracked
                    ]
                    assert float(row[column]) in [pytest.approx(value, abs=1e-9) for value in values]
    summary = json.loads((Path(recipe.out) / "summary.json").read_text())
    assert summary["bits_per_byte"] in [tracked.get("bits_per_byte") for tracked in rows if tracked["step"] == 12]


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_made(
    corpus: Path, tmp_path: Path, name: Literal["wandb", "trackio"]
) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(InputError, match=rf"trainer.tracker is {name}.*pip install 'perceiver-ar\[{name}\]'"):
        train(recipe_for(corpus, tmp_path / "run", name))
    assert not (tmp_path / "run").exists()
