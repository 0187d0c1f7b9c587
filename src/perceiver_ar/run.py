"""The run directory: a trained model and everything needed to use it or to resume its training.

config.json, model.safetensors      the network; safetensors cannot hold code
codec.json (tokenizer.json)         files to ids and back
recipe.yaml                         the complete settings; training it again reproduces the run
summary.json                        how good it is; written last, so a run that has it is finished
metrics.csv, tensorboard/           what was measured on the way
tracker_id, wandb/                  what a tracker calls the run, and what W&B keeps of it, where there is one
samples/, plots/, report.html       what it writes, pictures, and all of it on one page
tokens/, checkpoints/               only for resuming
checkpoints/initial/                what it starts from (init_from), until it is finished
"""

import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from perceiver_ar.config import BEFORE, Recipe, dump_yaml, load_yaml
from perceiver_ar.data.codec import Codec, load_codec
from perceiver_ar.errors import InputError
from perceiver_ar.files import TEMPORARY, write_text
from perceiver_ar.lock import LOCK
from perceiver_ar.network.model import PerceiverAR


class Run:
    """Names the parts of a run directory. Nothing is read or made before it is asked for.

    Raises InputError if the path is not UTF-8: the libraries that write weights and logs there cannot take it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        real = os.path.realpath(path)
        if other := re.search("[\ud800-\udfff]", real):
            byte = f"byte 0x{ord(other[0]) & 0xFF:02x}"
            raise InputError(f"{real!r} is not UTF-8 ({byte}): give another --out, or rename the folder")
        self.recipe_file = self.path / "recipe.yaml"
        self.summary_file = self.path / "summary.json"
        self.weights_file = self.path / "model.safetensors"
        self.metrics_file = self.path / "metrics.csv"
        self.tokens = self.path / "tokens"
        self.samples = self.path / "samples"
        self.plots = self.path / "plots"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.initial = self.checkpoints / "initial"

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """A directory that holds a run. Raises InputError where there is none."""
        run = cls(path)
        if not run.path.exists():
            raise InputError(f"{path}: no such run; `perceiver-ar train ... --out {path}` would make it")
        if not run.path.is_dir():
            raise InputError(f"{path} is a file, not a run directory")
        return run

    def is_taken(self) -> bool:
        """Whether something is there that a new run would overwrite."""
        if not self.path.is_dir():
            return self.path.exists()
        return any(not file.name.startswith(TEMPORARY) and file.name != LOCK for file in self.path.iterdir())

    def recipe(self) -> Recipe:
        """Raises InputError where the recipe is missing, damaged or not ours."""
        return Recipe.from_dict(self.recipe_dict(), where=str(self.recipe_file))

    def recipe_dict(self) -> dict[str, Any]:
        try:
            text = self.recipe_file.read_text(encoding="utf-8")
            settings = load_yaml(text)
            if isinstance(settings, dict) and "blocks" not in (settings.get("trainer") or {}):
                settings = yaml.safe_load(text)  # by which older runs were written: `out: 1e-3` is text there
        except FileNotFoundError:
            raise InputError(f"{self.path} holds no recipe.yaml, so it is not a run of perceiver-ar") from None
        except (yaml.YAMLError, UnicodeDecodeError):
            raise InputError(f"{self.recipe_file} is damaged (not YAML): restore it, or train again") from None
        if not isinstance(settings, dict):
            raise InputError(f"{self.recipe_file} is damaged (not a mapping): restore it, or train again")
        for group, before in BEFORE.items():
            if isinstance(settings.get(group), dict):
                settings[group] = before | settings[group]
        return settings

    def write_recipe(self, recipe: Recipe) -> None:
        write_text(self.recipe_file, dump_yaml(recipe.to_dict()))

    def remove_unfinished_files(self) -> None:
        """Removes what a kill in the middle of a write left beside the whole files."""
        for file in list(self.path.rglob(f"{TEMPORARY}*")):
            if file.is_dir():
                shutil.rmtree(file, ignore_errors=True)
            else:
                file.unlink(missing_ok=True)

    def remove_prepared(self, codec: Codec | None) -> None:
        """Removes what preparing a new run has made, and nothing that somebody else has put there."""
        shutil.rmtree(self.tokens, ignore_errors=True)
        shutil.rmtree(self.initial, ignore_errors=True)
        with suppress(OSError):  # there is none, or others are in it
            self.checkpoints.rmdir()
        for pattern in ("recipe.yaml", "codec.json", *(codec.files if codec else ())):
            for file in list(self.path.glob(pattern)):
                file.unlink(missing_ok=True)
                with suppress(OSError):  # others are in it
                    file.parent.rmdir()

    def model(self) -> PerceiverAR:
        """The trained network on the CPU, in evaluation mode."""
        return PerceiverAR.from_pretrained(self.path)

    def codec(self) -> Codec:
        return load_codec(self.path)

    def codec_if_any(self) -> Codec | None:
        """None for converted checkpoints that do not say what their ids stand for. Raises as `codec` else."""
        return self.codec() if (self.path / "codec.json").exists() else None

    def codec_name(self) -> str | None:
        """For what only names it, and needs nothing of what it takes to use it."""
        try:
            return str(json.loads((self.path / "codec.json").read_text(encoding="utf-8"))["codec"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def summary(self) -> dict[str, Any] | None:
        """What `summary.json` says; None before the run is finished."""
        try:
            summary = json.loads(self.summary_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (json.JSONDecodeError, UnicodeDecodeError):
            summary = None
        if not isinstance(summary, dict) or "steps" not in summary:
            raise InputError(f"{self.summary_file} is damaged: delete it and resume the run")
        return summary

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_text(self.summary_file, json.dumps(summary, indent=2) + "\n")
