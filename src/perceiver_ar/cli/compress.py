"""perceiver-ar compress, perceiver-ar decompress."""

import time
from collections.abc import Callable
from pathlib import Path

from perceiver_ar.cli.options import make_parser, parse
from perceiver_ar.errors import InputError, require
from perceiver_ar.files import atomic_path, check_out
from perceiver_ar.progress import ProgressBar

ENDING = ".par"


def compress_verb(argv: list[str]) -> None:
    parser = make_parser(
        "compress",
        "RUN FILE",
        "Compresses a file by a model's probabilities, without loss. Only this run on such a machine can undo it.",
        "  perceiver-ar compress runs/books new_book.txt --out new_book.txt.par\n"
        "  perceiver-ar decompress runs/books new_book.txt.par --out same_book.txt",
    )
    parser.add_argument("run", type=str, help="a run directory, of text or bytes")
    parser.add_argument("file", type=str, help="any file")
    parser.add_argument("--out", type=str | None, help=f"where to write (default: FILE{ENDING})")
    args = parse(parser, argv)

    from perceiver_ar.compression import compress

    convert(args.run, args.file, args.out or args.file + ENDING, "compressing", compress)


def decompress_verb(argv: list[str]) -> None:
    parser = make_parser(
        "decompress",
        "RUN FILE",
        "Restores a file that compress made: needs the same run, and a machine and versions that compute alike.",
        "  perceiver-ar decompress runs/books new_book.txt.par",
    )
    parser.add_argument("run", type=str, help="the run directory that it was compressed with")
    parser.add_argument("file", type=str, help="a compressed file")
    parser.add_argument("--out", type=str | None, help=f"where to write (default: FILE without {ENDING})")
    args = parse(parser, argv)
    if args.out is None and not args.file.endswith(ENDING):
        raise InputError(f"{args.file} does not end in {ENDING}: say with --out where to write")

    from perceiver_ar.compression import decompress

    convert(args.run, args.file, args.out or args.file.removesuffix(ENDING), "decompressing", decompress)


def convert(run: str, file: str, out: str, what: str, work: Callable[..., bytes]) -> None:
    """Writes what `work` makes of a file, never over another one."""
    from perceiver_ar.run import Run

    source, target = Path(file), Path(out)
    require(not target.exists(), f"{target} already exists: give another --out, or remove it")
    check_out(target, "--out")
    try:
        data = source.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; check the path") from None
    except IsADirectoryError:
        raise InputError(f"{file} is a folder: name a file, such as an archive of it") from None
    began, opened = time.perf_counter(), Run.open(run)
    try:
        with ProgressBar(what, 1.0) as bar:
            result = work(opened, data, bar.update)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    with atomic_path(target) as temporary:
        temporary.write_bytes(result)
    sizes = (len(result), len(data)) if what == "compressing" else (len(data), len(result))
    bits = f", {8 * sizes[0] / sizes[1]:.3f} bits per byte" if sizes[1] else ""
    seconds = time.perf_counter() - began
    print(f"{source}: {len(data):,} bytes -> {target}: {len(result):,} bytes{bits}, {seconds:.1f} s")
