"""Instruments, drums and tempo come back; an infill joins its two sides; conditions hold; bad input is one line."""

import io
import os
import shutil
from dataclasses import replace
from pathlib import Path

import mido
import numpy as np
import pytest
from helpers import SMALL, assert_refused
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import GOOD, midi_file, off, on, write_band

from perceiver_ar.cli import main
from perceiver_ar.data.codec import WrongModality
from perceiver_ar.data.codec_file import load_codec, save_codec
from perceiver_ar.data.conditions import ConditionedCodec, ConditionTable
from perceiver_ar.data.midi_file import Parts, read_parts
from perceiver_ar.data.remi_plus import RemiPlusCodec
from perceiver_ar.data.sources import Source
from perceiver_ar.errors import InputError
from perceiver_ar.run import Run

CODEC = RemiPlusCodec()
END = CODEC.separator[0]
NAMES = {index: token for token, index in CODEC.tokenizer.vocab.items()} | {END: "End"}
PROGRAMS = [-1, 0, 25, 33, 48, 73]


def notes(parts: Parts) -> list[list[float]]:
    """Start, length (quarters), pitch and program of each note."""
    start, end, pitch, _, program = parts.notes.T
    rows = np.stack([start / parts.division, (end - start) / parts.division, pitch, program], axis=1)
    return sorted(rows.round(4).tolist())


def drawn(row: np.ndarray, seed: int, count: int = 400) -> np.ndarray:
    """A row that goes on with ids drawn under the mask, up to the end of the document."""
    rng, row = np.random.default_rng(seed), np.asarray(row)
    for _ in range(count):
        choices = np.flatnonzero(CODEC.allowed_next(row))
        few = choices[np.isin(CODEC._types[choices], ["Bar", "End"])]  # so that it ends
        row = np.append(row, rng.choice(few if len(few) and rng.random() < 0.3 else choices))
        if row[-1] == END:
            break
    return row


