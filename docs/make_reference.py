"""Writes docs/settings.md from the docstrings of the settings, and docs/commands.md from the command's own help.

python docs/make_reference.py
"""

import dataclasses
import io
import json
import os
import re
from contextlib import redirect_stdout, suppress
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser

from perceiver_ar import InputError
from perceiver_ar.cli import USAGE, main
from perceiver_ar.config import PRESETS, DataConfig, OptimConfig, PerceiverARConfig, Recipe, TrainerConfig

GROUPS: dict[str, tuple[type, str]] = {
    "": (Recipe, "The run"),
    "model.": (PerceiverARConfig, "The network"),
    "data.": (DataConfig, "The data"),
    "optim.": (OptimConfig, "The learning rule"),
    "trainer.": (TrainerConfig, "The course of a run"),
}
VERBS: list[str] = re.findall(r"^  (\w+) ", USAGE, flags=re.MULTILINE)
NOTE = "<!-- Written by docs/make_reference.py; `make docs` runs it. -->\n"


def settings_page() -> str:
    parts = [
        f"# Settings\n\n{NOTE}\n"
        "Every setting of a run, with its default and the values that it takes. Write it\n\n"
        "- on the command line: `perceiver-ar train books/ --out runs/books --model.dim 256`,\n"
        "- in a file for `--config`, or in a run's `recipe.yaml`: `dim: 256` under `model:`,\n"
        '- in Python: `Recipe(out="runs/books", model=PerceiverARConfig(dim=256))`.\n\n'
        "`null` is None in Python. Options on the command line win over those in a file. A setting that does not "
        "exist, or a value that cannot work, is refused before anything is trained.\n"
    ]
    for prefix, (kind, title) in GROUPS.items():
        lead = " ".join((kind.__doc__ or "").split())
        parts.append(f"## {title}\n\n{lead}\n\n{table(kind, prefix)}")
    parts.append(presets())
    return "\n".join(parts)


def table(kind: type, prefix: str) -> str:
    """A row for each setting of a dataclass."""
    hints = get_type_hints(kind)
    words = {entry.args[1]: entry.description or "" for entry in docstring_parser.parse_from_object(kind).params}
    rows = ["| setting | default | values | meaning |", "|---|---|---|---|"]
    for entry in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[entry.name]):
            continue  # a group has a table of its own
        assert words.get(entry.name), f"{kind.__name__}.{entry.name} has no docstring"
        cells = [f"`{prefix}{entry.name}`", shown(entry.default), values(kind, entry.name, hints[entry.name])]
        rows.append("| " + " | ".join([*cells, cell(words[entry.name])]) + " |")
    return "\n".join(rows) + "\n"


def cell(text: str) -> str:
    """Text that Markdown shows as it is, in one line of a table."""
    text = " ".join(text.split()).replace("|", "\\|")
    pieces = text.split("`")
    pieces[::2] = [
        piece.replace("\\n", "\\\\n").replace("*", "\\*").replace("_", "\\_").replace("<", "&lt;")
        for piece in pieces[::2]
    ]
    return "`".join(pieces)


def shown(value: Any) -> str:
    """A value as one writes it in YAML."""
    text = json.dumps(value)
    return f"`{text[1:-1] if isinstance(value, str) and value else text}`"


def values(kind: type, name: str, hint: Any) -> str:
    """The values that a setting takes: its type or choices, and the bounds that its error messages state."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    bounds = [refusal(kind, name, value) for value in (-1, 10**9)] if {int, float} & {*members, *get_args(hint)} else []
    return ", ".join([" or ".join(map(type_words, members)), *dict.fromkeys(filter(None, bounds))])


def type_words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        return f"list of {type_words(kinds[0])}s" if ... in kinds else f"{len(kinds)} {type_words(kinds[0])}s"
    words = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`", type(None): "`null`"}
    return words[hint]


def refusal(kind: type, name: str, value: Any) -> str | None:
    """The bound in the error message, if the settings refuse this value by itself."""
    hint = get_type_hints(kind)[name]
    if get_origin(hint) is tuple:
        value = (value,) * (1 if ... in get_args(hint) else len(get_args(hint)))
    try:
        kind(**{name: value, **({"out": "run"} if kind is Recipe else {})})
    except InputError as error:
        if rule := re.search(r" must (?:be )?(\w[^:]*)", str(error)):
            return re.sub(r", (or|the) .*", "", rule[1]).replace("not be", "not")
    return None


def presets() -> str:
    """The presets: settings that differ from the defaults."""
    names = [name for name in PRESETS if PRESETS[name]]
    rows = [
        "## Presets\n",
        "`--preset NAME` (in a file: `preset: NAME`) starts the settings of the network from those of a size or of a "
        "published network. Settings that you give override it.\n",
    ]
    rows += ["| setting | " + " | ".join(f"`{name}`" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for setting in dict.fromkeys(setting for name in names for setting in PRESETS[name]):
        cells = [shown(PRESETS[name][setting]) if setting in PRESETS[name] else "" for name in names]
        rows.append("| " + " | ".join([f"`model.{setting}`", *cells]) + " |")
    return "\n".join(rows) + "\n"


def commands_page() -> str:
    parts = [f"# Commands\n\n{NOTE}\n```text\n{USAGE}\n```\n"]
    for verb in VERBS:
        text = help_of(verb).split(f"\n{summary(Recipe)}")[0].rstrip()
        parts.append(f"## {verb}\n\n```text\n{text}\n```\n")
        if verb == "train":
            parts.append(
                "`--help` shows the most important options, `--help=all` all: "
                "every one of the [settings](settings.md) is an option of `train`.\n"
            )
    parts.append(
        "## Exit status\n\n"
        "| status | meaning |\n|---|---|\n| 0 | done |\n"
        "| 2 | a failure that you can repair, such as wrong input, a full disk or training that diverges; one line "
        "names it, its place and the remedy |\n"
        "| 1 | any other failure, with its traceback; or another process of the run has died |\n"
        "| 130 | interrupted |\n\n"
        "Results go to standard output, progress and messages to standard error.\n"
    )
    return "\n".join(parts)


def summary(kind: type) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0].rstrip(".")


def help_of(verb: str) -> str:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    printed = io.StringIO()
    try:
        with redirect_stdout(printed), suppress(SystemExit):
            main([verb, "--help=all"])
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    return re.sub(".\b", "", printed.getvalue())  # the parser erases a space this way


PAGES = {"settings.md": settings_page, "commands.md": commands_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (Path(__file__).parent / name).write_text(page(), encoding="utf-8")
