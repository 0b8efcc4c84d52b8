"""What an evaluation found, as values for JSON and as a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from svd2_jax.evaluate.clip_model import ClipScores
from svd2_jax.evaluate.measures import Likeness, Steadiness, Tone, mean
from svd2_jax.text import aligned

CHANGED_BELOW = 0.5  # share of the old picture from which on a frame is nearer to the new one
SETTLED_BELOW = 0.25  # share below which a changed stream stays once it has settled


@dataclass(frozen=True)
class StreamResult:
    """One clip re-drawn to one prompt.

    Attributes:
      clip: name of the clip.
      style: name of the style asked for; None where there is no target.
      prompt: what was asked for.
      frames: length of the clip.
      output: how steady the output is.
      input: how steady the clip itself is.
      target: how steady the style's target is.
      to_target: likeness of the output to the style's target.
      input_to_target: that of the clip itself, as if nothing had been re-drawn.
      nearest: the style whose target is nearest to the output.
      clip_scores: of the output, where a CLIP model judges.
    """

    clip: str
    style: str | None
    prompt: str
    frames: int
    output: Steadiness
    input: Steadiness
    target: Steadiness | None = None
    to_target: Likeness | None = None
    input_to_target: Likeness | None = None
    nearest: str | None = None
    clip_scores: ClipScores | None = None


@dataclass(frozen=True)
class Rebuilt:
    """What the VAE alone keeps of a video: of a clip, or of a style's target."""

    clip: str
    style: str | None
    likeness: Likeness


@dataclass(frozen=True)
class PromptChange:
    """A stream whose prompt changes on the way.

    Attributes:
      clip: name of the clip.
      old: the prompt at first.
      new: the prompt from frame `at_frame` on.
      at_frame: the first frame of the first chunk that is drawn to the new prompt.
      shares: how much of the old picture each frame has, see `measures.shares_of_old`; None where all are equal.
      changed_frame: the first frame that is nearer to the new picture; None if there is none.
      settled_frame: the frame from which on little of the old picture is left; None if there is none.
      changed_s: from the change until the changed frame comes out, at the source's rate; the time that the device takes
        is not in it. None where it comes out only because the clip ends.
      settled_s: the same of the settled frame.
    """

    clip: str
    old: str
    new: str
    at_frame: int
    shares: tuple[float | None, ...]
    changed_frame: int | None
    settled_frame: int | None
    changed_s: float | None
    settled_s: float | None


@dataclass(frozen=True)
class Minute:
    """Means over a minute of a long stream; likeness only where there is a target."""

    output: Steadiness
    input: Steadiness
    tone: Tone
    input_tone: Tone
    to_target: Likeness | None


@dataclass(frozen=True)
class LongStream:
    """A clip played forwards and backwards again and again."""

    clip: str
    style: str | None
    prompt: str
    minutes: tuple[Minute, ...]

    def measures(self) -> dict[str, list[float]]:
        """Returns each measure of the output by its name, minute by minute; likeness only where there is a target."""
        minutes = [(m.output, m.tone, *([m.to_target] if m.to_target else [])) for m in self.minutes]
        return {
            field.name: [getattr(part, field.name) for part in parts]
            for parts in zip(*minutes, strict=True)
            for field in dataclasses.fields(parts[0])
        }

    def drift(self) -> dict[str, float | None]:
        """Returns by how much each measure of the last minute differs from the second one's, as a share of it."""
        if len(self.minutes) < 3:
            return {}

        def change(before: float, after: float) -> float | None:
            return None if before == 0 or math.isnan(before + after) else (after - before) / abs(before)

        return {name: change(values[1], values[-1]) for name, values in self.measures().items()}


@dataclass(frozen=True)
class Settings:
    """What was evaluated.

    Attributes:
      checkpoint: as it was given.
      clips: the folder.
      stream: the stream's settings.
      noise_scale: see `SessionSpec`.
      seed: see `SessionSpec`.
      rate_hz: frames per second that times are told at.
    """

    checkpoint: str
    clips: str
    stream: dict[str, Any]
    noise_scale: float
    seed: int
    rate_hz: float


