"""Pictures of results show what is the prompt's and what was generated, and their scales."""

import numpy as np
import pytest
from PIL import Image

from perceiver_ar.data.pictures import grid, piano_roll, shaded_text, spectrogram

RATE = 8000
NOISE = np.random.default_rng(0).uniform(-1, 1, 2 * RATE)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def is_orange(picture: np.ndarray) -> np.ndarray:
    return picture[..., 0] - picture[..., 2] > 60


def is_blue(picture: np.ndarray) -> np.ndarray:
    return picture[..., 2] - picture[..., 0] > 60


def dark_columns(picture: np.ndarray) -> np.ndarray:
    """Where a line goes from top to bottom."""
    return np.flatnonzero((picture[40:-40].max(axis=-1) < 60).all(axis=0))


# Texts.


def test_letters_beyond_ascii_are_drawn() -> None:
    drawn = [
        pixels(shaded_text(2 * letter.encode(), np.zeros(4))).tobytes() for letter in "\u00e4\u00f6\u0436\u0448\u00b6"
    ]
    assert len(set(drawn)) == 5  # a font that lacks them draws one box for all


# Piano rolls.


def test_a_line_stands_where_the_prompt_ends_and_a_held_note_changes_its_colour_there() -> None:
    notes = np.array([[0.0, 10.0, 60, 100], [1.0, 2.0, 64, 100], [8.0, 9.0, 67, 100]])
    picture = pixels(piano_roll(notes, 5.0))
    [line] = {int(dark_columns(picture).mean())}
    held = next(row for row in picture[30:] if is_orange(row).sum() > 100)
    assert is_orange(held[: line - 2]).sum() >= line - 60 and not is_blue(held[:line]).any()
    assert is_blue(held[line + 2 :]).sum() >= line - 60 and not is_orange(held[line:]).any()
    [start, end] = np.flatnonzero(is_orange(held))[0], np.flatnonzero(is_blue(held))[-1]
    assert line == pytest.approx((start + end) / 2, abs=2)
    assert is_orange(picture[30:, :line]).any() and not is_orange(picture[30:, line + 2 :]).any()


def test_a_roll_without_a_prompt_has_no_line_and_one_colour() -> None:
    picture = pixels(piano_roll(np.array([[0.0, 10.0, 60, 100]])))
    assert not dark_columns(picture).size and not is_orange(picture).any() and is_blue(picture[30:]).any()


def test_a_roll_of_the_prompt_alone_ends_with_its_line() -> None:
    picture = pixels(piano_roll(np.array([[0.0, 5.0, 60, 100]]), 10.0))
    assert dark_columns(picture)[-1] > picture.shape[1] - 30 and not is_blue(picture).any()


# Spectrograms.


@pytest.mark.parametrize("samples", [NOISE, 0 * NOISE, np.sin(np.arange(2 * RATE))], ids=["noise", "silence", "tone"])
def test_the_prompts_end_is_seen_on_any_sound(samples: np.ndarray) -> None:
    without, picture = pixels(spectrogram(samples, RATE)), pixels(spectrogram(samples, RATE, RATE))
    sound = slice(40, -40)
    columns = np.flatnonzero((picture != without)[sound].any(axis=(0, 2)))
    assert 2 <= len(columns) <= 3 and columns[0] == pytest.approx(picture.shape[1] / 2, abs=25)
    line = picture[sound, columns[0] : columns[0] + 3].mean(axis=-1)
    assert (line.max(axis=1) - line.min(axis=1) > 200).all()  # dark and bright side by side


def test_the_scale_is_in_decibels() -> None:
    tone = np.sin(2 * np.pi * 1000 * np.arange(4 * RATE) / RATE)
    samples = np.concatenate([tone, 0.1 * tone])  # 20 dB less
    picture = pixels(spectrogram(samples, RATE))
    loud, soft = (picture[30:-30, at].tolist() for at in (150, 550))
    brightest = [max(column, key=sum) for column in (loud, soft)]
    bar = picture[30:-30, -60]  # from 0 dB at its top to -80 dB
    levels = [-80 * np.abs(bar - colour).sum(axis=1).argmin() / (len(bar) - 1) for colour in brightest]
    assert levels == pytest.approx([0, -20], abs=1)
    labels = (picture[:, -40:].sum(axis=-1) < 600).any(axis=1)
    for decibels in (0, 20, 40, 60, 80):
        row = 30 + round(decibels / 80 * (len(bar) - 1))
        assert labels[row - 5 : row + 6].any() and not labels[row + 15 : row + 50].any()


def test_silence_is_black() -> None:
    assert pixels(spectrogram(np.zeros(RATE), RATE))[40:-40, 100:500].max() < 10


@pytest.mark.parametrize("seconds", [0.1, 1, 10, 300])
def test_a_spectrogram_is_wide_enough_to_see_and_to_open_however_long_the_sound_is(seconds: float) -> None:
    assert 600 <= spectrogram(np.zeros(int(seconds * RATE)), RATE).width <= 3200


# Grids.


@pytest.mark.parametrize("shape", [(5, 7), (64, 4), (4, 64)])
@pytest.mark.parametrize("count", [1, 3, 9])
def test_every_picture_of_a_grid_stands_above_its_label(shape: tuple[int, int], count: int) -> None:
    scale, colours = 4, [(40 + 20 * i, 0, 90) for i in range(count)]
    labels = ["original", "kept", *(f"sample {i}" for i in range(count))][:count]
    picture = pixels(grid([np.full((*shape, 3), colour, np.uint8) for colour in colours], labels, scale))
    ink = np.all(picture < 200, axis=-1)
    for colour in colours:
        rows, columns = np.nonzero(np.all(picture == colour, axis=-1))
        assert len(rows) == shape[0] * shape[1] * scale**2
        below = ink[rows.max() + 1 : rows.max() + 20, columns.min() : columns.max() + 9]
        assert below.any()