@pytest.fixture(scope="module")
def song(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("song") / "song.mid"
    write_band(path, 0)
    return path.read_bytes()


@pytest.fixture(scope="module")
def document(song: bytes) -> np.ndarray:
    return np.append(CODEC.separator, CODEC.encode(song)).astype(np.int64)


# Round trips.


def test_five_instruments_and_drums_come_back_and_open_elsewhere(song: bytes) -> None:
    parts, back = read_parts(song), CODEC.decode(CODEC.encode(song))
    again = read_parts(back)
    assert notes(again) == notes(parts)
    loud = [np.sort(one.notes[:, 3]) for one in (parts, again)]
    assert np.abs(loud[0] - loud[1]).max() <= 4
    assert [tempo for _, tempo in again.tempos] == [625_000, 652_174]  # 96 and 92 a minute
    quarters = [[(at / one.division, *rest) for at, *rest in one.tempos + one.signatures] for one in (parts, again)]
    assert quarters[0] == quarters[1]
    file = mido.MidiFile(file=io.BytesIO(back))
    programs = {
        (message.channel, message.program)
        for track in file.tracks
        for message in track
        if message.type == "program_change"
    }
    assert {program for channel, program in programs if channel != 9} == set(PROGRAMS) - {-1}
    assert len({channel for channel, _ in programs}) == 6
    assert abs(file.length - mido.MidiFile(file=io.BytesIO(song)).length) < 0.1
    assert CODEC.encode(back).tolist() == CODEC.encode(song).tolist()


@pytest.mark.parametrize("channel", [0, 9])
def test_a_piano_alone_and_drums_alone_are_music_too(channel: int) -> None:
    data = midi_file([(480 * i + 240 * j, (on, off)[j](36 + i, channel=channel)) for i in range(9) for j in (0, 1)])
    assert notes(read_parts(CODEC.decode(CODEC.encode(data)))) == notes(read_parts(data))


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_any_ids_are_a_file_that_another_library_reads(seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, CODEC.vocab_size, 200)
    mido.MidiFile(file=io.BytesIO(CODEC.decode(ids)))
    assert CODEC.seconds(ids) >= 0


def test_tempo_events_mean_nothing_where_time_is_counted_in_frames() -> None:
    """Division 0xE728: 25 frames of 40 ticks a second."""
    strokes = [(0, on(60)), (500, off(60)), (1000, on(62)), (1500, off(62))]
    frames = bytearray(midi_file([(0, mido.MetaMessage("set_tempo", tempo=250_000)), *strokes]))
    frames[12:14] = b"\xe7\x28"
    played = CODEC.decode_notes(CODEC.encode(bytes(frames)))
    assert played[:, :2].ravel().tolist() == pytest.approx([0, 0.5, 1, 1.5], abs=0.03)


def test_a_run_keeps_its_codec(song: bytes, tmp_path: Path) -> None:
    save_codec(CODEC, tmp_path)
    again = load_codec(tmp_path)
    assert isinstance(again, RemiPlusCodec) and again.vocab_size == CODEC.vocab_size
    assert again.encode(song).tolist() == CODEC.encode(song).tolist()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"hello" * 100, "no MIDI file"),
        (GOOD[:-3], "cut off"),
        (midi_file([(0, on(60)), (480 * 400_000, off(60))]), "56 hours"),
        (midi_file([(0, mido.MetaMessage("set_tempo", tempo=1)), (0, on(60)), (480 * 400_000, off(60))]), "00,000 b"),
        (midi_file([(480 * i, message) for i in range(16) for message in (
            mido.Message("program_change", program=i), on(60), off(60))]), "16 instruments"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_piece_is_refused_in_one_line(data: bytes, says: str) -> None:
    with pytest.raises(WrongModality, match=says) as error:
        list(CODEC.encode_stream([data], "x.mid"))
    assert "\n" not in str(error.value) and str(error.value).startswith("x.mid: ")


# What may come next.


def test_what_was_played_is_always_allowed(document: np.ndarray) -> None:
    row = np.append(document, END)
    for i in range(1, len(row)):
        assert CODEC.allowed_next(row[:i])[row[i]], [NAMES[index] for index in row[max(0, i - 5) : i + 1].tolist()]


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=5)
def test_what_is_drawn_under_the_mask_is_a_document_of_its_own(seed: int) -> None:
    row = drawn(np.array([END]), seed, 150)
    parts = (
        read_parts(CODEC.decode(np.append(row, CODEC.tokenizer.vocab["Bar_None"])))
        if CODEC.amounts(row)["note"]
        else None
    )
    kinds = CODEC._types[row]
    assert kinds[1] == "Tempo" and kinds[2] == "Program"
    if parts is not None:
        header = {int(NAMES[index].split("_")[1]) for index in row[2 : kinds.tolist().index("Bar")].tolist()}
        assert {int(program) for program in parts.notes[:, 4]} <= header


# Infilling.


@pytest.mark.parametrize(("first", "last"), [(2, 2), (3, 6), (8, 10), (11, 11)])
def test_an_infill_joins_its_two_sides(song: bytes, document: np.ndarray, first: int, last: int) -> None:
    row, prompt, count = CODEC.infill(document, first, last, 4096)
    assert row.tolist() == prompt.tolist() and count > 100
    [(start, end)] = np.array(CODEC._plain(row)[1]) / CODEC._division
    original, joined = read_parts(song), read_parts(CODEC.decode(drawn(row, first)))
    quarters = [[(at / one.division, *rest) for at, *rest in one.tempos + one.signatures] for one in (original, joined)]
    assert quarters[0] == quarters[1]
    before, after = ([[one for one in notes(parts) if (one[0] < start) == is_before and not start <= one[0] < end]
                      for parts in (original, joined)] for is_before in (True, False))  # fmt: skip
    assert after[0] == after[1] and len(after[0]) > 0
    assert sorted([at, min(long, start - at), *rest] for at, long, *rest in before[0]) == before[1]
    for at, long, _, _ in notes(joined):
        assert all(at + long <= edge + 1e-3 or at >= edge - 1e-3 for edge in (start, end))


