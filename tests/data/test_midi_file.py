"""Notes are what a listener would hear, whatever wrote the file; files that are whole are read, all others refused.

Files are written here by mido, a library of others, or byte by byte, and read back by mido and by MidiTok's symusic.
"""

import io
import random
import struct
from typing import Any

import mido
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import GOOD, control, midi_file, music, off, on, pedal, tracks_file
from symusic import Score

from perceiver_ar.data.codec import WrongModality
from perceiver_ar.data.midi_file import clean, read_midi, write_midi


def lasting(data: bytes) -> list[list[float]]:
    """Start, end and pitch of each note."""
    return read_midi(data)[:, :3].round(4).tolist()


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
    assert lasting(data) == [[0, 0, 60], [0.5, 1, 62]]


# What is heard.


def test_the_pedal_belongs_to_the_channel_whatever_track_it_is_on() -> None:
    left, right = [(0, on(40)), (480, off(40))], [(0, on(70)), (480, off(70))]
    pressed = [(0, pedal(127)), (960, pedal(0))]
    together = [[0, 1, 40], [0, 1, 70]]
    assert lasting(tracks_file(pressed, left, right)) == together
    assert lasting(tracks_file([*left[:1], *pressed[:1], *left[1:], *pressed[1:]], right)) == together
    other = [(0, on(70, channel=1)), (480, off(70, channel=1))]
    assert lasting(tracks_file(pressed, left, other)) == [[0, 1, 40], [0, 0.5, 70]]


def test_each_port_has_channels_of_its_own() -> None:
    port = (0, mido.MetaMessage("midi_port", port=1))
    left, right = [(0, on(40)), (480, off(40))], [(0, on(70)), (480, off(70))]
    pressed = [(0, pedal(127)), (960, pedal(0))]
    assert lasting(tracks_file(pressed, left, [port, *right])) == [[0, 1, 40], [0, 0.5, 70]]


def test_events_of_one_tick_act_in_the_order_of_the_file() -> None:
    up_at_last = [(960, pedal(0)), (2000, on(90)), (2001, off(90))]
    [before, _] = lasting(midi_file([(0, on(60)), (480, off(60)), (480, pedal(127)), *up_at_last]))
    [after, _] = lasting(midi_file([(0, on(60)), (480, pedal(127)), (480, off(60)), *up_at_last]))
    assert before == [0, 0.5, 60] and after == [0, 1, 60]
    half = [(0, pedal(127)), (0, on(60)), (480, off(60)), (600, pedal(0)), (600, pedal(127)), *up_at_last]
    assert lasting(midi_file(half))[0] == [0, 0.625, 60]
    assert lasting(tracks_file([(0, on(60)), (480, off(60))], [(480, pedal(127)), *up_at_last[:1]])) == [[0, 0.5, 60]]


@pytest.mark.parametrize("number", [120, 123, 124, 127])
def test_all_notes_off_releases_every_key_of_its_channel(number: int) -> None:
    notes = [(0, on(60)), (0, on(64)), (0, on(67, channel=1))]
    late = [(960, off(60)), (960, off(64)), (960, off(67, channel=1))]
    cut = [[0, 0.5, 60], [0, 0.5, 64], [0, 1, 67]]
    assert lasting(midi_file([*notes, (480, control(number)), *late])) == cut
    assert lasting(tracks_file(notes + late, [(480, control(number))])) == cut
    again = [(480, control(number)), (500, on(60)), (960, off(60))]
    assert lasting(midi_file([(0, on(60)), *again])) == [[0, 0.5, 60], [0.5208, 1, 60]]


def test_notes_off_leaves_the_pedal_and_sound_off_does_not_wait_for_it() -> None:
    notes, rest = [(0, pedal(127)), (0, on(60))], [(700, on(62)), (800, off(62)), (960, pedal(0))]
    assert lasting(midi_file([*notes, (480, control(123)), *rest])) == [[0, 1, 60], [0.7292, 1, 62]]
    assert lasting(midi_file([*notes, (480, control(120)), *rest])) == [[0, 0.5, 60], [0.7292, 1, 62]]


