"""The command: verbs to functions. Results go to stdout, progress and messages to stderr.

Exit status: 0 done; 2 something that the user can mend (wrong input, a full disk, training that diverges), and one line
says what, where and what to do; 1 any other failure, with its traceback; 130 interrupted.
"""

import argparse
import errno
import io
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import yaml
from jsonargparse import (
    ArgumentParser,
    DefaultHelpFormatter,
    Namespace,
    set_dumper,
    set_loader,
    set_parsing_settings,
)

from perceiver_ar.config import BEFORE, PRESETS, Recipe, dump_yaml, load_yaml, names_all, unknown_words
from perceiver_ar.costs import costs
from perceiver_ar.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from perceiver_ar.data.codec import Codec
    from perceiver_ar.evaluation import Evaluation
    from perceiver_ar.generation import Step
    from perceiver_ar.run import Run

USAGE = """usage: perceiver-ar VERB ...

Perceiver AR on your own files: train, see how good it is, generate.

  train [PATH...] --out RUN     make a run: a directory with a trained model
  evaluate RUN [PATH...]        bits per byte on files, or on what the run held out
  generate RUN                  let the model write
  info RUN                      what a run is, and what it costs
  convert FORMAT CHECKPOINT --out RUN     another implementation's checkpoint becomes a run
  export FORMAT RUN --out PATH            and back; or for Hugging Face transformers, or as ONNX
  push RUN OWNER/NAME           a run goes to the Hugging Face Hub

perceiver-ar VERB --help has all options and examples."""


PATHS = ("out", "run", "checkpoint", "prompt_file", "soundfont", "data.tokenizer", "data.audio_weights", "settings")
"""Options that name a file or folder; ~ is the home directory, as in the paths to train on."""

set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))
set_dumper("yaml", dump_yaml)


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: the next file that is opened would take its place
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may not be UTF-8
    verbs: dict[str, Callable[[list[str]], None]] = {
        "train": train_verb,
        "evaluate": evaluate_verb,
        "generate": generate_verb,
        "info": info_verb,
        "convert": convert_verb,
        "export": export_verb,
        "push": push_verb,
    }
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries, to their callers: to us, not to the user
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(USAGE)
            return 0 if argv else 2
        if argv[0] == "--version":
            from perceiver_ar import __version__

            print(__version__)
            return 0
        if argv[0] not in verbs:
            raise InputError(f"there is no verb {argv[0]!r}: use {', '.join(verbs)}")
        verbs[argv[0]](argv[1:])
        return 0
    except InputError as error:
        complain(" ".join(str(error).split()))
        return 2
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.strerror is None:
            raise
        remedy = {errno.ENOSPC: "free some space", errno.EACCES: "change its mode or choose another place"}
        place = f": {error.filename}" if error.filename else ""
        complain(
            f"{error.strerror}{place}; {remedy.get(error.errno or 0, 'choose another place, or look at the disk')}"
        )
        return 2
    except KeyboardInterrupt as error:
        complain(str(error) or "interrupted")
        return 130


def parse(parser: ArgumentParser, argv: list[str]) -> Namespace:
    """The options. Raises InputError for what they cannot be."""
    take_text_as_it_is(parser)
    refuse_comments(parser, argv)
    try:
        args = parser.parse_args(argv)
    except argparse.ArgumentError as error:
        message = plain(" ".join(str(error).split()), list(parser.get_defaults().keys(branches=True)))
        raise InputError(f"{message}; {parser.prog} --help has all options") from None
    for name in PATHS:
        if isinstance(path := args.get(name), str):
            args[name] = os.path.expanduser(path)
    return args


def refuse_comments(parser: ArgumentParser, argv: list[str]) -> None:
    """Raises InputError for a number or choice with a #. The parser reads these as YAML, where a comment follows."""
    kinds = {name: getattr(action, "_typehint", None) for action in parser._actions for name in action.option_strings}
    for word, following in zip(argv, [*argv, ""][1:], strict=True):
        option, equals, value = word.partition("=")
        value, kind = value if equals else following, kinds.get(option)
        simple = get_origin(kind) is Literal or set(get_args(kind) or [kind]) <= {int, float, bool, type(None)}
        if kind is not None and simple and "#" in value:
            raise InputError(f"{option} is {value!r}: give the value without #")


def take_text_as_it_is(parser: ArgumentParser) -> None:
    """Makes `str | None` options plain text; one that is not given, or null in a file, is None all the same.

    The parser reads the values of a union as YAML first, also those that a file quotes. In YAML `# text`, `~` and
    `null` are nothing, so the text would be lost.
    """
    for action in parser._actions:
        if getattr(action, "_typehint", None) == (str | None):
            action._typehint = str  # pyright: ignore[reportAttributeAccessIssue]


