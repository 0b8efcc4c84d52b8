"""Streams clips through an engine and measures what comes out."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from svd2_jax.api import Chunk, Engine, SessionSpec
from svd2_jax.errors import MediaError
from svd2_jax.evaluate import measures
from svd2_jax.evaluate.clip_model import ClipModel
from svd2_jax.evaluate.clips import Clip, ClipFolder, read_clip, read_target
from svd2_jax.evaluate.measures import Likeness, Motion, SteadinessMeter, Tone
from svd2_jax.evaluate.report import (
    CHANGED_BELOW,
    SETTLED_BELOW,
    LongStream,
    Minute,
    PromptChange,
    Rebuilt,
    StreamResult,
)

Rebuild = Callable[[np.ndarray], np.ndarray]
Advance = Callable[[int], object]


@dataclass(frozen=True)
class EvaluationPlan:
    """What to evaluate.

    Attributes:
      folder: clips and what to re-draw them to.
      spec: of every stream, but for its prompt.
      rate_hz: frames per second that times are told at, above 0.
      most_frames: of each clip, at least 2; None: all of them.
      minutes: length of the long stream; 0: none.
      clip_model: judges every output; None: none does.
    """

    folder: ClipFolder
    spec: SessionSpec
    rate_hz: float = 16.0
    most_frames: int | None = None
    minutes: int = 0
    clip_model: ClipModel | None = None

    @property
    def frames_per_minute(self) -> int:
        """Frames in a minute of the long stream."""
        return max(1, round(60 * self.rate_hz))

    def read(self, clip: Clip) -> np.ndarray:
        """Returns a clip's input, uint8 [T, H, W, 3].

        Raises:
          MediaError: it cannot be read, or has a single frame.
        """
        frames = read_clip(clip.input, self.spec.config.height, self.spec.config.width, self.most_frames)
        if len(frames) < 2:
            raise MediaError(f"{clip.input}: has one frame; at least two are needed")
        return frames

    def read_target(self, path: Path, like: np.ndarray) -> np.ndarray:
        """Returns a target of the shape of its input's frames; raises MediaError if it is not as long."""
        return read_target(path, like, self.most_frames)

    def spec_for(self, prompt: str) -> SessionSpec:
        """Returns what a stream with this prompt computes."""
        return dataclasses.replace(self.spec, prompt=prompt)


@dataclass(frozen=True)
class Sample:
    """A frame to look at, uint8 [H, W, 3]: of the clip, of what came out, and of the style's target."""

    style: str | None
    prompt: str
    input: np.ndarray
    output: np.ndarray
    target: np.ndarray | None


@dataclass(frozen=True)
class Found:
    """What the clips and the long stream gave."""

    streams: tuple[StreamResult, ...]
    rebuilt: tuple[Rebuilt, ...]
    changes: tuple[PromptChange, ...]
    long: LongStream | None
    samples: tuple[Sample, ...]


def evaluate(
    engine: Engine, rebuild: Rebuild, plan: EvaluationPlan, advance: Advance = lambda _: None
) -> Found:
    """Re-draws each clip to each style, changes the prompt in one stream of each, and plays the long stream.

    Args:
      engine: the model.
      rebuild: what the VAE alone makes of a clip, uint8 [T, H, W, 3].
      plan: what to do.
      advance: is told of frames that are done.
    """
    streams: list[StreamResult] = []
    rebuilt: list[Rebuilt] = []
    changes: list[PromptChange] = []
    samples: list[Sample] = []
    for number, clip in enumerate(plan.folder.clips):
        frames = plan.read(clip)
        targets = [plan.read_target(path, frames) for path in clip.targets]
        rebuilt.append(Rebuilt(clip.name, None, measures.likeness(rebuild(frames), frames)))
        for style, target in zip(plan.folder.styles, targets, strict=False):  # targets may be unknown
            rebuilt.append(Rebuilt(clip.name, style.name, measures.likeness(rebuild(target), target)))
        done = _Clip(plan, number, clip.name, frames, targets)
        for index in range(len(plan.folder.styles)):
            result, sample = done.redraw(engine, index, advance)
            streams.append(result)
            if not number:
                samples.append(sample)
        if (change := done.change_prompt(engine, advance)) is not None:
            changes.append(change)
    long = _play_long(engine, plan, advance) if plan.minutes else None
    return Found(tuple(streams), tuple(rebuilt), tuple(changes), long, tuple(samples))


def check_clips(plan: EvaluationPlan) -> int:
    """Reads every video once, before anything takes long; returns how many frames `advance` will be told of.

    Raises:
      ConfigError: what measures the pictures is not installed.
      MediaError: a video cannot be read, or is not as long as it must be.
    """
    measures.require_tools()
    count = plan.minutes * plan.frames_per_minute
    for clip in plan.folder.clips:
        frames, styles = plan.read(clip), len(plan.folder.styles)
        for target in clip.targets:
            plan.read_target(target, frames)
        changes = styles > 1 and change_frame(plan.spec, len(frames)) is not None
        count += len(frames) * (styles + changes)
    return count


