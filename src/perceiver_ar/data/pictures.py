"""What results look like: piano rolls, spectrograms and grids, painted with Pillow (which matplotlib brings along)."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER, LINE, INK = (255, 255, 255), (230, 232, 235), (110, 119, 129)
BLUE, ORANGE = (47, 111, 178), (196, 84, 26)


def piano_roll(notes: np.ndarray, is_prompt: np.ndarray) -> Image.Image:
    """Notes (n, 4) as `perceiver_ar.data.midi` has them: time to the right, pitch upwards, loud notes darker.

    The prompt's notes, (n,) bool, are orange, the others blue.
    """
    seconds = max(1.0, float(notes[:, 1].max(initial=0.0)))
    width = int(np.clip(40 * seconds, 600, 6000))
    scale = width / seconds
    low, high = int(notes[:, 2].min(initial=48)) - 2, int(notes[:, 2].max(initial=72)) + 3
    row, left, top, bottom = 7, 44, 26, 30
    height = row * (high - low)
    image = Image.new("RGB", (left + width + 16, top + height + bottom), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for pitch in range(-(-low // 12) * 12, high, 12):  # a line and a name at every C
        y = top + row * (high - pitch)
        draw.line([(left, y), (left + width, y)], fill=LINE)
        draw.text((left - 8, y - row / 2), f"C{pitch // 12 - 1}", fill=INK, font=font, anchor="rm")
    step = next(step for step in (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 10**9) if step * scale >= 70)
    for second in range(0, int(seconds) + 1, step):
        x = left + scale * second
        draw.line([(x, top), (x, top + height)], fill=LINE)
        draw.text((x, top + height + 6), f"{second} s", fill=INK, font=font, anchor="ma")
    for (start, end, pitch, velocity), old in zip(notes.tolist(), is_prompt.tolist(), strict=True):
        strength = 0.35 + 0.65 * velocity / 127
        colour = tuple(round(255 + strength * (c - 255)) for c in (ORANGE if old else BLUE))
        x, y = left + scale * start, top + row * (high - pitch - 1)
        draw.rectangle([x, y + 1, max(x + 1, left + scale * end - 1), y + row - 1], fill=colour)
    names = [("prompt", ORANGE)] * bool(is_prompt.any()) + [("generated", BLUE)] * bool((~is_prompt).any())
    x = left
    for name, colour in names:
        draw.rectangle([x, 8, x + 10, 18], fill=colour)
        draw.text((x + 16, 13), name, fill=INK, font=font, anchor="lm")
        x += 40 + int(draw.textlength(name, font=font))
    return image


def grid(pictures: Sequence[np.ndarray], scale: int, columns: int = 8) -> Image.Image:
    """Pictures (rows, columns, 3) uint8 of one size side by side, each pixel `scale` wide, with white between them."""
    height, width = (scale * size for size in pictures[0].shape[:2])
    gap, columns = max(2, scale), min(columns, len(pictures))
    lines = -(-len(pictures) // columns)
    image = Image.new("RGB", (columns * (width + gap) + gap, lines * (height + gap) + gap), PAPER)
    for i, picture in enumerate(pictures):
        large = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
        image.paste(large, (gap + i % columns * (width + gap), gap + i // columns * (height + gap)))
    return image


def spectrogram(samples: np.ndarray, rate: int, boundary: int = 0) -> Image.Image:
    """Samples (n,): time to the right, frequency upwards, 80 dB from black to yellow; a line where `boundary` is."""
    size = 1024
    padded = np.pad(samples, (size // 2, size // 2 + size))
    hop = int(np.clip(256, len(samples) // 3000, max(1, len(samples) // 600)))  # 600 to some 3,000 columns
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[: max(1, len(samples)) : hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(size), axis=1)).T[::-1]
    decibels = 20 * np.log10(np.maximum(power, 1e-10))
    level = (1 + (decibels - decibels.max()) / 80).clip(0, 1)
    knots = np.array([[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]])
    at = np.linspace(0, 1, len(knots))
    colours = np.stack([np.interp(level, at, knots[:, c]) for c in range(3)], axis=-1).astype(np.uint8)
    if boundary > 0:
        colours[:, min(boundary // hop, colours.shape[1] - 1)] = 255
    left, bottom = 60, 30
    image = Image.new("RGB", (left + colours.shape[1] + 16, 12 + colours.shape[0] + bottom), PAPER)
    image.paste(Image.fromarray(colours), (left, 12))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for share in (0, 0.25, 0.5, 0.75, 1):
        text = f"{share * rate / 2000:.3g} kHz"
        draw.text((left - 6, 12 + (1 - share) * colours.shape[0]), text, fill=INK, font=font, anchor="rm")
    seconds = len(samples) / rate
    per_second = rate / hop
    steps = (0.001, 0.01, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800, 10**9)
    step = next(step for step in steps if step * per_second >= 60)
    for i in range(int(seconds / step) + 1):
        x = left + i * step * per_second
        draw.text((x, 18 + colours.shape[0]), f"{i * step:g} s", fill=INK, font=font, anchor="ma")
    return image
