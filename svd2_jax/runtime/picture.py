"""A picture of a live run: latency against the deadline, what was late or dropped, and what the device did."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from svd2_jax.runtime.metrics import Metrics, Summary, Tally, Timeline
from svd2_jax.runtime.types import MS, SECOND, Reason
from svd2_jax.text import counted, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

WIDTH, DPI = 16.0, 100  # inches: 1600 pixels
MOST_STREAMS = 8  # with a panel of their own
BINS = 320  # about one each 4 pixels
DEVICE_BIN_NS = SECOND  # holds several ticks
GAP_NS = SECOND  # lines break where nothing happened for so long
TICKS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600)  # between marks of time
DROPS_HEIGHT = 0.22  # of a panel, for a bin in which every frame was dropped
LEAST_TEXT = 0.4  # inches; where there is less room, a change of the prompt has no text

INK, FAINT = "#27313b", "#8a949e"
LATENCY, DEADLINE, LATE, STEPS, BATCH, QUEUE, BUSY = (
    "#2a6fb0", "#b3261e", "#d9480f", "#5b3f8c", "#2b7a5b", "#8a6d1f", "#6b7785",
)  # fmt: skip
DROPS = {
    Reason.OVERLOAD: "#f0a202", Reason.EXPIRED: "#c2255c", Reason.STALE: "#7048e8", Reason.DISORDER: "#0c8599",
    Reason.DUPLICATE: "#66a80f", Reason.CLOSED: "#868e96",
}  # fmt: skip

Bins = list[tuple[float, Tally]]
"""(middle of a stretch of time in seconds, what happened in it), in order."""


def timeline(metrics: Metrics, path: str | PathLike[str], title: str = "") -> None:
    """Writes a PNG, 1600 pixels wide, of all that the metrics hold; call it when no more events come.

    Each stream has a panel, the eight with the lowest numbers at most. Frames stand where they arrived, ticks where
    they started, and a new prompt where the device took it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    streams = metrics.streams[:MOST_STREAMS]
    lines = {stream: metrics.timeline(stream) for stream in streams}
    overall = metrics.timeline()
    origin_ns = min((start for line in (*lines.values(), overall) for start, _ in line.items()), default=0)
    span_s = max((_end_ns(line) - origin_ns for line in (*lines.values(), overall)), default=0) / SECOND
    panel = 2.1 if len(streams) <= 4 else 1.6  # inches
    heights = [part for _ in streams for part in (panel, 0.42)] + [0.8, 0.8]
    space, above, below = 0.16, 1.15, 0.6
    groups = len(streams) + 1
    total = sum(heights) + space * (len(heights) - 1) + 0.24 * groups + above + below
    figure = Figure(figsize=(WIDTH, total), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)

    top = total - above
    axes: list[Axes] = []
    for index, height in enumerate(heights):
        if index % 2 == 0:
            top -= 0.24  # for the line of words above a group
        left, width = 0.95 / WIDTH, 1 - 1.75 / WIDTH
        axes.append(figure.add_axes((left, (top - height) / total, width, height / total)))
        top -= height + space
    for one in axes:
        _dress(one, span_s, last=one is axes[-1])

    seen: set[str] = set()
    for index, stream in enumerate(streams):
        summary, bins = metrics.summary(stream), _bins(lines[stream], origin_ns)
        _latency(axes[2 * index], bins, summary)
        _prompts(axes[2 * index], [((at - origin_ns) / SECOND, text) for at, text in metrics.prompts(stream)])
        _steps(axes[2 * index + 1], bins)
        seen |= set(summary.dropped)
    _device(axes[-2], axes[-1], _bins(overall, origin_ns, DEVICE_BIN_NS), metrics.summary())

    words = _headline(metrics.summary(), len(metrics.streams), len(streams))
    figure.text(
        0.95 / WIDTH,
        1 - 0.28 / total,
        title or "Live run",
        fontsize=15,
        weight="bold",
        color=INK,
        va="center",
    )
    figure.text(0.95 / WIDTH, 1 - 0.58 / total, words, fontsize=10.5, color=INK, va="center")
    figure.legend(
        handles=_legend(seen), loc="center left", bbox_to_anchor=(0.9 / WIDTH, 1 - 0.9 / total), frameon=False,
        ncols=12, fontsize=9.5, labelcolor=INK, handlelength=1.5, columnspacing=1.6, borderaxespad=0,
    )  # fmt: skip
    figure.savefig(path, format="png")


