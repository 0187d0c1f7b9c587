"""What a modality is: a `Codec` turns the bytes of a document into ids and ids back into bytes.

The model, training, evaluation and generation know a modality only by this interface. A run directory keeps its codec
as `codec.json` (which codec, with which settings) and, where a codec needs them, files of its own such as
`tokenizer.json`.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from perceiver_ar.errors import InputError
from perceiver_ar.files import write_text

# What `codec.json` may name, and where it lives. A new modality adds one line; nothing else is ever imported by name.
CODECS = {
    "bytes": "perceiver_ar.data.text:BytesCodec",
    "tokenizer": "perceiver_ar.data.text:TokenizerCodec",
}


class WrongModality(InputError):
    """A document that the codec cannot read: skipped if it was found in a folder, an error if the user named it."""


class Codec(ABC):
    """Documents to ids and back.

    vocab_size    ids are 0..vocab_size-1
    separator     ids that precede every document in a token file, and from which generation without a prompt starts;
                  empty where a modality has none. They stand for no bytes: `decode` drops them.
    index_dims    sizes of the dimensions of a position (rows, columns, channels of an image); empty for text
    """

    name: ClassVar[str]
    vocab_size: int
    separator: tuple[int, ...] = ()
    index_dims: tuple[int, ...] = ()

    @property
    def dtype(self) -> np.dtype:
        """The smallest of uint8, uint16 and uint32 that holds every id."""
        return np.dtype(
            np.uint8 if self.vocab_size <= 1 << 8 else np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        )

    @abstractmethod
    def encode(self, data: bytes) -> np.ndarray:
        """One whole document, or a prompt -> ids (n,) of `dtype`, without separators. Raises `WrongModality`."""

    def encode_stream(self, chunks: Iterable[bytes], where: str) -> Iterator[np.ndarray]:
        """One document that comes in `chunks` cut anywhere -> its ids, piece by piece. `where` names it in errors.

        Codecs of long documents override this to need constant memory. Raises `WrongModality`.
        """
        try:
            yield self.encode(b"".join(chunks))
        except WrongModality as error:
            raise WrongModality(f"{where}: {error}") from error

    @abstractmethod
    def decode(self, ids: ArrayLike) -> bytes:
        """Ids (n,) -> the bytes they stand for. Any ids will do, also the first half of a document."""

    @abstractmethod
    def byte_lengths(self) -> np.ndarray:
        """How many bytes of a document each id stands for: (vocab_size,) int64; 0 for separators."""

    @cached_property
    def _byte_lengths(self) -> np.ndarray:
        return self.byte_lengths()

    def num_bytes(self, ids: ArrayLike) -> int:
        """How many bytes of the documents these ids stand for: what bits per byte divides by."""
        return int(self._byte_lengths[np.asarray(ids, dtype=np.int64)].sum())

    def settings(self) -> dict[str, Any]:
        """What `load` needs to build the same codec again, as JSON."""
        return {}

    def save(self, directory: Path) -> None:  # noqa: B027  (most codecs have no files of their own)
        """Writes the codec's own files, if it has any, into `directory`."""

    @classmethod
    def load(cls, directory: Path, settings: dict[str, Any]) -> "Codec":
        """The codec that `settings()` and `save` described. Raises `InputError` if a file is missing or damaged."""
        return cls(**settings)


def save_codec(codec: Codec, directory: str | Path) -> None:
    """Writes `codec.json` and the codec's own files into `directory`, each atomically, `codec.json` last."""
    codec.save(Path(directory))
    text = json.dumps({"codec": codec.name, "settings": codec.settings()}, indent=2)
    write_text(Path(directory) / "codec.json", text + "\n")


def load_codec(directory: str | Path) -> Codec:
    """The codec that `save_codec` wrote. Raises `InputError` if it is missing, damaged, or of an unknown kind."""
    path = Path(directory) / "codec.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        name, settings = content["codec"], content["settings"]
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} does not exist: {directory} is not a run directory; train one with --out") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); copy it again from the original run") from None
    if str(name) not in CODECS:
        known = ", ".join(sorted(CODECS))
        raise InputError(f"{path} names the codec {name!r}, known are {known}; use the perceiver-ar that wrote it")
    module, _, attribute = CODECS[name].partition(":")
    codec_class: type[Codec] = getattr(import_module(module), attribute)
    try:
        return codec_class.load(path.parent, settings)
    except TypeError as error:  # settings that the class does not take
        raise InputError(f"{path} is damaged ({error}); copy it again from the original run") from None
