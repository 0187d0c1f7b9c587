"""The documents that a recipe names, as the codec and the token files of its run."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from perceiver_ar.config import Recipe
from perceiver_ar.data.codec import Codec, of_trained
from perceiver_ar.data.codec_file import load_codec, save_codec
from perceiver_ar.data.conditions import ConditionTable
from perceiver_ar.data.genome import Records, find_records
from perceiver_ar.data.hub import DOWNLOADS, find_datasets
from perceiver_ar.data.modalities import make_codec, official_split, recognise
from perceiver_ar.data.rows import find_within
from perceiver_ar.data.sources import HUB, Source, standard_library
from perceiver_ar.data.token_files import TokenFile
from perceiver_ar.data.tokens import prepare as tokenise
from perceiver_ar.errors import InputError, require
from perceiver_ar.run import Run
from perceiver_ar.training.console import say


def open_or_make_tokens(run: Run, recipe: Recipe) -> tuple[TokenFile, TokenFile | None, Codec]:
    """The run's token files, for training and held out, and its codec. Made from the recipe's files unless they are
    there."""
    if (run.path / "codec.json").exists():  # written last
        measured = (run.tokens / "validation.json").exists()
        validation = TokenFile.open(run.tokens / "validation") if measured else None
        return TokenFile.open(run.tokens / "train"), validation, load_codec(run.path)
    data = recipe.data
    table = None if data.conditions is None else ConditionTable.read(data.conditions)
    modality, sources, held_out = find_documents(run, recipe, table)
    if recipe.init_from is not None:
        codec = load_codec(run.initial)
    else:
        others = held_out or []
        codec = make_codec(modality, data, sources + others if modality == "integers" else sources)  # ids are in all
        if table is not None:
            require(
                codec.document_length is None,
                "data.conditions does not work with pictures: put those of a class in a folder, and set data.classes",
            )
            codec = table.codec(codec, sources + others, data.condition_text)
    check_windows(replace(recipe, model=codec.fit(recipe.model)), codec)  # before hours of encoding
    if table is not None:
        sources, held_out = table.apply(sources, codec), held_out and table.apply(held_out, codec)
        sizes = {field: f"{n} bytes" if isinstance(n, int) else f"{len(n):,}" for field, n in codec.conditions.items()}
        say(f"conditions: {', '.join(f'{field} ({size})' for field, size in sizes.items())}")
    elif codec.conditions:
        say(f"conditions are unknown ({', '.join(codec.conditions)}): there is no table data.conditions")
    try:
        tokens, validation = tokenise(
            sources,
            codec,
            run.tokens,
            validation_fraction=data.validation_fraction,
            validation_sources=held_out,
            split_on=data.split_on,
            group_by=data.group_by,
            seed=recipe.seed,
        )
    except InputError as error:
        raise error if recipe.init_from is None else InputError(of_trained(str(error))) from None
    save_codec(codec, run.path)
    records = [source for source in held_out or () if isinstance(source, Records)]
    if unseen := {name for source in records for name in source.unseen}:
        names = ", ".join(sorted(unseen)[:5])
        say(f"the .bed file names records that are in no file, so they are not held out: {names}")
    if validation is None and data.validation_fraction > 0:
        one = "Only one document (or group), so none is held out: give --data.validation or --data.split_on to measure."
        absent = f"data.split_on {data.split_on!r} does not occur, so there is one document, and none is held out."
        say(absent if data.split_on is not None and tokens.num_documents == 1 else one)
    return tokens, validation, codec


def find_documents(
    run: Run, recipe: Recipe, table: ConditionTable | None
) -> tuple[str, list[Source], list[Source] | None]:
    """The modality of the recipe's files, those to train on, and those to hold out; None: a share of the first ones.

    Raises InputError for settings that do not fit the files.
    """
    data, modality = recipe.data, recipe.modality
    if any(path.startswith(HUB) for path in (*recipe.paths, *data.validation)):
        require(modality in ("auto", "text"), f"of the Hub only text is read: set modality to text, not {modality}")
        modality = "text"
    else:
        require(data.max_bytes is None, f"data.max_bytes is for datasets that begin with {HUB}: leave it out")
    downloads, out = run.tokens / DOWNLOADS, run.path.resolve()

    def find(paths: Sequence[str]) -> list[Source]:
        found = find_datasets(paths, downloads, data.column, data.max_bytes, recipe.seed)
        return found if table is None else table.without_itself(found)

    def is_input(source: Source) -> bool:  # the run may lie in a folder that is trained on
        return downloads in source.path.parents or out not in Path(os.path.realpath(source.path)).parents

    sources = list(filter(is_input, find(recipe.paths) if recipe.paths else standard_library()))
    held_out = find(data.validation) if data.validation else None
    if modality == "auto":
        modality = recognise(sources) if recipe.paths else "text"
    require(
        data.column == "text" or modality == "text",
        f"data.column is {data.column}, for rows and tar files of text, but the files are {modality}: leave it out",
    )
    if modality == "genome":
        require(data.split_on is None, "data.split_on is for text: leave it out; records of a genome are documents")
        sources, held_out = find_records(sources, held_out)
    else:
        refused = f"is for genomes, but the files are {modality}: leave it out, or set the modality to genome"
        require(data.kmer == 1, f"data.kmer {refused}")
        beds = [source.name for source in held_out or () if source.path.suffix.lower() == ".bed"]
        require(not beds or recipe.modality != "auto", f"{''.join(beds[:1])} in data.validation {refused}")
        sources = find_within(sources, modality, data.column)
        held_out = held_out and find_within(held_out, modality, data.column)
    ruled = data.group_by is not None or held_out is not None
    if modality in ("midi", "audio") and not ruled and (split := official_split(sources)):
        sources, held_out, line = split
        say(line)
    return modality, sources, held_out


def check_windows(recipe: Recipe, codec: Codec) -> None:
    """Raises InputError for settings of windows that do not fit each other or the codec."""
    require(
        recipe.trainer.prefix_growth == 0 or codec.document_length is None,
        "trainer.prefix_growth does not work with pictures, whose prefixes are never cut: leave it out",
    )
    model, blocks = recipe.model, recipe.blocks
    require(
        recipe.window_latents <= model.context_length,
        f"trainer.blocks is {blocks}: with {model.num_latents} latents each they exceed context_length "
        f"{model.context_length}: lower it",
    )
    require(
        blocks == 1 or model.blocks_allowed,
        f"trainer.blocks is {blocks}, which a network with latent_keys query, positions_from_end, learned_queries each "
        "or latents_per_position does not allow: leave it out",
    )
    for field, length in codec.conditions.items():
        require(
            not isinstance(length, int) or length <= model.context_length // 4,
            f"data.condition_text: {field}, up to {length} bytes, takes more than a quarter of the context_length "
            f"{model.context_length}: raise model.context_length to {4 * length}, or shorten the longest texts",
        )
    require(
        recipe.window_latents + len(codec.unknown) <= model.context_length,
        f"data.conditions takes {len(codec.unknown)} of the context_length {model.context_length}, and the latents "
        f"{recipe.window_latents} ({blocks} blocks): lower model.num_latents or trainer.blocks",
    )
