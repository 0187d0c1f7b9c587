"""perceiver-ar score."""

import filecmp
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceiver_ar.cli.evaluate import describe, documents_to_score
from perceiver_ar.cli.options import add_documents, add_scoring, make_parser, names, parse
from perceiver_ar.cli.prompts import to_device
from perceiver_ar.errors import require
from perceiver_ar.files import check_out
from perceiver_ar.progress import ProgressBar
from perceiver_ar.tables import check_table, write_rows

if TYPE_CHECKING:
    from perceiver_ar.run import Run


def score_verb(argv: list[str]) -> None:
    parser = make_parser(
        "score",
        "RUN [PATH...]",
        "Scores every document of files: its bits, and those of each of its tokens.",
        "  perceiver-ar score runs/books new_books/ --out scores.csv\n"
        "  perceiver-ar score runs/books new_book.txt --out scores.parquet --tokens --picture surprise.png\n"
        "  perceiver-ar score runs/books new_books/ --against runs/other\n"
        "  perceiver-ar score runs/books                           (the documents it held out)",
    )
    add_documents(parser, "what the run held out")
    parser.add_argument("--out", type=str | None, help="write a table with a row for each document: .csv, .jsonl or "
                        ".parquet")  # fmt: skip
    parser.add_argument("--tokens", action="store_true", help="write a second table, OUT-tokens, with every token")
    parser.add_argument("--against", type=str | None, help="another run, to compare with on the same documents")
    parser.add_argument("--picture", type=str | None, help="draw where the first document is surprising, as .png")
    add_scoring(parser)
    args = parse(parser, argv)
    require(not args.tokens or args.out is not None, "--tokens writes a table beside --out: give --out, too")
    outs = list[tuple[str, Path]]()
    if args.picture is not None:
        require(Path(args.picture).suffix.lower() == ".png", f"--picture is {args.picture}: its name must end in .png")
        outs.append(("--picture", Path(args.picture)))
    if args.out is not None:
        check_table(args.out, "--out")
        outs.append(("--out", Path(args.out)))
        if args.tokens:
            outs.append(("--tokens", tokens_table(Path(args.out))))
    for option, out in outs:
        check_out(out, option)

    from perceiver_ar.run import Run
    from perceiver_ar.scores import TOKEN_COLUMNS, DocumentScores, compare, score_documents

    run = Run.open(args.run)
    other = None if args.against is None else Run.open(args.against)
    paths = names(args.paths)
    if other is not None and not paths:
        check_held_out(run, other)
    options = {name: args[name] for name in ("stride", "num_latents", "batch_size", "precision")}
    with tempfile.TemporaryDirectory(prefix="perceiver-ar-") as scratch:
        conditioned = [one for one in (run, other) if one is not None and one.conditions()]

        def scores_of(one: Run, folder: Path) -> DocumentScores:
            """By the model of `one`, of the files or else of what `run` held out."""
            model, codec = to_device(one.model()), one.codec()
            table = args.conditions if one in conditioned or not conditioned else None
            file, files = documents_to_score(run, codec, paths, folder, table, outs)
            with ProgressBar("scoring", 1.0) as bar:
                settings = options | {"progress": lambda done, total: bar.update(done / total)}
                return score_documents(model, codec, file, files, **settings)

        scores = scores_of(run, Path(scratch))
        columns, rows = scores.columns(), scores.rows
        result = scores.summary()
        if other is not None:
            others = scores_of(other, Path(scratch) / "other")
            result["against"] = compare(scores, others)
            columns |= {"bits_against": float}
            rows = [row | {"bits_against": its["bits"]} for row, its in zip(rows, others.rows, strict=True)]
        written = []
        if args.out is not None:
            written.append(Path(args.out))
            write_rows(written[-1], columns, rows)
        if args.tokens:
            written.append(tokens_table(written[0]))
            write_rows(written[-1], TOKEN_COLUMNS, scores.token_rows())
        if args.picture is not None:
            written.append(Path(args.picture))
            start, stop = scores.spans[0]
            scores.codec.draw_bits(scores.ids[start:stop], scores.nats[start:stop] / math.log(2), written[-1])
    if args.json:
        print(json.dumps(result))
    else:
        print(describe(scores.evaluation), *describe_documents(result), sep="\n")
    if written:
        print(f"written: {', '.join(map(str, written))}", file=sys.stderr)


def tokens_table(out: Path) -> Path:
    return out.with_stem(f"{out.stem}-tokens")


def check_held_out(run: "Run", other: "Run") -> None:
    """Raises InputError if `other` cannot score what `run` held out. stderr is told if it may know these documents."""
    patterns = ("codec.json", *run.codec().files)
    codecs = [{p.name: p.read_bytes() for x in patterns for p in one.path.glob(x)} for one in (run, other)]
    require(codecs[0] == codecs[1], f"{run.path} and {other.path} have different codecs: name the files to compare on")
    held_out = [one.tokens / "validation.bin" for one in (run, other)]
    if held_out[0].exists() and not (held_out[1].exists() and filecmp.cmp(*held_out, shallow=False)):
        print(f"{other.path} did not hold out the same documents: it may have been trained on these", file=sys.stderr)


def describe_documents(result: dict[str, Any]) -> list[str]:
    def plus_minus(error: float | None) -> str:
        return "" if error is None else f" +- {error:.4f}"

    unit = f"bits per {result['unit']}"
    mean = f"{result['mean_over_documents']:.4f}{plus_minus(result['mean_standard_error'])}"
    lines = [f"documents        {result['documents']:,}", f"mean over documents    {mean} {unit}"]
    if against := result.get("against"):
        unit = f"bits per {against['unit']}"
        error = plus_minus(against["difference_standard_error"])
        lines += [
            f"other run        {against['total']:.4f} {unit}; mean over documents {against['mean_over_documents']:.4f}",
            f"difference       {against['total_difference']:+.4f} {unit}; mean over documents "
            f"{against['mean_difference']:+.4f}{error}",
            f"better on        {against['documents_better']:,} of {result['documents']:,} documents; "
            f"p = {against['p_value']:.2g} ({against['test']})",
        ]
    return lines
