"""What a modality is: a `Codec` turns the bytes of a document into ids and ids back into bytes.

The network, evaluation and generation know a modality only by this interface; docs/modalities.md names exceptions
elsewhere. A run directory keeps its codec as `codec.json` (which codec, with which settings), and the codec's own
files, if it has any, such as `tokenizer.json`.
"""

import logging
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike

from perceiver_ar.config import PerceiverARConfig
from perceiver_ar.errors import InputError, require
from perceiver_ar.files import atomic_path


class WrongModality(InputError):
    """A document that the codec cannot read: skipped if it was found in a folder, an error if the user named it."""


NO_CONDITIONS: Mapping[str, str] = MappingProxyType({})


class Codec(ABC):
    """Documents to ids and back.

    Attributes:
        vocab_size: ids are 0 ... vocab_size - 1.
        separator: ids that precede every document in a token file, and from which generation without a prompt starts;
            empty if a modality has none. They stand for no bytes: `decode` drops them.
        index_dims: sizes of the dimensions of a position (rows, columns, channels of an image); empty for text. Only
            `ImageCodec.fit` passes them on to the network.
        document_length: tokens of every document, if each is a whole picture of one size: a start id and values. `fit`
            must set context_length to one less. None for files of fixed-size records: a window may span many of them.
        saved: names of the attributes that `settings` keeps.
        files: patterns of the files that `save` writes into a run directory.
        ending: file name ending for what `decode` returns, such as ".mid".
        conditions: field -> its values, of which one or "unknown" stands as a token after the separator of every
            document; or, for a free text, its number of tokens; see `ConditionedCodec`.
        header_conditions: names of conditions that the first ids of a document itself stand for.
        unknown: the ids of the tokens of `conditions` in documents that have no values.
        classes: prompts that `start` takes, beside none, of a codec that does not write text.
        reads_text: documents are UTF-8 text; files that cannot be text are refused.
        writes_text: `decode` returns text that can be read piece by piece.
        encodes_in_threads: `encode_pieces` lets other threads run, so encoding in several threads is faster.
        encodes_slowly: encoding takes much longer than reading, so several processes encode large corpora.
    """

    name: ClassVar[str]
    saved: ClassVar[tuple[str, ...]] = ()
    files: ClassVar[tuple[str, ...]] = ()
    ending: ClassVar[str] = ".bin"
    writes_text: ClassVar[bool] = False
    encodes_in_threads: ClassVar[bool] = False
    encodes_slowly: ClassVar[bool] = False
    reads_text: bool = False
    vocab_size: int
    separator: tuple[int, ...] = ()
    index_dims: tuple[int, ...] = ()
    document_length: int | None = None
    conditions: Mapping[str, tuple[str, ...] | int] = MappingProxyType({})
    header_conditions: tuple[str, ...] = ()
    unknown: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()

    @property
    def plain(self) -> "Codec":
        """The codec of the documents alone, without conditions."""
        return self

    @property
    def dtype(self) -> np.dtype:
        """The smallest of uint8, uint16 and uint32 that holds every id."""
        return np.dtype("uint8" if self.vocab_size <= 1 << 8 else "uint16" if self.vocab_size <= 1 << 16 else "uint32")

    @abstractmethod
    def encode(self, data: bytes) -> np.ndarray:
        """One whole document, or a prompt -> ids (n,) of `dtype`, without the separator before it.

        Raises `WrongModality`.
        """

    def encode_stream(self, chunks: Iterable[bytes], where: str) -> Iterator[np.ndarray]:
        """One document that comes in `chunks` cut anywhere -> its ids, piece by piece. `where` names it in errors.

        Codecs of long documents override this to need constant memory. Raises `WrongModality`.
        """
        try:
            yield self.encode(b"".join(chunks))
        except WrongModality as error:
            raise WrongModality(f"{where}: {error}") from error

    def pieces(self, chunks: Iterable[bytes], where: str) -> Iterator[Any]:
        """As `encode_stream`, but yields pieces from which `encode_pieces` makes the ids, in any order."""
        return self.encode_stream(chunks, where)

    def encode_pieces(self, pieces: Sequence[Any]) -> list[np.ndarray]:
        """The ids of pieces of any documents."""
        return list(pieces)

    @abstractmethod
    def decode(self, ids: ArrayLike) -> bytes:
        """Ids (n,) -> the bytes they stand for. Never raises for ids that no document has, such as its first half."""

    def file_of(self, document: bytes) -> bytes:
        """The content of a file for what `decode` returned: with what the format has around it."""
        return document

    def fit(self, config: PerceiverARConfig) -> PerceiverARConfig:
        """`config` with the settings that follow from the codec filled in."""
        return config.replace(vocab_size=self.vocab_size)

    def condition_ids(self, conditions: Mapping[str, str]) -> list[int]:
        """The ids that stand for `conditions` between separator and document; none for `header_conditions`.

        Raises `InputError` for unknown conditions and values.
        """
        if unknown := [field for field in conditions if field not in (*self.conditions, *self.header_conditions)]:
            known = ", ".join([*self.conditions, *self.header_conditions])
            known = f"known are {known}" if known else "this run was trained without any"
            raise InputError(f"there is no condition {unknown[0]!r}: {known}")
        return []

    def conditions_of(self, ids: np.ndarray) -> list[int]:
        """The ids of the conditions of a row (n,) that begins with a document; those of unknown ones if it has none."""
        return self.condition_ids({})

    def header_ids(self, conditions: Mapping[str, str]) -> list[int]:
        """The first ids of a document with those of `conditions` that are `header_conditions`; [] if none is.

        Raises `InputError` for values that do not exist.
        """
        return []

    def start(self, prompt: str = "", conditions: Mapping[str, str] = NO_CONDITIONS) -> np.ndarray:
        """The ids (n,) of a document that begins with `prompt`. Raises `InputError` if text cannot be a prompt."""
        front = np.array([*self.separator, *self.condition_ids(conditions)], dtype=self.dtype)
        if not prompt:
            return np.append(front, np.array(self.header_ids(conditions), dtype=self.dtype))
        if not self.writes_text:
            raise InputError(f"this run does not write text, so {prompt!r} is no prompt; give a file to go on from")
        return np.append(front, self.encode(prompt.encode("utf-8", errors="surrogateescape")))

    @property
    def has_bars(self) -> bool:
        """Whether documents have bars that can be infilled."""
        return type(self.plain).infill is not Codec.infill

    def infill(self, ids: np.ndarray, first: int, last: int, room: int) -> tuple[np.ndarray, np.ndarray, int]:
        """A document `ids` (n,), with its separator, whose bars first ... last (from 1) are to be drawn anew.

        Returns the row that, with what is drawn, is the whole document for `decode`; the prompt, which with what is
        drawn has about `room` tokens; and the maximum number of tokens to draw. Raises `InputError`.
        """
        raise InputError(f"documents of the codec {self.name!r} have no bars, so leave out infill")

    def allowed_next(self, ids: np.ndarray) -> np.ndarray | None:
        """Which ids may follow `ids` (n,), the whole row with separator and prompt: (vocab_size,) bool; None: all may.

        At least one must be allowed.
        """
        return None

    def constraint(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """`allowed_next` in the form that generation takes; None if any id may follow any."""
        if type(self).allowed_next is Codec.allowed_next:
            return None

        def allowed(ids: torch.Tensor) -> torch.Tensor:
            mask = self.allowed_next(ids.cpu().numpy())
            return torch.ones(self.vocab_size, dtype=torch.bool) if mask is None else torch.from_numpy(mask)

        return allowed

    def augment(self, ids: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """A random variant of a training window (n,), of the same length, such as the same music in another key."""
        return ids

    def amounts(self, ids: np.ndarray) -> dict[str, float]:
        """The amounts that `ids` (n,) stand for, by unit, such as {"note": 812, "second": 95.3}.

        Evaluations divide by them as they do by tokens and bytes: nats per note are the sum of -log p over these
        tokens, divided by their number of notes.
        """
        return {}

    def show(
        self,
        rows: Sequence[np.ndarray],
        prompt_len: int,
        directory: Path,
        stem: str,
        *,
        original: np.ndarray | None = None,
        soundfont: str | None = None,
    ) -> list[Path]:
        """Writes generated documents as files that can be heard and seen, named after `stem`; returns their paths.

        rows: prompt and continuation of each completion; original: the document that the prompt was cut from;
        soundfont: an .sf2 or .sf3 file, for codecs that need one.
        """
        paths = []
        for name, content in self.results(rows, prompt_len, stem, original=original, soundfont=soundfont):
            paths.append(directory / name)
            with atomic_path(paths[-1]) as temporary:
                temporary.write_bytes(content)
        return paths

    def results(self, rows: Sequence[np.ndarray], prompt_len: int, stem: str, **_: Any) -> Iterator[tuple[str, bytes]]:
        """Name and content of each file that `show` writes, from its arguments."""
        for name, ids in zip(self.result_names(stem, len(rows)), rows, strict=False):
            yield name, self.file_of(self.decode(ids))

    def result_names(self, stem: str, count: int) -> list[str]:
        """The names that `results` may yield for `count` rows, the rows' own first."""
        return [f"{numbered(stem, number, count)}{self.ending}" for number in range(1, count + 1)]

    def draw_bits(self, ids: np.ndarray, bits: np.ndarray, path: Path) -> None:
        """Draws a document of tokens `ids` (n,) that took `bits` (n,) into the PNG file `path`, shaded by bits.

        Raises `InputError` if the modality has no such picture.
        """
        from perceiver_ar.data.pictures import shaded_text

        if not self.writes_text:
            raise InputError(f"documents of the codec {self.name!r} have no picture of their bits: leave --picture out")
        lengths = self._byte_lengths[np.asarray(ids, dtype=np.int64)]
        with atomic_path(path) as temporary:
            shaded_text(self.decode(ids), np.repeat(bits / lengths.clip(1), lengths)).save(temporary)

    def byte_lengths(self) -> np.ndarray:
        """Number of bytes that each id stands for, (vocab_size,) int64: 0 for separators, and for all ids of a codec
        whose ids do not stand for bytes."""
        return np.zeros(self.vocab_size, dtype=np.int64)

    @cached_property
    def _byte_lengths(self) -> np.ndarray:
        return self.byte_lengths()

    def num_bytes(self, ids: ArrayLike) -> int:
        """Number of bytes that these ids stand for: the divisor of bits per byte."""
        return int(self._byte_lengths[np.asarray(ids, dtype=np.int64)].sum())

    def settings(self) -> dict[str, Any]:
        """The settings from which `load` builds the same codec again, as JSON values."""
        return {name: getattr(self, name) for name in self.saved}

    def save(self, directory: Path) -> None:  # noqa: B027  (most codecs have no files of their own)
        """Writes the codec's own files, if it has any, into `directory`."""

    @classmethod
    def load(cls, directory: Path, settings: dict[str, Any]) -> "Codec":
        """The codec that `settings()` and `save` described. Raises `InputError` if a file is missing or damaged."""
        return cls(**settings)


def start_ids(codec: Codec, prompt: str = "", conditions: Mapping[str, str] = NO_CONDITIONS) -> np.ndarray:
    """`codec.start` as ids (n,) int64, n >= 1, to generate from: id 0 if nothing precedes documents."""
    ids = codec.start(prompt, conditions).astype(np.int64)
    return ids if len(ids) else np.zeros(1, np.int64)


def parse_conditions(words: Iterable[str]) -> dict[str, str]:
    """Words of the form key=value as a dict. Raises `InputError` for others, and for a key that comes twice."""
    conditions: dict[str, str] = {}
    for word in words:
        key, _, value = word.partition("=")
        known = conditions.get(key)
        require(bool(key and value), f"condition {word!r} has no key and value: write KEY=VALUE, such as composer=bach")
        require(known is None, f"condition {key} is given twice: choose one of {known} and {value}")
        conditions[key] = value
    return conditions


def row_prompt_and_count(
    codec: Codec, document: np.ndarray, keep: float | None, count: int | None, infill: str | None, room: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """The row that results begin with, the prompt (both int64), and the maximum number of tokens to draw.

    keep: number of tokens after the document's start that the prompt has, or below 1 a share of them; at least one is
        kept. None: all of them, or half of a whole picture.
    count: maximum number of tokens to draw; None: 256, or the rest of a picture.
    infill: FIRST:LAST, bars of the whole document to draw anew in `room` tokens. None: the row is the prompt.
    """
    if infill is not None:
        bars = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", infill)
        if bars is None:
            raise InputError(f"infill is {infill!r}: give the first and the last bar, such as 9:12")
        row, prompt, most = codec.infill(document, int(bars[1]), int(bars[2]), room)
        return row, prompt, most if count is None else count
    if keep is None and codec.document_length is not None and len(document) == codec.document_length:
        keep = 0.5
    if keep is not None:
        start = len(codec.start())
        document = document[: start + max(1, round(keep * (len(document) - start) if keep < 1 else keep))]
    if codec.document_length is not None:
        rest = codec.document_length - len(document)
        count = rest if count is None else min(count, rest)
    prompt = np.array(document if len(document) else [0], dtype=np.int64)
    return prompt, prompt, 256 if count is None else count


def check_positive(**settings: int) -> None:
    """Raises ValueError, naming the setting, for a value that is not a whole number of at least 1."""
    for name, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}: it must be a whole number, at least 1")


def of_trained(reason: str) -> str:
    """Adapts a message that recommends --modality to a trained run, which no longer has this option."""
    return reason.replace("use --modality bytes", "use a run that was trained with --modality bytes")


def numbered(stem: str, number: int, count: int) -> str:
    """The stem of one of `count` results."""
    return stem if count == 1 else f"{stem}-{number}"


_IMPORTING = threading.RLock()  # threads that import extras wait for each other, as what is silent belongs to all


@contextmanager
def importing(extra: str) -> Iterator[None]:
    """For imports of the packages of an extra: raises InputError if one is missing, and keeps their notices silent."""
    with _IMPORTING:
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)  # torchao's are about kernels for other devices
        try:
            yield
        except ImportError as error:
            if (error.name or "").startswith("perceiver_ar"):
                raise
            raise InputError(f"this needs the package {error.name}: pip install 'perceiver-ar[{extra}]'") from None
        finally:
            logging.disable(before)
