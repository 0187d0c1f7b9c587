"""Music comes back as it was up to the codec's steps; any ids are a file; damage is one clear line.

Files are written here by mido, a library of others, and read back by it and by MidiTok's symusic.
"""

import io
import random
import wave
from pathlib import Path
from typing import Any

import mido
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from symusic import Score

from perceiver_ar.data.codec import Codec, WrongModality, load_codec, save_codec
from perceiver_ar.data.midi import END, MidiTokCodec, MusicCodec, PerformanceCodec, clean, read_midi, write_midi
from perceiver_ar.errors import InputError

CODECS = {
    "performance": PerformanceCodec(),
    "remi": MidiTokCodec("remi"),
    "tsd": MidiTokCodec("tsd"),
    "midilike": MidiTokCodec("midilike"),
}
STEP = {"performance": 0.01, "remi": 0.02, "tsd": 0.02, "midilike": 0.02}
every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)

played = st.tuples(
    st.floats(0, 20).map(lambda x: round(x, 3)),
    st.floats(0, 5).map(lambda x: round(x, 3)),
    st.integers(0, 126),
    st.integers(1, 127),
)
music = st.lists(played, min_size=1, max_size=25).map(
    lambda notes: clean(np.array([(start, start + length, pitch, loud) for start, length, pitch, loud in notes]))
)


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


# Reading and writing.


@given(music)
def test_what_is_written_is_read_back_to_the_millisecond(notes: np.ndarray) -> None:
    on_grid = notes.copy()
    on_grid[:, :2] = np.rint(1000 * notes[:, :2]) / 1000
    on_grid[:, 1] = np.maximum(on_grid[:, 1], on_grid[:, 0] + 0.001)
    np.testing.assert_allclose(read_midi(write_midi(clean(on_grid))), clean(on_grid), atol=1e-9)


@given(music)
def test_another_library_reads_the_same_notes(notes: np.ndarray) -> None:
    now, found, sounding = 0.0, [], {}
    for message in mido.MidiFile(file=io.BytesIO(write_midi(notes))):
        now += message.time
        if message.type == "note_on":
            sounding[message.note] = now, message.velocity
        elif message.type == "note_off":
            start, velocity = sounding.pop(message.note)
            found.append((start, now, message.note, velocity))
    assert not sounding
    expected = np.array(found)[np.lexsort((np.array(found)[:, 2], np.array(found)[:, 0]))]
    np.testing.assert_allclose(read_midi(write_midi(notes)), expected, atol=1e-6)


def test_tempo_changes_tracks_drums_and_running_status() -> None:
    file = mido.MidiFile(ticks_per_beat=100)
    tempo, right, drums = mido.MidiTrack(), mido.MidiTrack(), mido.MidiTrack()
    tempo.append(mido.MetaMessage("set_tempo", tempo=1_000_000, time=0))
    tempo.append(mido.MetaMessage("set_tempo", tempo=250_000, time=200))  # after 2 s
    tempo.append(mido.Message("sysex", data=(1, 2, 3), time=0))
    right += [on(60).copy(time=100), on(60, 0).copy(time=100), on(62, 5).copy(time=100), on(62, 0).copy(time=400)]
    drums += [on(36, channel=9).copy(time=0), off(36, channel=9).copy(time=50)]
    file.tracks += [tempo, right, drums]
    buffer = io.BytesIO()
    file.save(file=buffer)
    assert read_midi(buffer.getvalue()).tolist() == [[1.0, 2.0, 60, 64], [2.25, 3.25, 62, 5]]


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([60, 61]), st.booleans()), min_size=1, max_size=30))
def test_releases_end_strokes_in_their_order_as_symusic_has_it(events: list[tuple[int, int, bool]]) -> None:
    now, messages, held = 0, [], []
    for wait, pitch, pressed in events:
        now += 100 * wait
        if pressed:
            messages.append((now, on(pitch, 1 + len(messages))))
            held.append(pitch)
        elif pitch in held:
            messages.append((now, off(pitch)))
            held.remove(pitch)
    messages += [(now + 100, off(pitch)) for pitch in held]
    if not messages:
        return
    data = midi_file(messages)
    score: Any = Score.from_midi(data)
    [track] = score.tracks
    theirs = track.notes.numpy()
    start, length = theirs["time"] / 960, theirs["duration"] / 960
    expected = clean(np.stack([start, start + length, theirs["pitch"], theirs["velocity"]], axis=1))
    np.testing.assert_allclose(read_midi(data), expected, atol=1e-9)


