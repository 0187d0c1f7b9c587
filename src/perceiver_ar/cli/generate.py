"""perceiver-ar generate."""

import argparse
import codecs
import io
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceiver_ar.cli.options import make_parser, names, parse
from perceiver_ar.cli.prompts import prompt_ids, stop_bytes, to_device, what_to_draw
from perceiver_ar.errors import require
from perceiver_ar.files import atomic_path, check_out
from perceiver_ar.progress import ProgressBar

if TYPE_CHECKING:
    from perceiver_ar.data.codec import Codec
    from perceiver_ar.generation import Step


SAMPLING: dict[str, tuple[Any, float | None, str]] = {
    "temperature": (float, 1.0, "0 always takes the likeliest token"),
    "top_k": (int | None, None, "draw from the TOP_K likeliest tokens only"),
    "top_p": (float | None, None, "draw from the fewest tokens with this total probability"),
    "min_p": (float | None, None, "draw from tokens with at least MIN_P times the top probability"),
    "repetition_penalty": (float, 1.0, "above 1 makes used tokens less likely"),
    "frequency_penalty": (float, 0.0, "subtracted from a token's logit per draw"),
    "presence_penalty": (float, 0.0, "subtracted once from a drawn token's logit"),
}
"""Options that `stream` takes as they are: name -> type, default, help."""


def generate_verb(argv: list[str]) -> None:
    parser = make_parser(
        "generate",
        "RUN",
        "Generates with a run's model. Text is shown as it is drawn; music, pictures and sound become files.",
        "  perceiver-ar generate runs/books --prompt 'Call me'\n"
        "  perceiver-ar generate runs/code --prompt_file start.py --max_new_tokens 2000 --top_p 0.95\n"
        "  perceiver-ar generate runs/books --stop '\\n\\n' --seed 1 --out sample.txt\n"
        "  perceiver-ar generate runs/letters --condition author=austen --condition year=1812\n"
        "  perceiver-ar generate runs/piano --prompt_file prelude.mid --keep 500 --max_new_tokens 1000 --out new.mid\n"
        "  perceiver-ar generate runs/band --condition instruments=0,33,drums --condition tempo=96 --out new.mid\n"
        "  perceiver-ar generate runs/band --prompt_file song.mid --infill 9:12 --out new.mid",
    )
    parser.add_argument("run", type=str, help="a run directory")
    parser.add_argument("--prompt", type=str | None, help="text to continue; for pictures the name of a class")
    parser.add_argument("--prompt_file", type=str | None, help="a file to continue, - for standard input")
    parser.add_argument("--condition", action="append", default=[], help="KEY=VALUE, a condition that the "
                        "run was trained with (perceiver-ar info lists them; others are unknown), or of music of "
                        "several instruments: instruments=0,33,drums (General MIDI programs), tempo=120")  # fmt: skip
    parser.add_argument("--infill", type=str | None, help="FIRST:LAST: compose these bars of the prompt file anew, "
                        "between those before and after (counted from 1; music of several instruments)")  # fmt: skip
    parser.add_argument("--keep", type=float | None, help="continue only the first KEEP tokens of the prompt file; "
                        "below 1: this share of them (default: all; of a picture half)")  # fmt: skip
    parser.add_argument("--max_new_tokens", type=int | None, help="number of tokens to draw (default: 256, or the "
                        "rest of a picture)")  # fmt: skip
    parser.add_argument("--samples", type=int | None, help="number of continuations (default: 1; of a picture 4)")
    for name, (kind, default, text) in SAMPLING.items():
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    parser.add_argument("--stop", type=str | None, help="end a text after this string")
    parser.add_argument("--ignore_end", action="store_true", help="when a document ends, begin a new one")
    parser.add_argument(
        "--refill_latents", type=int | None, help="latents after a refill, when all are used (default: half)"
    )
    parser.add_argument("--compile", action="store_true", help="half a minute of compiling, then faster tokens")
    parser.add_argument("--max_autotune", action="store_true", help="the same with kernels chosen for this machine: a "
                        "minute of compiling, worth it from some ten thousand tokens on")  # fmt: skip
    parser.add_argument("--slide", action="store_true", help="drop the oldest latent instead of refilling: constant "
                        "time per token, but no single forward gives these logits")  # fmt: skip
    parser.add_argument("--precision", choices=["32", "bf16", "int8"], default="32", help="of weights and computation; "
                        "int8 (extra [int8]): int8 weights, bf16 computation, slow unless compiled")  # fmt: skip
    parser.add_argument("--seed", type=int | None, help="the same seed draws the same text; each further sample takes "
                        "the next seed")  # fmt: skip
    parser.add_argument("--out", type=str | None, help="also write the text to this file (several samples: numbered "
                        "files); music, pictures and sound: the name of their files "
                        "(default: RUN/samples/generated)")  # fmt: skip
    parser.add_argument("--soundfont", type=str | None, help="an .sf2 or .sf3 file to play music with")
    args = parse(parser, argv)
    require(args.prompt is None or args.prompt_file is None, "--prompt and --prompt_file are both given: choose one")
    if args.out is not None:
        check_out(args.out, "--out")

    import torch

    from perceiver_ar.data.codec import numbered, parse_conditions
    from perceiver_ar.data.sound import check_soundfont
    from perceiver_ar.generation import stream
    from perceiver_ar.generation.quantization import int8_weights
    from perceiver_ar.run import Run

    if args.soundfont is not None:
        check_soundfont(args.soundfont)  # before anything is drawn
    run = Run.open(args.run)
    model, codec = to_device(run.model()), run.codec()
    if args.precision != "32":
        model = model.to(torch.bfloat16)
    if args.precision == "int8":
        int8_weights(model)
    conditions = parse_conditions(names(args.condition, "condition"))
    pinned = codec.condition_ids(conditions)
    require(not (args.ignore_end and pinned), "--ignore_end begins documents without conditions: leave it out")
    require(not (args.slide and pinned), "--slide drops the conditions of a document, its oldest tokens: leave it out")
    require(
        args.infill is None or not codec.has_bars or run.infills(codec),
        f"--infill: {run.path} was trained with data.augment false, which leaves infills out: train anew",
    )
    document = prompt_ids(codec, args.prompt, args.prompt_file, conditions)
    row, prompt, count, samples = what_to_draw(codec, document, args, model.config.context_length)
    out = None if args.out is None and codec.writes_text else Path(args.out or run.samples / "generated")
    if out is not None and not codec.writes_text:
        stem = out.stem if out.suffix.lower() == codec.ending else out.name
        out = out.with_name(stem + codec.ending)
    outs = [] if out is None else [out.with_stem(numbered(out.stem, i + 1, samples)) for i in range(samples)]
    if out is not None and not codec.writes_text:
        outs = [out.with_name(name) for name in codec.result_names(out.stem, samples)]
    for one in outs:
        check_out(one, "--out", [args.prompt_file])
    stop = stop_bytes(codec, args.stop)
    steps = partial(
        stream,
        model,
        torch.tensor([prompt]),
        max_new_tokens=count,
        **{name: args[name] for name in SAMPLING},
        stop_tokens=() if args.ignore_end else codec.separator[-1:],
        refill_latents=args.refill_latents,
        slide=args.slide,
        compile="max-autotune" if args.max_autotune else args.compile,
        allowed_next=codec.constraint(),
        pinned=pinned,
    )
    if not codec.writes_text:
        drawn = steps(num_samples=samples, seed=args.seed)
        assert out is not None
        show_files(codec, drawn, count, document, row, out, args)
        return
    for number in range(1, samples + 1):  # one after the other, so that each can be read as it is drawn
        if number > 1:
            print(flush=True)
        if samples > 1:
            print(f"sample {number} of {samples}:", file=sys.stderr)
        seed = None if args.seed is None else args.seed + number - 1
        show_text(codec, steps(seed=seed), count, stop, outs[number - 1] if outs else None)