def test_a_reset_of_the_controllers_lifts_the_pedal() -> None:
    messages = [(0, pedal(127)), (0, on(60)), (240, off(60)), (480, control(121)), (600, on(62)), (720, off(62))]
    assert lasting(midi_file([*messages, (960, pedal(0))])) == [[0, 0.5, 60], [0.625, 0.75, 62]]


@pytest.mark.parametrize("lost", range(5))
def test_a_lost_release_costs_no_other_stroke_its_own(lost: int) -> None:
    times = [(960 * i, 960 * i + 480) for i in range(5)]
    messages = [message for start, end in times for message in ((start, on(60)), (end, off(60)))]
    del messages[2 * lost + 1]
    expected = [[i, i + 0.5, 60] for i in range(5)]
    expected[lost][1] = lost + 1 if lost < 4 else 5  # the next stroke, or the track's end
    assert lasting(midi_file([*messages, (4800, control(1))])) == expected


def test_strokes_that_overlap_keep_their_releases_when_one_is_lost_later() -> None:
    messages = [(0, on(60)), (240, on(60)), (480, off(60)), (720, off(60)), (960, on(60)), (1440, on(60)),
                (1680, off(60)), (1920, on(60)), (2160, off(60))]  # fmt: skip
    assert lasting(midi_file(messages)) == [
        [0, 0.25, 60], [0.25, 0.75, 60], [1, 1.5, 60], [1.5, 1.75, 60], [2, 2.25, 60]
    ]  # fmt: skip


def test_a_release_too_many_is_nothing() -> None:
    messages = [(0, off(60)), (0, on(60)), (240, off(60)), (480, off(60)), (960, on(60)), (1200, off(60))]
    assert lasting(midi_file(messages)) == [[0, 0.25, 60], [1, 1.25, 60]]


def test_a_unison_is_as_loud_as_its_louder_voice_and_as_long_as_its_longer_one() -> None:
    loud, quiet = [(0, on(60, 100)), (480, off(60))], [(0, on(60, 20, channel=1)), (960, off(60, channel=1))]
    assert read_midi(tracks_file(loud, quiet)).tolist() == [[0, 1, 60, 100]]
    assert read_midi(tracks_file(quiet, loud)).tolist() == [[0, 1, 60, 100]]


def test_the_pieces_of_format_2_follow_each_other() -> None:
    one, two = [(0, on(60)), (480, off(60))], [(0, on(62)), (480, off(62))]
    assert lasting(tracks_file(one, two, kind=2)) == [[0, 0.5, 60], [0.5, 1, 62]]


# Bytes.

TWO = b"\0\x90\x3c\x40\x83\x60\x80\x3c\0\0\x90\x3e\x40\x83\x60\x80\x3e\0"
"""Two notes of half a second, at 480 ticks a quarter."""
TWO_NOTES = [[0, 0.5, 60], [0.5, 1, 62]]
END = b"\0\xff\x2f\0"


def header(tracks: int = 1, division: int = 480) -> bytes:
    return struct.pack(">4sIHHH", b"MThd", 6, 1, tracks, division)


def track(events: bytes, size: int | None = None) -> bytes:
    return struct.pack(">4sI", b"MTrk", len(events) if size is None else size) + events


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        (b"\0\x90\x3c\x40\x60\xff\x01\x02hi\x81\x10\x3c\0", [[0, 0.25, 60]]),
        (b"\0\x90\x3c\x40\x60\xf0\x02\x01\xf7\x81\x10\x3c\0", [[0, 0.25, 60]]),
        (b"\0\x90\x3c\x40\x60\xf8\x81\x10\x3c\0", [[0, 0.25, 60]]),
        (b"\0\x90\x3c\xfe\x40\x81\x70\x3c\xfa\0", [[0, 0.25, 60]]),
        (b"\0\xf8\0\xf2\1\2\0\xf3\1\0\xf6" + TWO + b"\0\xfe", TWO_NOTES),
    ],
    ids=["meta", "system exclusive", "clock", "clock in a message", "all kinds"],
)
def test_other_events_do_not_disturb_notes_and_running_status(events: bytes, expected: list[list[float]]) -> None:
    assert lasting(header() + track(events + b"\x83\x60\xff\x2f\0")) == expected


