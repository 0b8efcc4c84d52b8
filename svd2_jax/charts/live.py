"""The chart of a live run: latency against the budget, what was late or dropped, and what the device did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from svd2_jax.charts.axes import (
    AMBER,
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    RED,
    band,
    chart,
    legend,
    time_axis,
)
from svd2_jax.runtime.metrics import Metrics, Summary, Tally, Timeline
from svd2_jax.runtime.types import MS, SECOND, Reason
from svd2_jax.text import percent, shortened

WIDTH = 16.0  # inches
LATENCY_HEIGHT, STRIP_HEIGHT, SPACE = 1.7, 0.5, 0.32
MOST_STREAMS = 8  # with panels of their own
BINS = 320  # about one each 4 pixels
STRIP_BIN_NS = SECOND  # at least, so that it holds several ticks
GAP_S = 1.0  # lines break where nothing happened for longer
DROPS_HEIGHT = 0.22  # of a panel, for a bin in which every frame was dropped
LEAST_DROPS = 0.025  # so that one is seen, too
LETTER = 0.085  # inches, of a prompt's text on average
LEAST_TEXT = 5  # letters; where there is less room, a change of the prompt has no text
LABEL = 80  # letters
DROPS = {
    Reason.OVERLOAD: "#f0a202", Reason.EXPIRED: "#c2255c", Reason.STALE: "#7048e8", Reason.DISORDER: "#0c8599",
    Reason.DUPLICATE: "#66a80f", Reason.CLOSED: "#868e96", Reason.SINK: "#5c3d1e",
}  # fmt: skip

Bins = list[tuple[float, Tally]]
"""(middle of a stretch of time in seconds, what happened in it), in order."""


def draw(path: Path, metrics: Metrics) -> None:
    """Writes a PNG, 1600 pixels wide, of all that the metrics hold; call it when no more events come.

    Each stream has panels, the eight with the lowest numbers at most. Frames stand where they arrived, ticks where
    they started, and a new prompt where the device took it.

    Raises:
      MediaError: the file cannot be written.
    """
    streams, overall = metrics.streams, metrics.timeline()
    drawn = streams[:MOST_STREAMS]
    items, width_ns = overall.items() or [(0, Tally())], overall.width_ns
    while (items[-1][0] - items[0][0]) / width_ns > BINS:
        width_ns *= 2
    begin_ns = items[0][0] // width_ns * width_ns
    span_s = (items[-1][0] + overall.width_ns - begin_ns) / SECOND
    strip_ns = width_ns * max(1, -(-STRIP_BIN_NS // width_ns))
    heights = [LATENCY_HEIGHT, STRIP_HEIGHT] * len(drawn) + [STRIP_HEIGHT] * 3
    height = sum(heights) + SPACE * (2 * len(drawn) + 5)
    with chart(path, WIDTH, height, layout=None) as figure:
        panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
        figure.subplots_adjust(0.05, 0.35 / height, 0.985, 1 - 0.65 / height, hspace=0.42)
        time_axis(panels[-1], span_s)
        # The last panels are the device's.
        for stream, latency, steps in zip(drawn, panels[0::2], panels[1::2], strict=False):
            line = metrics.timeline(stream)
            _latency(latency, _bins(line, width_ns, begin_ns), width_ns / SECOND, metrics.summary(stream))
            _prompts(latency, [((at - begin_ns) / SECOND, prompt) for at, prompt in line.prompts])
            bins = _bins(line, strip_ns, begin_ns)
            _strip(
                steps, bins, strip_ns, "steps", PURPLE, lambda t: (t.steps_low, t.steps_last, t.steps_high)
            )
        _device(panels[-3:], _bins(overall, strip_ns, begin_ns), strip_ns)
        panels[-3].set_title(
            "Device"
            if len(drawn) == len(streams)
            else f"Device, all {len(streams)} streams; {len(drawn)} are drawn",
            weight="bold",
        )
        panels[-3].set_ylim(0, 110)
        for axes in panels:
            axes.yaxis.set_label_coords(-0.03, 0.5)
        legend(figure, columns=10)


def _latency(axes: Axes, bins: Bins, width_s: float, summary: Summary) -> None:
    """Draws a stream's latency from least to most with its median, the budget, and what was late or dropped."""
    shown = _broken([(at, tally) for at, tally in bins if tally.displayed], max(GAP_S, 2.5 * width_s))
    band(
        axes,
        [at for at, _ in shown],
        [t and t.latency.low_ns / MS for _, t in shown],
        [t and (t.latency.quantile_ns(0.5) or 0) / MS for _, t in shown],
        [t and t.latency.high_ns / MS for _, t in shown],
        BLUE,
        "median latency, least to most",
    )
    axes.axhline(summary.budget_ms, color=RED, linestyle="--", linewidth=1.1, label="latency budget")
    highest = max((tally.latency.high_ns / MS for _, tally in bins), default=0)
    top = max(1.3 * summary.budget_ms, min(1.12 * highest, 4 * summary.budget_ms)) or 1
    if late := [(at, min(tally.latency.high_ns / MS, 0.97 * top)) for at, tally in bins if tally.late]:
        axes.plot(*zip(*late, strict=True), "o", color=ORANGE, markersize=4, label="late")
    base = np.zeros(len(bins))
    for reason, colour in DROPS.items():
        shares = np.array([t.drops[reason.value] / max(1, t.dropped + t.displayed) for _, t in bins])
        if shares.any():
            height = np.where(shares > 0, np.maximum(LEAST_DROPS, DROPS_HEIGHT * shares), 0)
            axes.bar(
                [at for at, _ in bins], height, width_s, base, color=colour, label=f"dropped: {reason.value}",
                transform=axes.get_xaxis_transform(),
            )  # fmt: skip
            base += height
    axes.set_ylim(0, top)
    axes.set_ylabel("latency, ms")
    axes.set_title(shortened(summary.label, LABEL, len), weight="bold")
    axes.set_title(_verdict(summary), loc="right")


