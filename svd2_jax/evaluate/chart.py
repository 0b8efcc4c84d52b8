"""The chart of an evaluation: samples, likeness of each style, confusion, steadiness, prompt changes and drift."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from svd2_jax.charts.axes import AMBER, BLUE, GREEN, GREY, INK, RED, chart
from svd2_jax.evaluate.measures import Likeness
from svd2_jax.evaluate.report import CHANGED_BELOW, SETTLED_BELOW, Report
from svd2_jax.evaluate.run import Sample
from svd2_jax.text import counted, shortened

OUTPUT, TARGET, INPUT, VAE = BLUE, GREEN, GREY, AMBER
WIDTH, PANEL_HEIGHT = 13.5, 3.4  # inches
COLUMNS = 2  # of panels
SAMPLES_IN_A_ROW = 7
CAPTION = 34  # letters
CAPTION_HEIGHT = 0.45  # inches, of two lines


def draw(path: Path, report: Report, samples: Sequence[Sample]) -> None:
    """Writes a PNG: samples above, a panel for each kind of number below.

    Raises:
      MediaError: the file cannot be written.
    """
    panels = [_steadiness]
    if report.likeness() is not None:
        panels = [_psnr, _ssim, _confusion, _steadiness]
    panels += [_changes] if report.changes else []
    panels += [_drift] if report.long else []
    images = [np.concatenate([i for i in (s.input, s.output, s.target) if i is not None]) for s in samples]
    rows, below = -(-len(samples) // SAMPLES_IN_A_ROW), -(-len(panels) // COLUMNS)
    tall, wide = images[0].shape[:2]
    heights = [rows * (WIDTH / SAMPLES_IN_A_ROW * tall / wide + CAPTION_HEIGHT) + 0.5, below * PANEL_HEIGHT]
    settings, stream = report.settings, report.settings.stream
    with chart(path, WIDTH, sum(heights)) as figure:
        parts: Any = figure.subfigures(2, 1, height_ratios=heights)
        strip, numbers = parts
        strip.suptitle(
            f"{settings.checkpoint} on {settings.clips}: {stream['width']}x{stream['height']}, "
            f"{counted(len(stream['timesteps']), 'step')}, noise scale {settings.noise_scale:g}, "
            f"seed {settings.seed}; samples, from above: input, output"
            + (", target" if samples[0].target is not None else "")
        )
        for axes in strip.subplots(rows, SAMPLES_IN_A_ROW, squeeze=False).flat:
            axes.axis("off")
        for axes, sample, image in zip(
            strip.axes, samples, images, strict=False
        ):  # the last row may have room
            axes.imshow(image)
            lines = [shortened(line, CAPTION, len) for line in (sample.style, sample.prompt) if line]
            axes.set_title("\n".join(lines), fontsize=7, pad=2, loc="center")
        for index, panel in enumerate(panels):
            panel(numbers.add_subplot(below, COLUMNS, index + 1), report)


def _psnr(axes: Axes, report: Report) -> None:
    _likeness(axes, report, "psnr_db", 50)  # of equal frames it is infinite
    axes.set_title("likeness to the target: PSNR, dB")


def _ssim(axes: Axes, report: Report) -> None:
    _likeness(axes, report, "ssim", 1)
    axes.set_title("likeness to the target: SSIM")


def _likeness(axes: Axes, report: Report, field: str, most: float) -> None:
    """Draws a measure of each style: of the output, of the input as it is, and of the VAE alone."""

    def values(likenesses: Sequence[Likeness | None]) -> list[float]:
        return [math.nan if one is None else getattr(one, field) for one in likenesses]

    parts = [report.of_style(style) for style in report.styles]
    groups = [
        ("VAE alone on the target", VAE, values([part.rebuilt_likeness(True) for part in parts])),
        ("output", OUTPUT, values([part.likeness() for part in parts])),
        ("input as it is", INPUT, values([part.input_likeness() for part in parts])),
    ]
    _bars(axes, report.styles, groups)
    _turn(axes)
    axes.set_ylim(0, 1.25 * min(most, max(v for _, _, found in groups for v in found if not math.isnan(v))))


def _confusion(axes: Axes, report: Report) -> None:
    counts = np.array(report.confusion(), float)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, j in zip(*np.nonzero(counts), strict=True):
        colour = "white" if shares[i, j] > 0.5 else INK
        axes.text(j, i, f"{counts[i, j]:.0f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(report.styles)), report.styles)
    axes.set_yticks(range(len(report.styles)), report.styles)
    axes.grid(visible=False)
    _turn(axes)
    axes.set_ylabel("asked for")
    axes.set_title(f"clips by nearest target: {100 * (report.right_share() or 0):.0f} % right")


def _steadiness(axes: Axes, report: Report) -> None:
    named = zip((("output", OUTPUT), ("target", TARGET), ("input", INPUT)), report.steadiness(), strict=True)
    groups = [(*name, [1000 * v for v in dataclasses.astuple(values)]) for name, values in named if values]
    for bars in _bars(axes, ("warp error", "flicker", "distance"), groups):
        axes.bar_label(bars, fmt="%.3g", fontsize=8)
    axes.margins(y=0.25)
    axes.set_title("change from frame to frame, 1/1000")


def _changes(axes: Axes, report: Report) -> None:
    for change in report.changes:
        frames = [frame - change.at_frame for frame in range(len(change.shares))]
        axes.plot(frames, np.array(change.shares, float), linewidth=1, color=OUTPUT, alpha=0.6)
    axes.axvline(0, color=RED, linewidth=1)
    for limit, label in ((CHANGED_BELOW, "nearer to the new"), (SETTLED_BELOW, "settled")):
        axes.axhline(limit, color=INK, linewidth=0.7, linestyle=":")
        axes.text(0.995, limit + 0.01, label, fontsize=8, ha="right", transform=axes.get_yaxis_transform())
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("frames from the first one that the new prompt is for")
    axes.set_title("share of the old image around a change of the prompt, each clip")


def _drift(axes: Axes, report: Report) -> None:
    """Draws each measure of each minute as a share of the second minute's."""
    assert report.long is not None
    minutes = range(1, len(report.long.minutes) + 1)
    for name, values in report.long.measures().items():
        base = values[min(1, len(values) - 1)]
        if base and not math.isnan(base):
            axes.plot(minutes, [v / base for v in values], marker="o", markersize=3, linewidth=1, label=name)
    axes.axhline(1, color=INK, linewidth=0.7, linestyle=":")
    axes.set_xticks(minutes)
    axes.set_xlabel("minute")
    axes.legend(ncols=2)
    axes.set_title("a long stream: each measure by that of the second minute")


def _bars(axes: Axes, names: Sequence[str], groups: Sequence[tuple[str, str, Sequence[float]]]) -> list[Any]:
    """Draws (label, colour, values) side by side for each name; returns the bars of each group."""
    middle = (len(groups) - 1) / 2
    drawn = [
        axes.bar(np.arange(len(names)) + 0.27 * (i - middle), values, 0.26, color=colour, label=label)
        for i, (label, colour, values) in enumerate(groups)
    ]
    axes.set_xticks(range(len(names)), names)
    axes.grid(visible=False, axis="x")
    axes.legend(ncols=len(groups), loc="upper left")
    return drawn


def _turn(axes: Axes) -> None:
    for label in axes.get_xticklabels():
        label.set(rotation=35, ha="right")
