"""From files to token files, split into training and validation."""

import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

from perceiver_ar.data.codec import Codec
from perceiver_ar.data.encoding import encode_documents
from perceiver_ar.data.shards import LARGE, SHARD, SHARDS, Encoders
from perceiver_ar.data.sources import Source, find_files, folder_of, read_text, standard_library
from perceiver_ar.data.splits import choose_groups, document_groups, drop_held_out
from perceiver_ar.data.token_files import NAMED, TokenFile, TokenWriter, token_writer
from perceiver_ar.errors import InputError, require
from perceiver_ar.progress import ProgressBar

__all__ = ["Source", "TokenFile", "find_files", "prepare", "prepare_all", "read_text", "standard_library"]


def prepare(
    sources: Iterable[Source],
    codec: Codec,
    directory: str | Path,
    *,
    validation_fraction: float = 0.05,
    validation_sources: Iterable[Source] | None = None,
    split_on: str | None = None,
    group_by: str | None = None,
    seed: int = 0,
    progress: bool = True,
    processes: int | None = None,
    shard: int = SHARD,
) -> tuple[TokenFile, TokenFile | None]:
    """Encodes `sources` into the token files `train` and `validation` in `directory`, replacing those that are there.

    Each source is read once; memory is constant. Without `split_on`, a file is one document; `split_on` is the string
    that separates several. In `Rows`, every row is at least one document. Empty documents are left out.

    Validation is `validation_sources`, which are removed from `sources`, or else whole documents, chosen by `seed`,
    with about `validation_fraction` of all bytes. It is None if the fraction is 0 or there is only one document. The
    choice keeps files together if the regular expression `group_by` has the same match in their names (its first group,
    or the whole match without groups). Equal documents stay together, too: no copy of a held-out document is trained
    on.

    If the codec is slow and the files have at least `LARGE` times `shard` bytes, other processes encode them
    (`processes`; None: one per core). They keep the ids in `directory/shards`, where a later call finds them, such as
    after a kill; remove that folder when all is done.

    Files that were found, not named, and that are empty or cannot be read are skipped; stderr gets their names and the
    reasons. `progress` shows a bar on a terminal, and one line on stderr at the end.

    Raises `InputError` if there is nothing to train on, or if a named file cannot be read.
    """
    sources, directory = list(sources), Path(directory)
    if not 0 <= validation_fraction < 1:
        raise InputError(f"validation_fraction is {validation_fraction}: it must be in [0, 1), usually 0.05")
    mark = _mark(split_on)
    held_out = [] if validation_sources is None else list(validation_sources)
    if held_out:
        reserved = {source.identity for source in held_out}
        sources = [source for source in sources if source.identity not in reserved]
        require(len(sources) > 0, "all training files are validation files as well; give other files for validation")

    total = sum(source.size for source in [*sources, *held_out])
    groups = None if group_by is None else document_groups(sources, group_by)
    with ProgressBar("reading", total, enabled=progress) as bar, token_writer(directory / "train", codec) as train:
        _add_all(train, sources, mark, bar.advance, groups, processes, shard)
        if held_out:
            with token_writer(directory / "validation", codec) as validation:
                _add_all(validation, held_out, mark, bar.advance, None, processes, shard)
                drop_held_out(train, validation)
        elif (chosen := choose_groups(train, validation_fraction, seed)).any():
            with token_writer(directory / "validation", codec) as validation:
                train.move(chosen, validation)
        else:
            validation = None
            for suffix in ("json", "documents.npy", "bin"):  # of an earlier split
                (directory / f"validation.{suffix}").unlink(missing_ok=True)

    train_file = TokenFile.open(directory / "train")
    validation_file = TokenFile.open(directory / "validation") if validation else None
    if progress:
        amounts = f"{train_file.num_documents:,} documents ({train_file.num_tokens:,} tokens) to train on"
        if validation_file:
            amounts += f", {validation_file.num_documents:,} ({validation_file.num_tokens:,}) to validate"
        print(amounts, file=sys.stderr)
    return train_file, validation_file


def prepare_all(
    sources: Iterable[Source], codec: Codec, stem: str | Path, split_on: str | None = None
) -> tuple[TokenFile, list[str]]:
    """Encodes all documents of `sources` into one token file, as `prepare` does; also returns the name of each
    document's source."""
    sources = list(sources)
    with token_writer(Path(stem), codec) as writer:
        _add_all(writer, sources, _mark(split_on), lambda num_bytes: None, range(len(sources)))
    shutil.rmtree(Path(stem).parent / SHARDS, ignore_errors=True)
    return TokenFile.open(stem), [sources[number].name for number in writer.groups]


def _mark(split_on: str | None) -> bytes | None:
    require(split_on != "", "split_on is empty; give the string between documents, or leave it out")
    return split_on.encode(errors="surrogateescape") if split_on else None


def _add_all(
    writer: TokenWriter,
    sources: Sequence[Source],
    split_on: bytes | None,
    advance: Callable[[int], Any],
    groups: Sequence[int] | None = None,
    processes: int | None = None,
    shard: int = SHARD,
) -> None:
    wrong, empty, rows, strange = list[str](), list[str](), list[str](), Counter[str]()
    codec, folder = writer.codec, Path(writer.file.name).parent / SHARDS
    large = codec.encodes_slowly and sum(source.size for source in sources) >= LARGE * shard
    with (
        Encoders(codec, folder, processes, shard) if large else nullcontext() as encoders,
        closing(encode_documents(sources, codec, split_on, advance, encoders=encoders)) as encoded,
    ):
        for number, parts in groupby(encoded, key=lambda part: part.source):
            source, before = sources[number], len(writer.lengths)
            writer.conditions = codec.condition_ids(source.conditions)
            writer.group = None if groups is None else groups[number]
            try:
                rows += writer.add_source(parts)
                if len(writer.lengths) == before and (source.size > 0 or source.named):
                    empty.append(f"{source.name} has nothing in it")
                elif codec.classes and folder_of(source.name) not in codec.classes:
                    strange[folder_of(source.name)] += 1
            except InputError as error:
                if source.named:
                    raise
                wrong.append(str(error))
    require(len(sources) > 0, "no files given; name files, folders or patterns")
    if not writer.lengths and (wrong or rows):
        raise InputError(f"none of {len(sources)} files can be read: {(wrong or rows)[0]}")
    if not writer.lengths:
        names = f"{sources[0].name} is" if len(sources) == 1 else f"{sources[0].name} and all other files are"
        raise InputError(f"{names} {sources[0].without_documents}")
    if strange:
        folders = ", ".join(list(strange)[:NAMED])
        amount = f"{strange.total():,} of {len(sources):,} files lie in folders that are no classes of the model"
        print(f"{amount}, such as {folders}: they count as pictures without a class", file=sys.stderr)
    for reasons, amount in (
        ([*wrong, *empty], f"{len(wrong) + len(empty)} of {len(sources)} files"),
        (rows, f"{len(rows):,} rows"),
    ):
        if reasons:
            more = [f"and {len(reasons) - NAMED:,} more"] if len(reasons) > NAMED else []
            print(f"skipped {amount}:", *reasons[:NAMED], *more, sep="\n  ", file=sys.stderr)