def test_the_pedal_lengthens_notes_until_it_goes_up_or_the_key_is_struck_again() -> None:
    data = midi_file(
        [(0, pedal(127)), (0, on(60)), (480, off(60)), (480, on(64)), (960, off(64)), (1440, on(60)), (1920, pedal(0)),
         (2400, off(60)), (2880, on(67)), (2890, off(67))]
    )  # fmt: skip
    assert read_midi(data)[:, :3].round(3).tolist() == [[0, 1.5, 60], [0.5, 2, 64], [1.5, 2.5, 60], [3, 3.01, 67]]


def test_notes_of_no_length_and_notes_that_never_end() -> None:
    data = midi_file([(0, on(60)), (0, off(60)), (480, on(62)), (960, pedal(0))])
    notes = read_midi(data)
    assert notes[:, 2].tolist() == [60, 62] and notes[1, 1] == 1.0
    (zero, _) = CODECS["performance"].decode_notes(CODECS["performance"].encode(data))
    assert zero.tolist() == [0, 0.01, 60, 62]


# Damage.

GOOD = midi_file([(tick, message) for tick in range(0, 9600, 480) for message in (on(60), on(64), off(60), off(64))])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no MIDI file"),
        (b"hello" * 100, "no MIDI file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "no MIDI file"),
        (GOOD[:10], "cut off"),
        (GOOD[:40], "cut off"),
        (GOOD[:-3], "cut off"),
        (midi_file([(0, pedal(0))]), "without notes"),
        (midi_file([(0, on(36, channel=9)), (9, off(36, channel=9))]), "without notes"),
        (midi_file([(0, on(60)), (100_000_000, off(60))]), "29 hours"),
    ],
)
@every_codec
def test_a_damaged_file_is_refused_in_one_line(codec: Codec, data: bytes, says: str) -> None:
    with pytest.raises(WrongModality, match=says) as error:
        list(codec.encode_stream([data], "x.mid"))
    assert "\n" not in str(error.value) and str(error.value).startswith("x.mid: ")


def test_whatever_bytes_are_changed_there_is_music_or_one_clear_line() -> None:
    rng, read = random.Random(0), 0
    for _ in range(3000):
        data = bytearray(GOOD[: rng.choice([len(GOOD), rng.randrange(len(GOOD))])])
        for _ in range(rng.randrange(6)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            read += len(read_midi(bytes(data))) > 0
        except WrongModality:
            continue
    assert 100 < read < 2900


# Round trips.


@every_codec
@given(notes=music)
@settings(max_examples=30)
def test_music_comes_back_up_to_the_codecs_steps(codec: MusicCodec, notes: np.ndarray) -> None:
    step = next(STEP[name] for name, one in CODECS.items() if one is codec)
    back = codec.decode_notes(codec.encode_notes(notes))
    assert np.isin(back[:, 2], notes[:, 2]).all() and len(back) <= len(notes)
    if isinstance(codec, PerformanceCodec):
        assert np.all(np.abs(back[:, 3][:, None] - notes[:, 3]).min(axis=1) <= 3)
    for start, _, pitch, _ in notes.tolist():  # two starts within a step become one
        assert np.abs(back[back[:, 2] == pitch, 0] - start).min() <= step / 2 + 1e-3
    if len(back) == len(notes):
        lengths = [np.diff(x[np.lexsort((x[:, 0], x[:, 2])), :2])[:, 0] for x in (notes, back)]
        assert np.all(np.abs(lengths[0] - lengths[1]) <= (0.011 if isinstance(codec, PerformanceCodec) else 0.2))


@every_codec
@given(notes=music)
@settings(max_examples=30)
def test_ids_of_music_come_back_exactly(codec: MusicCodec, notes: np.ndarray) -> None:
    ids = codec.encode_notes(notes)
    assert codec.encode(codec.decode(ids)).tolist() == ids.tolist()


@every_codec
@given(data=st.data())
@settings(max_examples=30)
def test_any_ids_are_a_file_that_another_library_reads(codec: Codec, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, codec.vocab_size - 1), max_size=100))
    mido.MidiFile(file=io.BytesIO(codec.decode(ids)))


