"""All plots, written atomically; the suffix of a plot's path chooses the format.

Import this module only where a plot is drawn: importing matplotlib is slow.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from perceiver_ar.evaluation import Evaluation
from perceiver_ar.files import atomic_path

INK, MUTED, GRID = "#24292f", "#6e7781", "#e6e8eb"
BLUE, ORANGE = "#2f6fb2", "#c4541a"
STYLE: Any = {
    "font.family": "DejaVu Sans",  # included in matplotlib, so plots are the same everywhere
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}
Points = Sequence[tuple[float, float]]
Label = tuple[float, str, str]
"""Height, text, colour."""


def plot_loss(
    path: str | os.PathLike[str],
    train: Points,
    validation: Points = (),
    references: Mapping[str, float] | None = None,
    *,
    y_label: str = "bits per token",
) -> None:
    """Draws the loss over a run: the training loss with its running mean, and the held-out loss.

    The first steps may lie outside of the plot: their steep fall would flatten the rest.

    Args:
        train, validation: (steps or tokens seen, bits), in rising order. Values that are not finite are left out.
        references: name -> bits, in the unit of the axis, drawn as horizontal lines, such as the bits of gzip.
    """
    x, bits = _arrays(train)
    held_out_x, held_out_bits = _arrays(validation)
    with _picture(path) as axes:
        labels = _draw_references(axes, references)
        heights = [*(height for height, _, _ in labels), *held_out_bits]
        if len(x) > 0:
            smooth = _running_mean(bits, len(bits) // 40)
            if len(x) >= 40:
                axes.plot(x, bits, color=BLUE, alpha=0.25, linewidth=0.8)
            axes.plot(x, smooth, color=BLUE, linewidth=1.8, marker="o" if len(x) == 1 else None)
            labels.append((smooth[-1], f"training {smooth[-1]:.2f}", BLUE))
            heights += list(smooth[len(smooth) // 20 :]) + list(bits[len(bits) // 10 :])
        if len(held_out_x) > 0:
            axes.plot(held_out_x, held_out_bits, color=ORANGE, linewidth=1.8, marker="o", markersize=4)
            labels.append((held_out_bits[-1], f"held out {held_out_bits[-1]:.2f}", ORANGE))
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        _finish(axes, heights, labels, "training tokens", y_label)


def plot_context(
    path: str | os.PathLike[str], evaluations: Sequence[Evaluation], references: Mapping[str, float] | None = None
) -> None:
    """Draws bits per byte against the context length; bits per token if some evaluation has no bytes.

    Bars show plus and minus one standard error.

    Args:
        evaluations: as from `evaluate_context_lengths`.
        references: name -> bits in the same unit, drawn as horizontal lines.
    """
    evaluations = sorted(evaluations, key=lambda evaluation: evaluation.context_length)
    per_byte = all(evaluation.bits_per_byte is not None for evaluation in evaluations)
    lengths = [evaluation.context_length for evaluation in evaluations]
    bits, errors = [], []
    for evaluation in evaluations:
        scale = evaluation.tokens / evaluation.bytes if per_byte and evaluation.bytes else 1.0
        bits.append(evaluation.bits_per_token * scale)
        errors.append((evaluation.standard_error or 0.0) / math.log(2) * scale)
    with _picture(path) as axes:
        labels = _draw_references(axes, references)
        heights = [height for height, _, _ in labels]
        axes.set_xscale("log", base=2)
        if evaluations:
            axes.errorbar(lengths, bits, errors, color=BLUE, linewidth=1.8, elinewidth=1.2, marker="o", markersize=4)
            labels.append((bits[-1], f"model {bits[-1]:.2f}", BLUE))
            heights += [bit + sign * error for bit, error in zip(bits, errors, strict=True) for sign in (-1, 1)]
            axes.set_xlim(lengths[0] / 2**0.5, lengths[-1] * 2**0.5)
        axes.xaxis.set_major_locator(FixedLocator(lengths))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: binary_count(value)))
        _finish(axes, heights, labels, "context length in tokens", "bits per byte" if per_byte else "bits per token")


def plot_scaling(
    path: str | os.PathLike[str],
    points: Mapping[str, Points],
    lines: Mapping[str, Points],
    best: Points,
    *,
    y_label: str,
) -> None:
    """Draws the loss of runs against the FLOPs of their training.

    Args:
        points: size -> (FLOPs, loss) of its runs, the smallest size first.
        lines: size -> the same along the fit.
        best: (FLOPs, loss) with the best size for these FLOPs, in rising order.
    """
    blues = LinearSegmentedColormap.from_list("", ["#9ecae9", "#0b3d75"])
    with _picture(path) as axes:
        labels, heights = list[Label](), [loss for runs in points.values() for _, loss in runs]
        for i, (size, runs) in enumerate(points.items()):
            colour = to_hex(blues(i / max(1, len(points) - 1)))
            axes.plot(*_arrays(lines[size]), color=colour, linewidth=1.2)
            axes.plot(*_arrays(runs), color=colour, linestyle="", marker="o", markersize=5)
            labels.append((lines[size][-1][1], size, colour))
        x, loss = _arrays(best)
        axes.plot(x, loss, color=ORANGE, linewidth=1.8, linestyle=(0, (4, 3)))
        labels.append((loss[-1], f"best size {loss[-1]:.2f}", ORANGE))
        axes.set_xscale("log")
        axes.set_xlim(min(line[0][0] for line in lines.values()), x[-1])
        _finish(axes, [*heights, loss[-1]], labels, "FLOPs of training", y_label)


def binary_count(value: float) -> str:
    """256 -> "256", 1024 -> "1k", 1536 -> "1.5k", 1048576 -> "1M"; others in full."""
    for unit, name in ((2**20, "M"), (2**10, "k")):
        if value >= unit and round(value) * 2 % unit == 0:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def _arrays(points: Points) -> tuple[np.ndarray, np.ndarray]:
    array = np.array(points, dtype=np.float64).reshape(-1, 2)
    array = array[np.isfinite(array).all(axis=1)]
    return array[:, 0], array[:, 1]


def _running_mean(values: np.ndarray, half: int) -> np.ndarray:
    """Means over each value and up to `half` neighbours on each side; near the start, the same number on both sides."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(half, at)  # the start is steep: one-sided means would be wrong there
    first, end = at - reach, np.minimum(at + reach + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)


