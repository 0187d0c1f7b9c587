"""A run's codec, in a folder or on the Hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Arguments of `from_pretrained` that locate a file."""


def find_codec(path: Any, kwargs: dict[str, Any]) -> Path | None:
    """The folder with a run's codec, fetched from the Hub if it is there; None: the run has no codec.

    kwargs: of `from_pretrained`.
    """
    hub = {name: value for name, value in kwargs.items() if name in HUB}
    file = None
    for name in ("tokenizer.json", "miditok.json", "codec.json"):  # the first two are files of codecs
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub)
    return None if file is None else Path(file).parent


def end_of_document(path: Any, kwargs: dict[str, Any]) -> int | None:
    """The id with which a run's codec ends a document; None if there is no such id, or no package to read the codec."""
    try:
        from perceiver_ar.data.codec_file import load_codec
    except ImportError:  # this file was exported with the weights alone
        return None
    folder = find_codec(path, kwargs)
    separator: Sequence[int] = () if folder is None else load_codec(folder).separator
    return separator[-1] if separator else None
