"""perceiver-ar scaling."""

import json
import math
import sys
from contextlib import suppress
from pathlib import Path

from perceiver_ar.cli.options import add_paths, make_parser, names, parse
from perceiver_ar.config.checks import parse_duration
from perceiver_ar.errors import InputError, require
from perceiver_ar.files import write_text


def scaling_verb(argv: list[str]) -> None:
    parser = make_parser(
        "scaling",
        "RUN...",
        "Fits the loss of finished runs against size and length: the best size and length for a budget.",
        "  perceiver-ar scaling runs/*                                (ten and a hundred times the largest run)\n"
        "  perceiver-ar scaling runs/* --budget 1e18 --out scaling    (FLOPs; table, JSON and picture in scaling/)\n"
        "  perceiver-ar scaling runs/* --budget 12h                   (time, at the speed of the runs)",
    )
    add_paths(parser, "six or more finished runs of several sizes and lengths, on the same data with the same context")
    parser.add_argument("--budget", type=str | None, help="FLOPs of training, as in 1e18, or a time, as in 12h")
    parser.add_argument("--out", type=str | None, help="folder for scaling.json, scaling.md and scaling.png")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parse(parser, argv)
    paths = names(args.paths)
    require(bool(paths), "scaling needs runs: name their directories, as in perceiver-ar scaling runs/*")
    budgets = [] if args.budget is None else [parse_budget(args.budget)]
    if args.out is not None and Path(args.out).exists() and not Path(args.out).is_dir():
        raise InputError(f"--out {args.out} is a file: name a folder")

    try:
        from perceiver_ar.scaling import analyse, curves, markdown, read_runs
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("scipy"):
            raise
        raise InputError("scaling needs the package scipy: pip install 'perceiver-ar[scaling]'") from None

    result = analyse(read_runs(paths), budgets)
    page = markdown(result)
    print(json.dumps(result) if args.json else page, end="\n" if args.json else "")
    if args.out is not None:
        from perceiver_ar.plots import plot_scaling

        out = Path(args.out)
        write_text(out / "scaling.json", json.dumps(result, indent=2) + "\n")
        write_text(out / "scaling.md", page)
        plot_scaling(out / "scaling.png", **curves(result), y_label=f"{result['unit']}, held out")
        print(f"written: scaling.json, scaling.md and scaling.png in {out}", file=sys.stderr)


def parse_budget(text: str) -> tuple[float, str]:
    """ "1e18" -> FLOPs, "12h" -> seconds."""
    with suppress(ValueError):
        if 1e6 <= (flops := float(text)) < math.inf:  # fewer were meant as a time
            return flops, "flops"
    with suppress(InputError):
        return parse_duration(text, "--budget"), "seconds"
    raise InputError(f"--budget is {text!r}: write FLOPs as in 1e18, or a time as in 12h or 1h30m")