def test_an_infill_has_as_many_bars_as_the_hole_and_ends(document: np.ndarray) -> None:
    row, _, _ = CODEC.infill(document, 4, 6, 4096)
    whole = drawn(row, 0, 4000)
    assert whole[-1] == END and (CODEC._types[whole[len(row) :]] == "Bar").sum() == 3
    undone = drawn(row, 0, 5)  # a hole that is filled in part keeps its length
    assert read_parts(CODEC.decode(undone)).notes[:, 1].max() == read_parts(CODEC.decode(whole)).notes[:, 1].max()


def test_a_long_piece_is_cut_to_the_context_around_the_hole(document: np.ndarray) -> None:
    row, prompt, count = CODEC.infill(document, 6, 6, 700)
    assert len(prompt) + min(count, 350) <= 700 < len(row)
    after, before = (CODEC._split(prompt)[i] for i in (1, 2))
    whole = CODEC._split(row)
    assert len(after) > 0 and after.tolist() == whole[1][: len(after)].tolist()
    assert len(before) > 0 and before.tolist() == whole[2][-len(before) :].tolist()


def test_half_of_the_training_windows_are_to_be_infilled(document: np.ndarray) -> None:
    windows = [CODEC.augment(document, np.random.default_rng(seed)) for seed in range(60)]
    again = [CODEC.augment(document, np.random.default_rng(seed)) for seed in range(60)]
    assert all(len(one) == len(document) and (one == two).all() for one, two in zip(windows, again, strict=True))
    infilled = [one for one in windows if one[-1] == END]
    assert 15 < len(infilled) < 45
    assert {len(CODEC._bars(CODEC._split(one)[3])) - 1 for one in infilled} >= {1, 2, 3}
    plain = [one for one in windows if one[-1] != END]
    of_drums = np.flatnonzero(document[:-1] == CODEC.tokenizer.vocab["Program_-1"]) + 1
    of_piano = np.flatnonzero(document[:-1] == CODEC.tokenizer.vocab["Program_0"]) + 1
    assert all((one[of_drums] == document[of_drums]).all() for one in plain)
    assert len({int(one[of_piano[1]]) for one in plain}) == 7


# The command.


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("band")
    for number in range(4):
        write_band(folder / f"{number}.mid", number)
    training = [
        *SMALL,
        "--model.context_length=512",
        "--model.num_latents=128",
        "--max_steps=2",
        "--data.validation_fraction=0.2",
    ]
    assert main(["train", str(folder), "--out", str(folder / "run"), "--data.midi_tokens=remi_plus", *training]) == 0
    return folder / "run"


def test_the_command_infills_and_shows_the_joined_piece(run: Path, song: bytes, tmp_path: Path) -> None:
    (tmp_path / "song.mid").write_bytes(song)
    options = [
        "--prompt_file",
        tmp_path / "song.mid",
        "--infill",
        "3:4",
        "--max_new_tokens",
        60,
        "--out",
        tmp_path / "new",
    ]
    assert main(["generate", *map(str, [run, *options, "--seed", 0])]) == 0
    assert sorted(path.suffix for path in tmp_path.glob("new*")) == [".mid", ".mid", ".png", ".wav"]
    original, joined = (read_parts((tmp_path / name).read_bytes()) for name in ("song.mid", "new.mid"))
    sides = [[one for one in notes(parts) if one[0] + one[1] <= 7.9 or one[0] >= 16] for parts in (original, joined)]
    assert sides[0] == sides[1] and len(sides[0]) > 100
    hole = read_parts((tmp_path / "new-continuation.mid").read_bytes())
    assert hole.notes[:, 1].max() <= 8 * hole.division


