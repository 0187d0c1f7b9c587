"""Sound: WAV files, and a piano made of sines for use without a soundfont."""

import io
import os
import wave
from typing import Any

import numpy as np

from perceiver_ar.data.codec import importing
from perceiver_ar.errors import InputError

RATE = 22_050  # Hz, of the synthetic piano


def wav_bytes(samples: np.ndarray, rate: int) -> bytes:
    """Samples (n,) or (n, channels) in -1 ... 1, at `rate` Hz, as a 16-bit WAV file."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.rint(samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def check_soundfont(soundfont: str) -> None:
    """Raises `InputError` if it does not exist, or if symusic, which plays it, is not installed."""
    with importing("midi"):
        import symusic  # noqa: F401
    if not os.path.isfile(soundfont):
        raise InputError(f"the soundfont {soundfont} does not exist; give an .sf2 or .sf3 file, or leave it out")


def play_notes(notes: np.ndarray, midi: bytes, soundfont: str | None) -> tuple[np.ndarray, int]:
    """Samples in -1 ... 1 and their rate in Hz: `midi` through `soundfont`, or `notes` on the synthetic piano.

    Raises `InputError` if the soundfont cannot be read.
    """
    if soundfont is None:
        return synthesise(notes), RATE
    check_soundfont(soundfont)
    from symusic import Score, Synthesizer

    try:
        score: Any = Score.from_midi(midi)
        samples = np.asarray(Synthesizer(soundfont, 44_100).render(score, stereo=True))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the soundfont {soundfont} cannot be used ({reason}); give an .sf2 or .sf3 file") from None
    return _normalise(samples.T), 44_100


def synthesise(notes: np.ndarray) -> np.ndarray:
    """Notes (n, 4) as in `perceiver_ar.data.midi_file` -> samples (RATE * seconds,), with half a second after the end.

    A string's partials k = 1 ... 8, slightly sharp (f_k = k f sqrt(1 + B k^2), as stiff strings are), each with
    amplitude 1/k and a decay that is faster for high notes and high partials; keys that are released fade within 80 ms.
    """
    tail = 0.5
    samples = np.zeros(int(RATE * (notes[:, 1].max(initial=0.0) + tail)) + 1)
    strings = {pitch: _string(pitch) for pitch in np.unique(notes[:, 2]).tolist()}
    release = np.exp(-np.arange(int(0.4 * RATE)) / (0.08 * RATE))
    for start, end, pitch, velocity in notes.tolist():
        held = max(1, int(RATE * (end - start)))
        tone = strings[pitch][: held + len(release)].copy()
        fading = tone[held:]
        fading *= release[: len(fading)]
        at = int(RATE * start)
        tone = tone[: len(samples) - at]
        samples[at : at + len(tone)] += (velocity / 127) ** 1.5 * tone
    return _normalise(samples)


def _string(pitch: float) -> np.ndarray:
    """Samples (n,) of a struck string that is never released."""
    frequency = 440 * 2 ** ((pitch - 69) / 12)
    lasts = float(np.clip(3.0 * 2 ** ((60 - pitch) / 18), 0.3, 8.0))  # seconds until a partial has fallen to 1/e
    time = np.arange(int(RATE * min(2.5 * lasts, 10.0))) / RATE
    tone = np.zeros(len(time))
    for k in range(1, 9):
        partial = k * frequency * np.sqrt(1 + 3e-4 * k * k)
        if partial < RATE / 2:
            tone += np.sin(2 * np.pi * partial * time) / k * np.exp(-time * (1 + 0.5 * (k - 1)) / lasts)
    attack = np.minimum(1.0, time / 0.004)
    return tone * attack


def _normalise(samples: np.ndarray) -> np.ndarray:
    peak = np.abs(samples).max(initial=0.0)
    return samples * (0.9 / peak) if peak > 0 else samples
