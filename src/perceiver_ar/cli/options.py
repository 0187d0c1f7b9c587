"""Shared by the verbs: the parser, and plain messages about options."""

import argparse
import os
import re
from collections.abc import Collection
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_dumper, set_loader

from perceiver_ar.config import dump_yaml, load_yaml, unknown_words
from perceiver_ar.errors import InputError

PATHS = ("out", "against", "file", "picture", "run", "checkpoint", "init_from", "base", "prompt_file", "soundfont",
         "data.tokenizer", "data.conditions", "conditions", "data.audio_weights", "settings")  # fmt: skip
"""Options that name a file or folder; ~ is the home directory, as in the paths to train on."""

set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))
set_dumper("yaml", dump_yaml)


def parse(parser: ArgumentParser, argv: list[str], shown: Collection[str] = ()) -> Namespace:
    """Parses `argv`. `--help` shows the options in `shown` (empty: all), `--help=all` shows all.

    Raises InputError for an unknown option or an invalid value.
    """
    if "--help=all" in argv:
        argv = ["--help"]
    elif shown and {"--help", "-h"} & {*argv}:
        hide_others(parser, shown)
    take_text_as_it_is(parser)
    refuse_comments(parser, argv)
    try:
        args = parser.parse_args(argv)
    except argparse.ArgumentError as error:
        message = plain(" ".join(str(error).split()), list(parser.get_defaults().keys(branches=True)))
        raise InputError(f"{message}; {parser.prog} --help=all shows the options") from None
    for name in PATHS:
        if isinstance(path := args.get(name), str):
            args[name] = os.path.expanduser(path)
    return args


def hide_others(parser: ArgumentParser, shown: Collection[str]) -> None:
    """Hides all options but those in `shown` from the help."""
    hidden = 0
    for action in parser._actions:
        if action.option_strings and action.dest not in shown:
            action.help = argparse.SUPPRESS
            hidden += 1
    for group in parser._action_groups:
        group.description = None
        if all(action.help is argparse.SUPPRESS for action in group._group_actions):
            group.title = None
    parser.epilog = f"--help=all shows {hidden} more."


def refuse_comments(parser: ArgumentParser, argv: list[str]) -> None:
    """Raises InputError if a number or choice contains #: the parser reads it as YAML and drops the comment."""
    kinds = {name: getattr(action, "_typehint", None) for action in parser._actions for name in action.option_strings}
    for word, following in zip(argv, [*argv, ""][1:], strict=True):
        option, equals, value = word.partition("=")
        value, kind = value if equals else following, kinds.get(option)
        parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        choices = {get_args(part)[0] if get_origin(part) is Annotated else part for part in parts}
        simple = get_origin(kind) is Literal or choices <= {int, float, bool, type(None)}
        if kind is not None and simple and "#" in value:
            raise InputError(f"{option} is {value!r}: give the value without #")


def take_text_as_it_is(parser: ArgumentParser) -> None:
    """Makes `str | None` options plain text. An option that is not given, or null in a file, is still None.

    The parser reads the value of a union type as YAML first, even if a file quotes it. In YAML `# text`, `~` and
    `null` are null, so the text would be lost.
    """
    for action in parser._actions:
        if getattr(action, "_typehint", None) == (str | None):
            action._typehint = str  # pyright: ignore[reportAttributeAccessIssue]


UNKNOWN = re.compile(
    r"unrecognized arguments: (?P<option>-{1,2}[\w.-]+)|Option '(?P<setting>[\w.]+)' is not accepted"
    r"|Group '(?P<group>[\w.]+)' does not accept option '(?P<name>[\w.]+)'"
)
WRONG_TYPE = re.compile(
    r'Parser key "(?P<option>[^"]+)": '
    r"(?:.* Subtypes: |Expected a )(?P<kinds>.+?)(?: Errors: .* Given value|\. Got value): (?P<value>.*)"
)
TYPES = {
    "NoneType": "left out",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "tuple": "a list as [1,2]",
}


