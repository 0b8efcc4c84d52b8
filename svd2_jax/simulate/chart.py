"""The chart of simulated runs: for each trace, latency over time against the budget, drops and steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from svd2_jax.charts.axes import BLUE, GREEN, GREY, INK, ORANGE, RED, band, chart, legend, time_axis
from svd2_jax.runtime.metrics import Tally, Timeline
from svd2_jax.runtime.types import MS, SECOND
from svd2_jax.simulate.simulator import SimulationResult
from svd2_jax.simulate.trace import Trace
from svd2_jax.text import counted

COLOURS = {"fifo": ORANGE, "reference": GREY, "bounded": GREEN, "deadline": BLUE}  # ours on top
OVERLOAD = "#f7d9d4"
BINS = 150  # over a trace
WIDTH, HEIGHT = 7.2, 3.6  # inches, of a trace


@dataclass(frozen=True)
class Run:
    """What is drawn of one trace under one policy: its frames, summed up by time of arrival."""

    trace: Trace
    policy: str
    timeline: Timeline


def summed_up(outcome: SimulationResult) -> Run:
    """Returns what is drawn of a run, so that its records need not be stored."""
    timeline = Timeline()
    for frame in outcome.frames:
        timeline.at(frame.arrival_ns).add_frame(frame)
    return Run(outcome.trace, outcome.policy, timeline)


def draw(path: Path, runs: Sequence[Run]) -> None:
    """Writes a PNG with two panels for each trace, whose runs follow one another.

    Raises:
      MediaError: the file cannot be written.
    """
    traces = [list(group) for _, group in itertools.groupby(runs, lambda run: id(run.trace))]
    columns = min(2, len(traces))
    rows = -(-len(traces) // columns)
    width, height = columns * WIDTH, rows * HEIGHT + 0.8
    with chart(path, width, height, layout=None) as figure:
        grid = figure.add_gridspec(
            rows, columns, left=0.75 / width, right=1 - 0.5 / width, bottom=0.35 / height, top=1 - 1 / height,
            hspace=0.24, wspace=0.2,
        )  # fmt: skip
        for index, group in enumerate(traces):
            cell = grid[divmod(index, columns)]
            group.sort(key=lambda run: list(COLOURS).index(run.policy))
            latencies, drops = (
                figure.add_subplot(part) for part in cell.subgridspec(2, 1, height_ratios=(4, 1), hspace=0.1)
            )
            _latencies(latencies, group)
            _drops(drops, group)
        legend(figure, columns=3 * columns)


def _latencies(axes: Axes, runs: Sequence[Run]) -> None:
    """Draws the median latency of each policy, and up to the longest."""
    trace = runs[0].trace
    budgets = sorted({source.budget_ms for source in trace.sources})
    _prepare(axes, trace)
    for run in runs:
        times, tallies = _bins(run)
        shown = [tally if tally.displayed else None for tally in tallies]
        median = [t and (t.latency.quantile_ns(0.5) or 0) / MS for t in shown]
        longest = [t and t.latency.high_ns / MS for t in shown]
        band(
            axes, times, median, median, longest, COLOURS[run.policy], f"{run.policy}: median, to the longest"
        )
    for budget in budgets:
        axes.axhline(budget, color=RED, linewidth=1.1, linestyle="--", label="latency budget")
    if axes.dataLim.ymax > 3 * budgets[-1]:  # an unbounded queue: only a logarithm shows it beside the rest
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.1 * budgets[0])
    else:
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.tick_params(labelbottom=False)
    axes.set_ylabel("latency, ms")
    axes.set_title(
        f"{trace.name}: load {trace.peak_load:.2f}, {counted(len(trace.sources), 'stream')}, "
        f"budget {' to '.join(f'{budget:g}' for budget in budgets)} ms"
    )


def _drops(axes: Axes, runs: Sequence[Run]) -> None:
    """Draws the share of dropped frames, and the steps of the frames that the scheduler showed."""
    _prepare(axes, runs[0].trace)
    steps: Any = axes.twinx()
    for run in runs:
        times, tallies = _bins(run)
        percent = [100 * tally.dropped / (tally.dropped + tally.displayed) for tally in tallies]
        axes.fill_between(times, percent, color=COLOURS[run.policy], alpha=0.5, step="mid", linewidth=0)
        if run.policy == "deadline":
            mean = [
                tally.steps_sum / tally.displayed if tally.displayed else float("nan") for tally in tallies
            ]
            steps.plot(times, mean, color=INK, linewidth=1, drawstyle="steps-mid", label="steps (deadline)")
    axes.set_ylim(0, 100)
    axes.set_ylabel("dropped, %")
    steps.set_ylim(0, max(source.steps for source in runs[0].trace.sources) + 0.5)
    steps.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    steps.set_ylabel("steps")
    steps.grid(visible=False)


def _prepare(axes: Axes, trace: Trace) -> None:
    time_axis(axes, trace.duration_s)
    for begin_s, end_s in trace.overloads:
        axes.axvspan(begin_s, end_s, color=OVERLOAD, linewidth=0, zorder=0, label="demand above capacity")


def _bins(run: Run) -> tuple[list[float], list[Tally]]:
    """Returns the middle in seconds of each stretch of time in which frames came, and what became of them."""
    width_ns = run.timeline.width_ns
    while width_ns * BINS < run.trace.duration_s * SECOND:
        width_ns *= 2
    items = run.timeline.items(width_ns)
    return [(start + width_ns / 2) / SECOND for start, _ in items], [tally for _, tally in items]
