"""A picture of where the time goes: a chunk's parts, how near each is to the ceiling, and the first frame."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from svd2_jax.bench.report import MS, Measured, Report
from svd2_jax.bench.timing import Spread
from svd2_jax.text import counted

WIDTH, DPI = 12.0, 100  # inches
BAR = 0.42  # inches
COLOURS = {
    "encode": "#2a6fb0", "tick": "#d9730d", "decode-wan": "#2b7a5b", "decode-taehv": "#7fb89b",
    "weights": "#2a6fb0", "compile": "#d9730d", "prompt": "#5b3f8c", "first group": "#2b7a5b",
}  # fmt: skip
OTHER = "#9aa5b1"
BOUND = {"compute": "#d9730d", "memory": "#2a6fb0"}

Stack = tuple[str, Sequence[tuple[str, float]]]
"""A label, and what is stacked in its bar: names and seconds."""


def draw(path: Path, report: Report) -> None:
    """Writes a PNG; panels whose parts were not measured are left out."""
    panels = [
        ("a chunk, ms (medians)", _chunk_stacks(report), MS),
        ("from the start of the process to the first frames, s", _first_stack(report), 1.0),
    ]
    panels = [panel for panel in panels if panel[1]]
    shares = [part for part in report.parts if report.share(part) is not None]
    counts = [len(stacks) for _, stacks, _ in panels] + ([len(shares)] if shares else [])
    heights = [BAR * (count + 2) for count in counts] or [BAR]
    figure, axes = pyplot.subplots(
        len(heights), 1, figsize=(WIDTH, sum(heights) + 1.0), dpi=DPI, height_ratios=heights, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    s = report.settings
    figure.suptitle(
        f"{s.checkpoint}, {counted(s.blocks, 'block')}, {s.stream['width']}x{s.stream['height']}, "
        f"{counted(len(s.stream['timesteps']), 'step')}, {s.precision} on {s.device}",
        fontsize=11,
    )
    for (title, stacks, scale), one in zip(panels, axes[: len(panels), 0], strict=True):
        _stacks(one, title, stacks, scale)
    if shares:
        _shares(axes[-1, 0], report, shares)
    figure.savefig(path)
    pyplot.close(figure)


def _chunk_stacks(report: Report) -> list[Stack]:
    """Returns the parts of a chunk, one bar for each decoder and side, and the whole from the session."""
    measured = {part.name: part for part in report.parts}
    stacks: list[Stack] = []
    for decoder in ("decode-wan", "decode-taehv"):
        names = ("encode", "tick", decoder)
        if not set(names) <= measured.keys():
            continue
        parts = [measured[name] for name in names]
        stacks.append((f"ours\n{decoder}", [(p.name, p.total.median) for p in parts]))
        theirs = [(p.name, Spread.of(p.against.seconds).median) for p in parts if p.against]
        if len(theirs) == len(parts):
            stacks.append((f"{report.settings.against}\n{decoder}", theirs))
    if stacks and (whole := measured.get("stream")):
        stacks.append(("session\nend to end", [("end to end", whole.total.median)]))
    return stacks


def _first_stack(report: Report) -> list[Stack]:
    return [("first frame", list(report.first_frame.items()))] if report.first_frame else []


def _stacks(axes: Any, title: str, stacks: Sequence[Stack], scale: float) -> None:
    longest = max(sum(seconds for _, seconds in parts) for _, parts in stacks)
    for row, (_, parts) in enumerate(stacks):
        left = 0.0
        for name, seconds in parts:
            axes.barh(
                row, seconds * scale, left=left * scale, color=COLOURS.get(name, OTHER), edgecolor="white"
            )
            if seconds > 0.08 * longest:  # else the words do not fit
                axes.text(
                    (left + seconds / 2) * scale, row, f"{name}\n{seconds * scale:.3g}",
                    ha="center", va="center", fontsize=8, color="white",
                )  # fmt: skip
            left += seconds
    _rows(axes, title, [label for label, _ in stacks])


def _shares(axes: Any, report: Report, parts: Sequence[Measured]) -> None:
    for row, part in enumerate(parts):
        share, bound = report.share(part) or (0.0, "compute")
        axes.barh(row, 100 * share, color=BOUND[bound])
        axes.text(100 * share, row, f" {100 * share:.0f} %, {bound}", va="center", fontsize=8)
    axes.set_xlim(0, max(115.0, 1.15 * axes.get_xlim()[1]))
    _rows(axes, "least time by this run's ceilings, % of the time taken", [part.name for part in parts])


def _rows(axes: Any, title: str, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