@pytest.mark.parametrize("size", [0, 1, 10, len(TWO), len(TWO) + 3, len(TWO) + 50, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_track_ends_at_its_end_whatever_its_length_says(size: int) -> None:
    assert lasting(header() + track(TWO + END, size)) == TWO_NOTES
    low = TWO.replace(b"\x3c", b"\x30").replace(b"\x3e", b"\x32")
    both = sorted([*TWO_NOTES, [0, 0.5, 48], [0.5, 1, 50]])
    assert lasting(header(2) + track(TWO + END, size) + track(low + END)) == both


def test_a_recorder_that_crashed_leaves_what_it_had_written() -> None:
    for size in (0, 0x7FFFFFFF, 0xFFFFFFFF):
        assert lasting(header() + track(TWO, size)) == TWO_NOTES
        assert lasting(header() + track(TWO + TWO[:7], size)) == [*TWO_NOTES, [1, 1.5, 60]]
    assert lasting(header() + track(TWO, len(TWO))) == TWO_NOTES  # the end may be missing


def test_every_track_is_read_whatever_the_header_counts() -> None:
    low = TWO.replace(b"\x3c", b"\x30").replace(b"\x3e", b"\x32")
    both = sorted([*TWO_NOTES, [0, 0.5, 48], [0.5, 1, 50]])
    for count in (0, 1, 2, 3, 65535):
        assert lasting(header(count) + track(TWO + END) + track(low + END)) == both
    between = b"XFIH" + struct.pack(">I", 5) + b"other"
    assert lasting(header(2) + between + track(TWO + END) + between + track(low + END) + b"\0\0 and what not") == both


def test_what_comes_before_the_file_is_passed_over() -> None:
    midi = header() + track(TWO + END)
    names = struct.pack("<4sI4sI", b"LIST", 304, b"INFO", 292) + 300 * b"x"
    riff = names + struct.pack("<4sI", b"data", len(midi)) + midi
    assert lasting(struct.pack("<4sI4s", b"RIFF", 4 + len(riff), b"RMID") + riff) == TWO_NOTES
    assert lasting(bytes(128) + midi) == TWO_NOTES  # MacBinary


@pytest.mark.parametrize(("frames", "rate"), [(24, 24), (25, 25), (29, 30_000 / 1001), (30, 30)])
def test_frames_a_second(frames: int, rate: float) -> None:
    notes = read_midi(header(1, (256 - frames) << 8 | 40) + track(TWO + END))
    np.testing.assert_allclose(notes[:, :2], np.array([[0, 480], [480, 960]]) / 40 / rate)


@pytest.mark.parametrize(
    "data",
    [
        header(1, 0) + track(TWO + END),
        header(1, 0xE200) + track(TWO + END),
        header() + track(b"\0\xff\x51\x03\0\0\0" + TWO + END),
    ],
    ids=["no ticks a quarter", "no ticks a frame", "no time a quarter"],
)
def test_a_file_that_does_not_tell_its_tempo_is_refused(data: bytes) -> None:
    with pytest.raises(WrongModality, match="tempo or division is 0"):
        read_midi(data)


@pytest.mark.parametrize("events", [b"\0\x3c\x40" + TWO, b"\xff\xff\xff\xff\x7f" + TWO, b"\0\x90\x3c\x90" + TWO])
def test_events_that_mean_nothing_are_refused(events: bytes) -> None:
    with pytest.raises(WrongModality, match="a damaged MIDI file"):
        read_midi(header() + track(events + END))


def test_a_file_that_is_cut_off_is_refused_wherever_that_is() -> None:
    for end in range(len(GOOD)):
        with pytest.raises(WrongModality, match="no MIDI file" if end < 4 else "cut off"):
            read_midi(GOOD[:end])


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