def _latency(axes: Axes, bins: Bins, summary: Summary) -> None:
    """Draws a stream's latency from least to most with its median, the deadline, and what was late or dropped."""
    shown = _broken([(at, tally) for at, tally in bins if tally.latency.count])
    times = [at for at, _ in shown]
    low, high = ([_ms(t and value(t)) for _, t in shown] for value in (_low, _high))
    middle = [_ms(t and t.latency.quantile_ns(0.5)) for _, t in shown]
    axes.fill_between(times, low, high, color=LATENCY, alpha=0.22, linewidth=0)
    axes.plot(times, middle, color=LATENCY, linewidth=1.5)
    highest = max((t.latency.high_ns / MS for _, t in bins), default=0.0)
    top = max(1.3 * summary.budget_ms, min(1.12 * highest, 4 * summary.budget_ms)) or 1.0
    axes.axhline(summary.budget_ms, color=DEADLINE, linewidth=1.1, dashes=(5, 3))
    late = [(at, min(t.latency.high_ns / MS, 0.97 * top)) for at, t in bins if t.late]
    axes.plot(*zip(*late, strict=True) if late else ([], []), "o", color=LATE, markersize=3.6, linestyle="")
    width = _width(bins)
    base = [0.0] * len(bins)
    for reason, colour in DROPS.items():
        shares = [t.drops.get(reason.value, 0) / max(1, t.dropped + t.displayed) for _, t in bins]
        if any(shares):
            size = [
                max(0.025, share * DROPS_HEIGHT) if share else 0.0 for share in shares
            ]  # one is seen, too
            axes.bar(
                [at for at, _ in bins], size, width, bottom=base, color=colour, linewidth=0,
                transform=axes.get_xaxis_transform(),
            )  # fmt: skip
            base = [a + b for a, b in zip(base, size, strict=True)]
    axes.set_ylim(0, top)
    axes.set_ylabel("latency, ms")
    _words(axes, summary.label, _verdict(summary))


def _prompts(axes: Axes, prompts: Sequence[tuple[float, str]]) -> None:
    """Draws when a stream's prompt changed, and to what, from (seconds, prompt) in order."""
    if len(prompts) < 2:
        return
    end = axes.get_xlim()[1]
    starts = [max(0.0, at) for at, _ in prompts]
    for (at, prompt), start, until in zip(prompts, starts, [*starts[1:], end], strict=True):
        if at > 0:
            axes.axvline(at, color=INK, linewidth=0.9, alpha=0.7)
        room = (until - start) / end * axes.get_window_extent().width - DPI / 10
        if room > LEAST_TEXT * DPI:
            text = axes.annotate(
                " ".join(prompt.split()), (start, 1), (4, -3), xycoords=("data", "axes fraction"),
                textcoords="offset points", fontsize=9, color=INK, va="top",
            )  # fmt: skip
            _fit(text, room)


def _steps(axes: Axes, bins: Bins) -> None:
    """Draws the denoising steps of a stream's ticks; a band where they changed within a bin."""
    ticked = _broken([(at, tally) for at, tally in bins if tally.ticks])
    times = [at for at, _ in ticked]
    low, high, last = (
        [math.nan if t is None else getattr(t, name) for _, t in ticked]
        for name in ("steps_low", "steps_high", "steps_last")
    )
    axes.fill_between(times, low, high, step="mid", color=STEPS, alpha=0.25, linewidth=0)
    axes.plot(times, last, color=STEPS, linewidth=1.5, drawstyle="steps-mid")
    most = max((tally.steps_high for _, tally in bins), default=1) or 1
    axes.set_ylim(0.4, most + 0.6)
    axes.set_yticks(range(1, most + 1))
    axes.set_ylabel("steps")


