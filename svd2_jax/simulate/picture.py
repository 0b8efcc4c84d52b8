"""A picture of simulated runs: for each trace, latency over time against the budget, drops and steps."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter

from svd2_jax.runtime.types import SECOND, Fate
from svd2_jax.simulate.simulator import SimulationResult
from svd2_jax.simulate.trace import Trace
from svd2_jax.text import counted

BINS = 150  # over a trace
COLOURS = {"deadline": "#1f5fbf", "bounded": "#2e8b57", "fifo": "#d9730d", "reference": "#7a7a7a"}
SHADE = "#f7d9d4"
PANEL = (7.2, 3.3)  # inches
LEGEND_LINE = 0.21  # inches, of each line above the panels
DPI = 100


@dataclass(frozen=True)
class Sketch:
    """What is drawn of one run; every list has one entry for each bin of time, by arrival.

    Attributes:
      trace: what was run.
      policy: by which policy.
      median: latency as a share of the budget, of the frames shown; None where none was.
      worst: the longest of these.
      dropped: share of the frames that were dropped.
      steps: mean of the frames shown; None where none was.
      degraded: seconds at which a stream was given fewer steps.
      restored: seconds at which one was given more.
    """

    trace: Trace
    policy: str
    median: list[float | None]
    worst: list[float | None]
    dropped: list[float]
    steps: list[float | None]
    degraded: list[float]
    restored: list[float]


def sketch(outcome: SimulationResult) -> Sketch:
    """Returns what is drawn of a run, so that its records need not be kept."""
    width_ns = outcome.trace.duration_s * SECOND / BINS
    shares: dict[int, list[float]] = defaultdict(list)
    steps: dict[int, list[int]] = defaultdict(list)
    came, dropped = [0] * BINS, [0] * BINS
    for frame in outcome.frames:
        index = min(int(frame.arrival_ns / width_ns), BINS - 1)
        came[index] += 1
        dropped[index] += frame.fate is Fate.DROPPED
        if frame.shown_ns is not None:
            budget_ns = frame.deadline_ns - frame.arrival_ns
            shares[index].append((frame.shown_ns - frame.arrival_ns) / budget_ns)
            steps[index].append(frame.steps or 0)
    return Sketch(
        outcome.trace,
        outcome.policy,
        [statistics.median(shares[i]) if shares[i] else None for i in range(BINS)],
        [max(shares[i]) if shares[i] else None for i in range(BINS)],
        [dropped[i] / max(1, came[i]) for i in range(BINS)],
        [statistics.mean(steps[i]) if steps[i] else None for i in range(BINS)],
        [c.at_ns / SECOND for c in outcome.changes if c.after < c.before],
        [c.at_ns / SECOND for c in outcome.changes if c.after > c.before],
    )


def draw(path: Path, sketches: Sequence[Sketch]) -> None:
    """Writes a PNG with one panel for each trace."""
    by_trace: dict[int, list[Sketch]] = defaultdict(list)
    for one in sketches:
        by_trace[id(one.trace)].append(one)
    columns = min(2, len(by_trace))
    rows = -(-len(by_trace) // columns)
    handles = _legend([run.policy for run in sketches])
    words = 2 * columns  # of the legend in a line
    legend = 0.15 + LEGEND_LINE * -(-len(handles) // words)
    width, height = PANEL[0] * columns, PANEL[1] * rows + legend
    figure = pyplot.figure(figsize=(width, height), dpi=DPI)
    grid = figure.add_gridspec(
        rows, columns, left=0.75 / width, right=1 - 0.6 / width, bottom=0.35 / height,
        top=1 - (legend + 0.3) / height, hspace=0.27, wspace=0.2,
    )  # fmt: skip
    for index, runs in enumerate(by_trace.values()):
        cell = grid[index // columns, index % columns].subgridspec(2, 1, height_ratios=(4, 1), hspace=0.08)
        above = figure.add_subplot(cell[0])
        _latencies(above, runs)
        _strip(figure.add_subplot(cell[1], sharex=above), runs)
    figure.legend(handles=handles, loc="upper center", ncols=words, frameon=False, fontsize=9)
    figure.savefig(path)
    pyplot.close(figure)


def _latencies(axes: Any, runs: Sequence[Sketch]) -> None:
    """Draws the median latency of each policy and up to the longest, as a share of the budget."""
    trace = runs[0].trace
    _shade(axes, trace)
    top = 1.0
    for run in sorted(runs, key=lambda r: r.policy == "deadline"):  # ours on top
        median, worst = _gaps(run.median), _gaps(run.worst)
        axes.fill_between(_times(trace), median, worst, color=COLOURS[run.policy], alpha=0.25, linewidth=0)
        axes.plot(_times(trace), median, color=COLOURS[run.policy], linewidth=1.4)
        top = max([top, *(value for value in worst if value == value)])
    axes.axhline(1, color="#c0392b", linewidth=1)
    if top > 3:  # an unbounded queue: only a logarithm shows it beside the rest
        axes.set_yscale("log")
        axes.set_ylim(0.1, top * 2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    else:
        axes.set_ylim(0, top * 1.2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1f}x")
    axes.yaxis.set_minor_formatter(NullFormatter())
    for run in runs:
        for times, marker, y in ((run.degraded, "v", 0.955), (run.restored, "^", 0.885)):
            axes.plot(
                times, [y] * len(times), marker, color=COLOURS[run.policy], markersize=4.5,
                transform=axes.get_xaxis_transform(), clip_on=False,
            )  # fmt: skip
    axes.set_title(
        f"{trace.name}: load {trace.peak_load:.2f}, {_streams(trace)}, budget {_span(trace)} ms",
        fontsize=10,
        loc="left",
    )
    axes.set_ylabel("latency / budget", fontsize=9)
    axes.tick_params(labelbottom=False, labelsize=8)
    axes.set_xlim(0, trace.duration_s)
    axes.grid(alpha=0.25, linewidth=0.6)


def _strip(axes: Any, runs: Sequence[Sketch]) -> None:
    """Draws the share of dropped frames, and the steps of the frames shown where they change."""
    trace = runs[0].trace
    _shade(axes, trace)
    for run in sorted(runs, key=lambda r: r.policy == "deadline"):
        percent = [100 * share for share in run.dropped]
        axes.fill_between(
            _times(trace), percent, color=COLOURS[run.policy], alpha=0.5, step="mid", linewidth=0
        )
    axes.set_ylim(0, 100)
    axes.set_yticks([0, 100], ["0", "100 %"])
    axes.set_ylabel("dropped", fontsize=9)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} s")
    axes.tick_params(labelsize=8)
    steps = axes.twinx()
    most = max(source.steps for source in trace.sources)
    for run in runs:
        if run.policy == "deadline":
            steps.plot(_times(trace), _gaps(run.steps), color="black", linewidth=1, drawstyle="steps-mid")
    steps.set_ylim(0, most + 0.5)
    steps.set_yticks(range(1, most + 1))
    steps.set_ylabel("steps", fontsize=9)
    steps.tick_params(labelsize=8)


def _shade(axes: Any, trace: Trace) -> None:
    for begin, end in trace.overloads:
        axes.axvspan(begin, end, color=SHADE, linewidth=0, zorder=0)


def _times(trace: Trace) -> list[float]:
    return [(i + 0.5) * trace.duration_s / BINS for i in range(BINS)]


def _gaps(values: Sequence[float | None]) -> list[float]:
    """Returns the values with NaN, which is not drawn, where nothing was shown."""
    return [math.nan if value is None else value for value in values]


def _streams(trace: Trace) -> str:
    count = len(trace.sources)
    return counted(count, "stream")


def _span(trace: Trace) -> str:
    budgets = [source.budget_ms for source in trace.sources]
    return f"{min(budgets):g}" if min(budgets) == max(budgets) else f"{min(budgets):g} to {max(budgets):g}"


def _legend(policies: Sequence[str]) -> list[Any]:
    present = [policy for policy in COLOURS if policy in policies]
    return [
        *(Line2D([], [], color=COLOURS[p], label=f"{p}: median, shaded up to the longest") for p in present),
        Line2D([], [], color="#c0392b", label="latency budget"),
        Patch(color=SHADE, label="demand above capacity"),
        Line2D([], [], color="black", linewidth=1, label="denoising steps (deadline)"),
        Line2D([], [], color=COLOURS["deadline"], marker="v", linestyle="", label="fewer steps"),
        Line2D([], [], color=COLOURS["deadline"], marker="^", linestyle="", label="more steps"),
    ]
