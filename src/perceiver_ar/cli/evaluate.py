"""perceiver-ar evaluate."""

import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceiver_ar.cli.options import add_documents, add_scoring, make_parser, names, parse
from perceiver_ar.cli.prompts import to_device
from perceiver_ar.config import Recipe
from perceiver_ar.errors import InputError, require
from perceiver_ar.files import check_out
from perceiver_ar.progress import ProgressBar

if TYPE_CHECKING:
    from perceiver_ar.data.codec import Codec
    from perceiver_ar.data.tokens import TokenFile
    from perceiver_ar.evaluation import Evaluation
    from perceiver_ar.run import Run


def evaluate_verb(argv: list[str]) -> None:
    parser = make_parser(
        "evaluate",
        "RUN [PATH...]",
        "Scores every token of files exactly once, each with as much context as there is.",
        "  perceiver-ar evaluate runs/books new_book.txt\n"
        "  perceiver-ar evaluate runs/books                        (the documents it held out)\n"
        "  perceiver-ar evaluate runs/letters new/ --conditions new/about.csv\n"
        "  perceiver-ar evaluate runs/books --context_lengths 256,1024,4096\n"
        "  perceiver-ar evaluate runs/books new_book.txt --json",
    )
    add_documents(parser, "the documents that the run held out")
    parser.add_argument(
        "--context_lengths", type=str | None, help="compare these context lengths in a table, a CSV file and a plot"
    )
    parser.add_argument("--max_tokens", type=int | None, help="score only the first MAX_TOKENS tokens")
    add_scoring(parser)
    args = parse(parser, argv)
    lengths = parse_lengths(args.context_lengths)

    from perceiver_ar.evaluation import compressors, evaluate, evaluate_context_lengths
    from perceiver_ar.run import Run

    run = Run.open(args.run)
    model, codec = to_device(run.model()), run.codec()
    with tempfile.TemporaryDirectory(prefix="perceiver-ar-") as scratch:
        tokens = documents_to_score(run, codec, names(args.paths), Path(scratch), args.conditions)[0]
        options: dict[str, Any] = {"num_latents": args.num_latents, "byte_lengths": codec.byte_lengths()}
        options |= {"amounts": codec.amounts, "document_length": codec.document_length}
        options |= {"max_tokens": args.max_tokens, "batch_size": args.batch_size, "precision": args.precision}
        with ProgressBar("scoring", 1.0) as bar:
            options |= {"stride": args.stride, "progress": lambda done, total: bar.update(done / total)}
            if lengths is None:
                results = [evaluate(model, tokens, **options)]
            else:
                results = evaluate_context_lengths(model, tokens, lengths, **options)
        if lengths is None:
            print(json.dumps(results[0].to_dict()) if args.json else describe(results[0]))
            return
        references = compressors(codec, tokens.tokens[max(lengths) :][: args.max_tokens])
    show_context_table(run, results, references, args.json)


def parse_lengths(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise InputError(f"--context_lengths is {text!r}: write numbers with commas between, as in 256,1024") from None


def documents_to_score(
    run: "Run",
    codec: "Codec",
    paths: tuple[str, ...],
    scratch: Path,
    conditions: str | None = None,
    outs: Iterable[tuple[str, Path]] = (),
) -> "tuple[TokenFile, list[str]]":
    """The documents at `paths`, or else those that the run held out, and the file name of each.

    conditions: a table of the conditions of files at `paths`.
    outs: options and the files that they will write: none of them may be read here.
    """
    from perceiver_ar.data.codec import of_trained
    from perceiver_ar.data.conditions import ConditionTable
    from perceiver_ar.data.modalities import codec_settings
    from perceiver_ar.data.rows import find_within
    from perceiver_ar.data.sources import find_files
    from perceiver_ar.data.tokens import TokenFile, prepare_all

    if paths:
        recipe = run.recipe() if run.recipe_file.exists() else Recipe(out=str(run.path))
        sources = find_files(paths)
        for option, out in outs:
            check_out(out, option, [conditions, *(source.path for source in sources)])
        table = None if conditions is None else ConditionTable.read(conditions)
        sources = sources if table is None else table.without_itself(sources)
        modality = codec_settings(codec.plain)["modality"] if recipe.modality != "bytes" else "bytes"
        sources = find_within(sources, modality, recipe.data.column)
        if table is not None:
            sources = table.apply(sources, codec)
        elif codec.conditions:
            print(f"conditions are unknown ({', '.join(codec.conditions)}): give --conditions TABLE", file=sys.stderr)
        try:
            return prepare_all(sources, codec, scratch / "documents", recipe.data.split_on)
        except InputError as error:
            raise InputError(of_trained(str(error))) from None
    require(conditions is None, "--conditions is of files: name them, or leave it out")
    require((run.tokens / "validation.json").exists(), f"{run.path} held nothing out: name the files to evaluate")
    held_out = TokenFile.open(run.tokens / "validation")
    return held_out, ["held out"] * held_out.num_documents


def describe(result: "Evaluation") -> str:
    error = "" if result.standard_error is None else f" +- {result.standard_error:.4f}"
    lines = [] if result.bits_per_byte is None else [f"bits per byte    {result.bits_per_byte:.4f}"]
    lines += [
        f"bits per token   {result.bits_per_token:.4f}",
        f"nats per token   {result.nats_per_token:.4f}{error}",
        f"perplexity       {result.perplexity:.3f}",
        f"tokens scored    {result.tokens:,}",
    ]
    for unit, amount in result.amounts.items():
        if amount > 0:
            count = f"{amount:,.0f}" if amount >= 100 or amount == round(amount) else f"{amount:.3g}"
            per = f"{result.nats_per(unit):.4f} nats, {result.bits_per(unit):.4f} bits"
            lines.append(f"{'per ' + unit:<17}{per} ({count} {unit}s)")
    return "\n".join(lines)


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
