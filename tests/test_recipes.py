"""Every recipe is made of settings that go together, and trains: here in small, on a few files."""

from pathlib import Path

import pytest
import torch
from helpers import ROOT
from samples import write_band, write_genome, write_music, write_picture, write_words

from perceiver_ar import PerceiverAR, Recipe
from perceiver_ar.cli import main
from perceiver_ar.config import load_yaml

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
FILES = {"demo": (write_words, ".txt"), "piano": (write_music, ".mid"), "image": (write_picture, ".png"),
         "band": (write_band, ".mid"),         "genome": (write_genome, ".fa")}  # fmt: skip
SMALL = [
    *("--max_steps=1", "--max_time=none", "--model.dim=16", "--model.num_layers=1", "--model.num_heads=2"),
    *("--model.num_latents=8", "--trainer.batch_size=2", "--trainer.micro_batch_size=1", "--trainer.sample_tokens=0"),
    *("--trainer.evaluations=0", "--trainer.evaluation_tokens=100", "--data.validation_fraction=0.3"),
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_describes_a_network(path: Path) -> None:
    recipe = Recipe.from_dict({"out": "run", **load_yaml(path.read_text())}, where=path.name)
    with torch.device("meta"):
        assert PerceiverAR(recipe.model).num_parameters() > 1e6


@pytest.mark.parametrize("path", [path for path in RECIPES if "audio" not in path.stem], ids=lambda path: path.stem)
def test_a_recipe_trains(path: Path, tmp_path: Path) -> None:
    kind = path.stem.partition("_")[0]
    write, ending = FILES[kind]
    for number in range(4):
        write(tmp_path / f"{number}__{ending}", number)
    sizes = {"image": ["--data.image_size=[6,6]"], "demo": ["--data.bpe_vocab_size=300"]}.get(kind, [])
    sizes += [] if kind == "image" else ["--model.context_length=64"]
    options = ["--config", str(path), "--out", str(tmp_path / "run"), *SMALL, *sizes]
    assert main(["train", str(tmp_path), *options]) == 0