# --- streams


@dataclass(frozen=True)
class Shown:
    """Frames that came out.

    Attributes:
      first: index of the first of them.
      frames: uint8 [T, H, W, 3].
      taken: how many input frames had been handed in by then; None where they came out because the input ended.
    """

    first: int
    frames: np.ndarray
    taken: int | None


def play(
    engine: Engine,
    spec: SessionSpec,
    frames: Iterable[np.ndarray],
    prompt_at: tuple[int, str] | None = None,
    blend_chunks: int = 0,
) -> Iterator[Shown]:
    """Streams frames, uint8 [H, W, 3] each, one by one as a camera gives them; yields what comes out.

    Args:
      engine: the model.
      spec: what to compute.
      frames: the input.
      prompt_at: another prompt, and the frame before which it comes.
      blend_chunks: over how many chunks it comes; 0: at once.
    """
    if prompt_at is not None:
        engine.prepare_prompt(prompt_at[1])
    with contextlib.closing(engine.open(spec)) as session:
        held: list[tuple[Chunk, int | None]] = []
        for number, frame in enumerate(frames):
            if prompt_at is not None and number == prompt_at[0]:
                session.set_prompt(prompt_at[1], blend_chunks)
            if chunks := session.push(frame[None]):
                yield from _read(held)  # waits for the device, so the next chunk is given to it first
                held = [(chunk, number + 1) for chunk in chunks]
        yield from _read([*held, *((chunk, None) for chunk in session.finish())])


def _read(chunks: Iterable[tuple[Chunk, int | None]]) -> Iterator[Shown]:
    for chunk, taken in chunks:
        yield Shown(chunk.first_frame, chunk.frames(), taken)


def collect(shown: Iterable[Shown], like: np.ndarray, advance: Advance = lambda _: None) -> np.ndarray:
    """Returns all that comes out of a clip, as an array like the clip's own frames; `advance` is told of each part."""
    output = np.empty_like(like)
    for part in shown:
        output[part.first : part.first + len(part.frames)] = part.frames
        advance(len(part.frames))
    return output


def there_and_back(length: int) -> Iterator[int]:
    """Yields 0, 1, ..., length - 1, length - 2, ..., 0, 1, ... for ever: a clip that goes on without a jump."""
    yield 0
    while True:
        yield from range(1, length)
        yield from range(length - 2, -1, -1)


def time_change(
    clip: str,
    prompts: tuple[str, str],
    at: int,
    shown: Sequence[Shown],
    unchanged: tuple[np.ndarray, np.ndarray],
    rate_hz: float,
) -> PromptChange:
    """Returns how soon a change of the prompt was seen.

    Args:
      clip: name of the clip.
      prompts: the old and the new one.
      at: the frame before which the new one came.
      shown: all that came out.
      unchanged: what comes out with the old prompt alone, and with the new one from the start, uint8 [T, H, W, 3].
      rate_hz: frames per second that times are told at.
    """
    came = {part.first + i: part.taken for part in shown for i in range(len(part.frames))}
    shares = measures.shares_of_old(collect(shown, unchanged[0]), *unchanged)
    first = measures.first_below(shares, at, CHANGED_BELOW)
    settled = measures.stays_below(shares, at, SETTLED_BELOW)

    def seconds(frame: int | None) -> float | None:
        taken = None if frame is None else came[frame]
        return None if taken is None else (taken - at) / rate_hz

    known = tuple(None if math.isnan(share) else float(share) for share in shares)
    return PromptChange(clip, *prompts, at, known, first, settled, seconds(first), seconds(settled))