def plain(message: str, known: list[str]) -> str:
    """Rewrites the parser's message about an option that is not `known` or has a value of the wrong type."""
    if match := UNKNOWN.match(message):
        name = match["option"] or match["setting"] or f"{match['group']}.{match['name']}"
        known = [f"--{other}" for other in known] if match["option"] else known
        file = "" if name.startswith("--") or not match["option"] else f"; if it is a file, write ./{name}"
        return f"there is no option {unknown_words([name], known)}{file}"
    if match := re.fullmatch(r"argument (--[\w.-]+): expected one argument", message):
        return f"{match[1]} has no value; one that begins with a dash needs an equals sign, as in {match[1]}=-x"
    message = message.replace('Parser key "config": ', "--config: ")
    if not (match := WRONG_TYPE.fullmatch(message)):
        return message
    kinds = ["".join(found) for found in re.findall(r"'(\w+)'|(tuple)\[|Annotated\[(\w+)", match["kinds"])]
    if not kinds:
        return message
    if match["option"] in ("max_time", "trainer.checkpoint_every") and match["value"].isdecimal():
        return f"--{match['option']} is {match['value']}: give a unit, as in {match['value']}s"
    hint = " (in a file, put it in quotes)" if "str" in kinds else ""
    return f"--{match['option']} is {match['value']}: it must be {' or '.join(TYPES.get(k, k) for k in kinds)}{hint}"


class Formatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of descriptions; shows each option's type, bounds and default."""

    def _expand_help(self, action: argparse.Action) -> str:
        return re.sub(
            r"Annotated\[(int|float), (.+?)\](?=, default| \||\]|\))", r"\1, \2", super()._expand_help(action)
        )


def make_parser(verb: str, arguments: str, description: str, examples: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"perceiver-ar {verb}",
        usage=f"perceiver-ar {verb} {arguments} [OPTION...]",
        description=f"{description}\n\nexamples:\n{examples}",
        formatter_class=Formatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    what = "settings, such as another run's recipe.yaml" if verb == "train" else "options; options after it win"
    parser.add_argument("--config", action="config", help=f"a YAML file of {what}")
    return parser


def add_paths(parser: ArgumentParser, help: str) -> None:
    action = parser.add_argument("paths", nargs="*", help=help)
    action.required = False  # pyright: ignore[reportOptionalMemberAccess]  # else the help marks it as required


def add_documents(parser: ArgumentParser, otherwise: str) -> None:
    """A run and the documents that evaluate, score and embed read; `otherwise`: those without paths."""
    parser.add_argument("run", type=str, help="a run directory")
    add_paths(parser, f"files as for train; none: {otherwise}")
    help = "the table of the files' conditions, as data.conditions of train (default: unknown)"
    parser.add_argument("--conditions", type=str | None, help=help)


def add_scoring(parser: ArgumentParser) -> None:
    """The options of evaluate and score for how documents are scored."""
    parser.add_argument("--stride", type=int | None, help="tokens from window to window; 1 is exact and slow "
                        "(default: half the latents)")  # fmt: skip
    parser.add_argument("--num_latents", type=int | None, help="latents per window (default: as trained)")
    parser.add_argument("--batch_size", type=int, default=8, help="windows per forward")
    parser.add_argument("--precision", choices=["32", "bf16"], default="32", help="of the computation")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def names(paths: Any, option: str = "paths") -> tuple[str, ...]:
    """The paths, or the texts of another option, as a tuple; a --config file may give one, several or none."""
    found = (paths,) if isinstance(paths, str) else paths or ()
    if not isinstance(found, list | tuple) or not all(isinstance(path, str) for path in found):
        what = "names of files or folders" if option == "paths" else "a text, or a list of texts"
        raise InputError(f"{option} is {paths!r}: it must be {what}")
    return tuple(found)
