"""The run directory: a trained model and everything needed to use it or to resume its training.

docs/files.md says what each file holds.
"""

import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from perceiver_ar.config import BEFORE, PerceiverARConfig, Recipe, dump_yaml, load_yaml
from perceiver_ar.data.codec import Codec
from perceiver_ar.data.codec_file import load_codec
from perceiver_ar.data.hub import DOWNLOADS
from perceiver_ar.data.shards import SHARDS
from perceiver_ar.errors import InputError, require
from perceiver_ar.files import TEMPORARY, write_text
from perceiver_ar.lock import LOCK
from perceiver_ar.network.model import PerceiverAR


class Run:
    """The paths in a run directory. Only the methods read or write files.

    Raises InputError if the path is not UTF-8: the libraries that write weights and logs do not support that.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        real = os.path.realpath(path)
        if other := re.search("[\ud800-\udfff]", real):
            byte = f"byte 0x{ord(other[0]) & 0xFF:02x}"
            raise InputError(f"{real!r} is not UTF-8 ({byte}): give another --out, or rename the folder")
        self.recipe_file = self.path / "recipe.yaml"
        self.summary_file = self.path / "summary.json"
        self.stopped_file = self.path / "stopped.txt"
        self.weights_file = self.path / "model.safetensors"
        self.adapter = self.path / "adapter"
        self.metrics_file = self.path / "metrics.csv"
        self.tokens = self.path / "tokens"
        self.samples = self.path / "samples"
        self.plots = self.path / "plots"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.initial = self.checkpoints / "initial"  # copy of init_from; removed at the end unless an adapter needs it

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """The run in an existing directory. Raises InputError if the directory does not exist."""
        run = cls(path)
        require(run.path.exists(), f"{path}: no such run; `perceiver-ar train ... --out {path}` would make it")
        require(run.path.is_dir(), f"{path} is a file, not a run directory")
        return run

    def is_taken(self) -> bool:
        """Whether the directory holds anything that a new run would overwrite."""
        if not self.path.is_dir():
            return self.path.exists()
        return any(not file.name.startswith(TEMPORARY) and file.name != LOCK for file in self.path.iterdir())

    def recipe(self) -> Recipe:
        """Raises InputError if the recipe is missing, damaged or not ours."""
        return Recipe.from_dict(self.recipe_dict(), where=str(self.recipe_file))

    def recipe_dict(self) -> dict[str, Any]:
        try:
            text = self.recipe_file.read_text(encoding="utf-8")
            settings = load_yaml(text)
            trainer = settings.get("trainer") if isinstance(settings, dict) else None
            if not isinstance(trainer, dict) or "blocks" not in trainer:
                settings = yaml.safe_load(text)  # older runs were written with it: `out: 1e-3` is text there
        except FileNotFoundError:
            raise InputError(f"{self.path} holds no recipe.yaml, so it is not a run of perceiver-ar") from None
        except (yaml.YAMLError, ValueError):
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
        """Removes unfinished files that a kill during a write has left."""
        for file in list(self.path.rglob(f"{TEMPORARY}*")):
            if file.is_dir():
                shutil.rmtree(file, ignore_errors=True)
            else:
                file.unlink(missing_ok=True)

    def has_intermediate_tokens(self) -> bool:
        """Whether token files are unfinished and the part that is done is kept."""
        kept = (f"{SHARDS}/*.npz", f"{DOWNLOADS}/*/.state.json")
        return any(file for pattern in kept for file in self.tokens.glob(pattern))

    def remove_intermediate_tokens(self) -> None:
        for folder in (SHARDS, DOWNLOADS):
            shutil.rmtree(self.tokens / folder, ignore_errors=True)

    def remove_prepared(self, codec: Codec | None) -> None:
        """Removes the files that preparing a new run made; files of others stay."""
        shutil.rmtree(self.tokens, ignore_errors=True)
        shutil.rmtree(self.initial, ignore_errors=True)
        with suppress(OSError):  # missing, or not empty
            self.checkpoints.rmdir()
        for pattern in ("recipe.yaml", "codec.json", *(codec.files if codec else ())):
            for file in list(self.path.glob(pattern)):
                file.unlink(missing_ok=True)
                with suppress(OSError):  # not empty
                    file.parent.rmdir()

    def model(self) -> PerceiverAR:
        """The trained network on the CPU, in evaluation mode."""
        return PerceiverAR.from_pretrained(self.path)

    def codec(self) -> Codec:
        """Raises InputError if it is missing or damaged, or if the network has another number of ids."""
        codec = load_codec(self.path)
        if (self.path / "config.json").exists():
            ids = PerceiverARConfig.load(self.path).vocab_size
            require(
                ids == codec.vocab_size,
                f"{self.path}: codec.json has {codec.vocab_size:,} ids, but vocab_size in config.json is {ids:,}: take "
                "both files from the same run",
            )
        return codec

    def codec_if_any(self) -> Codec | None:
        """None without codec.json (a converted checkpoint whose codec is unknown). Else as `codec`, with its errors."""
        return self.codec() if (self.path / "codec.json").exists() else None

    def codec_name(self) -> str | None:
        """The codec's name, without loading the codec; None if it is unknown."""
        try:
            return str(json.loads((self.path / "codec.json").read_text(encoding="utf-8"))["codec"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def infills(self, codec: Codec) -> bool:
        """Whether the model was trained to infill bars."""
        return codec.has_bars and (not self.recipe_file.exists() or self.recipe().data.augment)

    def conditions(self) -> dict[str, list[str] | int]:
        """`Codec.conditions` that the run was trained with, without loading the codec; {} if unknown."""
        try:
            return dict(json.loads((self.path / "codec.json").read_text(encoding="utf-8"))["conditions"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def summary(self) -> dict[str, Any] | None:
        """The content of `summary.json`; None before the run is finished. Of older runs that ran out of patience, it
        gets their `ended_by`. Raises InputError if it is damaged."""
        try:
            summary = json.loads(self.summary_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (json.JSONDecodeError, UnicodeDecodeError):
            summary = None
        if not isinstance(summary, dict) or "steps" not in summary:
            raise InputError(f"{self.summary_file} is damaged: delete it and resume the run")
        if self.stopped_file.exists():
            summary.setdefault("ended_by", "patience")  # older runs keep this end in that file only
        return summary