def _device(batches: Axes, queue: Axes, bins: Bins, summary: Summary) -> None:
    """Draws what the device did: share of time that it worked, streams per tick, and frames that waited."""
    ticked = [(at, tally) for at, tally in bins if tally.ticks]
    times, width = [at for at, _ in ticked], _width(bins)
    most = max((tally.batch_high for _, tally in ticked), default=1)
    busy = batches.twinx()
    shares = [100 * min(1.0, tally.busy_ns / SECOND / width) for _, tally in ticked]
    busy.bar(times, shares, width, color=BUSY, alpha=0.25, linewidth=0)
    busy.set_ylim(0, 100)
    busy.set_yticks([0, 50, 100], ["0", "50 %", "100 %"])
    busy.set_ylabel("busy", color=BUSY, fontsize=9.5, weight="bold")
    busy.tick_params(labelcolor=INK, labelsize=9, length=3, color="#b8c0c8")
    for side in busy.spines.values():
        side.set_visible(False)
    batches.set_zorder(busy.get_zorder() + 1)
    batches.patch.set_visible(False)  # else it hides the bars behind it
    if ticked:  # lines go on to the edges of the first and the last bin
        (first, begin), (last, end) = ticked[0], ticked[-1]
        ticked = [(first - width / 2, begin), *ticked, (last + width / 2, end)]
        times = [at for at, _ in ticked]
    batches.plot(
        times, [t.batch_sum / t.ticks for _, t in ticked], color=BATCH, linewidth=1.4, drawstyle="steps-mid"
    )
    batches.set_ylim(0, most + 0.5)
    batches.set_yticks(sorted({0, 1, most}) if most < 4 else [0, most // 2, most])
    batches.set_ylabel("batch", color=BATCH, weight="bold")
    _words(
        batches,
        "Device",
        f"{summary.ticks} ticks · {summary.batch_mean:.2f} streams each, at most {summary.batch_max} · "
        f"busy {_percent(summary.utilisation)} of the time · "
        f"{summary.queue_mean:.1f} frames waiting, at most {summary.queue_max}",
    )
    waiting = [tally.queue_sum / tally.ticks for _, tally in ticked]
    queue.fill_between(
        times, [t.queue_high for _, t in ticked], step="mid", color=QUEUE, alpha=0.3, linewidth=0
    )
    queue.plot(times, waiting, color=QUEUE, linewidth=1.4, drawstyle="steps-mid")
    queue.set_ylim(0, max(4, 1.15 * summary.queue_max))
    queue.set_ylabel("queue")


def _dress(axes: Axes, span_s: float, last: bool) -> None:
    """Gives an axis system its frame, grid and scale of time."""
    from matplotlib.ticker import MultipleLocator

    axes.set_xlim(0, span_s or 1)
    axes.grid(color="#dfe4e8", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#b8c0c8")
    axes.tick_params(colors=INK, labelsize=9, length=3, color="#b8c0c8", labelbottom=last)
    axes.yaxis.label.set(color=INK, fontsize=9.5)
    axes.yaxis.set_label_coords(-0.04, 0.5)
    axes.xaxis.set_major_locator(MultipleLocator(next((t for t in TICKS_S if span_s / t <= 12), 2 * 3600)))
    if last:
        axes.xaxis.set_major_formatter(lambda seconds, _: _clock(seconds, span_s))


def _words(axes: Axes, left: str, right: str) -> None:
    """Writes two texts above a panel; the left one is cut where they do not fit."""
    over = {"transform": axes.transAxes, "color": INK, "va": "bottom"}
    end = axes.text(1, 1.03, right, fontsize=9.5, ha="right", **over)
    begin = axes.text(0, 1.03, left, fontsize=11, weight="bold", **over)
    _fit(begin, axes.get_window_extent().width - end.get_window_extent().width - DPI / 5)


def _fit(text: Text, room: float) -> None:
    """Cuts a text to so many pixels."""

    def measured(words: str) -> float:
        text.set_text(words)
        return text.get_window_extent().width

    text.set_text(shortened(text.get_text(), room, measured))


def _legend(dropped: set[str]) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    return [
        Line2D([], [], color=LATENCY, linewidth=1.5, label="median latency"),
        Patch(color=LATENCY, alpha=0.22, linewidth=0, label="least to most"),
        Line2D([], [], color=DEADLINE, linewidth=1.1, dashes=(5, 3), label="deadline"),
        Line2D([], [], color=LATE, marker="o", markersize=4, linestyle="", label="late"),
        *(
            Patch(color=c, linewidth=0, label=f"dropped: {r.value}")
            for r, c in DROPS.items()
            if r.value in dropped
        ),
    ]


def _headline(summary: Summary, streams: int, drawn: int) -> str:
    dropped = ", ".join(f"{count} {reason}" for reason, count in summary.dropped.items())
    parts = [
        f"{counted(streams, 'stream')}" + (f" (the first {drawn} drawn)" if streams > drawn else ""),
        _duration(summary.span_s),
        f"{summary.frames_in} frames in",
        f"{summary.shown} in time",
        f"{summary.late} late",
        f"{summary.frames_dropped} dropped" + (f" ({dropped})" if dropped else ""),
    ]
    return " · ".join([*parts, f"{summary.inside} not known"] if summary.inside else parts)


def _verdict(summary: Summary) -> str:
    if summary.latency_p50_ms is None:
        return "nothing shown"
    return (
        f"p50 {summary.latency_p50_ms:.0f}, p95 {summary.latency_p95_ms:.0f}, p99 {summary.latency_p99_ms:.0f}, "
        f"most {summary.latency_max_ms:.0f} of {summary.budget_ms:.0f} ms · {summary.fps_shown:.1f} FPS · "
        f"late {_percent(summary.miss_rate)} · dropped {_percent(summary.drop_rate)} · "
        f"{summary.steps_mean:.2f} steps"
    )


def _bins(line: Timeline, origin_ns: int, least_ns: int = 0) -> Bins:
    """Returns a timeline in stretches that are wide enough to be seen, of `least_ns` or more."""
    items = line.items()
    if not items:
        return []
    width_ns = line.width_ns
    while width_ns < least_ns or (items[-1][0] - items[0][0]) / width_ns > BINS:
        width_ns *= 2
    merged: dict[int, Tally] = {}
    for start_ns, tally in items:
        merged.setdefault((start_ns - line.start_ns) // width_ns, Tally()).merge(tally)
    first_ns = line.start_ns - origin_ns
    return [((first_ns + (i + 0.5) * width_ns) / SECOND, merged[i]) for i in sorted(merged)]


def _end_ns(line: Timeline) -> int:
    return max((start + line.width_ns for start, _ in line.items()), default=line.start_ns)


def _broken(bins: Bins) -> list[tuple[float, Tally | None]]:
    """Returns the bins with None, where a line breaks, in longer pauses."""
    found: list[tuple[float, Tally | None]] = []
    gap_s = max(GAP_NS / SECOND, 2.5 * _width(bins))
    for at, tally in bins:
        if found and at - found[-1][0] > gap_s:
            found.append((at, None))
        found.append((at, tally))
    return found


def _width(bins: Bins) -> float:
    """Seconds that a bin covers: the least distance of two."""
    return min((b[0] - a[0] for a, b in itertools.pairwise(bins)), default=0.1)


def _low(tally: Tally) -> int:
    return tally.latency.low_ns


def _high(tally: Tally) -> int:
    return tally.latency.high_ns


def _ms(ns: float | None) -> float:
    return math.nan if ns is None else ns / MS


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 or share == 0 else f"{100 * share:.2g} %"


def _clock(seconds: float, span_s: float) -> str:
    if span_s < 120:
        return f"{seconds:g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if span_s >= 3600 else f"{minutes}:{rest:02}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
