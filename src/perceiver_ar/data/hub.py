"""Datasets of the Hugging Face Hub by name: streamed into files of rows, which are then read like any others.

A file has `ROWS` rows. After each, `.state.json` keeps the position in the stream. After a kill, the download goes on
there and gives the same rows.
"""

import json
import logging
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import numpy as np

from perceiver_ar.data.codec import importing
from perceiver_ar.data.rows import MISSING, ROWS_TO_SEARCH, field_of
from perceiver_ar.data.sources import HUB, Source, find_files
from perceiver_ar.errors import InputError, require
from perceiver_ar.files import write_text
from perceiver_ar.progress import ProgressBar

PART = r"[\w.-]+"
DATASET = re.compile(rf"{HUB}datasets/({PART}/{PART})(?:@([\w.~-]+))?(?::({PART}))?(?:/({PART}))?")
DOWNLOADS = "downloads"
"""The usual name of the folder."""
ROWS = 10_000  # rows that are shuffled and written together


def find_datasets(
    paths: Sequence[str], folder: Path, column: str, max_bytes: int | None, seed: int, rows: int = ROWS
) -> list[Source]:
    """The files and folders at `paths`, as `find_files` finds them. Those that begin with hf:// are first streamed from
    the Hub into `folder`, unless they are there.

    column: the column with the text, or a field of a field.
    max_bytes: bytes of text to take from each dataset; None: all.
    seed: of the order. The dataset's files come in random order, several at a time, and of the stream every `rows`
        rows are shuffled.

    Raises `InputError` as `find_files`, and if a dataset cannot be reached or has no such column.
    """
    sources, local = list[Source](), [path for path in paths if not path.startswith(HUB)]
    named = dict[str, str]()  # each dataset and split once
    for path in (path for path in paths if path.startswith(HUB)):
        match = DATASET.fullmatch(path)
        named.setdefault(f"{path}/train" if match and not match[4] else path, path)
    for path in named.values():
        parts = folder / quote(path, safe="")
        _download(path, parts, column, max_bytes, seed, rows)
        sources += find_files(parts)
    return sources + (find_files(local) if local or not sources else [])


def _download(path: str, folder: Path, column: str, max_bytes: int | None, seed: int, rows: int) -> None:
    state_file = folder / ".state.json"
    state = {"parts": 0, "bytes": 0, "without column": 0, "ended": False, "stream": None}
    if state_file.exists():
        state = json.loads(state_file.read_text(encoding="utf-8"))
    try:
        stream = None if state["ended"] else _open(path, column, seed)
        if stream is not None and state["stream"] is not None:
            stream.load_state_dict(state["stream"])
        stream_rows = iter(stream or ())
        with ProgressBar("downloading", max_bytes or 0, enabled=max_bytes is not None) as bar:
            while stream is not None and not state["ended"]:
                bar.update(state["bytes"])
                part, texts, size = state["parts"], list[str](), state["bytes"]
                read, lacking, without = 0, dict[str, None](), state.get("without column", 0)
                for read, row in enumerate(islice(stream_rows, rows), 1):
                    text = field_of(row, column)
                    if text is MISSING:
                        lacking, without = lacking | dict.fromkeys(row), without + 1
                        if part or texts or read < ROWS_TO_SEARCH:
                            continue
                        break
                    if not isinstance(text, str | None):
                        raise InputError(f"{path} has {text!r:.40} in column {column!r}, not text; set data.column")
                    texts.append(text or "")
                    size += len(texts[-1].encode(errors="surrogatepass"))
                    if max_bytes is not None and size >= max_bytes:
                        break
                if lacking and not (part or texts):
                    _no_column(path, column, lacking)
                order = np.random.default_rng([part, seed & (1 << 64) - 1]).permutation(len(texts))
                lines = [json.dumps({column: texts[index]}) + "\n" for index in order]
                if lines:
                    write_text(folder / f"{part:06}.jsonl", "".join(lines))
                ended = read < rows or (max_bytes is not None and size >= max_bytes)
                state = {"parts": part + 1, "bytes": size, "without column": without, "ended": ended}
                state["stream"] = stream.state_dict()
                write_text(state_file, json.dumps(state))
    except InputError:
        raise
    except Exception as error:  # the libraries below raise many kinds
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:  # a full disk
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"cannot read {path} ({reason}); check its name and the network, or fetch it with `hf download` and name "
            "the folder"
        ) from None
    if without := state.get("without column"):
        print(f"skipped {without:,} rows of {path} without the column {column!r}", file=sys.stderr)
    require(any(folder.glob("*.jsonl")), f"{path} has no rows; name another split")


def _open(path: str, column: str, seed: int) -> Any:
    """The stream of a dataset, with one column. Raises InputError if its name is malformed or the column is missing."""
    if (match := DATASET.fullmatch(path)) is None:
        raise InputError(
            f"{path} is not the name of a dataset: write {HUB}datasets/OWNER/NAME, with :CONFIG or /SPLIT behind it if "
            "needed"
        )
    with importing("datasets"):
        from datasets import load_dataset
    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they log what they raise
    name, revision, config, split = match.groups()
    stream = load_dataset(name, config, revision=revision, split=split or "train", streaming=True)
    if names := stream.column_names:  # without them, reading finds out
        top = column if column in names else column.partition(".")[0]
        stream = stream.select_columns(top) if top in names else _no_column(path, column, names)
    # A buffer of more rows would be lost when the stream is resumed, so rows are shuffled when they are written.
    return stream.shuffle(seed=seed, buffer_size=1)


def _no_column(path: str, column: str, names: Iterable[str]) -> NoReturn:
    raise InputError(f"{path} has no column {column!r}; set data.column to one of {', '.join(names)}")
