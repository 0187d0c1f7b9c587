"""Files of every modality, made from a number; and MIDI files, message by message."""

import io
from pathlib import Path
from typing import Any

import mido
import numpy as np
import soundfile
from hypothesis import strategies as st
from PIL import Image

from perceiver_ar.data.midi_file import clean, write_midi

RATE = 8000
TONE = 0.5 * np.sin(2 * np.pi * 440 * np.arange(4000) / RATE)


def recording(samples: np.ndarray, rate: int = RATE, *, kind: str = "WAV", **options: Any) -> bytes:
    """A file of samples (n,) or (n, channels)."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, **options)
    return buffer.getvalue()


def write_music(path: Path, number: int) -> None:
    rng = np.random.default_rng(number)
    starts = np.cumsum(rng.uniform(0.05, 0.3, 60))
    path.write_bytes(
        write_midi(np.stack([starts, starts + 0.2, rng.integers(50, 70, 60), rng.integers(30, 90, 60)], axis=1))
    )


def write_band(path: Path, number: int) -> None:
    """Five instruments and drums, twelve bars, by mido: 6/8 from bar 5 on, slower from bar 9 on."""
    rng = np.random.default_rng(number)
    file = mido.MidiFile(ticks_per_beat=480)
    conductor, slower = mido.MidiTrack(), 4 * 1920 + 4 * 1440
    conductor += [mido.MetaMessage("set_tempo", tempo=625_000), mido.MetaMessage("time_signature", numerator=4),
                  mido.MetaMessage("time_signature", numerator=6, denominator=8, time=4 * 1920),
                  mido.MetaMessage("set_tempo", tempo=652_174, time=4 * 1440)]  # fmt: skip
    file.tracks.append(conductor)
    for channel, program in ((0, 0), (1, 25), (2, 33), (3, 48), (4, 73), (9, 0)):
        track, now = mido.MidiTrack(), 0
        track.append(mido.Message("program_change", program=program, channel=channel))
        length = 120 if channel == 9 else 240 * (channel + 1)
        for start in range(0, slower + 4 * 1440 - length + 1, max(480, length)):
            pitch, velocity = int(rng.integers(36, 80)), int(rng.integers(40, 110))
            track.append(on(pitch, velocity, channel).copy(time=start - now))
            track.append(off(pitch, channel).copy(time=length))
            now = start + length
        file.tracks.append(track)
    file.save(path)


def write_picture(path: Path, number: int) -> None:
    """A disc before a background; the number says where and in which colours."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:6, :6]
    colours, (row, column) = rng.integers(0, 255, (2, 3)), rng.integers(1, 5, 2)
    disc = ((y - row) ** 2 + (x - column) ** 2 < 5)[..., None]
    Image.fromarray(np.where(disc, colours[0], colours[1]).astype(np.uint8)).save(path)


def write_sound(path: Path, number: int) -> None:
    time = np.arange(1200) / 8000
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * 200 * (number + 1) * time), 8000)


def write_numbers(path: Path, number: int) -> None:
    np.save(path, np.random.default_rng(number).integers(0, 40, (30, 10)))


def write_genome(path: Path, number: int) -> None:
    bases = np.random.default_rng(number).choice(list(b"ACGT"), 400).astype(np.uint8).tobytes()
    path.write_bytes(b">record %d\n%b\n" % (number, bases))


def write_words(path: Path, number: int) -> None:
    path.write_text(f"{number} words and more words " * 20)


def midi_file(messages: list[tuple[int, Any]], **options: Any) -> bytes:
    """A file of one track from messages at rising ticks (480 a quarter, 960 a second)."""
    file, track, now = mido.MidiFile(ticks_per_beat=480, **options), mido.MidiTrack(), 0
    for tick, message in messages:
        track.append(message.copy(time=tick - now))
        now = tick
    file.tracks.append(track)
    buffer = io.BytesIO()
    file.save(file=buffer)
    return buffer.getvalue()


def on(pitch: int, velocity: int = 64, channel: int = 0) -> Any:
    return mido.Message("note_on", note=pitch, velocity=velocity, channel=channel)


def off(pitch: int, channel: int = 0) -> Any:
    return mido.Message("note_off", note=pitch, channel=channel)


def pedal(value: int) -> Any:
    return mido.Message("control_change", control=64, value=value)


def control(number: int, value: int = 0, channel: int = 0) -> Any:
    return mido.Message("control_change", control=number, value=value, channel=channel)


def tracks_file(*tracks: list[tuple[int, Any]], kind: int = 1) -> bytes:
    """A file of several tracks, each as `midi_file` takes it."""
    whole = mido.MidiFile(type=kind, ticks_per_beat=480)
    whole.tracks += [mido.MidiFile(file=io.BytesIO(midi_file(track))).tracks[0] for track in tracks]
    buffer = io.BytesIO()
    whole.save(file=buffer)
    return buffer.getvalue()


GOOD = midi_file([(tick, message) for tick in range(0, 9600, 480) for message in (on(60), on(64), off(60), off(64))])

played = st.tuples(
    st.floats(0, 20).map(lambda x: round(x, 3)),
    st.floats(0, 5).map(lambda x: round(x, 3)),
    st.integers(0, 126),
    st.integers(1, 127),
)
music = st.lists(played, min_size=1, max_size=25).map(
    lambda notes: clean(np.array([(start, start + length, pitch, loud) for start, length, pitch, loud in notes]))
)