UNKNOWN = re.compile(
    r"unrecognized arguments: (?P<option>--[\w.-]+)|Option '(?P<setting>[\w.]+)' is not accepted"
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
    """A message in our words where the parser says in its own that there is no such option, of those `known`, or that
    a value is of the wrong type."""
    if match := UNKNOWN.match(message):
        name = match["option"] or match["setting"] or f"{match['group']}.{match['name']}"
        known = [f"--{other}" for other in known] if match["option"] else known
        return f"there is no option {unknown_words([name], known)}"
    if match := re.fullmatch(r"argument (--[\w.-]+): expected one argument", message):
        return f"{match[1]} has no value; one that begins with a dash needs an equals sign, as in {match[1]}=-x"
    message = message.replace('Parser key "config": ', "--config: ")
    match = WRONG_TYPE.fullmatch(message)
    kinds = [] if match is None else ["".join(found) for found in re.findall(r"'(\w+)'|(tuple)\[", match["kinds"])]
    if match is None or not kinds:
        return message
    if match["option"] in ("max_time", "trainer.checkpoint_every") and match["value"].isdecimal():
        return f"--{match['option']} is {match['value']}: give a unit, as in {match['value']}s"
    return f"--{match['option']} is {match['value']}: it must be {' or '.join(TYPES.get(k, k) for k in kinds)}"


def complain(message: str) -> None:
    print(f"perceiver-ar: {message}", file=sys.stderr)


class Formatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line ends of our descriptions; says each option's type and default."""


def make_parser(verb: str, arguments: str, description: str, examples: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"perceiver-ar {verb}",
        usage=f"perceiver-ar {verb} {arguments} [OPTION...]",
        description=f"{description}\n\nexamples:\n{examples}",
        formatter_class=Formatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    what = "settings, such as another run's recipe.yaml" if verb == "train" else "options; those after it win"
    parser.add_argument("--config", action="config", help=f"a YAML file of {what}")
    return parser


def add_paths(parser: ArgumentParser, help: str) -> None:
    action = parser.add_argument("paths", nargs="*", help=help)
    action.required = False  # pyright: ignore[reportOptionalMemberAccess]  # or the help would say that it is


def names(paths: Any) -> tuple[str, ...]:
    """The paths given, as a --config file may have them: one, several or none."""
    found = (paths,) if isinstance(paths, str) else paths or ()
    if not isinstance(found, list | tuple) or not all(isinstance(path, str) for path in found):
        raise InputError(f"paths is {paths!r}: it must be names of files or folders")
    return tuple(found)


def train_verb(argv: list[str]) -> None:
    parser = make_parser(
        "train",
        "[PATH...] --out RUN",
        "Trains a Perceiver AR on files and makes a run directory.",
        "  perceiver-ar train books/ --out runs/books --max_time 1h\n"
        "  perceiver-ar train corpus.txt.xz --data.split_on '\\n\\n\\n\\n' --out runs/corpus --max_steps 2000\n"
        "  perceiver-ar train src/ --out runs/code --model.context_length 8192 --model.dim 256 --model.num_heads 4\n"
        "  perceiver-ar train stories.parquet --data.column story --out runs/stories     (a document each row)\n"
        "  perceiver-ar train --out runs/python --max_time 5m      (Python's own source)\n"
        "  perceiver-ar train --out runs/books --resume            (go on where it stopped)",
    )
    add_paths(
        parser,
        "files, folders, patterns, - for standard input; also .gz .xz .bz2 .zst, and .jsonl .csv .parquet .arrow, of "
        "which each row is a document; none: Python's source",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, exactly where it stopped")
    parser.add_argument(
        "--find_batch", action="store_true", help="choose the largest trainer.micro_batch_size that the memory holds"
    )
    parser.add_argument("--preset", choices=list(PRESETS), help="start the --model settings from a published network")
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the settings' own words are the help
    parser.add_class_arguments(Recipe, skip={"paths"})
    if preset := option_value(argv, "--preset"):
        if preset not in PRESETS:
            raise InputError(f"there is no preset {preset!r}: choose one of {', '.join(PRESETS)}")
        parser.set_defaults({f"model.{name}": value for name, value in PRESETS[preset].items()})

    from_files: dict[str, Any] = {}
    if "--resume" in argv:
        from perceiver_ar.run import Run

        out = option_value(argv, "--out")
        if out is None:
            raise InputError("--resume needs the run to go on with: give --out RUN")
        if preset is not None:
            raise InputError("--resume goes on with the same model, so --preset changes nothing: leave it out")
        run = Run.open(os.path.expanduser(out))
        run.recipe()  # says clearly what is wrong with it, if anything is
        argv = ["--config", str(run.recipe_file), *argv]
        from_files |= run.recipe_dict()
    elif (config_file := os.path.expanduser(option_value(argv, "--config") or "")) and Path(config_file).is_file():
        try:
            loaded = load_yaml(Path(config_file).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            raise InputError(f"--config {config_file} is not YAML: give a file of settings") from None
        from_files |= loaded if isinstance(loaded, dict) else {}
    for group, before in BEFORE.items():
        if "--resume" in argv or names_all(group, from_files.get(group)):
            parser.set_defaults({f"{group}.{name}": value for name, value in before.items()})
    for name in ("preset", "resume", "find_batch"):
        if from_files.get(name):
            raise InputError(f"the --config file sets {name}, which only the command line can: give --{name} there")
    parsed = parse(parser, argv)
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

    from perceiver_ar.training import train

    summary = train(recipe, resume=resume, find_batch=find_batch)
    if summary:  # of several processes the first one has it
        print(json.dumps(summary, indent=2))


def option_value(argv: list[str], option: str) -> str | None:
    """The last value of an option that must be known before parsing; None if it is not there."""
    found = None
    for i, word in enumerate(argv):
        if word == option and i + 1 < len(argv):
            found = argv[i + 1]
        elif word.startswith(option + "="):
            found = word[len(option) + 1 :]
    return found


def evaluate_verb(argv: list[str]) -> None:
    parser = make_parser(
        "evaluate",
        "RUN [PATH...]",
        "Scores every token of files exactly once, each with as much context as there is.",
        "  perceiver-ar evaluate runs/books new_book.txt\n"
        "  perceiver-ar evaluate runs/books                        (the documents it held out)\n"
        "  perceiver-ar evaluate runs/books --context_lengths 256,1024,4096\n"
        "  perceiver-ar evaluate runs/books new_book.txt --json",
    )
    parser.add_argument("run", type=str, help="a run directory")
    add_paths(parser, "files as for train; none: what the run held out")
    parser.add_argument("--stride", type=int | None, help="tokens from window to window; 1 is exact and slow "
                        "(default: half the latents)")  # fmt: skip
    parser.add_argument("--num_latents", type=int | None, help="latents per window (default: as trained)")
    parser.add_argument(
        "--context_lengths", type=str | None, help="a table, a CSV and a plot for these context lengths"
    )
    parser.add_argument("--max_tokens", type=int | None, help="score only so many tokens from the start")
    parser.add_argument("--batch_size", type=int, default=8, help="windows at once")
    parser.add_argument("--precision", choices=["32", "bf16"], default="32", help="of the computation")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parse(parser, argv)
    lengths = parse_lengths(args.context_lengths)

    import tempfile

    from perceiver_ar.evaluation import compressors, evaluate, evaluate_context_lengths
    from perceiver_ar.run import Run

    run = Run.open(args.run)
    model, codec = to_device(run.model()), run.codec()
    with tempfile.TemporaryDirectory(prefix="perceiver-ar-") as scratch:
        tokens = tokens_to_score(run, codec, names(args.paths), Path(scratch))
        options: dict[str, Any] = {"num_latents": args.num_latents, "byte_lengths": codec.byte_lengths()}
        options |= {"amounts": codec.amounts, "document_length": codec.document_length}
        options |= {"max_tokens": args.max_tokens, "batch_size": args.batch_size, "precision": args.precision}
        options |= {"stride": args.stride, "progress": show_scored if sys.stderr.isatty() else None}
        if lengths is None:
            results = [evaluate(model, tokens, **options)]
            print(json.dumps(results[0].to_dict()) if args.json else describe(results[0]))
            return
        results = evaluate_context_lengths(model, tokens, lengths, **options)
        references = compressors(codec, tokens[max(lengths) :][: results[0].tokens])
    show_context_table(run, results, references, args.json)


def show_scored(done: int, total: int) -> None:
    print(f"\rscored {done:,} of {total:,} tokens", end="\n" if done == total else "", file=sys.stderr, flush=True)


def parse_lengths(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise InputError(f"--context_lengths is {text!r}: write numbers with commas between, as in 256,1024") from None


def tokens_to_score(run: "Run", codec: "Codec", paths: tuple[str, ...], scratch: Path) -> "np.ndarray":
    from perceiver_ar.data.rows import find_rows
    from perceiver_ar.data.sources import find_files
    from perceiver_ar.data.tokens import TokenFile, prepare

    if paths:
        recipe = run.recipe() if run.recipe_file.exists() else Recipe(out=str(run.path))
        split_on = recipe.data.split_on
        sources = find_files(paths)
        if codec.writes_text and recipe.modality != "bytes":
            sources = find_rows(sources, recipe.data.column)
        try:
            tokens, _ = prepare(sources, codec, scratch, validation_fraction=0.0, split_on=split_on, progress=False)
        except InputError as error:
            raise InputError(of_trained(str(error))) from None
        return tokens.tokens
    if not (run.tokens / "validation.json").exists():
        raise InputError(f"{run.path} held nothing out: name the files to evaluate")
    return TokenFile.open(run.tokens / "validation").tokens


def describe(result: "Evaluation") -> str:
    error = "" if result.standard_error is None else f" +- {result.standard_error:.4f}"
    lines = [] if result.bits_per_byte is None else [f"bits per byte    {result.bits_per_byte:.4f}"]
    lines += [
        f"bits per token   {result.bits_per_token:.4f}",
        f"nats per token   {result.nats_per_token:.4f}{error}",
        f"perplexity       {result.perplexity:.3f}",
        f"tokens scored    {result.tokens:,}",
    ]
    for unit in (unit for unit, amount in result.amounts.items() if amount > 0):
        lines.append(
            f"{'per ' + unit:<17}{result.nats_per(unit):.4f} nats, {result.bits_per(unit):.4f} bits "
            f"({amount_words(result.amounts[unit])} {unit}s)"
        )
    return "\n".join(lines)


def amount_words(amount: float) -> str:
    return f"{amount:,.0f}" if amount >= 100 or amount == round(amount) else f"{amount:.3g}"


def show_context_table(run: "Run", results: "list[Evaluation]", references: dict[str, float], as_json: bool) -> None:
    from perceiver_ar.evaluation import write_table
    from perceiver_ar.plots import plot_context

    if as_json:
        print(json.dumps({"context_lengths": [result.to_dict() for result in results]}))
    else:
        print(f"{'context':>9}  {'bits per byte':>13}  {'bits per token':>14}")
        for result in results:
            per_byte = "" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
            print(f"{result.context_length:>9,}  {per_byte:>13}  {result.bits_per_token:>14.4f}")
        for name, bits in references.items():
            print(f"{name:>9}  {bits:>13.4f}")
    write_table(run.plots / "context.csv", results)
    plot_context(run.plots / "context.png", results, references)
    print(f"table and plot: {run.plots / 'context.csv'}, {run.plots / 'context.png'}", file=sys.stderr)


def generate_verb(argv: list[str]) -> None:
    parser = make_parser(
        "generate",
        "RUN",
        "Lets the model of a run write, and shows it as it is drawn; music, pictures and sound become files.",
        "  perceiver-ar generate runs/books --prompt 'Call me'\n"
        "  perceiver-ar generate runs/code --prompt_file start.py --max_new_tokens 2000 --top_p 0.95\n"
        "  perceiver-ar generate runs/books --stop '\\n\\n' --seed 1 --out sample.txt\n"
        "  perceiver-ar generate runs/piano --prompt_file prelude.mid --keep 500 --max_new_tokens 1000 --out new.mid",
    )
    parser.add_argument("run", type=str, help="a run directory")
    parser.add_argument("--prompt", type=str | None, help="text to go on from; for pictures the name of a class")
    parser.add_argument("--prompt_file", type=str | None, help="a file to go on from, - for standard input")
    parser.add_argument("--keep", type=float | None, help="go on from the first so many tokens of the prompt file, or "
                        "from a share of them below 1 (default: all; of a picture half)")  # fmt: skip
    parser.add_argument("--max_new_tokens", type=int | None, help="how many tokens to draw (default: 256, or the rest "
                        "of a picture)")  # fmt: skip
    parser.add_argument("--samples", type=int | None, help="how many continuations (default: 1; of a picture 4)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 always takes the likeliest token")
    parser.add_argument("--top_k", type=int | None, help="draw from so many likeliest tokens only")
    parser.add_argument("--top_p", type=float | None, help="draw from the likeliest tokens that hold this share")
    parser.add_argument("--min_p", type=float | None, help="draw from tokens at least so likely as a share of the best")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 makes used tokens less likely")
    parser.add_argument(
        "--frequency_penalty", type=float, default=0.0, help="taken from a token's logit per earlier use"
    )
    parser.add_argument("--stop", type=str | None, help="end a text once this was written")
    parser.add_argument("--ignore_end", action="store_true", help="go on where a document ends, with a new one")
    parser.add_argument(
        "--refill_latents", type=int | None, help="latents to go on with when all are used (default: half)"
    )
    parser.add_argument("--compile", action="store_true", help="half a minute first, then faster tokens")
    parser.add_argument("--max_autotune", action="store_true", help="the same with kernels tried out for this machine: "
                        "a minute first, pays from some ten thousand tokens on")  # fmt: skip
    parser.add_argument("--slide", action="store_true", help="drop the oldest latent instead: constant time a token, "
                        "but what it knew lives on in the others: logits of no single forward")  # fmt: skip
    parser.add_argument("--precision", choices=["32", "bf16", "int8"], default="32", help="of weights and computation; "
                        "int8 (extra [int8]): such weights, computation in bf16; fast with these two only")  # fmt: skip
    parser.add_argument("--seed", type=int | None, help="the same seed draws the same text; the next sample takes the "
                        "next seed")  # fmt: skip
    parser.add_argument("--out", type=str | None, help="also write what was generated into this file, several samples "
                        "with their numbers; for what is no text, how the files are named "
                        "(default: RUN/samples/generated)")  # fmt: skip
    parser.add_argument("--soundfont", type=str | None, help="an .sf2 or .sf3 file to play music with")
    args = parse(parser, argv)
    if args.prompt is not None and args.prompt_file is not None:
        raise InputError("--prompt and --prompt_file are both given: choose one")
    if args.out is not None and Path(args.out).is_dir():
        raise InputError(f"--out {args.out} is a folder: name a file in it")

    import torch

    from perceiver_ar.data.codec import numbered
    from perceiver_ar.data.sound import check_soundfont
    from perceiver_ar.generation import stream
    from perceiver_ar.quantization import int8_weights
    from perceiver_ar.run import Run

    if args.soundfont is not None:
        check_soundfont(args.soundfont)  # before anything is drawn
    run = Run.open(args.run)
    model, codec = to_device(run.model()), run.codec()
    if args.precision != "32":
        model = model.to(torch.bfloat16)
    if args.precision == "int8":
        int8_weights(model)
    document = prompt_ids(codec, args.prompt, args.prompt_file)
    prompt, count, samples = what_to_draw(codec, document, args)
    stop = stop_bytes(codec, args.stop)
    steps = partial(
        stream,
        model,
        torch.tensor([prompt]),
        max_new_tokens=count,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        frequency_penalty=args.frequency_penalty,
        stop_tokens=() if args.ignore_end else codec.separator[-1:],
        refill_latents=args.refill_latents,
        slide=args.slide,
        compile="max-autotune" if args.max_autotune else args.compile,
        allowed_next=codec.constraint(),
    )
    if not codec.writes_text:
        show_files(run, codec, steps(num_samples=samples, seed=args.seed), document, len(prompt), args)
        return
    for number in range(1, samples + 1):  # one after the other, to be read as they are drawn
        if number > 1:
            print(flush=True)
        if samples > 1:
            print(f"sample {number} of {samples}:", file=sys.stderr)
        seed = None if args.seed is None else args.seed + number - 1
        out = None if args.out is None else Path(args.out)
        out = out and out.with_name(f"{numbered(out.stem, number, samples)}{out.suffix}")
        show_text(codec, steps(seed=seed), count, stop, out)


def show_text(codec: "Codec", steps: "Iterable[Step]", count: int, stop: bytes, out: Path | None) -> None:
    """Shows a text of `count` tokens as it is drawn, or up to `stop`, and writes it into `out`."""
    from perceiver_ar.data.text import Utf8Stream
    from perceiver_ar.files import atomic_path

    ids: list[int] = []
    ending = b""
    text, started = Utf8Stream(), time.perf_counter()
    interrupted = False
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may know fewer characters than the model
    try:
        for step in steps:
            ids.append(int(step.tokens[0]))
            data = codec.decode([ids[-1]])
            sys.stdout.write(text.push(data))
            sys.stdout.flush()
            ending += data
            if stop and stop in ending:
                break
            ending = ending[1 - len(stop) :] if len(stop) > 1 else b""
    except KeyboardInterrupt:
        interrupted = True
    finally:
        if out is not None and (ids or count == 0):  # a file of before is not given up for nothing
            with atomic_path(out) as temporary:
                temporary.write_bytes(codec.decode(ids))
    seconds = time.perf_counter() - started
    print(text.close())
    print(f"{len(ids)} tokens in {seconds:.1f} s, {len(ids) / seconds:.1f} tokens/s", file=sys.stderr)
    if interrupted:
        raise KeyboardInterrupt("interrupted; what was drawn until then is above")


def prompt_ids(codec: "Codec", prompt: str | None, prompt_file: str | None) -> list[int]:
    """The ids to go on from: the prompt as the start of a document."""
    from perceiver_ar.data.codec import WrongModality
    from perceiver_ar.data.text import text_only

    try:
        if prompt_file is None:
            return codec.start(prompt or "").tolist() or [0]
        where = f"--prompt_file {prompt_file}"
        try:
            data = sys.stdin.buffer.read() if prompt_file == "-" else Path(prompt_file).read_bytes()
        except FileNotFoundError:
            raise InputError(f"{where}: no such file; check the path") from None
        except IsADirectoryError:
            raise InputError(f"{where} is a folder: name a file") from None
        chunks = text_only([data], prompt_file) if codec.reads_text else [data]
        pieces = [ids.tolist() for ids in codec.encode_stream(chunks, prompt_file)]
    except WrongModality as error:
        reason = str(error).replace("the input", "--prompt", 1) if prompt_file is None else f"--prompt_file {error}"
        raise InputError(f"this run cannot read the prompt: {of_trained(reason)}") from None
    return [*codec.separator, *chain.from_iterable(pieces)] or [0]


def of_trained(reason: str) -> str:
    """Why files cannot be read, where --modality is no option any more."""
    return reason.replace("use --modality bytes", "use a run that was trained with --modality bytes")


def stop_bytes(codec: "Codec", stop: str | None) -> bytes:
    """The bytes that end a text, empty without any. Looked for in bytes, as a tokenizer may write them in many ways."""
    if stop is None:
        return b""
    if not codec.writes_text:
        raise InputError("--stop is text, which this run does not write: leave it out")
    stop = stop.replace("\\n", "\n").replace("\\t", "\t")  # shells pass backslashes on
    data = stop.encode("utf-8", errors="surrogateescape")
    try:
        written = codec.decode(codec.encode(data))
    except InputError as error:
        raise InputError(f"--stop {stop!r} cannot be encoded: {error}") from None
    if not data or written != data:
        raise InputError(f"--stop {stop!r} cannot be encoded: give text that the model can write")
    return data


def what_to_draw(codec: "Codec", document: list[int], args: argparse.Namespace) -> tuple[list[int], int, int]:
    """The prompt, how many tokens to draw after it, and how often."""
    keep = args.keep
    if keep is not None and not (keep > 0 and math.isfinite(keep)):
        raise InputError(f"--keep is {keep:g}: give a number of tokens, or a share of them below 1")
    if keep is None and codec.document_length is not None and len(document) == codec.document_length:
        keep = 0.5
    if keep is not None:
        start = len(codec.start())
        document = document[: start + round(keep * (len(document) - start) if keep < 1 else keep)]
    count, samples = args.max_new_tokens, args.samples
    if codec.document_length is not None:
        rest = codec.document_length - len(document)
        count = rest if count is None else min(count, rest)
    if samples is None:
        samples = 1 if codec.document_length is None else 4
    if samples < 1:
        raise InputError(f"--samples is {samples}: it must be at least 1")
    return document or [0], 256 if count is None else count, samples


def show_files(
    run: "Run", codec: "Codec", steps: "Iterable[Step]", document: list[int], prompt_len: int, args: argparse.Namespace
) -> None:
    """Draws all tokens, then writes what they are; the files' names go to stdout."""
    import numpy as np

    started, columns = time.perf_counter(), []
    interrupted = False
    try:
        for step in steps:
            columns.append(step.tokens.cpu().numpy())
            if sys.stderr.isatty():
                print(f"\r{len(columns):,} tokens", end="", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        if not columns:
            raise
        interrupted = True
    seconds = time.perf_counter() - started
    samples = len(columns[0]) if columns else 1
    rows = [np.array(document[:prompt_len] + [int(column[r]) for column in columns]) for r in range(samples)]
    out = Path(args.out) if args.out is not None else run.samples / "generated"
    stem = out.stem if out.suffix.lower() == codec.ending else out.name
    original = np.array(document) if args.prompt_file is not None else None
    for path in codec.show(rows, prompt_len, out.parent, stem, original=original, soundfont=args.soundfont):
        print(path)
    print(f"{len(columns)} tokens in {seconds:.1f} s, {len(columns) / seconds:.1f} tokens/s", file=sys.stderr)
    if interrupted:
        raise KeyboardInterrupt("interrupted; what was drawn until then is in these files")


def to_device(model: Any) -> Any:
    import torch

    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def info_verb(argv: list[str]) -> None:
    parser = make_parser("info", "RUN", "Shows what a run is and what it costs.", "  perceiver-ar info runs/books")
    parser.add_argument("run", type=str, help="a run directory")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parse(parser, argv)

    from perceiver_ar.run import Run

    run = Run.open(args.run)
    facts = dict(run_facts(run))
    if args.json:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        if isinstance(value, bool):
            shown = "yes" if value else "no"
        elif isinstance(value, list):
            shown = ", ".join(value[:3]) + (f" and {len(value) - 3:,} more" if len(value) > 3 else "")
        else:
            shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else value
        print(f"{name.replace('_', ' '):<34}{shown}")


# What checkpoints may not tell, by format: option, type, help.
CONVERT_OPTIONS: dict[str, list[tuple[str, Any, str]]] = {
    "lucidrains": [
        ("cross_attn_seq_len", int, "prefix length, which no weight tells"),
        ("heads", int, "attention heads, where the weights leave a choice"),
    ],
    "krasserm": [],
    "google": [
        ("settings", str, "random_mirrored_32, random_mirrored_131072, imagenet_w_positions, or a JSON file of their "
         "PerceiverAR's arguments"),
        ("max_context_length", int, "as in their settings"),
        ("z_index_dim", int, "as in their settings"),
        ("num_cross_attend_heads", int, "as in their settings"),
        ("num_transformer_heads", int, "as in their settings"),
    ],
}  # fmt: skip


def convert_verb(argv: list[str]) -> None:
    parser = make_parser(
        "convert",
        "lucidrains|krasserm|google CHECKPOINT --out RUN",
        "Makes a run from a checkpoint of perceiver-ar-pytorch (lucidrains), perceiver-io (krasserm) or\n"
        "google-research/perceiver-ar (google). No code in a checkpoint is run.",
        "  perceiver-ar convert krasserm perceiver-ar-clm-base/ --out runs/clm       (a Hugging Face directory)\n"
        "  perceiver-ar convert krasserm epoch=1.ckpt --out runs/clm                 (a Lightning checkpoint)\n"
        "  perceiver-ar convert lucidrains model.pt --cross_attn_seq_len 3072 --heads 8 --out runs/enwik8\n"
        "  perceiver-ar convert google checkpoint.dill --settings random_mirrored_131072 --out runs/copy",
    )
    parser.add_argument("format", choices=list(CONVERT_OPTIONS), help="whose checkpoint it is")
    parser.add_argument("checkpoint", type=str, help="a file, or a directory where they write one")
    parser.add_argument("--out", type=str, required=True, help="the run directory to make")
    for form, options in CONVERT_OPTIONS.items():
        for name, kind, text in options:
            parser.add_argument(f"--{name}", type=kind | None, help=f"{form}: {text}")
    args = parse(parser, argv)
    own = [name for name, _, _ in CONVERT_OPTIONS[args.format]]
    for name, _, _ in (option for options in CONVERT_OPTIONS.values() for option in options):
        if name not in own and args[name] is not None:
            raise InputError(f"--{name} is no option of {args.format}: leave it out")

    from importlib import import_module

    from perceiver_ar.data.codec import save_codec
    from perceiver_ar.files import atomic_directory
    from perceiver_ar.run import Run

    if Run(args.out).is_taken():
        raise InputError(f"--out {args.out} is there already: choose another place, or remove it")
    read = import_module(f"perceiver_ar.compat.{args.format}").read
    model, codec = read(Path(args.checkpoint), **{name: args[name] for name in own})
    with atomic_directory(args.out) as directory:
        model.save_pretrained(directory)
        if codec is not None:
            save_codec(codec, directory)
    if codec is None:
        print("the checkpoint does not say what its ids stand for: info and Python work with the run; evaluate and "
              "generate need a codec.json in it", file=sys.stderr)  # fmt: skip
    facts = {"run": args.out, "parameters": model.num_parameters(), "codec": None if codec is None else codec.name}
    print(json.dumps(facts))


def export_verb(argv: list[str]) -> None:
    parser = make_parser(
        "export",
        "huggingface|lucidrains|krasserm|onnx RUN --out PATH",
        "Writes a run's model for others.\n"
        "huggingface: a directory that transformers load with trust_remote_code=True where this package is not\n"
        "installed: weights, settings, tokenizer and code; it is still a run. (Where the package is installed,\n"
        "transformers load the run itself, after `import perceiver_ar.huggingface`.)\n"
        "lucidrains, krasserm: a file of torch.save that perceiver-ar-pytorch loads, a Hugging Face directory that\n"
        "perceiver-io loads; shows the arguments or settings it goes with. Only for models that these packages can\n"
        "compute, such as those trained with --preset lucidrains or --preset krasserm.\n"
        "onnx: a directory for runtimes without PyTorch: scoring, and generation step by step.",
        "  perceiver-ar export huggingface runs/books --out books-for-transformers/\n"
        "  perceiver-ar export krasserm runs/clm --out clm-for-perceiver-io/\n"
        "  perceiver-ar export lucidrains runs/enwik8 --out model.pt\n"
        "  perceiver-ar export onnx runs/books --out books-onnx/",
    )
    formats = ["huggingface", "lucidrains", "krasserm", "onnx"]
    parser.add_argument("format", choices=formats, help="for which package")
    parser.add_argument("run", type=str, help="a run directory")
    parser.add_argument("--out", type=str, required=True, help="the file or directory to write")
    args = parse(parser, argv)

    from perceiver_ar import compat
    from perceiver_ar.data.codec import save_codec
    from perceiver_ar.files import atomic_directory, write_text
    from perceiver_ar.onnx import export_onnx
    from perceiver_ar.run import Run

    run = Run.open(args.run)
    if Run(args.out).is_taken():
        raise InputError(f"--out {args.out} is there already: choose another place, or remove it")
    model = run.model()
    if args.format == "lucidrains":
        about: Any = compat.save_lucidrains(model, args.out)
    else:
        with atomic_directory(args.out) as directory:
            if args.format == "krasserm":
                about = compat.save_krasserm(model, directory)
            elif args.format == "huggingface":
                about = export_huggingface(run, directory)
            else:
                about = export_onnx(model, directory)
                write_text(directory / "config.json", model.config.to_json())
                if (codec := run.codec_if_any()) is not None:
                    save_codec(codec, directory)
    print(json.dumps(about, indent=2))


def export_huggingface(run: "Run", directory: Path) -> dict[str, Any]:
    """A run for transformers; what to tell of it."""
    from perceiver_ar.data.codec import missing_extra

    try:
        from perceiver_ar import huggingface
    except ImportError as error:
        raise missing_extra("hf", error) from None
    codec = run.codec_if_any()
    huggingface.export(huggingface.PerceiverARForCausalLM.from_pretrained(run.path), codec, directory)
    return {"files": sorted(file.name for file in directory.iterdir()), "codec": None if codec is None else codec.name}


def push_verb(argv: list[str]) -> None:
    parser = make_parser(
        "push",
        "RUN OWNER/NAME",
        "Uploads a run to the Hugging Face Hub: model, codec, recipe, summary and report, with a model card. The card\n"
        "is RUN/README.md; it is written unless it is there. Not uploaded are tokens, checkpoints and samples.",
        "  perceiver-ar push runs/books me/books --dry_run         (write the card, and show what would be uploaded)\n"
        "  perceiver-ar push runs/books me/books --private",
    )
    parser.add_argument("run", type=str, help="a run directory")
    parser.add_argument("repo_id", type=str, help="whose repository of which name")
    parser.add_argument("--private", action="store_true", help="for its owner alone")
    parser.add_argument("--dry_run", action="store_true", help="upload nothing")
    args = parse(parser, argv)

    from perceiver_ar.card import CARD, push, shared_files, write_card
    from perceiver_ar.run import Run

    run = Run.open(args.run)
    written = write_card(run, args.repo_id)
    state = "written; add a licence to its head" if written else "there already: remove it to have it written anew"
    print(f"{run.path / CARD} is {state}", file=sys.stderr)
    print("\n".join(shared_files(run)) if args.dry_run else push(run, args.repo_id, private=args.private))


# Of what summary.json has measured, where it has.
SHOWN = ("steps", "tokens_seen", "train_seconds", "bits_per_byte", "bits_per_dimension", "nats_per_note",
         "nats_per_token")  # fmt: skip


def run_facts(run: "Run") -> Iterator[tuple[str, Any]]:
    import torch

    from perceiver_ar.trouble import expected_bytes

    model = run.model()
    config, parameters, codec = model.config, model.num_parameters(), run.codec_name()
    recipe, summary = run.recipe() if run.recipe_file.exists() else None, run.summary()
    if recipe is not None:
        yield "trained_on", list(recipe.paths) or ["Python's standard library"]
        yield "finished", summary is not None
    if codec is not None:
        yield "codec", codec
    yield "parameters", parameters
    yield "vocab_size", config.vocab_size
    yield "context_length", config.context_length
    yield "num_latents", config.num_latents
    yield "self_attention_layers", config.num_layers
    yield "cross_attention_layers", len(config.cross_layers)
    yield "dim", config.dim
    window = costs(config)
    yield "forward_gigaflops_per_window", window.forward_flops / 1e9
    if recipe is not None:
        yield "windows_per_step", recipe.trainer.batch_size
        yield "blocks_per_window", recipe.blocks
        training = costs(config, latents=recipe.window_latents, blocks=recipe.blocks).training_flops
        yield "training_gigaflops_per_step", recipe.trainer.batch_size * training / 1e9
        device = "cuda" if torch.cuda.is_available() else "cpu"
        yield "training_megabytes", expected_bytes(recipe, parameters, device) / 1e6
    yield "weights_megabytes", 4 * parameters / 1e6
    yield "context_keys_values_megabytes", window.context_bytes / 1e6
    for name, value in (summary or {}).items():
        if name in SHOWN and value is not None:
            yield name, value


if __name__ == "__main__":
    sys.exit(main())
