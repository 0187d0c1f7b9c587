"""Recordings as ids: 8-bit mu-law samples, or the codes of a neural codec (EnCodec, DAC, Mimi)."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike

from perceiver_ar.data.audio_file import read_audio
from perceiver_ar.data.codec import Codec, check_positive, importing, numbered
from perceiver_ar.data.pictures import png_bytes, spectrogram
from perceiver_ar.data.sound import wav_bytes
from perceiver_ar.errors import InputError


class AudioCodec(Codec):
    """The common part of audio codecs: recordings in, WAV and spectrograms out."""

    ending = ".wav"
    encodes_slowly = True
    sample_rate: int

    def encode(self, data: bytes) -> np.ndarray:
        return self.encode_samples(read_audio(data, self.sample_rate))

    def decode(self, ids: ArrayLike) -> bytes:
        return wav_bytes(self.decode_samples(np.asarray(ids, dtype=np.int64)), self.sample_rate)

    @abstractmethod
    def encode_samples(self, samples: np.ndarray) -> np.ndarray:
        """Samples (n,) in -1 ... 1 -> ids."""

    @abstractmethod
    def decode_samples(self, ids: np.ndarray) -> np.ndarray:
        """Any ids -> samples (n,) in -1 ... 1."""

    def results(self, rows: Sequence[np.ndarray], prompt_len: int, stem: str, **_: Any) -> Iterator[tuple[str, bytes]]:
        """STEM.wav and STEM.png for each row; the picture is a spectrogram with a line at the prompt's end. With a
        prompt, STEM-prompt.wav is the prompt after the codec, for comparison."""
        prompt = self.decode_samples(np.asarray(rows[0][:prompt_len], dtype=np.int64))
        if len(prompt) > 0:
            yield f"{stem}-prompt.wav", wav_bytes(prompt, self.sample_rate)
        for number, ids in enumerate(rows, 1):
            name = numbered(stem, number, len(rows))
            samples = self.decode_samples(np.asarray(ids, dtype=np.int64))
            yield f"{name}.wav", wav_bytes(samples, self.sample_rate)
            yield f"{name}.png", png_bytes(spectrogram(samples, self.sample_rate, len(prompt)))

    def result_names(self, stem: str, count: int) -> list[str]:
        wavs = super().result_names(stem, count)
        return [*wavs, *(name.removesuffix(".wav") + ".png" for name in wavs), f"{stem}-prompt.wav"]


MU = 255
END = 256


class MuLawCodec(AudioCodec):
    """Every sample is an id 0 ... 255 by the mu-law of G.711, as in WaveNet (arXiv 1609.03499, section 2.2). It needs
    no model. Id 256 separates recordings.

    f(x) = sign(x) ln(1 + 255 |x|) / ln 256 is rounded to 256 equally spaced levels in -1 ... 1.
    """

    name = "mulaw"
    saved = ("sample_rate",)
    vocab_size = END + 1
    separator = (END,)

    def __init__(self, sample_rate: int = 16_000) -> None:
        check_positive(sample_rate=sample_rate)
        self.sample_rate = sample_rate

    def encode_samples(self, samples: np.ndarray) -> np.ndarray:
        x = samples.astype(np.float64).clip(-1, 1)
        level = np.sign(x) * np.log1p(MU * np.abs(x)) / np.log1p(MU)
        return np.rint((level + 1) / 2 * MU).astype(self.dtype)

    def decode_samples(self, ids: np.ndarray) -> np.ndarray:
        level = 2 * ids[ids < END] / MU - 1
        return np.sign(level) * np.expm1(np.abs(level) * np.log1p(MU)) / MU

    def allowed_next(self, ids: np.ndarray) -> np.ndarray | None:
        """All ids, but after a separator no other one: no recording is empty."""
        return np.arange(self.vocab_size) < END if len(ids) and ids[-1] == END else None

    def amounts(self, ids: np.ndarray) -> dict[str, float]:
        samples = float((np.asarray(ids) < END).sum())
        return {"sample": samples, "second": samples / self.sample_rate}


Kind = Literal["encodec", "dac", "mimi"]
WEIGHTS: dict[str, str] = {
    "encodec": "facebook/encodec_24khz",
    "dac": "descript/dac_24khz",
    "mimi": "kyutai/mimi",
}
"""Names of the usual weights on the Hub."""
PIECE = 30
"""Seconds that are coded in one piece, so that memory does not grow with the recording."""
FOLDER = "neural_codec"


class NeuralCodec(AudioCodec):
    """The codes of a neural codec: frame by frame, and within a frame codebook by codebook (as the paper does with
    SoundStream; Hawthorne et al. 2022, section 4.4).

    Code c of codebook k is id k * codebook_size + c, so each codebook has a range of its own; the last id
    separates recordings. The first (coarsest) `codebooks` of the model are used. Recordings are coded in pieces of
    30 s. The run directory keeps a copy of the model.
    """

    name = "neural"
    saved = ("kind", "codebooks")
    files = (f"{FOLDER}/*",)

    def __init__(self, kind: Kind, model: Any, codebooks: int | None = None) -> None:
        """model: an EncodecModel, DacModel or MimiModel of transformers, with one audio channel."""
        config = model.config
        self.kind: Kind = kind
        self.model = model.eval()
        self.sample_rate = config.sampling_rate
        if kind == "encodec":
            available = model.quantizer.get_num_quantizers_for_bandwidth(config.target_bandwidths[-1])
            self.hop = int(np.prod(config.upsampling_ratios))
        elif kind == "dac":
            available, self.hop = config.n_codebooks, config.hop_length
        else:
            available, self.hop = config.num_quantizers, round(config.sampling_rate / config.frame_rate)
        self.codebooks = min(8, available) if codebooks is None else codebooks
        if not 1 <= self.codebooks <= available:
            raise InputError(f"data.codebooks is {codebooks}, but this {kind} has {available}: give 1 ... {available}")
        if getattr(config, "audio_channels", 1) != 1:
            raise InputError(f"this {kind} has {config.audio_channels} audio channels: use weights for one channel")
        self.codebook_size = config.codebook_size
        self.vocab_size = self.codebooks * self.codebook_size + 1
        self.separator = (self.vocab_size - 1,)

    @classmethod
    def from_pretrained(
        cls, kind: Kind, weights: str | Path, codebooks: int | None = None, **options: Any
    ) -> "NeuralCodec":
        """`weights`: a folder, or a name on the Hub; `options` are those of transformers' `from_pretrained`.

        Raises `InputError` if the weights are missing, damaged, or of another kind.
        """
        with importing("codecs"):
            from transformers import DacModel, EncodecModel, MimiModel
            from transformers.utils.logging import disable_progress_bar
        disable_progress_bar()
        classes: dict[str, Any] = {"encodec": EncodecModel, "dac": DacModel, "mimi": MimiModel}
        try:
            model = classes[kind].from_pretrained(str(weights), **options)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            if Path(weights).is_dir():
                raise InputError(f"{weights}: the {kind} weights are missing or damaged ({reason})") from None
            raise InputError(
                f"{weights}: no such folder, and the Hub gives no {kind} weights of that name ({reason})"
            ) from None
        return cls(kind, model, codebooks)

    @torch.no_grad()
    def encode_samples(self, samples: np.ndarray) -> np.ndarray:
        size = PIECE * self.sample_rate // self.hop * self.hop
        frames = []
        for at in range(0, len(samples), size):
            piece = samples[at : at + size]
            piece = np.pad(piece, (0, -len(piece) % self.hop))  # whole frames
            sound = torch.from_numpy(piece.astype(np.float32))[None, None]
            if self.kind == "encodec":
                codes = self.model.encode(sound, bandwidth=self.model.config.target_bandwidths[-1]).audio_codes[0]
            else:
                codes = self.model.encode(sound).audio_codes
            frames.append(codes[0, : self.codebooks].T.numpy())  # (frames, codebooks)
        codes = np.concatenate(frames).astype(np.int64) + np.arange(self.codebooks) * self.codebook_size
        return codes.reshape(-1).astype(self.dtype)

    @torch.no_grad()
    def decode_samples(self, ids: np.ndarray) -> np.ndarray:
        """A code of the wrong codebook begins a new frame. Missing codes of a frame are 0."""
        ids = ids[ids < self.vocab_size - 1]
        if len(ids) == 0:
            return np.zeros(0)
        books, codes = np.divmod(ids, self.codebook_size)
        frame = np.cumsum(np.diff(books, prepend=-1) <= 0)
        table = np.zeros((self.codebooks, frame[-1] + 1), dtype=np.int64)
        table[books, frame] = codes
        size = PIECE * self.sample_rate // self.hop
        pieces = []
        for at in range(0, table.shape[1], size):
            piece = torch.from_numpy(table[None, :, at : at + size])
            if self.kind == "encodec":
                sound = self.model.decode(piece[None], [None]).audio_values
            else:
                sound = self.model.decode(audio_codes=piece).audio_values
            pieces.append(sound.reshape(-1).numpy().astype(np.float64))
        return np.nan_to_num(np.concatenate(pieces)).clip(-1, 1)

    def allowed_next(self, ids: np.ndarray) -> np.ndarray:
        """The codes of the next codebook; at the start of a frame also the separator, unless the recording is empty."""
        ids = np.asarray(ids)
        ends = np.flatnonzero(ids == self.vocab_size - 1)
        length = len(ids) - (ends[-1] + 1 if len(ends) else 0)
        book = length % self.codebooks
        allowed = np.arange(self.vocab_size) // self.codebook_size == book
        allowed[-1] = book == 0 and length > 0
        return allowed

    def amounts(self, ids: np.ndarray) -> dict[str, float]:
        """Seconds, counted by the codes of the first codebook: one per frame."""
        return {"second": float((np.asarray(ids) < self.codebook_size).sum()) * self.hop / self.sample_rate}

    def save(self, directory: Path) -> None:
        self.model.save_pretrained(directory / FOLDER)

    @classmethod
    def load(cls, directory: Path, settings: dict[str, Any]) -> "NeuralCodec":
        folder = directory / FOLDER
        if not folder.is_dir():  # or transformers would take it for a name on the Hub
            raise InputError(f"{folder} does not exist: copy it again from the original run")
        only = {"local_files_only": True, "use_safetensors": True}
        return cls.from_pretrained(settings["kind"], folder, settings["codebooks"], **only)
