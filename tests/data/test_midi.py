"""Music comes back as it was up to the codec's steps; any ids are a file; damage is one clear line."""

import io
import wave
from pathlib import Path
from typing import Any

import mido
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from samples import GOOD, midi_file, music, off, on, pedal

from perceiver_ar.data.codec import Codec, WrongModality
from perceiver_ar.data.codec_file import load_codec, save_codec
from perceiver_ar.data.midi import END, MidiTokCodec, MusicCodec, PerformanceCodec, read_midi
from perceiver_ar.errors import InputError

CODECS = {
    "performance": PerformanceCodec(),
    "remi": MidiTokCodec("remi"),
    "tsd": MidiTokCodec("tsd"),
    "midilike": MidiTokCodec("midilike"),
}
STEP = {"performance": 0.01, "remi": 0.02, "tsd": 0.02, "midilike": 0.02}
every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)

# Damage.


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


# Round trips.


@every_codec
@given(notes=music)
@settings(max_examples=10)
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
@settings(max_examples=10)
def test_ids_of_music_come_back_exactly(codec: MusicCodec, notes: np.ndarray) -> None:
    ids = codec.encode_notes(notes)
    assert codec.encode(codec.decode(ids)).tolist() == ids.tolist()


@every_codec
@given(data=st.data())
@settings(max_examples=10)
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


def test_a_note_of_no_length_lasts_a_step() -> None:
    (note,) = CODECS["performance"].decode_notes(CODECS["performance"].encode(midi_file([(0, on(60)), (0, off(60))])))
    assert note.tolist() == [0, 0.01, 60, 62]


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
@settings(max_examples=8)
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
@settings(max_examples=8)
def test_notes_and_seconds_are_counted(codec: MusicCodec, notes: np.ndarray) -> None:
    ids = codec.encode_notes(notes)
    back = codec.decode_notes(ids)
    amounts = codec.amounts(np.append(codec.separator, ids))
    assert amounts["note"] == len(back)
    last = back[:, 1 if codec in (CODECS["performance"], CODECS["midilike"]) else 0].max()  # else lengths come extra
    assert 0 <= amounts["second"] - last + 0.021 <= (2.021 if codec is CODECS["remi"] else 0.042)


@every_codec
@given(notes=music, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=8)
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


def test_a_note_held_across_the_prompts_end_goes_on_in_the_continuation(tmp_path: Path) -> None:
    held = [(0, on(60)), (0, on(72)), (480, off(72)), (960, on(64)), (1440, off(64)), (1920, off(60))]
    codec = CODECS["performance"]
    ids = np.append(codec.separator, codec.encode(midi_file(held)))
    prompt_len = ids.tolist().index(64)  # up to the third note, after a second
    paths = codec.show([ids], prompt_len, tmp_path, "song")
    assert [path.name for path in paths] == ["song.mid", "song-continuation.mid", "song.wav", "song.png"]
    notes = read_midi(paths[1].read_bytes())
    assert notes[:, :3].round(3).tolist() == [[0, 1, 60], [0, 0.5, 64]]


@every_codec
@given(notes=music, data=st.data())
@settings(max_examples=10)
def test_a_prompt_ends_after_its_events_and_before_the_next(codec: MusicCodec, notes: np.ndarray, data: Any) -> None:
    ids = codec.encode_notes(notes).astype(np.int64)
    prompt_len = data.draw(st.integers(0, len(ids)))
    ends = codec.seconds(ids[:prompt_len])
    starts = np.sort(codec.decode_notes(ids)[:, 0])
    struck = round(codec.amounts(ids[:prompt_len])["note"])
    assert (starts[:struck] <= ends + 1e-6).all() and (starts[struck:] >= ends - 1e-6).all()


@every_codec
def test_there_is_no_continuation_without_music(codec: MusicCodec, tmp_path: Path) -> None:
    ids = np.append(codec.separator, codec.encode(GOOD))
    for rows in ([ids], [np.append(ids, codec.separator)]):
        names = [path.name for path in codec.show(rows, len(ids), tmp_path, "song")]
        assert names == ["song.mid", "song.wav", "song.png"]


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