def change_frame(spec: SessionSpec, frames: int) -> int | None:
    """Returns where a prompt changes: the beginning of the chunk in the middle; None if a clip is too short for it."""
    first, step = spec.config.first_frames, spec.config.chunk_frames
    chunks = (frames - first) // step
    return first + (chunks // 2) * step if chunks >= 2 else None


class _Clip:
    """A clip with its targets, and what of it is needed for more than one stream."""

    def __init__(
        self, plan: EvaluationPlan, number: int, name: str, frames: np.ndarray, targets: Sequence[np.ndarray]
    ):
        self._plan, self._number, self._name = plan, number, name
        self._frames, self._targets = frames, targets
        self._motion = measures.motion(frames)
        self._steadiness = measures.steadiness(frames, self._motion)
        self._blurred = [measures.blurred(target) for target in targets]
        styles = plan.folder.styles
        self._old, self._new = number % len(styles), (number + 1) % len(styles)  # of the change of the prompt
        self._outputs: dict[int, np.ndarray] = {}  # of these two styles

    def redraw(self, engine: Engine, index: int, advance: Advance) -> tuple[StreamResult, Sample]:
        """Re-draws the clip to a style."""
        style = self._plan.folder.styles[index]
        prompt = style.phrasing(self._number)
        output = collect(play(engine, self._plan.spec_for(prompt), self._frames), self._frames, advance)
        if index in (self._old, self._new):
            self._outputs[index] = output
        judge = self._plan.clip_model
        result = StreamResult(
            self._name, style.name, prompt, len(output), measures.steadiness(output, self._motion), self._steadiness,
            clip_scores=judge.scores(output, prompt) if judge else None,
        )  # fmt: skip
        middle = len(output) // 2
        sample = Sample(style.name, prompt, self._frames[middle], output[middle], None)
        if not self._targets:
            return result, sample
        target = self._targets[index]
        closest = measures.nearest(measures.blurred(output), self._blurred)
        result = dataclasses.replace(
            result,
            target=measures.steadiness(target, self._motion),
            to_target=measures.likeness(output, target),
            input_to_target=measures.likeness(self._frames, target),
            nearest=self._plan.folder.styles[closest].name,
        )
        return result, dataclasses.replace(sample, target=target[middle])

    def change_prompt(self, engine: Engine, advance: Advance) -> PromptChange | None:
        """Changes from one style to the next one in the middle of the clip; both were re-drawn before."""
        at = change_frame(self._plan.spec, len(self._frames))
        if at is None or self._old == self._new:
            return None
        styles = self._plan.folder.styles
        old, new = (styles[i].phrasing(self._number) for i in (self._old, self._new))
        shown = list(play(engine, self._plan.spec_for(old), self._frames, (at, new)))
        advance(len(self._frames))
        unchanged = (self._outputs[self._old], self._outputs[self._new])
        return time_change(self._name, (old, new), at, shown, unchanged, self._plan.rate_hz)


# --- a long stream


def _play_long(engine: Engine, plan: EvaluationPlan, advance: Advance) -> LongStream:
    """Plays the first clip forwards and backwards, to the first style, and measures each minute of it."""
    clip, style = plan.folder.clips[0], plan.folder.styles[0]
    frames = plan.read(clip)
    target = plan.read_target(clip.targets[0], frames) if clip.targets else None
    spec = plan.spec_for(style.phrasing(0))
    length = (plan.minutes, plan.frames_per_minute)
    motion = measures.motion(frames)
    minutes = play_minutes(engine, spec, frames, motion, target, length, lambda *_: advance(1))
    return LongStream(clip.name, style.name, spec.prompt, minutes)


def play_minutes(
    engine: Engine,
    spec: SessionSpec,
    frames: np.ndarray,
    motion: Motion,
    target: np.ndarray | None,
    length: tuple[int, int],
    see: Callable[[int, np.ndarray], object],
) -> tuple[Minute, ...]:
    """Plays a clip forwards and backwards again and again; returns the measures of each minute.

    Args:
      engine: the model.
      spec: what to compute.
      frames: the clip, uint8 [T, H, W, 3].
      motion: its optical flow.
      target: what it should become, of the same shape; None where that is not known.
      length: how many minutes, and frames in each of them.
      see: is given each frame that comes out, behind the index in the clip of the frame that it was made of.
    """
    count, per_minute = length
    order = list(itertools.islice(there_and_back(len(frames)), count * per_minute))
    minutes: list[Minute] = []
    meter = _MinuteMeter(frames, motion, target)
    for part in play(engine, spec, (frames[i] for i in order)):
        for number, frame in enumerate(part.frames, start=part.first):
            meter.add(frame, order[number], order[number - 1] if number else None)
            if (number + 1) % per_minute == 0:
                minutes.append(meter.take())
            see(order[number], frame)
    return tuple(minutes)


class _MinuteMeter:
    """Measures a long stream, a minute at a time."""

    def __init__(self, frames: np.ndarray, motion: Motion, target: np.ndarray | None):
        self._frames, self._motion, self._target = frames, motion, target
        self._output, self._input = SteadinessMeter(), SteadinessMeter()
        self._begin()

    def _begin(self) -> None:
        self._tones: list[tuple[Tone, Tone]] = []
        self._errors: list[float] = []
        self._similar: list[float] = []

    def add(self, frame: np.ndarray, index: int, before: int | None) -> None:
        """Takes an output frame, the index of its input frame in the clip, and that of the frame before."""
        flow = None
        if before is not None:
            flow = self._motion.to_previous[before] if before < index else self._motion.to_next[index]
        self._output.add(frame, flow)
        self._input.add(self._frames[index], flow)
        self._tones.append((measures.tone(frame), measures.tone(self._frames[index])))
        if self._target is not None:
            self._errors.append(measures.squared_error(frame, self._target[index]))
            self._similar.append(measures.ssim(frame, self._target[index]))

    def take(self) -> Minute:
        """Returns the means since the last call."""
        likeness = None
        if self._errors:
            likeness = Likeness(measures.psnr_db(measures.mean(self._errors)), measures.mean(self._similar))
        ours, own = (_mean_tone([pair[i] for pair in self._tones]) for i in (0, 1))
        minute = Minute(self._output.take(), self._input.take(), ours, own, likeness)
        self._begin()
        return minute


def _mean_tone(tones: Sequence[Tone]) -> Tone:
    return Tone(
        measures.mean(t.brightness for t in tones),
        measures.mean(t.contrast for t in tones),
        measures.mean(t.saturation for t in tones),
    )
