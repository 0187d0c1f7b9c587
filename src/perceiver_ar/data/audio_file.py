"""Files of recordings -> samples, also of files whose length is missing or wrong, and of several in one.

libsndfile reads the files. It believes the length that a header states or that it estimates, and of recordings that
follow one another it reads the first; so such files are mended, cut or passed through a pipe.
"""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from threading import Thread
from typing import Any

import numpy as np

from perceiver_ar.data.codec import WrongModality, importing

BLOCK = 1 << 16  # samples read at a time: the length in a header may be wrong
HIGHEST_RATE = 10_000_000
MOST_GROWTH = 100
"""If resampling would multiply the samples by more than this, the recording's sample rate is damaged."""


def read_audio(data: bytes, rate: int) -> np.ndarray:
    """A WAV, AIFF, FLAC, OGG or MP3 file -> its sound (n,) float32 at `rate` Hz, n >= 1.

    Recordings that follow one another in the file are joined. The sound is the mean of all channels, or the loudest
    channel if they cancel each other (-20 dB). Samples above 1, which files of floats may have, are scaled to 1. Raises
    `WrongModality` if it is not a recording, is damaged or empty.
    """
    return np.concatenate([_read(part, rate) for part in _recordings(data)])


def _read(data: bytes, rate: int) -> np.ndarray:
    with importing("audio"):
        import soundfile
        import soxr
    blocks: list[np.ndarray] = []  # (samples, channels)
    try:
        with _opened(data) as source, soundfile.SoundFile(source, closefd=False) as file:
            file.seekable = lambda: False  # or the package would stop where a header says that the sound ends
            original = file.samplerate
            while len(block := file.read(BLOCK, dtype="float32", always_2d=True)) > 0:
                blocks.append(block)
    except Exception as error:  # soundfile's own, or others for damaged headers
        reason = " ".join(str(error).split()).partition("BytesIO object at")[2].partition(": ")[2] or error
        raise WrongModality(f"no recording, or a damaged one ({reason})") from None
    if not blocks or not all(np.isfinite(block).all() for block in blocks):
        raise WrongModality("a damaged recording" if blocks else "a recording without samples")
    if original > HIGHEST_RATE or rate > MOST_GROWTH * original:
        raise WrongModality(f"a recording of {original:,} samples a second, to be read at {rate:,}: it must be damaged")
    power = sum(np.square(block, dtype=np.float64).sum(axis=0) for block in blocks)
    samples = np.concatenate([block.mean(axis=1) for block in blocks])
    if np.square(samples, dtype=np.float64).sum() < 0.01 * np.mean(power):
        samples = np.concatenate([block[:, np.argmax(power)] for block in blocks])
    samples /= max(1.0, np.abs(samples).max())
    resampled = samples if original == rate else soxr.resample(samples, original, rate)
    return resampled if len(resampled) > 0 else samples[:1]


def _recordings(data: bytes) -> list[bytes]:
    """The recordings that follow one another in a file, such as the links of an Ogg stream."""
    cuts, at, first = [0], 0, True
    if data.startswith(b"OggS"):
        while data[at : at + 4] == b"OggS" and at + 27 <= len(data):
            begins, segments = bool(data[at + 5] & 2), data[at + 26]
            if begins and not first:
                cuts.append(at)
            first = begins  # streams side by side begin with a page each
            at += 27 + segments + sum(data[at + 27 : at + 27 + segments])
    else:
        while (at := _end_of_mp3(data, at)) is not None:
            cuts.append(at)
    return [data[start:end] for start, end in pairwise([*cuts, len(data)])]


def _mp3_frame(data: bytes, at: int) -> int | None:
    """Where the first frame of MP3 begins at or after `at`, behind tags; None if there is none."""
    while data[at : at + 3] == b"ID3" and len(data) > at + 10:
        size = data[at + 6 : at + 10]
        at += 10 + (size[0] << 21 | size[1] << 14 | size[2] << 7 | size[3])
    is_frame = len(data) > at + 4 and data[at] == 0xFF and data[at + 1] & 0xE6 == 0xE2
    return at if is_frame else None


def _mp3_header(data: bytes, frame: int) -> re.Match[bytes] | None:
    """The table of contents in the first frame of MP3: a file of variable bit rate says its length there."""
    return re.compile(rb"Xing|Info|VBRI").search(data, frame, frame + 200)


def _end_of_mp3(data: bytes, start: int) -> int | None:
    """Where a recording that starts there says that it ends, if another one follows."""
    if (frame := _mp3_frame(data, start)) is None or (header := _mp3_header(data, frame)) is None:
        return None
    flags = int.from_bytes(data[header.end() : header.end() + 4], "big")
    if header[0] == b"VBRI" or not flags & 2:
        return None
    place = header.end() + 4 + 4 * (flags & 1)
    end = frame + int.from_bytes(data[place : place + 4], "big")
    return end if end > frame and _mp3_frame(data, end) is not None else None


@contextmanager
def _opened(data: bytes) -> Iterator[Any]:
    """A file of `data`, or a descriptor from which it can be read."""
    frame = _mp3_frame(data, 0)
    if frame is None or _mp3_header(data, frame) is not None:
        yield io.BytesIO(_with_length(data))
        return
    # From the bit rate of its first frames libsndfile estimates where MP3 ends; that of a pipe it reads to the end.
    source, target = os.pipe()

    def feed() -> None:
        with suppress(BrokenPipeError), os.fdopen(target, "wb") as file:
            file.write(data)

    feeder = Thread(target=feed, daemon=True)
    feeder.start()
    try:
        yield source
    finally:
        os.close(source)
        feeder.join()


def _with_length(data: bytes) -> bytes:
    """`data`; in a WAV file whose recorder crashed before it wrote the length, the sound then goes on to the end."""
    if data[:4] not in (b"RIFF", b"RF64") or data[8:12] != b"WAVE":
        return data
    chunks, at = {}, 12  # where each chunk starts
    while at + 8 <= len(data) and data[at : at + 4].isascii() and data[at : at + 4].decode().isprintable():
        chunks.setdefault(data[at : at + 4], at)
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + size + size % 2
    start = chunks.get(b"data", len(data)) + 8
    if data[:4] == b"RF64":  # the 64-bit lengths are in a chunk of their own
        unknown = b"ds64" in chunks and data[chunks[b"ds64"] + 16 : chunks[b"ds64"] + 24] == bytes(8)
    else:  # length 0, but the bytes behind it are not chunks
        unknown = data[start - 4 : start] == bytes(4) and at not in (len(data), len(data) + 1)
    endless = b"\xff\xff\xff\xff"
    return b"RIFF" + endless + data[8 : start - 4] + endless + data[start:] if unknown else data