@every_codec
def test_a_run_keeps_its_codec(codec: Codec, tmp_path: Path) -> None:
    save_codec(codec, tmp_path)
    again = load_codec(tmp_path)
    assert again.encode(GOOD).tolist() == codec.encode(GOOD).tolist() and again.vocab_size == codec.vocab_size


def test_a_damaged_tokenizer_file_is_named(tmp_path: Path) -> None:
    save_codec(CODECS["remi"], tmp_path)
    (tmp_path / "miditok.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot read .*miditok\.json"):
        load_codec(tmp_path)


def test_the_performance_vocabulary_event_by_event() -> None:
    data = midi_file([(0, on(60, 64)), (960, on(64, 64)), (960 + 2400, off(60)), (960 + 2400, on(60, 127)),
                      (960 + 2410, off(64)), (960 + 2410, off(60))])  # fmt: skip
    second, half, centisecond = 256 + 99, 256 + 49, 256
    expected = [356 + 15, 60, second, 64, second, second, half, 128 + 60, 356 + 31, 60, centisecond, 128 + 60, 128 + 64]
    assert CODECS["performance"].encode(data).tolist() == expected
    assert CODECS["performance"].vocab_size == 389


# What may come next.


@every_codec
@given(notes=music)
@settings(max_examples=20)
def test_what_was_played_is_always_allowed(codec: MusicCodec, notes: np.ndarray) -> None:
    row = np.concatenate([codec.separator, codec.encode_notes(notes), codec.separator]).astype(np.int64)
    for i in range(1, len(row)):
        allowed = codec.allowed_next(row[:i])
        assert allowed is not None and allowed[row[i]]


@every_codec
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_ids_drawn_under_the_mask_mean_something_each(codec: MusicCodec, seed: int) -> None:
    rng, row = np.random.default_rng(seed), np.array(codec.separator)
    for _ in range(80):
        allowed = codec.allowed_next(row)
        assert allowed is not None
        choices = np.flatnonzero(allowed)
        row = np.append(row, rng.choice(choices[choices != codec.separator[0]]))
    if isinstance(codec, PerformanceCodec):  # no end of a note that does not sound, no start of one that does
        sounding = set()
        for event in row[row < 256].tolist():
            assert (event % 128 in sounding) == (event >= 128)
            sounding ^= {event % 128}
    few = 0 if codec is CODECS["midilike"] else 1  # MidiTok drops notes that do not end within its longest length
    assert few <= len(codec.decode_notes(row)) <= codec.amounts(row)["note"]


# Amounts and augmentation.


@every_codec
@given(notes=music)
@settings(max_examples=20)
def test_notes_and_seconds_are_counted(codec: MusicCodec, notes: np.ndarray) -> None:
    ids = codec.encode_notes(notes)
    back = codec.decode_notes(ids)
    amounts = codec.amounts(np.append(codec.separator, ids))
    assert amounts["note"] == len(back)
    last = back[:, 1 if codec in (CODECS["performance"], CODECS["midilike"]) else 0].max()  # else lengths come extra
    assert 0 <= amounts["second"] - last + 0.021 <= (2.021 if codec is CODECS["remi"] else 0.042)


