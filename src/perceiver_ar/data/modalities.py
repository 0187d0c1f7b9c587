"""The modality of files, and its codec."""

import csv
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from perceiver_ar.config import DataConfig
from perceiver_ar.data.codec import Codec
from perceiver_ar.data.sources import Source, file_beside, folder_of, read_text
from perceiver_ar.data.tars import TAR, Members, extension, read_tar
from perceiver_ar.data.text import BytesCodec, TokenizerCodec, column_separator, train_bpe
from perceiver_ar.errors import InputError

ENDINGS = {
    "midi": (".mid", ".midi", ".rmi"),
    "image": (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    "audio": (".wav", ".flac", ".ogg", ".mp3", ".aif", ".aiff"),
    "integers": (".npy", ".npz"),
    "genome": (".fasta", ".fa", ".fna", ".ffn", ".fas", ".fastq", ".fq"),
}
TEXT_MEMBERS = (".txt", ".text")
TAR_MEMBERS = 20  # of a tar file, to recognise its modality by
COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
MAGIC = {
    rb"MThd|RIFF....RMID": "midi",
    rb"\x89PNG\r\n|\xff\xd8\xff|RIFF....WEBP": "image",
    rb"RIFF....WAVE|fLaC|OggS": "audio",
    rb"\x93NUMPY": "integers",
}
NOTES = re.compile(r"(readme|licen[cs]e|copying|changelog|citation)\b.*|.*\.(csv|tsv|json|md|cff)", re.IGNORECASE)
"""Names of files that describe the files beside them. A file with such a name alone is text."""
BPE_BYTES = 100_000_000  # enough text to choose merges from


def recognise(sources: Iterable[Source]) -> str:
    """The modality of all files: by their ending, or else by their first bytes; text if neither is known.

    Raises `InputError`, with the number of files of each, if they have several. Notes and tables beside other files
    (README, LICENSE, .csv, .json, .md) do not count, nor do files that cannot be read.
    """
    sources = list(sources)
    tars = [source for source in sources if TAR.fullmatch(source.path.name)]
    others = (source for source in sources if not TAR.fullmatch(source.path.name))
    kinds = [(source, kind) for source in others if (kind := _kind(source)) is not None]
    kinds += [(source, kind) for source in tars[:1] for kind in _kinds_in(source)]  # shards are alike
    kinds = [(source, kind) for source, kind in kinds if kind != "text" or not NOTES.fullmatch(source.path.name)]
    seen = Counter(kind for _, kind in kinds)
    if len(seen) > 1:
        examples = {kind: source.name for source, kind in reversed(kinds)}
        counts = ", ".join(f"{count:,} {kind}, such as {examples[kind]}" for kind, count in seen.most_common())
        raise InputError(f"the files are of several kinds ({counts}); name files of one kind, or set --modality")
    return next(iter(seen), "text")


def _kinds_in(tar: Source) -> list[str]:
    """The modalities of the first members of a tar file."""
    try:
        endings = {extension(name) for name, _ in islice(read_tar(tar), TAR_MEMBERS)}
    except InputError:  # reported when the file is read
        return []
    known = {**ENDINGS, "text": TEXT_MEMBERS}
    return [modality for modality, own in known.items() if not endings.isdisjoint(own)]


def find_members(sources: Iterable[Source], modality: str, column: str) -> list[Source]:
    """`sources`, with tar files as `Members` with documents of this modality; for bytes, a tar file stays a file.

    column: for text, if it is not "text", the ending of the members (md), or that of JSON members and a field in them
        (json.caption).
    """
    endings, field = ENDINGS.get(modality, TEXT_MEMBERS), ""
    if modality == "text" and column != "text":
        ending, _, field = column.partition(".") if column.startswith("json.") else (column, "", "")
        endings = (f".{ending.lower()}",)
    return [
        Members(**vars(source), endings=endings, field=field)
        if modality != "bytes" and TAR.fullmatch(source.path.name)
        else source
        for source in sources
    ]


def _kind(source: Source) -> str | None:
    name = source.path.name.lower()
    compressed = name.endswith(COMPRESSED)
    ending = os.path.splitext(os.path.splitext(name)[0] if compressed else name)[1]
    for modality, endings in ENDINGS.items():
        if ending in endings:
            return modality
    if not compressed:
        try:
            with open(source.path, "rb") as file:
                start = file.read(16)
        except OSError:  # reported when the file is read
            return None
        for magic, modality in MAGIC.items():
            if re.match(magic, start, re.DOTALL):
                return modality
    return "text"


def make_codec(modality: str, data: DataConfig, sources: Sequence[Source]) -> Codec:
    """The codec of a modality with these settings. Raises `InputError` if they do not fit together.

    Reads `sources` only for codecs that are made from data (tokenizers, palettes, integers).
    """
    if modality not in ("text", "auto") and (data.tokenizer is not None or data.bpe_vocab_size is not None):
        raise InputError(f"the modality is {modality}, but a tokenizer reads text: leave out one of them")
    if modality == "midi":
        from perceiver_ar.data.midi import MidiTokCodec, PerformanceCodec
        from perceiver_ar.data.remi_plus import RemiPlusCodec

        if data.midi_tokens == "remi_plus":
            return RemiPlusCodec()
        return PerformanceCodec() if data.midi_tokens == "performance" else MidiTokCodec(data.midi_tokens)
    if modality == "image":
        from perceiver_ar.data.image import ImageCodec, choose_palette

        rows, columns = data.image_size
        tar = next((source.name for source in sources if isinstance(source, Members)), None)
        if data.classes and tar is not None:
            raise InputError(f"data.classes takes the classes from folders, but {tar} is a tar file: unpack it")
        palette = None
        if data.image_colours == "palette":
            palette = choose_palette(sources, rows, columns, data.palette_size)
        pictures = [source for source in sources if _kind(source) == "image"] if data.classes else []
        classes = sorted({folder_of(source.name) for source in pictures})
        return ImageCodec(rows, columns, data.image_colours, palette, classes)
    if modality == "audio":
        from perceiver_ar.data.audio import WEIGHTS, MuLawCodec, NeuralCodec

        if data.audio_codec == "mulaw":
            return MuLawCodec(data.sample_rate)
        weights = data.audio_weights or WEIGHTS[data.audio_codec]
        return NeuralCodec.from_pretrained(data.audio_codec, weights, data.codebooks)
    if modality == "integers":
        from perceiver_ar.data.integers import IntegerCodec, count_values

        return IntegerCodec(count_values(sources))
    if modality == "genome":
        from perceiver_ar.data.genome import NucleotideCodec

        return NucleotideCodec(data.kmer)
    if data.tokenizer is not None:
        return TokenizerCodec.from_file(data.tokenizer)
    if data.bpe_vocab_size is not None:
        print(f"training a tokenizer of {data.bpe_vocab_size:,} tokens", file=sys.stderr)
        return train_bpe(read_text(sources, max_bytes=BPE_BYTES), data.bpe_vocab_size)
    assert modality in ("auto", "text", "bytes"), f"make_codec does not know {modality!r}"
    return BytesCodec(text=modality != "bytes")


def codec_settings(codec: Codec) -> dict[str, Any]:
    """The settings from which `make_codec` makes such a codec, by their names in a recipe, such as "data.image_size".

    They do not include what a codec learned from data (a tokenizer, a palette, classes).
    """
    own = codec.settings()
    match codec.name:
        case "bytes":
            return {"modality": "text" if own["text"] else "bytes"}
        case "performance" | "remi_plus":
            return {"modality": "midi", "data.midi_tokens": codec.name}
        case "miditok":
            return {"modality": "midi", "data.midi_tokens": own["kind"]}
        case "image":
            colours = {"data.image_colours": own["colours"], "data.classes": bool(own["classes"])}
            colours |= {"data.palette_size": len(own["palette"])} if own["palette"] else {}
            return {"modality": "image", "data.image_size": (own["rows"], own["columns"]), **colours}
        case "mulaw":
            return {"modality": "audio", "data.audio_codec": "mulaw", "data.sample_rate": own["sample_rate"]}
        case "neural":
            return {"modality": "audio", "data.audio_codec": own["kind"], "data.codebooks": own["codebooks"]}
        case "integers":
            return {"modality": "integers"}
        case "nucleotides":
            return {"modality": "genome", "data.kmer": own["kmer"]}
        case "tokenizer" | "offset_bytes":
            return {"modality": "text"}
    raise AssertionError(f"codec_settings does not know {codec.name!r}")


def official_split(sources: Sequence[Source]) -> tuple[list[Source], list[Source], str] | None:
    """Training files, validation files and a message about them, if `sources` contain a table of the split; else None.

    The table is a .csv file with columns `split` (train, validation, test) and `midi_filename` or `audio_filename`,
    relative to its folder, as in MAESTRO (Hawthorne et al. 2019). Capitals and the separator of columns do not matter.
    Files of other splits are left out.

    Raises `InputError` for a row that names a file as no file can be named.
    """
    for table in (source for source in sources if source.path.suffix.lower() == ".csv"):
        try:
            with open(table.path, newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
                reader = csv.DictReader(file, delimiter=column_separator(file.readline()))
                file.seek(0)
                reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
                rows = list(reader)
        except (OSError, UnicodeDecodeError, csv.Error):
            continue
        columns = {"midi_filename", "audio_filename"} & set(rows[0] if rows else ())
        if not columns or "split" not in rows[0]:
            continue
        split_of = {
            file_beside(table.path, row[column], f"{table.name}, row {number},"): (row["split"] or "").strip().lower()
            for number, row in enumerate(rows, 1)
            for column in columns
            if row[column]
        }
        parts: dict[str | None, list[Source]] = {}
        for source in sources:
            if source is not table:
                parts.setdefault(split_of.get(os.path.realpath(source.path)), []).append(source)
        train, validation = parts.pop("train", []), parts.pop("validation", [])
        if not train:
            continue
        left = sum(map(len, parts.values()))
        counts = f"{len(train):,} files to train on, {len(validation):,} to validate, {left:,} left out"
        return train, validation, f"split of {table.name}: {counts}"
    return None
