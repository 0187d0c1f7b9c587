"""perceiver-ar embed."""

import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from perceiver_ar.cli.evaluate import documents_to_score
from perceiver_ar.cli.options import add_documents, make_parser, names, parse
from perceiver_ar.cli.prompts import to_device
from perceiver_ar.errors import require
from perceiver_ar.files import atomic_path
from perceiver_ar.progress import ProgressBar
from perceiver_ar.tables import check_table, write_rows


def embed_verb(argv: list[str]) -> None:
    parser = make_parser(
        "embed",
        "RUN [PATH...] --out FILE",
        "Makes a vector of every document: the mean of the final latents of its tokens.",
        "  perceiver-ar embed runs/books new_books/ --out books.npy\n"
        "  perceiver-ar embed runs/books new_books/ --out books.parquet    (with the names of the files)",
    )
    add_documents(parser, "what the run held out")
    parser.add_argument("--out", type=str | None, help="what to write: .npy (documents, dim) float32 in the order of "
                        "the documents, or a table: .parquet, .jsonl, .csv")  # fmt: skip
    parser.add_argument("--stride", type=int | None, help="new latents per window (default: half the latents)")
    parser.add_argument("--batch_size", type=int, default=8, help="windows per forward")
    parser.add_argument("--precision", choices=["32", "bf16"], default="32", help="of the computation")
    args = parse(parser, argv)
    require(args.out is not None, "--out is missing: name the file to write, as in --out books.npy")

    check_table(args.out, "--out", also=(".npy",))

    import numpy as np

    from perceiver_ar.embeddings import embed
    from perceiver_ar.run import Run

    run = Run.open(args.run)
    model, codec = to_device(run.model()), run.codec()
    with tempfile.TemporaryDirectory(prefix="perceiver-ar-") as scratch:
        file, files = documents_to_score(
            run, codec, names(args.paths), Path(scratch), args.conditions, [("--out", Path(args.out))]
        )
        first, count = file.conditions
        unread = int(codec.document_length is not None)  # the last value of a picture has no position: it is no input
        vectors = []
        with ProgressBar("embedding", len(files)) as bar:
            for start, stop in pairwise(file.bounds()):
                tokens = file.tokens[start : stop - unread]
                settings = {"stride": args.stride, "batch_size": args.batch_size, "precision": args.precision}
                vectors.append(embed(model, tokens, pinned=tokens[first : first + count], **settings))
                bar.advance(1)
    if Path(args.out).suffix.lower() == ".npy":
        with atomic_path(args.out) as temporary:
            np.save(temporary, np.stack(vectors))
    else:
        named = enumerate(zip(files, vectors, strict=True))
        rows = ({"document": i, "file": name, "embedding": vector.tolist()} for i, (name, vector) in named)
        write_rows(args.out, {"document": int, "file": str, "embedding": list}, rows)
    print(f"written: {args.out}, {len(vectors):,} documents of {model.config.dim} numbers", file=sys.stderr)