def _verdict(summary: Summary) -> str:
    if summary.latency_p50_ms is None:
        return "nothing shown"
    return (
        f"p50 {summary.latency_p50_ms:.0f}, p95 {summary.latency_p95_ms:.0f}, p99 {summary.latency_p99_ms:.0f}, "
        f"most {summary.latency_max_ms:.0f} of {summary.budget_ms:.0f} ms · {summary.fps_shown:.1f} FPS · "
        f"late {percent(summary.miss_rate)} · dropped {percent(summary.drop_rate)}"
    )


def _prompts(axes: Axes, prompts: Sequence[tuple[float, str]]) -> None:
    """Draws when a stream's prompt changed, and to what, from (seconds, prompt) in order."""
    if len(prompts) < 2:
        return
    end = axes.get_xlim()[1]
    starts = [max(0.0, at) for at, _ in prompts]
    for (at, prompt), start, until in zip(prompts, starts, [*starts[1:], end], strict=True):
        if at > 0:
            axes.axvline(at, color=INK, linewidth=0.9, alpha=0.7)
        if (room := (until - start) / end * 0.9 * WIDTH / LETTER) > LEAST_TEXT:
            text = shortened(" ".join(prompt.split()), room - 1, len)
            axes.annotate(
                text, (start, 1), (4, -3), ("data", "axes fraction"), textcoords="offset points", va="top"
            )


def _device(panels: Sequence[Axes], bins: Bins, width_ns: int) -> None:
    """Draws what the device did: share of time that it worked, streams per tick, and frames that waited."""

    def load(tally: Tally) -> tuple[float, float, float]:
        busy = 100 * min(1.0, tally.busy_ns / width_ns)
        return 0, busy, busy

    _strip(panels[0], bins, width_ns, "busy, %", GREY, load)
    _strip(panels[1], bins, width_ns, "batch", GREEN, lambda t: (0, t.batch_sum / t.ticks, t.batch_high))
    _strip(panels[2], bins, width_ns, "queue", AMBER, lambda t: (0, t.queue_sum / t.ticks, t.queue_high))


def _strip(
    axes: Axes,
    bins: Bins,
    width_ns: int,
    label: str,
    colour: str,
    values: Callable[[Tally], tuple[float, float, float]],
) -> None:
    """Draws (low, middle, high) of each stretch of time that has ticks."""
    times = np.array([at for at, tally in bins if tally.ticks])
    low, middle, high = np.array([values(tally) for _, tally in bins if tally.ticks]).reshape(-1, 3).T
    width_s = width_ns / SECOND
    axes.bar(times, high - low, width_s, low, color=colour, alpha=0.25)
    axes.hlines(middle, times - width_s / 2, times + width_s / 2, color=colour)
    axes.set_ylim(0, 1.15 * max([1.0, *high]))
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.set_ylabel(label)


def _bins(timeline: Timeline, width_ns: int, begin_ns: int) -> Bins:
    return [((start + width_ns / 2 - begin_ns) / SECOND, tally) for start, tally in timeline.items(width_ns)]


def _broken(bins: Bins, gap_s: float) -> list[tuple[float, Tally | None]]:
    """Returns the bins with None, where a line breaks, in longer pauses."""
    found: list[tuple[float, Tally | None]] = []
    for at, tally in bins:
        if found and at - found[-1][0] > gap_s:
            found.append((at, None))
        found.append((at, tally))
    return found
