"""The chart of where the time goes: a chunk's parts, how near each is to the ceiling, and the first frame."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from svd2_jax.bench.report import MS, Report
from svd2_jax.bench.timing import Spread
from svd2_jax.charts.axes import BLUE, GREEN, GREY, ORANGE, PURPLE, chart
from svd2_jax.text import counted

WIDTH, BAR = 12.0, 0.42  # inches
COLOURS = {
    "encode": BLUE, "tick": ORANGE, "decode-wan": GREEN, "decode-taehv": "#7fb89b",
    "weights": BLUE, "compile": ORANGE, "prompt": PURPLE, "first group": GREEN,
}  # fmt: skip
BOUND = {"compute": ORANGE, "memory": BLUE}

Stack = tuple[str, Sequence[tuple[str, float]]]
"""A label, and what is stacked in its bar: names and values."""


def draw(path: Path, report: Report) -> None:
    """Writes a PNG; panels whose parts were not measured are left out.

    Raises:
      MediaError: the file cannot be written.
    """
    first = [("first frame", list(report.first_frame.items()))] if report.first_frame else []
    stacked = {
        "a chunk, ms (medians)": _chunk(report),
        "from the start of the process to the first frames, s": first,
    }
    stacked = {title: stacks for title, stacks in stacked.items() if stacks}
    shares = [(part.name, *share) for part in report.parts if (share := report.share(part))]
    heights = [BAR * (len(bars) + 2) for bars in (*stacked.values(), shares) if bars] or [BAR]
    s = report.settings
    with chart(path, WIDTH, sum(heights) + 1.0) as figure:
        figure.suptitle(
            f"{s.checkpoint}, {counted(s.blocks, 'block')}, {s.stream['width']}x{s.stream['height']}, "
            f"{counted(len(s.stream['timesteps']), 'step')}, {s.precision} on {s.device}"
        )
        panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        for axes, (title, stacks) in zip(panels, stacked.items(), strict=False):  # the last is for shares
            _stacks(axes, stacks)
            _label(axes, title, [label for label, _ in stacks])
        if shares:
            for row, (_, share, bound) in enumerate(shares):
                bar = panels[-1].barh(row, 100 * share, color=BOUND[bound])
                panels[-1].bar_label(bar, [f" {100 * share:.0f} %, {bound}"])
            panels[-1].set_xlim(0, max(115.0, 1.15 * panels[-1].get_xlim()[1]))
            title = "least time by this run's ceilings, % of the time taken"
            _label(panels[-1], title, [name for name, _, _ in shares])


def _chunk(report: Report) -> list[Stack]:
    """Returns the parts of a chunk in ms, one bar for each decoder and side, and the whole from the session."""
    measured = {part.name: part for part in report.parts}
    stacks: list[Stack] = []
    for decoder in ("decode-wan", "decode-taehv"):
        names = ("encode", "tick", decoder)
        if not set(names) <= measured.keys():
            continue
        parts = [measured[name] for name in names]
        stacks.append((f"ours\n{decoder}", [(p.name, MS * p.total.median) for p in parts]))
        theirs = [(p.name, MS * Spread.of(p.against.seconds).median) for p in parts if p.against]
        if len(theirs) == len(parts):
            stacks.append((f"{report.settings.against}\n{decoder}", theirs))
    if stacks and (whole := measured.get("stream")):
        stacks.append(("session\nend to end", [("end to end", MS * whole.total.median)]))
    return stacks


def _stacks(axes: Axes, stacks: Sequence[Stack]) -> None:
    longest = max(sum(value for _, value in parts) for _, parts in stacks)
    for row, (_, parts) in enumerate(stacks):
        left = 0.0
        for name, value in parts:
            bar = axes.barh(row, value, left=left, color=COLOURS.get(name, GREY), edgecolor="white")
            if value > 0.08 * longest:  # else the words do not fit
                axes.bar_label(bar, [f"{name}\n{value:.3g}"], label_type="center", fontsize=8, color="white")
            left += value


def _label(axes: Axes, title: str, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_title(title)
    axes.grid(visible=False, axis="y")