def test_a_piece_begins_as_the_conditions_say(run: Path, tmp_path: Path) -> None:
    options = ["--condition", "instruments=drums,0,33", "--condition", "tempo=90", "--max_new_tokens", "120"]
    assert main(["generate", str(run), *options, "--out", str(tmp_path / "new"), "--seed", "0"]) == 0
    parts = read_parts((tmp_path / "new.mid").read_bytes())
    assert {int(program) for program in parts.notes[:, 4]} <= {-1, 0, 33}
    assert parts.tempos[0] == (0, 666_667)
    assert [NAMES[index] for index in CODEC.header_ids({"tempo": "90"})] == ["Tempo_90.0"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--condition", "tempo"], "write KEY=VALUE"),
        (["--condition", "tempo=90", "--condition", "tempo=91"], "given twice"),
        (["--condition", "tempo=300"], "tempo=300: give a whole number of beats a minute, 40 ... 250"),
        (["--condition", "instruments=0,flute"], "'flute' is no instrument"),
        (["--condition", "instruments=0,"], "'' is no instrument"),
        (["--condition", f"instruments=drums,{','.join(map(str, range(17)))}"], ": 17 instruments: give at most 15"),
        (["--condition", "key=C"], "known are instruments, tempo"),
        (["--condition", "tempo=90", "--prompt_file", "SONG"], "leave out --prompt and --prompt_file"),
        (["--infill", "3:4"], "give --prompt_file"),
        (["--infill", "3:4", "--prompt_file", "SONG", "--keep", "0.5"], "leave out --keep"),
        (["--infill", "3", "--prompt_file", "SONG"], "the first and the last bar"),
        (["--infill", "1:4", "--prompt_file", "SONG"], "at least one bar before"),
        (["--infill", "3:99", "--prompt_file", "SONG"], "bars 1 to 12"),
        (["--infill", "4:3", "--prompt_file", "SONG"], "bars 1 to 12"),
    ],
)
def test_a_wrong_option_is_answered_in_one_line(
    run: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(capsys, "generate", run, *[str(run.parent / "0.mid") if one == "SONG" else one for one in options],
                   says=says)  # fmt: skip


def test_a_model_that_never_saw_an_infill_is_not_asked_for_one(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    recipe = Run(run).recipe()
    Run(tmp_path / "run").write_recipe(replace(recipe, data=replace(recipe.data, augment=False)))
    words = ["--prompt_file", run.parent / "0.mid", "--infill", "3:4", "--max_new_tokens", 1]
    assert_refused(capsys, "generate", tmp_path / "run", *words, says="trained with data.augment false")


def test_conditions_of_a_table_stand_before_the_header(document: np.ndarray) -> None:
    codec = ConditionedCodec(CODEC, {"style": ["polka", "waltz"], "mood": 9})
    given = {"style": "waltz", "mood": "slow", "tempo": "90"}
    front = codec.condition_ids(given)
    waltz = front[0]
    assert codec.start("", given).tolist() == [END, *front, *CODEC.header_ids({"tempo": "90"})]
    with_style = np.insert(document, 1, front)
    for ours, theirs in zip(codec.infill(with_style, 4, 6, 4096), CODEC.infill(document, 4, 6, 4086), strict=True):
        assert np.array_equal(ours, theirs if np.isscalar(theirs) else np.insert(theirs, 1, front))
    with pytest.raises(InputError, match="has a column 'tempo', which is a condition of remi_plus already"):
        ConditionTable("t.csv", {os.path.realpath("x"): {"tempo": "fast"}}).codec(CODEC, [Source(Path("x"), "x", 1)])
    # A document that ends in the window stays in order: its bars at the end would bring a second separator.
    window = np.concatenate([with_style, with_style])
    variants = [codec.augment(window, np.random.default_rng(seed)) for seed in range(20)]
    assert all(
        len(one) == len(window) and (one == waltz).nonzero()[0].tolist() == [1, len(with_style) + 1] for one in variants
    )
    assert not any(((one[1:] == END) & (one[:-1] == END)).any() for one in variants)
    assert any((one == CODEC._sections[3]).any() for one in variants)


def test_other_codecs_have_neither() -> None:
    from perceiver_ar.data.midi import PerformanceCodec

    with pytest.raises(InputError, match="trained without any"):
        PerformanceCodec().condition_ids({"tempo": "90"})
    with pytest.raises(InputError, match="have no bars, so leave out infill"):
        PerformanceCodec().infill(np.zeros(3, dtype=np.int64), 2, 3, 100)
