"""What streaming features are worth: each against the default on the same held-out scenes, with their targets.

python benchmarks/streaming_features.py                                     # all; most of it are two long streams
python benchmarks/streaming_features.py --only prompt --style sepia --style neon_night
python benchmarks/streaming_features.py --minutes 1 --fps 1 --frames 25 --scene 2 --scene 3 --out out/features

Writes OUT.json, OUT.md and for each part a chart OUT_PART.png. Parts: sinks (anchors, adaptive or not), cache (its
length), steps (1, 2 and 4, stream batch or sequential), noise (motion-aware or not, slow and fast scenes), prompt
(blend or hard switch), refresh (of the rotary embedding's time index, over --minutes). A part that OUT.json holds of
the same weights and options is kept, so an interrupted run goes on; --only measures parts again. docs/evaluation.md
defines the measures. Needs pip install "svd2-jax[train]".
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

from svd2_jax import files, shipped
from svd2_jax.api import Engine, SessionSpec
from svd2_jax.charts.axes import chart
from svd2_jax.command import exit_code
from svd2_jax.config import LATENT_STRIDE, SINK_THRESHOLD_OFF, V2V_TIMESTEPS, StreamConfig
from svd2_jax.errors import ConfigError
from svd2_jax.evaluate import measures, run
from svd2_jax.evaluate.chart import INPUT, OUTPUT, TARGET, VAE
from svd2_jax.evaluate.measures import Motion
from svd2_jax.evaluate.report import LongStream, plain
from tiny_model import phrasings, scenes
from tiny_model.styles import STYLES, apply_style

T = TypeVar("T")

OUT = Path(__file__).with_suffix("")
SPLIT = "held_out"
STYLE_NAMES = ("sunset", "watercolour", "winter")
SCENES = (9, 2)  # a photograph and a drawn one; both move fast
SLOW = 0.1  # frames of the scene per frame of a slow clip
WARM_CHUNKS = 3  # not timed: the first group, and what fills the stream batch
LEAST_FRAMES = 25  # of a clip: six chunks
BLENDS = (0, 4, 8)  # chunks
MOST_DRIFT = 0.1  # between the second and the last minute

COLOURS = (OUTPUT, "#c0392b", TARGET, VAE, "#7b5ea7", "#d16ba5")
COLUMNS, LEAST_COLUMNS = 7, 5  # of a film; with fewer a part of the width is left free
WIDTH, ROW_LABEL, MARGIN, PANEL = 13.5, 1.9, 0.2, 3.0  # inches
LEAST_DB = 0.5  # height of a panel: less is nothing to look at
GAP = 3  # white pixels between the pictures of a film

Film = Sequence[tuple[str, Sequence[np.ndarray]]]
"""(label, frames uint8 [H, W, 3]) of each row, as many frames in each."""


@dataclass(frozen=True)
class Setting:
    """What a row of a table is about; the first of a part's settings is the one the others are compared with.

    Attributes:
      name: as tables and charts call it.
      stream: what differs from the default stream.
      noise_scale: see `SessionSpec`.
    """

    name: str
    stream: Mapping[str, Any] = field(default_factory=dict)
    noise_scale: float = 0.8


@dataclass(frozen=True, eq=False)
class Clip:
    """What a stream is made of, and what should come out.

    Attributes:
      group: kind of clip; each has its own table.
      name: scene and style.
      prompt: asks for the style.
      frames: uint8 [T, H, W, 3].
      target: of the same shape.
      motion: from frame `start` on.
      start: the first frame that is measured.
    """

    group: str
    name: str
    prompt: str
    frames: np.ndarray
    target: np.ndarray
    motion: Motion
    start: int = 0


@dataclass(frozen=True)
class Options:
    """What is measured on; part of the results."""

    weights: str
    styles: tuple[str, ...]
    scenes: tuple[int, ...]
    frames: int
    seed: int

    def check(self) -> None:
        """Raises ConfigError for what cannot be measured."""
        for style in self.styles:
            if style not in STYLES:
                raise ConfigError(f"unknown style {style!r}; known: {', '.join(STYLES)}")
        if len(set(self.styles)) < 2:
            raise ConfigError("--style: give two or more; the prompt changes from one to the next")
        if len(set(self.scenes)) < 2 or min(self.scenes) < 0:
            raise ConfigError(
                "--scene: give two or more numbers from 0 on; streams move on from one to the next"
            )
        if self.frames < LEAST_FRAMES:
            raise ConfigError(f"--frames must be at least {LEAST_FRAMES}, got {self.frames}")
        SessionSpec("any", seed=self.seed)  # has its own say about the seed


class Bench:
    """A model, and clips for it."""

    def __init__(self, engine: Engine, default: StreamConfig, options: Options, minutes: int, rate_hz: float):
        """Takes the default stream, and the long stream's length and frames per second."""
        self.engine, self.default, self.options = engine, default, options
        self.minutes, self.rate_hz = minutes, rate_hz
        self.frames = functools.cache(self._frames)
        self.motion = functools.cache(lambda scene, speed: measures.motion(self.frames(scene, speed)))

    def _frames(self, scene: int, speed: float = 1.0, count: int | None = None) -> np.ndarray:
        """Returns frames of a scene that moves `speed` times as fast as it does, uint8 [T, H, W, 3]."""
        made, size = scenes.make_scene(scene, SPLIT), (self.default.height, self.default.width)
        return np.stack([made.frame(speed * t, *size) for t in range(count or self.options.frames)])

    def prompt(self, scene: int, style: str) -> str:
        """Returns what asks for a style in all clips of a scene."""
        return phrasings.sample(style, SPLIT, np.random.default_rng((scene, list(STYLES).index(style))))

    def clips(self, group: str, speed: float = 1.0) -> list[Clip]:
        """Returns a clip of each scene for each style."""
        return [
            Clip(
                group, f"scene {scene}, {style}", self.prompt(scene, style), frames, apply_style(style, frames),
                self.motion(scene, speed),
            )
            for scene in self.options.scenes
            for frames in [self.frames(scene, speed)]
            for style in self.options.styles
        ]  # fmt: skip

    def cuts(self, group: str) -> list[Clip]:
        """Returns clips that cut from each scene to the next, measured from there on."""
        numbers, whole = self.options.scenes, []
        for before, after in zip(numbers, (*numbers[1:], numbers[0]), strict=True):
            frames = np.concatenate([self.frames(before, 1.0), self.frames(after, 1.0)])
            for style in self.options.styles:
                name, prompt = f"scene {before} to {after}, {style}", self.prompt(after, style)
                target, motion = apply_style(style, frames), self.motion(after, 1.0)
                whole.append(Clip(group, name, prompt, frames, target, motion, self.options.frames))
        return whole

    def spec(self, prompt: str, setting: Setting) -> SessionSpec:
        """Returns what a stream computes."""
        cfg = dataclasses.replace(self.default, **setting.stream)
        return SessionSpec(prompt, cfg, setting.noise_scale, self.options.seed)

    def redraw(self, clip: Clip, setting: Setting) -> tuple[dict[str, Any], np.ndarray]:
        """Returns the measures of a stream, and what came out."""
        shown, times = [], []
        for part in run.play(self.engine, self.spec(clip.prompt, setting), clip.frames):
            shown.append(part)
            times.append(time.perf_counter())
        live = [
            part for part in shown if part.taken is not None
        ]  # the others came out because the clip ended
        waits = np.diff(times[: len(live)])[WARM_CHUNKS:]
        output = run.collect(shown, clip.frames)
        values = {
            "group": clip.group,
            "setting": setting.name,
            "clip": clip.name,
            **dataclasses.asdict(measures.likeness(output[clip.start :], clip.target[clip.start :])),
            **dataclasses.asdict(measures.steadiness(output[clip.start :], clip.motion)),
            "chunk_ms": 1000 * float(np.median(waits)) if len(waits) else math.nan,
            "frames_behind": int(np.median([p.taken - p.first - len(p.frames) for p in live if p.taken])),
        }
        return values, output