@dataclass(frozen=True)
class Report:
    """All numbers of an evaluation."""

    settings: Settings
    styles: tuple[str, ...]
    streams: tuple[StreamResult, ...]
    rebuilt: tuple[Rebuilt, ...]
    changes: tuple[PromptChange, ...]
    long: LongStream | None

    def confusion(self) -> list[list[int]]:
        """Returns how many clips asked for style i (row) came out nearest to style j (column)."""
        counts = [[0] * len(self.styles) for _ in self.styles]
        for stream in self.streams:
            if stream.style is not None and stream.nearest is not None:
                counts[self.styles.index(stream.style)][self.styles.index(stream.nearest)] += 1
        return counts

    def right_share(self) -> float | None:
        """Returns the share of streams whose nearest style is the one asked for; None without targets."""
        return _none(mean(float(s.nearest == s.style) for s in self.streams if s.nearest is not None))

    def of_style(self, style: str | None) -> Report:
        """Returns the part of it about one style."""
        return dataclasses.replace(
            self,
            streams=tuple(s for s in self.streams if s.style == style),
            rebuilt=tuple(r for r in self.rebuilt if r.style == style),
        )

    def likeness(self) -> Likeness | None:
        """Returns the mean likeness of outputs to targets."""
        return mean_likeness(s.to_target for s in self.streams)

    def input_likeness(self) -> Likeness | None:
        """Returns the mean likeness of unprocessed clips to targets."""
        return mean_likeness(s.input_to_target for s in self.streams)

    def rebuilt_likeness(self, targets: bool) -> Likeness | None:
        """Returns the mean likeness of what the VAE alone makes, of targets or of the clips themselves."""
        return mean_likeness(r.likeness for r in self.rebuilt if (r.style is not None) == targets)

    def clip_scores(self) -> ClipScores | None:
        """Returns the mean of CLIP's scores; None where no CLIP model judged."""
        there = [s.clip_scores for s in self.streams if s.clip_scores is not None]
        return ClipScores(mean(s.prompt for s in there), mean(s.neighbours for s in there)) if there else None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON, means first; what is no number is null."""
        likeness, unchanged = self.likeness(), self.input_likeness()
        means = {
            "to_target": likeness and dataclasses.asdict(likeness),
            "input_to_target": unchanged and dataclasses.asdict(unchanged),
            "nearest_is_right": self.right_share(),
            "clip": (c := self.clip_scores()) and dataclasses.asdict(c),
            "vae_of_inputs": (r := self.rebuilt_likeness(False)) and dataclasses.asdict(r),
            "vae_of_targets": (r := self.rebuilt_likeness(True)) and dataclasses.asdict(r),
            **{
                who: dataclasses.asdict(values) if values else None
                for who, values in zip(("output", "target", "input"), self.steadiness(), strict=True)
            },
        }
        confusion = [] if likeness is None else self.confusion()
        values = {**dataclasses.asdict(self), "means": means, "confusion": confusion}
        if self.long:
            values["long"]["drift"] = self.long.drift()
        order = ("settings", "means", "styles", "confusion", "streams", "rebuilt", "changes", "long")
        return plain({key: values[key] for key in order})

    def steadiness(self) -> tuple[Steadiness | None, Steadiness | None, Steadiness | None]:
        """Returns the mean steadiness of outputs, targets and inputs."""
        return (
            mean_steadiness([s.output for s in self.streams]),
            mean_steadiness([s.target for s in self.streams if s.target]),
            mean_steadiness([s.input for s in self.streams]),
        )


def mean_likeness(values: Iterable[Likeness | None]) -> Likeness | None:
    """Returns the mean of those that are there; None if none is."""
    there = [value for value in values if value is not None]
    return Likeness(mean(v.psnr_db for v in there), mean(v.ssim for v in there)) if there else None


def mean_steadiness(values: Sequence[Steadiness]) -> Steadiness | None:
    """Returns the mean; None of none."""
    if not values:
        return None
    return Steadiness(
        mean(v.warp_error for v in values), mean(v.flicker for v in values), mean(v.distance for v in values)
    )


def _none(value: float) -> float | None:
    return None if math.isnan(value) else value


def plain(value: Any) -> Any:
    """Returns values with None for what is no number, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return _none(value) if isinstance(value, float) else value


