"""perceiver-ar train."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace, set_parsing_settings

from perceiver_ar.cli.options import add_paths, make_parser, names, parse
from perceiver_ar.config import BEFORE, PRESETS, Recipe, load_yaml, names_all
from perceiver_ar.errors import InputError, require

SHOWN = (
    *("help", "config", "resume", "preset", "out", "init_from", "max_time", "max_steps", "modality"),
    *("model.context_length", "model.num_latents", "model.dim", "model.num_layers", "model.num_heads"),
    *("data.bpe_vocab_size", "data.split_on", "trainer.batch_size", "trainer.device"),
)
"""The options in `--help`: enough for most runs."""

SAME_MODEL = "--resume goes on with the same model"


def train_verb(argv: list[str]) -> None:
    parser = make_parser(
        "train",
        "[PATH...] --out RUN",
        "Trains a Perceiver AR on files and makes a run directory.",
        "  perceiver-ar train books/ --out runs/books --max_time 1h\n"
        "  perceiver-ar train corpus.txt.xz --data.split_on '\\n\\n\\n\\n' --out runs/corpus --max_steps 2000\n"
        "  perceiver-ar train stories.parquet --data.column story --out runs/stories     (each row is a document)\n"
        "  perceiver-ar train letters/ --data.conditions letters/about.csv --out runs/letters      (author, year)\n"
        "  perceiver-ar train 'shards/*.tar' --out runs/shards      (WebDataset: members KEY.txt, KEY.mid, ...)\n"
        "  perceiver-ar train hf://datasets/roneneldan/TinyStories --data.max_bytes 1000000000 --out runs/tiny\n"
        "  perceiver-ar train --out runs/books --resume            (go on where it stopped)\n"
        "  perceiver-ar train letters/ --init_from runs/books --out runs/letters --max_time 10m     (fine-tune a run)\n"
        "  perceiver-ar train letters/ --init_from runs/books --adapter lora --out runs/letters     (an adapter alone)",
    )
    add_paths(
        parser,
        "files, folders, patterns, - for standard input, hf://datasets/OWNER/NAME; also .gz .xz .bz2 .zst, .jsonl .csv "
        ".parquet .arrow with a document in each row, .tar with a document in each sample; none: Python's source",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, exactly where it stopped")
    parser.add_argument(
        "--find_batch", action="store_true", help="choose the largest trainer.micro_batch_size that the memory holds"
    )
    parser.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="start the --model settings from a size (laptop, gpu) or from a published network",
    )
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the docstrings of the settings are the help
    parser.add_class_arguments(Recipe, skip={"paths"})
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # for the defaults of the others
    early.add_argument("--config", nargs="?", action="append", default=[])
    for name in ("--out", "--preset", "--init_from"):
        early.add_argument(name, nargs="?")
    given, _ = early.parse_known_args(argv)
    resuming, from_files = "--resume" in argv, dict[str, Any]()
    if resuming:
        from perceiver_ar.run import Run

        require(given.out is not None, "--resume needs the run to go on with: give --out RUN")
        for name, reason in (("preset", SAME_MODEL), ("init_from", "--resume goes on with the run's own weights")):
            if getattr(given, name) is not None:
                raise InputError(f"{reason}, so --{name} changes nothing: leave it out")
        run = Run.open(os.path.expanduser(given.out))
        run.recipe()  # raises a clear InputError if it is unusable
        argv = ["--config", str(run.recipe_file), *argv]
        from_files |= run.recipe_dict()
    for config_file in filter(None, given.config):
        found = settings_in(Path(os.path.expanduser(config_file)))
        if resuming:  # the run's recipe has the rest
            if found.get("preset") is not None:
                print(f"preset in {config_file} changes nothing: {SAME_MODEL}", file=sys.stderr)
            found = {"paths": found["paths"]} if "paths" in found else {}
        from_files |= found
    for group, before in BEFORE.items():
        if resuming or names_all(group, from_files.get(group)):
            parser.set_defaults({f"{group}.{name}": value for name, value in before.items()})
    preset = given.preset or from_files.get("preset")
    if preset is not None:
        if names_all("model", from_files.get("model")):
            raise InputError("leave out the preset: the --config file has every setting of the network")
        if not isinstance(preset, str) or preset not in PRESETS:
            raise InputError(f"there is no preset {preset!r}: choose one of {', '.join(PRESETS)}")
        parser.set_defaults({f"model.{name}": value for name, value in PRESETS[preset].items()})
    init_from, origin = given.init_from or from_files.get("init_from"), None
    if init_from and isinstance(init_from, str) and not resuming:
        from perceiver_ar.origin import Origin

        require(
            preset is None,
            "--init_from takes the network of a run, so --preset changes nothing: leave out one of them",
        )
        origin = Origin.open(os.path.expanduser(init_from))
        parser.set_defaults(origin.settings())  # then a setting that differs was given by the user
    for name in ("resume", "find_batch"):
        if from_files.get(name):
            raise InputError(f"the --config file sets {name}, which only the command line can: give --{name} there")
    parsed = parse(parser, argv, SHOWN)
    for group in ("model", "data", "optim", "trainer"):
        if not isinstance(parsed[group], Namespace):
            raise InputError(f"{group} is {parsed[group]!r}: it must be a group of settings, as in recipe.yaml")
    settings = parser.instantiate(parsed).as_dict()
    for name in ("config", "preset"):
        settings.pop(name)
    resume, find_batch = settings.pop("resume"), settings.pop("find_batch")
    # The parser does not take positional arguments from files.
    settings["paths"] = names(settings["paths"] or from_files.get("paths"))
    recipe = Recipe(**settings)
    if origin is not None:
        origin.check(recipe)

    from perceiver_ar.training.main import train

    summary = train(recipe, resume=resume, find_batch=find_batch)
    if summary:  # empty on all ranks but the first
        print(json.dumps(summary, indent=2))


def settings_in(file: Path) -> dict[str, Any]:
    """The settings in a --config file; {} if the file is missing or holds none, which the parser reports."""
    if not file.is_file():
        return {}
    try:
        settings = load_yaml(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        raise InputError(f"--config {file} is not YAML: give a file of settings") from None
    return settings if isinstance(settings, dict) else {}
