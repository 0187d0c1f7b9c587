"""Every picture. Import this module where a picture is drawn and not before: matplotlib takes its time."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from perceiver_ar.evaluation import Evaluation
from perceiver_ar.files import atomic_path

INK, MUTED, GRID = "#24292f", "#6e7781", "#e6e8eb"
BLUE, ORANGE = "#2f6fb2", "#c4541a"
STYLE = {
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",  # matplotlib brings it along
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


def plot_loss(
    path: str | os.PathLike[str],
    train: Points,
    validation: Points = (),
    references: Mapping[str, float] | None = None,
    *,
    x_label: str = "training tokens",
    y_label: str = "bits per token",
) -> None:
    """Draws the loss over a run.

    The training loss is faint, with its running mean over it. The axis leaves out the fall of the first steps, which
    would flatten all the rest, where that goes beyond what else there is to see.

    Args:
        path: the picture; its suffix says the format. Written atomically.
        train, validation: (steps or tokens seen, bits), in rising order. Values that are not finite are left out.
        references: horizontal lines, name -> bits, such as what gzip needs; in the unit of the axis.
    """
    references = dict(references or {})
    train, validation = _finite(train), _finite(validation)
    with _figure(path) as (axes, labels):
        pass