@every_codec
@given(notes=music, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_augmentation_is_the_same_music_in_another_key_and_a_function_of_its_seed(
    codec: MusicCodec, notes: np.ndarray, seed: int
) -> None:
    ids = np.append(codec.separator, codec.encode_notes(notes)).astype(codec.dtype)
    new = codec.augment(ids, np.random.default_rng(seed))
    assert new.tolist() == codec.augment(ids, np.random.default_rng(seed)).tolist()
    assert len(new) == len(ids) and new.min() >= 0 and new.max() < codec.vocab_size
    assert ((new == codec.separator[0]) == (ids == codec.separator[0])).all()
    before, after = codec.decode_notes(ids), codec.decode_notes(new)
    assert len(before) == len(after)
    shift = np.unique(np.sort(after[:, 2]) - np.sort(before[:, 2]))
    assert len(shift) == 1 and abs(shift[0]) <= 3
    assert abs(after[:, 1].max() - before[:, 1].max()) <= 0.051 * before[:, 1].max() + 0.2


@every_codec
def test_every_variant_comes_up(codec: MusicCodec) -> None:
    ids = codec.encode(GOOD)
    variants = [codec.decode_notes(codec.augment(ids, np.random.default_rng(seed))) for seed in range(60)]
    assert {notes[:, 2].min() - 60 for notes in variants} == {-3, -2, -1, 0, 1, 2, 3}
    assert len({notes[0, 3] for notes in variants}) == 3
    assert (len({round(notes[:, 1].max(), 1) for notes in variants}) > 3) == isinstance(codec, PerformanceCodec)


# Results.


@every_codec
def test_results_are_files_to_hear_and_see(codec: Codec, tmp_path: Path) -> None:
    ids = np.append(codec.separator, codec.encode(GOOD))
    paths = codec.show([ids, ids], len(ids) // 2, tmp_path / "new", "song")
    endings = [".mid", "-continuation.mid", ".wav", ".png"]
    assert [path.name for path in paths] == [f"song-{i}{ending}" for i in (1, 2) for ending in endings]
    assert all(path.is_file() for path in paths)
    whole, rest = (mido.MidiFile(path) for path in paths[:2])
    assert 0.4 * whole.length < rest.length < 0.7 * whole.length
    with wave.open(str(paths[2])) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        assert abs(file.getnframes() / file.getframerate() - whole.length) < 1
    assert np.abs(samples).max() > 25_000 and samples.astype(float).std() > 300
    picture = np.asarray(Image.open(paths[3]).convert("RGB")).astype(int)
    orange, blue = picture[..., 0] - picture[..., 2] > 60, picture[..., 2] - picture[..., 0] > 60
    middle = picture.shape[1] // 2
    assert orange[30:, :middle].any() and blue[30:, middle:].any()
    assert not blue[30:, : middle - 60].any() and not orange[30:, middle + 60 :].any()


def test_nothing_generated_is_shown_too(tmp_path: Path) -> None:
    paths = CODECS["performance"].show([np.array([END])], 1, tmp_path, "nothing")
    assert [path.suffix for path in paths] == [".mid", ".wav", ".png"]


def test_the_synthetic_piano_plays_the_pitch_that_is_written() -> None:
    from perceiver_ar.data.sound import RATE, synthesise

    for pitch in (45, 69, 81):
        samples = synthesise(np.array([[0.0, 1.0, pitch, 100]]))
        spectrum = np.abs(np.fft.rfft(samples[:RATE]))
        assert abs(spectrum.argmax() - 440 * 2 ** ((pitch - 69) / 12)) < 2


def test_a_soundfont_that_is_none_is_named(tmp_path: Path) -> None:
    ids = [np.append(END, CODECS["performance"].encode(GOOD))]
    with pytest.raises(InputError, match=r"missing\.sf2 does not exist"):
        CODECS["performance"].show(ids, 1, tmp_path, "x", soundfont=str(tmp_path / "missing.sf2"))
    (tmp_path / "none.sf2").write_bytes(b"no soundfont")
    with pytest.raises(InputError, match=r"none\.sf2 cannot be used"):
        CODECS["performance"].show(ids, 1, tmp_path, "x", soundfont=str(tmp_path / "none.sf2"))
