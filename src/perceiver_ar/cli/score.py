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

if TYPE_CHECKING:
    from perceiver_ar.run import Run
    from perceiver_ar.scores import DocumentScores


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
    if args.picture is not None:
        require(Path(args.picture).suffix.lower() == ".png", f"--picture is {args.picture}: its name must end in .png")
        check_out(args.picture, "--picture")
    if args.out is not None:
        from perceiver_ar.tables import check_table

        check_table(args.out, "--out")
        if args.tokens:
            check_out(tokens_table(Path(args.out)), "--out")

    from perceiver_ar.run import Run
    from perceiver_ar.scores import TOKEN_COLUMNS, compare
    from perceiver_ar.tables import write_rows

    run = Run.open(args.run)
    other = None if args.against is None else Run.open(args.against)
    paths = names(args.paths)
    if other is not None and not paths:
        check_held_out(run, other)
    options = {name: args[name] for name in ("stride", "num_latents", "batch_size", "precision")}
    with tempfile.TemporaryDirectory(prefix="perceiver-ar-") as scratch:
        conditioned = [one for one in (run, other) if one is not None and one.conditions()]

        def table(of: Run) -> str | None:
            return args.conditions if of in conditioned or not conditioned else None

        scores = scores_of(run, paths, Path(scratch), options, conditions=table(run))
        columns, rows = scores.columns(), scores.rows
        result = scores.summary()
        if other is not None:
            others = scores_of(other, paths, Path(scratch) / "other", options, held_out_by=run, conditions=table(other))
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


def scores_of(
    run: "Run",
    paths: tuple[str, ...],
    scratch: Path,
    options: dict[str, Any],
    held_out_by: "Run | None" = None,
    conditions: str | None = None,
) -> "DocumentScores":
    """`held_out_by`: the run whose held-out documents are scored without `paths`; None: `run`."""
    from perceiver_ar.scores import score_documents

    model, codec = to_device(run.model()), run.codec()
    file, files = documents_to_score(held_out_by or run, codec, paths, scratch, conditions)
    with ProgressBar("scoring", 1.0) as bar:
        options |= {"progress": lambda done, total: bar.update(done / total)}
        return score_documents(model, codec, file, files, **options)


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