def show_text(codec: "Codec", steps: "Iterable[Step]", count: int, stop: bytes, out: Path | None) -> None:
    """Shows a text of `count` tokens as it is drawn, or up to `stop`, and writes it into `out`."""
    ids, written = list[int](), bytearray()
    text, started = codecs.getincrementaldecoder("utf-8")(errors="replace"), time.perf_counter()
    interrupted = False
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may know fewer characters than the model
    try:
        for step in steps:
            ids.append(int(step.tokens[0]))
            before = len(written)
            written += codec.decode([ids[-1]])
            at = written.find(stop, max(0, before - len(stop) + 1)) if stop else -1
            if at >= 0:
                del written[at + len(stop) :]  # a token may go on behind it
            sys.stdout.write(text.decode(written[before:]))
            sys.stdout.flush()
            if at >= 0:
                break
    except KeyboardInterrupt:
        interrupted = True
    finally:
        if out is not None and (ids or count == 0):  # keep an older file if nothing was drawn
            with atomic_path(out) as temporary:
                temporary.write_bytes(codec.file_of(bytes(written)))
    seconds = time.perf_counter() - started
    print(text.decode(b"", final=True))
    print(f"{len(ids)} tokens in {seconds:.1f} s, {len(ids) / seconds:.1f} tokens/s", file=sys.stderr)
    if interrupted:
        raise KeyboardInterrupt("interrupted; the tokens drawn so far are above")


def show_files(
    codec: "Codec",
    steps: "Iterable[Step]",
    count: int,
    document: list[int],
    row: list[int],
    out: Path,
    args: argparse.Namespace,
) -> None:
    """Draws up to `count` tokens per sample, writes them after `row` to files like `out`, and prints the paths."""
    import numpy as np

    started, columns = time.perf_counter(), []
    interrupted = False
    try:
        with ProgressBar("generating", count) as bar:
            for step in steps:
                columns.append(step.tokens.cpu().numpy())
                bar.advance(1)
    except KeyboardInterrupt:
        if not columns:
            raise
        interrupted = True
    seconds = time.perf_counter() - started
    samples = len(columns[0]) if columns else 1
    rows = [np.array(row + [int(column[r]) for column in columns]) for r in range(samples)]
    original = np.array(document) if args.prompt_file is not None else None
    for path in codec.show(rows, len(row), out.parent, out.stem, original=original, soundfont=args.soundfont):
        print(path)
    print(f"{len(columns)} tokens in {seconds:.1f} s, {len(columns) / seconds:.1f} tokens/s", file=sys.stderr)
    if interrupted:
        raise KeyboardInterrupt("interrupted; the tokens drawn so far are in these files")
