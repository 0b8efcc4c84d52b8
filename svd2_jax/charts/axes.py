"""What all charts share: style and colours, a figure that becomes a file, bands, an axis of time, one legend."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from svd2_jax import files

BLUE, GREEN, ORANGE, RED, PURPLE = "#2a6fb0", "#2b7a5b", "#d9730d", "#b3261e", "#5b3f8c"
AMBER, GREY, INK, EDGE = "#d9a02b", "#8a949e", "#27313b", "#b8c0c8"
STYLE: dict[Any, Any] = {
    "figure.dpi": 100, "savefig.dpi": "figure",
    "font.size": 9, "text.color": INK, "text.parse_math": False,  # a prompt may hold dollar signs
    "axes.titlelocation": "left", "axes.titlesize": 10, "axes.labelsize": 9, "axes.labelcolor": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": EDGE, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": "#dfe4e8", "grid.linewidth": 0.7, "lines.linewidth": 1.4,
    "xtick.color": EDGE, "ytick.color": EDGE, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "legend.frameon": False, "legend.fontsize": 9,
}  # fmt: skip
MARKS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600)  # between marks of time
MOST_MARKS = 8


@contextmanager
def chart(
    path: Path, width: float, height: float, layout: Literal["constrained"] | None = "constrained"
) -> Iterator[Figure]:
    """Writes a PNG of the figure that is filled inside the `with`, whole or not at all.

    Args:
      path: the file.
      width: in inches of 100 pixels.
      height: likewise.
      layout: what places the panels: matplotlib, which takes seconds where they are many, or None: the caller.

    Raises:
      MediaError: the file cannot be written.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure((width, height), layout=layout)
        FigureCanvasAgg(figure)
        yield figure
        files.write_whole(path, lambda part: figure.savefig(part, format="png"))


def band(
    axes: Axes,
    times: Sequence[float],
    low: Sequence[float | None],
    middle: Sequence[float | None],
    high: Sequence[float | None],
    colour: str,
    label: str,
) -> None:
    """Draws a line in a band from `low` to `high`; both break where a value is None."""
    axes.fill_between(
        times, np.array(low, float), np.array(high, float), color=colour, alpha=0.25, linewidth=0
    )
    axes.plot(times, np.array(middle, float), color=colour, label=label)


def time_axis(axes: Axes, span_s: float) -> None:
    """Gives the axis of x the time from 0 to `span_s` seconds."""
    axes.set_xlim(0, span_s)
    distance_s = next((t for t in MARKS_S if span_s / t <= MOST_MARKS), span_s / MOST_MARKS)
    axes.xaxis.set_major_locator(MultipleLocator(distance_s))
    axes.xaxis.set_major_formatter(
        lambda at, _: f"{at:g} s" if span_s < 120 else str(datetime.timedelta(seconds=round(at)))
    )


def legend(figure: Figure, columns: int) -> None:
    """Puts one legend above all panels: each label of theirs once."""
    found = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes]
    named = {label: handle for pairs in found for handle, label in pairs}
    figure.legend(named.values(), named.keys(), loc="outside upper left", ncols=columns)