@contextmanager
def _picture(path: str | os.PathLike[str]) -> Iterator[Axes]:
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.2), dpi=150)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0.08, 0.13, 0.74, 0.76))  # room for the lines' labels on the right
        yield axes
        with atomic_path(path) as temporary:
            figure.savefig(temporary, bbox_inches="tight", pad_inches=0.15)  # makes room for long names


def _draw_references(axes: Axes, references: Mapping[str, float] | None) -> list[Label]:
    labels = []
    for name, height in (references or {}).items():
        axes.axhline(height, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
        labels.append((height, f"{name} {height:.2f}", MUTED))
    return labels


def _finish(axes: Axes, heights: Sequence[float], labels: Sequence[Label], x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_title(y_label, loc="left", fontsize=10, pad=10)
    if heights:
        low, high = min(heights), max(heights)
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + margin)
    # Labels at the height of their lines' ends, spread if they would overlap.
    bottom, top = axes.get_ylim()
    labels = sorted(labels, key=lambda label: label[0])
    at = spread([(height - bottom) / (top - bottom) for height, _, _ in labels], gap=0.055)
    for y, (_, text, colour) in zip(at, labels, strict=True):
        axes.text(1.02, y, text, transform=axes.transAxes, color=colour, va="center")


def spread(values: Sequence[float], gap: float) -> list[float]:
    """The nearest places (least squares) to rising `values` that are at least `gap` apart."""
    groups: list[tuple[float, int]] = []  # mean of the members' values less their gaps, number of members
    for i, value in enumerate(values):
        mean, size = value - i * gap, 1
        while groups and groups[-1][0] > mean:
            other, count = groups.pop()
            mean, size = (mean * size + other * count) / (size + count), size + count
        groups.append((mean, size))
    means = [mean for mean, size in groups for _ in range(size)]
    return [mean + i * gap for i, mean in enumerate(means)]
