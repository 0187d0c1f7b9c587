"""Pictures of results: piano rolls, spectrograms and grids, drawn with Pillow (a dependency of matplotlib)."""

import io
from collections.abc import Sequence
from importlib.metadata import distribution

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER, LINE, INK = (255, 255, 255), (230, 232, 235), (110, 119, 129)
BLUE, ORANGE = (47, 111, 178), (196, 84, 26)
EDGE = (20, 24, 28)  # where the prompt ends
FONT = "matplotlib/mpl-data/fonts/ttf/DejaVuSans.ttf"
"""A font with accented, Greek, Cyrillic and Arabic letters; Pillow's own has those of ASCII alone."""
RANGE = 80  # decibels of a spectrogram


def png_bytes(image: Image.Image) -> bytes:
    """The content of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def piano_roll(
    notes: np.ndarray, boundary: float = 0.0, until: float = np.inf, label: str = "generated"
) -> Image.Image:
    """Notes (n, 4) as in `perceiver_ar.data.midi_file`: time to the right, pitch upwards, loud notes darker.

    Sound before `boundary` and after `until`, in seconds, is orange, the rest is blue and has the `label`; lines
    separate them.
    """
    seconds = max(1.0, float(notes[:, 1].max(initial=0.0)), boundary)
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
    for start, end, pitch, velocity in notes.tolist():
        strength, y = 0.35 + 0.65 * velocity / 127, top + row * (high - pitch - 1)
        spans = [(0.0, boundary, ORANGE), (boundary, until, BLUE), (until, np.inf, ORANGE)]
        parts = [(max(start, a), min(end, b), ink) for a, b, ink in spans if start < b and end > a + 1e-6]
        for begins, ends, ink in parts:
            x = left + scale * begins
            draw.rectangle([x, y + 1, max(x + 1, left + scale * ends - 1), y + row - 1], fill=_tint(ink, strength))
    names = [("prompt", ORANGE)] * (boundary > 0) + [(label, BLUE)] * bool(
        ((notes[:, 1] > boundary + 1e-6) & (notes[:, 0] < until)).any()
    )
    x = left
    for name, colour in names:
        draw.rectangle([x, 8, x + 10, 18], fill=colour)
        draw.text((x + 16, 13), name, fill=INK, font=font, anchor="lm")
        x += 40 + int(draw.textlength(name, font=font))
    for edge in {boundary, until} - {0.0, np.inf}:
        x = left + scale * edge
        draw.line([(x, top), (x, top + height + 4)], fill=EDGE, width=2)
    return image


def grid(pictures: Sequence[np.ndarray], labels: Sequence[str], scale: int) -> Image.Image:
    """Pictures (rows, columns, 3) uint8 of one size side by side, enlarged `scale` times, each above its label."""
    font = ImageFont.load_default(13)
    height, width = (scale * size for size in pictures[0].shape[:2])
    gap, line, columns = max(8, scale), 20, min(8, len(pictures))
    wide = max([width, *(int(font.getlength(label)) + 1 for label in labels)])
    lines = -(-len(pictures) // columns)
    image = Image.new("RGB", (columns * (wide + gap) + gap, lines * (height + line + gap) + gap), PAPER)
    draw = ImageDraw.Draw(image)
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x, y = gap + i % columns * (wide + gap), gap + i // columns * (height + line + gap)
        image.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST), (x, y))
        draw.text((x, y + height + 4), label, fill=INK, font=font)
    return image


def shaded_text(data: bytes, bits: np.ndarray) -> Image.Image:
    """The first 4,000 characters of a text, each on a ground that is darker the more bits it took.

    data: UTF-8; other bytes are shown as \ufffd. bits: (len(data),) of each byte.
    """
    width, line, gap, most, dark = 900, 20, 10, 4000, 8.0
    text = data[: 4 * most].decode("utf-8", errors="surrogateescape")[:most]
    font, spots = ImageFont.truetype(str(distribution("matplotlib").locate_file(FONT)), 13), []
    x, y, at = gap, 2 * gap + line, 0
    for character in text:
        size = len(character.encode("utf-8", errors="surrogateescape"))
        shown = {"\n": "\u00b6", "\t": "    "}.get(character, character if character.isprintable() else "\ufffd")
        wide = font.getlength(shown)
        if x + wide > width - gap:
            x, y = gap, y + line
        spots.append((x, y, wide, shown, min(1.0, float(bits[at : at + size].sum()) / dark)))
        x, y = (gap, y + line) if character == "\n" else (x + wide, y)
        at += size
    image = Image.new("RGB", (width, y + line + gap), PAPER)
    draw = ImageDraw.Draw(image)
    for level in range(9):
        draw.rectangle([gap + 24 * level, gap, gap + 24 * level + 23, gap + 12], fill=_tint(ORANGE, level / 8))
    draw.text((gap + 24 * 9 + 6, gap), f"bits of a character: 0 to {dark:g} and more", fill=INK, font=font)
    for x, y, wide, shown, level in spots:
        draw.rectangle([x, y, x + wide, y + line - 2], fill=_tint(ORANGE, level))
        draw.text((x, y), shown, fill=LINE if shown == "\u00b6" else EDGE, font=font)
    return image


def _tint(colour: tuple[int, int, int], level: float) -> tuple[int, ...]:
    """Levels 0 ... 1 from white to a colour."""
    return tuple(round(255 + level * (c - 255)) for c in colour)


def spectrogram(samples: np.ndarray, rate: int, boundary: int = 0) -> Image.Image:
    """Samples (n,) at `rate` Hz: time to the right, frequency upwards, 80 dB from black to yellow (the loudest).

    A line shows where the prompt of `boundary` samples ends.
    """
    size = 1024
    padded = np.pad(samples, (size // 2, size // 2 + size))
    hop = int(np.clip(256, len(samples) // 3000, max(1, len(samples) // 600)))  # 600 to some 3,000 columns
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[: max(1, len(samples)) : hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(size), axis=1)).T[::-1]
    decibels = 20 * np.log10(np.maximum(power, 1e-10))
    colours = _heat(1 + (decibels - max(decibels.max(), -60.0)) / RANGE)  # less than a bit of 16 counts as silence
    height, width = colours.shape[:2]
    left, top, bottom = 60, 30, 30
    image = Image.new("RGB", (left + width + 80, top + height + bottom), PAPER)
    image.paste(Image.fromarray(colours), (left, top))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for share in (0, 0.25, 0.5, 0.75, 1):
        text = f"{share * rate / 2000:.3g} kHz"
        draw.text((left - 6, top + (1 - share) * height), text, fill=INK, font=font, anchor="rm")
    seconds = len(samples) / rate
    per_second = rate / hop
    steps = (0.001, 0.01, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800, 10**9)
    step = next(step for step in steps if step * per_second >= 60)
    for i in range(int(seconds / step) + 1):
        x = left + i * step * per_second
        draw.text((x, top + 6 + height), f"{i * step:g} s", fill=INK, font=font, anchor="ma")
    bar = left + width + 16
    image.paste(Image.fromarray(_heat(np.linspace(1, 0, height)[:, None].repeat(12, axis=1))), (bar, top))
    for level in range(0, RANGE + 1, 20):
        y = top + level / RANGE * (height - 1)
        draw.text((bar + 18, y), f"{-level} dB", fill=INK, font=font, anchor="lm")
    if boundary > 0:
        x = left + min(boundary // hop, width - 1)
        draw.line([(x - 1, top), (x - 1, top + height - 1)], fill=EDGE)
        draw.line([(x + 1, top), (x + 1, top + height - 1)], fill=EDGE)
        draw.line([(x, top - 8), (x, top + height + 4)], fill=PAPER)
        draw.line([(x, top - 8), (x, top - 1)], fill=EDGE, width=3)
        draw.text((x, top - 10), "prompt ends", fill=INK, font=font, anchor="mb")
    return image


def _heat(level: np.ndarray) -> np.ndarray:
    """Levels 0 ... 1 as colours (..., 3) uint8, from black through red to yellow."""
    knots = np.array([[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]])
    at = np.linspace(0, 1, len(knots))
    return np.stack([np.interp(level, at, knots[:, c]) for c in range(3)], axis=-1).astype(np.uint8)