# --- the table


def table(report: Report) -> str:
    """Returns the means as text."""
    parts = [_likeness_lines(report), _steadiness_lines(report), _change_lines(report), _long_lines(report)]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _likeness_lines(report: Report) -> list[str]:
    def cells(name: str, part: Report) -> tuple[str, ...]:
        share = part.right_share()
        return (
            name,
            *_pair(part.likeness()),
            *_pair(part.input_likeness()),
            *_pair(part.rebuilt_likeness(True)),
            "" if share is None else f"{100 * share:.0f} %",
        )

    lines = []
    if report.likeness():
        head = ("likeness to the target", "dB", "SSIM", "input dB", "SSIM", "VAE dB", "SSIM", "nearest")
        lines = aligned(
            [head, *(cells(style, report.of_style(style)) for style in report.styles), cells("all", report)]
        )
    if found := report.rebuilt_likeness(False):
        lines.append(f"VAE alone on the clips themselves: {found.psnr_db:.2f} dB, SSIM {found.ssim:.3f}")
    if clip := report.clip_scores():
        lines.append(
            f"CLIP, 100 x cosine: frames with their prompt {clip.prompt:.2f}, "
            f"with the frame before {clip.neighbours:.2f}"
        )
    return lines


def _steadiness_lines(report: Report) -> list[str]:
    output, target, input_ = report.steadiness()
    if output is None or input_ is None:
        return []

    def ratio(a: float, b: float) -> str:
        return f"{a / b:.2f}" if b > 0 else ""

    rows = [("from frame to frame, 1/1000", "output", "target", "input", "output/input")]
    for name, text in (
        ("warp_error", "warp error"), ("flicker", "flicker"), ("distance", "distance")
    ):  # fmt: skip
        ours, own = getattr(output, name), getattr(input_, name)
        rows.append(
            (
                text,
                _milli(ours),
                _milli(getattr(target, name)) if target else "",
                _milli(own),
                ratio(ours, own),
            )
        )
    return aligned(rows)


def _change_lines(report: Report) -> list[str]:
    if not report.changes:
        return []
    rate = report.settings.rate_hz
    rows = [("change of the prompt", "changed", f"at {rate:g} FPS", "settled", f"at {rate:g} FPS")]

    def cells(frame: int | None, at: int, seconds: float | None) -> tuple[str, str]:
        if frame is None:
            return "never", ""
        return f"+{frame - at} frames", "" if seconds is None else f"{seconds:.2f} s"

    for change in report.changes:
        rows.append(
            (
                f"{change.clip}: {_short(change.old)} > {_short(change.new)}",
                *cells(change.changed_frame, change.at_frame, change.changed_s),
                *cells(change.settled_frame, change.at_frame, change.settled_s),
            )
        )
    return aligned(rows)


def _long_lines(report: Report) -> list[str]:
    if report.long is None:
        return []
    drift = report.long.drift()
    lines = [
        f"{len(report.long.minutes)} minutes of {report.long.clip}: {_short(report.long.prompt, 40)}"
        + ("" if drift else "; at least 3 are needed to tell what drifts")
    ]
    for name, value in drift.items():
        lines.append(f"  {name:<12} " + ("      -" if value is None else f"{100 * value:+6.1f} %"))
    return [*lines[:1], *(["  from the second to the last minute:"] if drift else []), *lines[1:]]


def _pair(likeness: Likeness | None) -> tuple[str, str]:
    return ("", "") if likeness is None else (f"{likeness.psnr_db:.2f}", f"{likeness.ssim:.3f}")


def _milli(value: float) -> str:
    return "-" if math.isnan(value) else f"{1000 * value:.2f}"


def _short(text: str, most: int = 24) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
