"""A picture of an evaluation: samples, likeness of each look, confusion, steadiness, changes of prompt and drift."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot

from svd2_jax.evaluate.measures import Likeness
from svd2_jax.evaluate.report import CHANGED_BELOW, SETTLED_BELOW, LongStream, PromptChange, Report
from svd2_jax.evaluate.run import Sample
from svd2_jax.text import counted

OUTPUT, TARGET, INPUT, VAE = "#1f5fbf", "#3a9d5d", "#9a9a9a", "#d9a02b"
PANEL = (6.0, 3.6)  # inches
SAMPLE_WIDTH = 1.85  # inches
SAMPLES_IN_A_ROW = 7
CAPTION = 36  # letters
CAPTION_HEIGHT = 0.4  # inches, of two lines
DPI = 100

Panel = Callable[[Any, Report], None]


def draw(path: Path, report: Report, samples: Sequence[Sample]) -> None:
    """Writes a PNG: samples above, a panel for each kind of number below."""
    with pyplot.rc_context({"text.parse_math": False}):  # a prompt may hold dollar signs
        _draw(path, report, samples)


def _draw(path: Path, report: Report, samples: Sequence[Sample]) -> None:
    panels = _panels(report)
    columns = 2
    rows = -(-len(samples) // SAMPLES_IN_A_ROW)
    pictures = 3 if samples[0].target is not None else 2
    height, width = samples[0].input.shape[:2]
    tall = pictures * SAMPLE_WIDTH * height / width  # inches, of a sample
    strip = rows * (tall + CAPTION_HEIGHT)
    below = -(-len(panels) // columns)
    size = (columns * PANEL[0] + 1.5, 0.7 + strip + below * PANEL[1])
    figure = pyplot.figure(figsize=size, dpi=DPI)
    settings = report.settings
    stream = settings.stream
    steps = len(stream["timesteps"])
    figure.suptitle(
        f"{settings.checkpoint} on {settings.clips}: {stream['width']}x{stream['height']}, "
        f"{counted(steps, 'step')}, noise scale {settings.noise_scale:g}, seed {settings.seed}",
        fontsize=11, x=0.02, y=1 - 0.12 / size[1], ha="left", va="top",
    )  # fmt: skip
    figure.text(
        0.02, 1 - 0.42 / size[1], "samples, from above: input, output" + (", target" if pictures == 3 else ""),
        fontsize=9, va="top",
    )  # fmt: skip
    grid = figure.add_gridspec(
        rows, SAMPLES_IN_A_ROW, left=0.02, right=0.98, top=1 - 0.85 / size[1], bottom=1 - (0.5 + strip) / size[1],
        wspace=0.04, hspace=CAPTION_HEIGHT / tall,
    )  # fmt: skip
    for index, sample in enumerate(samples):
        axes = figure.add_subplot(grid[divmod(index, SAMPLES_IN_A_ROW)])
        shown = [sample.input, sample.output, *([] if sample.target is None else [sample.target])]
        axes.imshow(np.concatenate(shown))
        lines = [line[:CAPTION] for line in (sample.look, sample.prompt) if line]
        axes.set_title("\n".join(lines), fontsize=7, pad=2)
        axes.set_anchor("N")
        axes.axis("off")
    margin = 1.35 / size[0]
    grid = figure.add_gridspec(
        below, columns, left=margin, right=0.97, top=1 - (1.0 + strip) / size[1], bottom=0.75 / size[1],
        wspace=0.32, hspace=0.5,
    )  # fmt: skip
    for index, panel in enumerate(panels):
        panel(figure.add_subplot(grid[index // columns, index % columns]), report)
    figure.savefig(path)
    pyplot.close(figure)


def _panels(report: Report) -> list[Panel]:
    panels: list[Panel] = []
    if report.likeness() is not None:
        panels += [_likeness("psnr_db", "PSNR, dB"), _likeness("ssim", "SSIM"), _confusion]
    panels.append(_steadiness)
    if report.changes:
        panels.append(_changes)
    if report.long is not None:
        panels.append(_drift)
    return panels


def _likeness(field: str, title: str) -> Panel:
    """Returns what draws a measure of each look: of the output, of the input as it is, and of the VAE alone."""

    def panel(axes: Any, report: Report) -> None:
        def value(likeness: Likeness | None) -> float:
            return math.nan if likeness is None else getattr(likeness, field)

        parts = [report.of_look(look) for look in report.looks]
        places = np.arange(len(parts))
        bars = (
            ("VAE alone on the target", VAE, [value(p.rebuilt_likeness(True)) for p in parts]),
            ("output", OUTPUT, [value(p.likeness()) for p in parts]),
            ("input as it is", INPUT, [value(p.input_likeness()) for p in parts]),
        )
        for i, (label, colour, values) in enumerate(bars):
            axes.bar(places + 0.27 * (i - 1), values, 0.26, color=colour, label=label)
        top = max(v for _, _, values in bars for v in values if not math.isnan(v))
        axes.set_ylim(0, min(1.0, top) * 1.25 if field == "ssim" else min(top, 50) * 1.25)
        axes.set_xticks(places, report.looks, rotation=35, ha="right", fontsize=8)
        axes.legend(fontsize=7, ncols=3, frameon=False, loc="upper left")
        finish(axes, f"likeness to the target: {title}")

    return panel


def _confusion(axes: Any, report: Report) -> None:
    counts = np.array(report.confusion(), float)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, j in zip(*np.nonzero(counts), strict=True):
        axes.text(
            j, i, f"{counts[i, j]:.0f}", ha="center", va="center", fontsize=7,
            color="white" if shares[i, j] > 0.5 else "black",
        )  # fmt: skip
    axes.set_xticks(range(len(report.looks)), report.looks, rotation=35, ha="right", fontsize=8)
    axes.set_yticks(range(len(report.looks)), report.looks, fontsize=8)
    axes.set_ylabel("asked for", fontsize=8)
    axes.set_title(
        f"clips by nearest target: {100 * (report.right_share() or 0):.0f} % right", fontsize=10, loc="left"
    )


def _steadiness(axes: Any, report: Report) -> None:
    groups = [
        (label, colour, values)
        for (label, colour), values in zip(
            (("output", OUTPUT), ("target", TARGET), ("input", INPUT)), report.steadiness(), strict=True
        )
        if values is not None
    ]
    for i, (label, colour, values) in enumerate(groups):
        places = np.arange(3) + 0.27 * (i - (len(groups) - 1) / 2)
        heights = [1000 * value for value in dataclasses.astuple(values)]
        bars = axes.bar(places, heights, 0.26, color=colour, label=label)
        axes.bar_label(bars, fmt="%.3g", fontsize=7)
    axes.set_xticks(range(3), ["warp error", "flicker", "distance"], fontsize=8)
    axes.margins(y=0.25)
    axes.legend(fontsize=7, frameon=False)
    finish(axes, "change from frame to frame, 1/1000")


def _changes(axes: Any, report: Report) -> None:
    for change in report.changes:
        axes.plot(*_shares(change), linewidth=1, color=OUTPUT, alpha=0.6, label=f"{change.clip}")
    axes.axvline(0, color="#c0392b", linewidth=1)
    for limit, label in ((CHANGED_BELOW, "nearer to the new"), (SETTLED_BELOW, "settled")):
        axes.axhline(limit, color="black", linewidth=0.7, linestyle=":")
        axes.text(0.995, limit + 0.01, label, fontsize=7, ha="right", transform=axes.get_yaxis_transform())
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("frames from the first one that the new prompt is for", fontsize=8)
    finish(axes, "share of the old picture around a change of the prompt, each clip")


def _shares(change: PromptChange) -> tuple[list[int], list[float]]:
    places = [frame - change.at_frame for frame in range(len(change.shares))]
    return places, [math.nan if share is None else share for share in change.shares]


def _drift(axes: Any, report: Report) -> None:
    """Draws each measure of each minute as a share of the second minute's."""
    assert report.long is not None
    minutes = range(1, len(report.long.minutes) + 1)
    for label, values in _series(report.long):
        base = values[1] if len(values) > 1 else values[0]
        if base and not math.isnan(base):
            axes.plot(minutes, [v / base for v in values], marker="o", markersize=3, linewidth=1, label=label)
    axes.axhline(1, color="black", linewidth=0.7, linestyle=":")
    axes.set_xticks(minutes)
    axes.set_xlabel("minute", fontsize=8)
    axes.legend(fontsize=7, ncols=2, frameon=False)
    finish(axes, "a long stream: each measure by that of the second minute")


def _series(long: LongStream) -> list[tuple[str, list[float]]]:
    parts: list[list[Any]] = [[m.output for m in long.minutes], [m.tone for m in long.minutes]]
    if all(m.to_target is not None for m in long.minutes):
        parts.append([m.to_target for m in long.minutes])
    return [
        (field.name, [getattr(value, field.name) for value in values])
        for values in parts
        for field in dataclasses.fields(values[0])
    ]


def finish(axes: Any, title: str) -> None:
    """Gives a panel its title and its looks."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6, axis="y")