# --- parts that compare settings on clips


@dataclass(frozen=True)
class Comparison:
    """Settings that are compared on the same clips.

    Attributes:
      title: of its section.
      text: what is compared.
      settings: the first one is what the others are compared with.
      clips: makes the clips.
      timed: whether speed is the point.
    """

    title: str
    text: str
    settings: tuple[Setting, ...]
    clips: Callable[[Bench], list[Clip]]
    timed: bool = False

    def measure(self, bench: Bench, chart_path: Path, progress: Progress) -> dict[str, Any]:
        """Returns the numbers of all streams, and draws a chart."""
        clips, streams, outputs = self.clips(bench), [], {}
        with progress(len(self.settings) * sum(len(clip.frames) for clip in clips)) as bar:
            for clip in clips:
                # One setting behind the other: all see the same of what else the machine does.
                for setting in self.settings:
                    values, outputs[clip, setting.name] = bench.redraw(clip, setting)
                    streams.append(values)
                    bar.update(len(clip.frames))
        self._draw(chart_path, clips, streams, outputs)
        return {"streams": streams}

    def table(self, found: Mapping[str, Any]) -> list[str]:
        """Returns the numbers as Markdown."""
        head = ["setting", "PSNR, dB", "against the first", "SSIM", "warp error", "flicker"]
        head += ["ms a chunk", "FPS", "frames behind"] if self.timed else []
        lines = []
        for group, streams in grouped(found["streams"], "group"):
            per_setting = dict(grouped(streams, "setting"))
            first = next(iter(per_setting.values()))
            rows = []
            for name, own in per_setting.items():
                gains = [a["psnr_db"] - b["psnr_db"] for a, b in zip(own, first, strict=True)]
                better = f"{mean(gains):+.2f}, better in {sum(g > 0 for g in gains)} of {len(gains)}"
                row = [name, f"{of(own, 'psnr_db'):.2f}", "" if own is first else better]
                row += [f"{of(own, 'ssim'):.3f}", *(milli(of(own, key)) for key in ("warp_error", "flicker"))]
                if self.timed:
                    took = chunk_ms(own)
                    rate = 1000 * LATENT_STRIDE / took  # frames per second
                    row += [*(f"{v:.{i}f}" for i, v in enumerate((took, rate))), f"{own[0]['frames_behind']}"]
                rows.append(row)
            lines += ["", f"**{group}**, {len(first)} streams:", "", *markdown(head, rows)]
        return lines

    def _draw(
        self, path: Path, clips: Sequence[Clip], streams: Sequence[Mapping[str, Any]], outputs: Any
    ) -> None:
        columns = list(itertools.islice(self._columns(clips), COLUMNS))
        pick = [(clip, [outputs[clip, s.name][at] for s in self.settings]) for clip, at in columns]
        film = [
            ("input", [clip.frames[at] for clip, at in columns]),
            ("target", [clip.target[at] for clip, at in columns]),
            *((s.name, [drawn[i] for _, drawn in pick]) for i, s in enumerate(self.settings)),
        ]
        heads = [f"{clip.name}\n{clip.group}, frame {at}" for clip, at in columns]
        groups = list(dict.fromkeys(clip.group for clip in clips))
        with figure(path, self.title, film, heads, len(groups) + self.timed) as panels:
            for axes, group in zip(panels[: len(groups)], groups, strict=True):
                own = [clip for clip in clips if clip.group == group]
                for i, (colour, setting) in enumerate(coloured(self.settings)):
                    errors = np.mean([frame_errors(outputs[c, setting.name], c.target) for c in own], axis=0)
                    width = 3.4 - 0.6 * i  # so that lines on top of each other are seen
                    axes.plot(
                        [measures.psnr_db(e) for e in errors],
                        color=colour,
                        linewidth=width,
                        label=setting.name,
                    )
                if own[0].start:
                    axes.axvline(own[0].start, color=INPUT, linewidth=0.8, linestyle=":")
                axes.set_xlabel("frame", fontsize=8)
                axes.legend(fontsize=7, frameon=False)
                axes.set_title(f"{group}: PSNR to the target, dB, all clips")
            if self.timed:
                self._draw_speed(panels[-1], streams)

    def _draw_speed(self, axes: Any, streams: Sequence[Mapping[str, Any]]) -> None:
        for colour, (name, own) in coloured(grouped(streams, "setting")):
            took = chunk_ms(own)
            axes.plot(took, of(own, "psnr_db"), "o", color=colour, markersize=8)
            axes.annotate(
                name, (took, of(own, "psnr_db")), xytext=(0, 8), textcoords="offset points", fontsize=8,
                ha="center", color=colour,
            )  # fmt: skip
        axes.margins(0.25)
        low, high = axes.get_ylim()
        spare = max(0.0, LEAST_DB - (high - low)) / 2
        axes.set_ylim(low - spare, high + spare)
        axes.set_xlabel("ms a chunk of four frames", fontsize=8)
        axes.set_title("likeness and time: PSNR, dB")

    def _columns(self, clips: Sequence[Clip]) -> Iterable[tuple[Clip, int]]:
        """Yields what a chart shows: a moment of each clip, all groups alike."""
        kinds = [
            [clip for clip in clips if clip.group == group] for group in dict.fromkeys(c.group for c in clips)
        ]
        share = -(-COLUMNS // len(kinds))
        for own in kinds:
            yield from ((clip, len(clip.frames) - 2) for clip in own[:share])


# --- a change of the prompt


class ChangeOfPrompt:
    """Blends against a hard switch."""

    title = "A change of the prompt: blend against a hard switch"
    text = (
        "In the middle of a stream the prompt changes from one style to the next. *Changed*: frames from the first "
        "one that the new prompt is for until the picture is nearer to the new style's; *settled*: until less than a "
        "quarter of the old picture is left for good; means of the streams in which it happens. *Largest jump*: the "
        "largest mean absolute difference between two frames that follow each other from the change on, 1/1000; "
        "next to it the same of streams whose prompt does not change."
    )

    def measure(self, bench: Bench, chart_path: Path, progress: Progress) -> dict[str, Any]:
        """Returns how each change went, and draws a chart."""
        styles, default = bench.options.styles, Setting("")
        count, numbers = 2 * bench.options.frames, bench.options.scenes
        at = run.change_frame(bench.spec("x", default), count)
        assert at is not None  # LEAST_FRAMES sees to it
        changes, kept = [], []
        with progress(count * len(numbers) * len(styles) * (1 + len(BLENDS))) as bar:
            for scene in numbers:
                frames = bench.frames(scene, count=count)
                prompts = [bench.prompt(scene, style) for style in styles]
                alone = [
                    run.collect(run.play(bench.engine, bench.spec(p, default), frames), frames, bar.update)
                    for p in prompts
                ]
                for i, style in enumerate(styles):
                    j = (i + 1) % len(styles)
                    for blend in BLENDS:
                        spec = bench.spec(prompts[i], default)
                        shown = list(run.play(bench.engine, spec, frames, (at, prompts[j]), blend))
                        bar.update(count)
                        pair = (alone[i], alone[j])
                        name = f"scene {scene}, {style} to {styles[j]}"
                        change = run.time_change(
                            name, (prompts[i], prompts[j]), at, shown, pair, bench.rate_hz
                        )
                        output = run.collect(shown, frames)
                        jumps = frame_distances(output)
                        usual = max(frame_distances(o)[at - 1 :].max() for o in pair)
                        changes.append(
                            {
                                "setting": blend_name(blend), **dataclasses.asdict(change),
                                "largest_jump": float(jumps[at - 1 :].max()), "largest_without": float(usual),
                            }
                        )  # fmt: skip
                        kept.append((output, jumps))
        self._draw(chart_path, at, changes, kept)
        return {"at_frame": at, "changes": changes}

    def table(self, found: Mapping[str, Any]) -> list[str]:
        """Returns the numbers as Markdown."""
        rows = []
        for name, own in grouped(found["changes"], "setting"):
            cells = []
            for key in ("changed", "settled"):
                took = [c[f"{key}_frame"] - c["at_frame"] for c in own if c[f"{key}_frame"] is not None]
                cells.append(f"{mean(took):.1f}, in {len(took)} of {len(own)}" if took else "never")
            rows.append([name, *cells, milli(of(own, "largest_jump")), milli(of(own, "largest_without"))])
        return [
            "",
            *markdown(["prompt", "changed, frames", "settled, frames", "largest jump", "without"], rows),
        ]

    def _draw(self, path: Path, at: int, changes: Sequence[Mapping[str, Any]], kept: Any) -> None:
        last = len(changes[0]["shares"]) - 1
        moments = [at + offset for offset in (-1, 0, 4, 8, 16, 24, 40) if at + offset <= last]
        film = [(changes[i]["setting"], [kept[i][0][t] for t in moments]) for i in range(len(BLENDS))]
        heads = [f"frame {t - at:+d}" for t in moments]
        with figure(path, f"{self.title}\n{changes[0]['clip']}", film, heads, 2) as (shares, jumps):
            for i, (colour, blend) in enumerate(coloured(BLENDS)):
                own = range(i, len(changes), len(BLENDS))
                places = np.arange(last + 1) - at
                left = [mean(of_frame) for of_frame in zip(*(changes[k]["shares"] for k in own), strict=True)]
                shares.plot(places, left, color=colour, linewidth=1.3, label=blend_name(blend))
                far = np.mean([kept[k][1] for k in own], axis=0)
                jumps.plot(places[1:], 1000 * far, color=colour, linewidth=1.3)
            shares.set_ylim(-0.03, 1.03)
            shares.legend(fontsize=8, frameon=False)
            for axes, title in (
                (shares, "share of the old picture, all changes"),
                (jumps, "difference from the frame before, 1/1000, all changes"),
            ):
                axes.axvline(0, color=INPUT, linewidth=0.8, linestyle=":")
                axes.set_xlim(-12, last - at)
                axes.set_xlabel("frame, from the first one that the new prompt is for", fontsize=8)
                axes.set_title(title)


def blend_name(chunks: int) -> str:
    """Returns what a table calls a change over so many chunks."""
    return f"blend over {chunks} chunks" if chunks else "hard switch"


# --- long streams


class LongStreams:
    """The rotary embedding's refresh, on a long stream."""

    title = "A long stream, with and without the refresh of the time index"
    text = (
        "A clip is played forwards and backwards. With the refresh (default) the time index restarts at 50 latent "
        "frames; without, it goes on for ever, beyond what the model was trained on. Drift is from the second to the "
        "last minute; "
        f"**bold** above {100 * MOST_DRIFT:.0f} %. Warp error, flicker and distance are in 1/1000."
    )

    def measure(self, bench: Bench, chart_path: Path, progress: Progress) -> dict[str, Any]:
        """Returns the measures of each minute of both streams, and draws a chart."""
        scene, style = bench.options.scenes[0], bench.options.styles[0]
        frames, prompt = bench.frames(scene, 1.0), bench.prompt(scene, style)
        target, motion = apply_style(style, frames), bench.motion(scene, 1.0)
        length = (bench.minutes, max(1, round(60 * bench.rate_hz)))
        total = length[0] * length[1]
        settings = (Setting("refresh"), Setting("no refresh", {"rope_refresh": max(50, total)}))
        streams, seen = {}, {}
        with progress(len(settings) * total) as bar:
            for setting in settings:
                middles: list[np.ndarray] = []

                def see(index: int, frame: np.ndarray, middles: list[np.ndarray] = middles) -> None:
                    bar.update()
                    if index == len(frames) // 2:
                        middles.append(frame)

                spec = bench.spec(prompt, setting)
                minutes = run.play_minutes(bench.engine, spec, frames, motion, target, length, see)
                stream = LongStream(f"scene {scene}", style, prompt, minutes)
                streams[setting.name] = {**dataclasses.asdict(stream), "drift": stream.drift()}
                seen[setting.name] = middles
        middle = len(frames) // 2
        self._draw(chart_path, streams, seen, (frames[middle], target[middle]))
        return {"rate_hz": bench.rate_hz, "streams": streams}

    def table(self, found: Mapping[str, Any]) -> list[str]:
        """Returns the numbers as Markdown, and what drifts too far."""
        streams, head, rows = found["streams"], ["measure"], []
        series = {name: minute_series(stream["minutes"]) for name, stream in streams.items()}
        for name in streams:
            head += [f"{name}: 2nd minute", "last", "drift"]
        for key, scale in measure_scales(series).items():
            row = [words(key)]
            for name, stream in streams.items():
                values = [math.nan if v is None else scale * v for v in series[name][key]]
                row += [
                    f"{values[min(1, len(values) - 1)]:.4g}",
                    f"{values[-1]:.4g}",
                    drifted(stream["drift"].get(key)),
                ]
            rows.append(row)
        lines = ["", *markdown(head, rows), ""]
        for name, stream in streams.items():
            far = [key for key, value in stream["drift"].items() if abs(value or 0) > MOST_DRIFT]
            verdict = (
                f"more than {100 * MOST_DRIFT:.0f} % drift: {', '.join(far)}"
                if far
                else "nothing drifts that far"
            )
            lines.append(
                f"- {name}: {verdict if stream['drift'] else 'at least 3 minutes are needed to tell drift'}."
            )
        return lines

    def _draw(self, path: Path, streams: Mapping[str, Any], seen: Mapping[str, Any], of_clip: Any) -> None:
        count = max(1, min(len(middles) for middles in seen.values()))
        at = np.unique(np.linspace(0, count - 1, COLUMNS - 1).astype(int))
        film = [(name, [of_clip[0], *(middles[i] for i in at)]) for name, middles in seen.items()]
        film[-1] = (film[-1][0], [of_clip[1], *film[-1][1][1:]])
        minutes = len(next(iter(streams.values()))["minutes"])
        heads = ["input (above), target", *(f"minute {minutes * (i + 0.5) / count:.1f}" for i in at)]
        series = {name: minute_series(stream["minutes"]) for name, stream in streams.items()}
        scales = measure_scales(series)
        with figure(path, self.title, film, heads, len(scales), columns=4) as panels:
            for axes, (key, scale) in zip(panels, scales.items(), strict=True):
                for colour, (name, values) in coloured(list(series.items())):
                    numbers = scale * np.array(values[key], float)
                    axes.plot(
                        range(1, minutes + 1),
                        numbers,
                        "o-",
                        color=colour,
                        markersize=3,
                        linewidth=1.2,
                        label=name,
                    )
                    if name == "refresh" and minutes > 1:
                        axes.axhspan(
                            *numbers[1] * np.array([1 - MOST_DRIFT, 1 + MOST_DRIFT]), color=colour, alpha=0.08
                        )
                axes.set_title(f"{words(key)}{', 1/1000' if scale > 1 else ''}")
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
                axes.set_xlabel("minute", fontsize=8)
            panels[0].legend(fontsize=8, frameon=False)


def minute_series(minutes: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Returns each measure of the output, minute by minute."""
    parts = ("to_target", "output", "tone")
    return {key: [m[part][key] for m in minutes] for part in parts for key in minutes[0][part]}


def measure_scales(series: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Returns by what to multiply each measure that a long stream has."""
    small = ("warp_error", "flicker", "distance")
    return {key: 1000.0 if key in small else 1.0 for key in next(iter(series.values()))}


def words(key: str) -> str:
    """Returns what a table calls a measure."""
    return {"psnr_db": "PSNR, dB", "ssim": "SSIM"}.get(key, key.replace("_", " "))


def drifted(value: float | None) -> str:
    """Returns a drift as text, bold where it is too large."""
    if value is None:
        return ""
    return f"**{100 * value:+.1f} %**" if abs(value) > MOST_DRIFT else f"{100 * value:+.1f} %"


# --- all parts


def sinks(threshold: float) -> Mapping[str, Any]:
    """Returns the settings of anchors that are replaced below a similarity."""
    return {"sink_threshold": threshold}


def steps(count: int, mode: str = "stream") -> Mapping[str, Any]:
    """Returns the settings of so many denoising steps."""
    return {"timesteps": V2V_TIMESTEPS[:count], "mode": mode}


BENCHMARKS: dict[str, Comparison | ChangeOfPrompt | LongStreams] = {
    "sinks": Comparison(
        "Anchors in the cache",
        "Of the six latent frames in the cache none are anchors, or three are: the stream's first ones for good, or "
        "replaced when their similarity to what is drawn falls below a threshold. On clips of one scene, and on clips "
        "that cut to another scene, measured from the cut on.",
        (
            Setting("3, adaptive 0.2 (default)"),
            Setting("none, all roll", {"sink_frames": 0, "keep_first": False}),
            Setting("3, for good", sinks(SINK_THRESHOLD_OFF)),
            Setting("3, adaptive 0.8", sinks(0.8)),
        ),
        lambda bench: [*bench.clips("one scene"), *bench.cuts("behind a cut")],
    ),
    "cache": Comparison(
        "Length of the cache",
        "Latent frames that are remembered, three of them anchors.",
        (
            Setting("6 (default)"),
            Setting("4", {"cache_frames": 4}),
            Setting("9", {"cache_frames": 9}),
            Setting("12", {"cache_frames": 12}),
        ),
        lambda bench: bench.clips("one scene"),
        timed=True,
    ),
    "steps": Comparison(
        "Denoising steps, in a stream batch or one after another",
        "A stream batch takes all steps at once, each on another chunk, with a cache for each; sequential steps share "
        "one cache, and give a chunk before the next one comes in. *Frames behind*: how many frames have come in when "
        "a chunk comes out, beyond its own.",
        (
            Setting("2, stream batch (default)"),
            Setting("1", steps(1)),
            Setting("4, stream batch", steps(4)),
            Setting("2, sequential", steps(2, "sequential")),
            Setting("4, sequential", steps(4, "sequential")),
        ),
        lambda bench: bench.clips("one scene"),
        timed=True,
    ),
    "noise": Comparison(
        "Motion-aware noise",
        f"Fast motion lowers the noise scale from 0.8 to 0.7, or it stays at either. Slow clips are the same scenes at "
        f"{SLOW:g} of their speed.",
        (
            Setting("0.8 to 0.7 by motion (default)"),
            Setting("0.8 always", {"motion_range": 0.0}),
            Setting("0.7 always", {"motion_range": 0.0}, 0.7),
        ),
        lambda bench: [*bench.clips("slow", SLOW), *bench.clips("fast")],
    ),
    "prompt": ChangeOfPrompt(),
    "refresh": LongStreams(),
}  # fmt: skip


# --- numbers and text


def grouped(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Returns the rows by what they have under `key`, in order of appearance."""
    return [(name, [r for r in rows if r[key] == name]) for name in dict.fromkeys(r[key] for r in rows)]


def coloured(items: Sequence[T]) -> Iterator[tuple[str, T]]:
    """Returns each item with a colour of its own; raises ValueError when there are too few colours."""
    return zip(COLOURS[: len(items)], items, strict=True)


def mean(values: Iterable[float | None]) -> float:
    """Returns the mean of those that are numbers."""
    return measures.mean(math.nan if value is None else value for value in values)


def of(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """Returns the mean of one measure."""
    return mean(row[key] for row in rows)


def chunk_ms(rows: Sequence[Mapping[str, Any]]) -> float:
    """Returns the median of the times of a chunk; NaN where the clips were too short to tell."""
    times = [
        row["chunk_ms"] for row in rows if row["chunk_ms"] is not None and not math.isnan(row["chunk_ms"])
    ]
    return float(np.median(times)) if times else math.nan


def milli(value: float) -> str:
    """Returns thousandths as text."""
    return "" if math.isnan(value) else f"{1000 * value:.2f}"


def frame_errors(a: np.ndarray, b: np.ndarray) -> list[float]:
    """Returns the mean squared difference of each frame."""
    return [measures.squared_error(x, y) for x, y in zip(a, b, strict=True)]


def frame_distances(clip: np.ndarray) -> np.ndarray:
    """Returns how far each frame but the first is from the one before, float64 [T - 1] in [0, 1]."""
    return np.array([measures.distance(a, b) for a, b in itertools.pairwise(clip)])


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def document(results: Mapping[str, Any], name: str) -> str:
    """Returns all results as Markdown; charts stand beside it under `name`_PART.png."""
    lines = [
        "# What streaming features are worth",
        "",
        "Measured with the small model, each feature against the default on the same held-out scenes. Warp error and "
        "flicker are in 1/1000; [evaluation.md](../docs/evaluation.md) defines the measures. Written by",
        "",
        "```\npython benchmarks/streaming_features.py\n```",
        "",
        f"Weights {results['weights']}; {results['machine']}.",
    ]
    for part in (part for part in BENCHMARKS if part in results["parts"]):
        found = results["parts"][part]
        on = found["options"]
        if "minutes" in on:
            where = f"Scene {on['scenes'][0]}, {on['styles'][0]}; {on['minutes']} minutes of {on['rate_hz']:g} FPS."
        else:
            names = ", ".join(map(str, on["scenes"]))
            where = f"Scenes {names}; {', '.join(on['styles'])}; clips of {on['frames']} frames."
        lines += ["", f"## {BENCHMARKS[part].title}", "", BENCHMARKS[part].text, where]
        lines += [*BENCHMARKS[part].table(found), "", f"![{BENCHMARKS[part].title}]({name}_{part}.png)"]
    return "\n".join(lines) + "\n"


# --- charts


@contextlib.contextmanager
def figure(
    path: Path, title: str, film: Film, heads: Sequence[str], panels: int, columns: int | None = None
) -> Iterator[list[Any]]:
    """Writes a chart: a film above, below it panels that are filled inside the `with`.

    Args:
      path: the PNG.
      title: stands above.
      film: its rows.
      heads: what stands above the film's columns.
      panels: how many there are.
      columns: panels in a row; None: all of them.
    """
    columns = columns or panels
    below, count = -(-panels // columns), len(heads)
    height, width = film[0][1][0].shape[:2]
    share = (WIDTH - ROW_LABEL - MARGIN) / WIDTH * count / max(count, LEAST_COLUMNS)
    tall = len(film) * share * WIDTH / count * height / width  # inches
    above = 0.55 + 0.2 * title.count("\n") + 0.15 * heads[0].count("\n")
    total = above + tall + below * PANEL
    with chart(path, WIDTH, total, layout=None) as drawn:
        drawn.suptitle(title, fontsize=12, x=0.02, y=1 - 0.1 / total, ha="left", va="top")
        strip = drawn.add_axes((ROW_LABEL / WIDTH, 1 - (above + tall) / total, share, tall / total))
        strip.imshow(_canvas(film), aspect="auto")
        strip.set_yticks(
            [(height + GAP) * (i + 0.5) for i in range(len(film))], [n for n, _ in film], fontsize=8
        )
        strip.set_xticks([(width + GAP) * (i + 0.5) for i in range(count)], heads, fontsize=7)
        strip.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
        strip.spines[:].set_visible(False)
        strip.grid(visible=False)
        grid = drawn.add_gridspec(
            below, columns, left=0.6 / WIDTH, right=1 - MARGIN / WIDTH, top=1 - (above + tall + 0.5) / total,
            bottom=0.5 / total, wspace=0.14 if columns < 4 else 0.24, hspace=0.35,
        )  # fmt: skip
        axes = [drawn.add_subplot(grid[divmod(i, columns)]) for i in range(panels)]
        for one in axes:
            one.tick_params(axis="x", labelsize=8)
        yield axes


def _canvas(film: Film) -> np.ndarray:
    """Returns the film's frames on white, uint8 [H, W, 3]."""
    rows = [
        np.concatenate([np.pad(f, ((0, GAP), (0, GAP), (0, 0)), constant_values=255) for f in frames], axis=1)
        for _, frames in film
    ]
    return np.concatenate(rows)


# --- the command

Progress = Callable[[int], Any]


def digest(folder: Path) -> str:
    """Returns twelve hexadecimal digits that change with anything in a checkpoint."""
    found = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        found.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def read_results(path: Path, weights: str) -> dict[str, Any]:
    """Returns the parts that were measured with these weights; raises ConfigError for a file of another kind."""
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text())
        return results["parts"] if results["weights"] == weights else {}
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise ConfigError(
            f"{path}: holds no results of this script; move it away, or name another --out"
        ) from e


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes and returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default=shipped.TINY, metavar="FOLDER", help="(default %(default)s)")
    parser.add_argument("--only", action="append", default=[], choices=tuple(BENCHMARKS), metavar="PART",
                        help="measure this part, again if it was; may be given several times")  # fmt: skip
    parser.add_argument("--style", action="append", default=[], metavar="NAME",
                        help=f"may be given several times (default: {', '.join(STYLE_NAMES)})")  # fmt: skip
    parser.add_argument("--scene", action="append", default=[], type=int, metavar="N",
                        help=f"held-out, at least two (default: {', '.join(map(str, SCENES))})")  # fmt: skip
    parser.add_argument(
        "--frames", type=int, default=49, metavar="N", help="of each clip (default %(default)s)"
    )
    parser.add_argument(
        "--minutes", type=int, default=10, metavar="N", help="of long streams (default %(default)s)"
    )
    parser.add_argument("--fps", type=float, default=8.0, metavar="X",
                        help="frames in a second of a long stream (default %(default)g)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="NAME",
                        help="results, without a suffix (default: beside this script)")  # fmt: skip
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    args = parser.parse_args(argv)
    return exit_code(lambda: measure(args), "interrupted; parts that were measured are kept")


def measure(args: argparse.Namespace) -> None:
    """Measures what is missing or asked for; raises Svd2Error on bad input."""
    if args.minutes < 1 or not 0 < args.fps < math.inf:
        raise ConfigError(
            f"--minutes must be at least 1 and --fps above 0, got {args.minutes} and {args.fps:g}"
        )
    folder = shipped.checkpoint_folder(args.checkpoint)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is no folder; expected a converted checkpoint")
    styles, numbers = (
        tuple(dict.fromkeys(args.style)) or STYLE_NAMES,
        tuple(dict.fromkeys(args.scene)) or SCENES,
    )
    options = Options(digest(folder), styles, numbers, args.frames, args.seed)
    options.check()
    paths = {name: args.out.with_name(f"{args.out.name}_{name}.png") for name in BENCHMARKS}
    target, text = (args.out.with_name(args.out.name + suffix) for suffix in (".json", ".md"))
    for path in (target, text, *paths.values()):
        files.check_target(path)
    measures.require_tools()

    def on(part: str) -> dict[str, Any]:
        long = {"minutes": args.minutes, "rate_hz": args.fps} if part == "refresh" else {}
        return json.loads(json.dumps({**dataclasses.asdict(options), **long}))

    parts = read_results(target, options.weights)
    wanted = args.only or [
        p for p in BENCHMARKS if parts.get(p, {}).get("options") != on(p) or not paths[p].exists()
    ]
    if not wanted:
        print(f"{target}: holds all parts already; --only PART measures one again")
        return

    import jax

    from svd2_jax.engine.engine import DeviceEngine

    engine = DeviceEngine.from_checkpoint(folder)
    bench = Bench(engine, engine.stream_config(), options, args.minutes, args.fps)
    machine = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, JAX {jax.__version__}"
    for part in (p for p in BENCHMARKS if p in wanted):
        progress = functools.partial(_bar, part, args.no_progress)
        found = {"options": on(part), **BENCHMARKS[part].measure(bench, paths[part], progress)}
        parts = {**parts, part: json.loads(json.dumps(plain(found)))}
        results = {"weights": options.weights, "machine": machine, "parts": parts}
        files.write_json(target, results, allow_nan=False)
        page = document(results, args.out.name)
        files.write_whole(text, lambda path, page=page: path.write_text(page))
        print(
            "\n".join([f"{part}: {BENCHMARKS[part].title}", *BENCHMARKS[part].table(parts[part]), ""]),
            flush=True,
        )
    print(f"{text}: {len(parts)} of {len(BENCHMARKS)} parts")


def _bar(part: str, disable: bool, total: int) -> tqdm:
    return tqdm(total=total, unit="frame", desc=part, dynamic_ncols=True, disable=disable, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
