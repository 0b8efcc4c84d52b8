"""What happens in a simulated run: sources and a device, described by a few numbers and a seed.

A trace is a JSON file with the fields of `Trace`; `device` has those of `DeviceTrace` and each entry of `streams`
those of `StreamTrace`. What is left out has its default, what is unknown is an error.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from svd2_jax.errors import ConfigError
from svd2_jax.runtime.types import MS, SECOND, StreamSettings
from svd2_jax.validate import build

LONGEST_S = 24 * 3600
MOST_FRAMES = 5_000_000  # of a trace, a gigabyte of records
LUCK = 4.0  # standard deviations by which no tick is faster than its typical time (one in 30 000 is)
JITTER_TAIL = 5.0  # of the mean; exponential, cut off there


@dataclass(frozen=True)
class DeviceTrace:
    """The device as it truly is; the scheduler has to find out.

    A tick of `batch` streams with `steps` steps takes `fixed_ms + row_ms * max(0, batch * steps - knee_rows)`: up to
    the knee the time goes into reading weights. Where no stage has chunks in several rows of a stream, it takes as long
    as with one step. A first group, two rows in one, takes all its passes one after another. What comes behind the
    stages (decoding, on a device that has time for it) takes `tail_ms` more, and meanwhile the next tick may run.

    Attributes:
      fixed_ms: of every pass.
      row_ms: of each row (a chunk at one step) beyond the knee.
      knee_rows: rows that cost no time.
      batch_sizes: streams that a tick may take, ascending, beginning with 1.
      noise: relative standard deviation of the times.
      outlier_share: how many of the ticks take much longer.
      outlier_factor: how much longer.
      speed: (from second, factor) pairs, ascending; before the first pair the factor is 1.
      tail_ms: behind the stages, hidden behind the next tick if one follows; at most `fixed_ms`, as no more than
        two ticks are in flight.
    """

    fixed_ms: float
    row_ms: float
    knee_rows: int = 1
    batch_sizes: tuple[int, ...] = (1, 2, 4)
    noise: float = 0.01
    outlier_share: float = 0.0
    outlier_factor: float = 3.0
    speed: tuple[tuple[float, float], ...] = ()
    tail_ms: float = 0.0

    def __post_init__(self):
        _check(self, "fixed_ms", 0.01, 1e5)
        _check(self, "row_ms", 0, 1e5)
        _check(self, "knee_rows", 0, 1024)
        _check(self, "noise", 0, 0.3)
        _check(self, "outlier_share", 0, 0.5)
        _check(self, "outlier_factor", 1, 1000)
        _check(self, "tail_ms", 0, self.fixed_ms)
        sizes = self.batch_sizes
        if not sizes or sizes[0] != 1 or list(sizes) != sorted(set(sizes)) or sizes[-1] > 1024:
            raise ConfigError(f"batch_sizes must ascend from 1, for example [1, 2, 4]; got {list(sizes)}")
        _check_spans("speed", self.speed, 0.001, 1000)
        if any(a >= b for (a, _), (b, _) in itertools.pairwise(self.speed)):
            raise ConfigError(f"speed must be in order of time, got {[list(pair) for pair in self.speed]}")

    def tick_ms(self, batch: int, steps: int) -> float:
        """Returns what a tick takes at full speed."""
        return self.fixed_ms + self.row_ms * max(0, batch * steps - self.knee_rows)

    def sequential_ms(self, passes: int, rows: int) -> float:
        """Returns what so many passes one after another take at full speed, each with so many rows."""
        return passes * self.tick_ms(rows, 1)

    def speed_at(self, at_s: float) -> float:
        """Returns the speed's factor at a time."""
        return next((factor for begin, factor in reversed(self.speed) if begin <= at_s), 1.0)

    def end_ns(self, start_ns: int, work_ms: float) -> int:
        """Returns when so much work, in ms at full speed, is done, though the speed may change on the way."""
        at_s, left_s = start_ns / SECOND, work_ms * MS / SECOND
        for change_s, _ in self.speed:
            if change_s <= at_s:
                continue
            speed = self.speed_at(at_s)
            if at_s + left_s / speed <= change_s:
                break
            at_s, left_s = change_s, left_s - (change_s - at_s) * speed
        return max(start_ns + 1, round((at_s + left_s / self.speed_at(at_s)) * SECOND))


@dataclass(frozen=True)
class StreamTrace:
    """One source, or `count` of the same kind, and what is asked of the scheduler for it.

    Attributes:
      rate_hz, budget_ms, steps, min_steps, first_frames, chunk_frames, stages, batch_key: see `StreamSettings`.
      count: so many sources, each `stagger_s` behind the one before it.
      start_s: when it joins.
      end_s: when it leaves; None: with the end of the trace.
      leaves: "ends": what it sent is still shown; "closes": at once.
      delay_ms: of the network, the same for every frame.
      jitter_ms: mean of what comes on top, exponentially distributed and cut off at five times that.
      reorder: whether frames may overtake one another; otherwise each waits for the one before it.
      burst_ms: frames are held back and handed over together, once in such a time; 0: at once.
      stalls: (at second, for seconds) pairs: no frames are taken in that time.
      timestamps: whether frames carry the source's time.
      clock_s: what the source's clock is ahead.
      drift_ppm: how much faster than ours the source's clock and camera run.
      missing_share: frames without a timestamp.
      duplicate_share: frames that are sent twice.
      stale_share: frames that come `stale_ms` late, behind newer ones.
      stale_ms: how late these are.
    """

    rate_hz: float
    budget_ms: float
    steps: int = 2
    min_steps: int = 1
    first_frames: int = 5
    chunk_frames: int = 4
    stages: int = 1
    batch_key: str | None = None
    count: int = 1
    stagger_s: float = 0.0
    start_s: float = 0.0
    end_s: float | None = None
    leaves: Literal["ends", "closes"] = "ends"
    delay_ms: float = 20.0
    jitter_ms: float = 0.0
    reorder: bool = False
    burst_ms: float = 0.0
    stalls: tuple[tuple[float, float], ...] = ()
    timestamps: bool = True
    clock_s: float = 0.0
    drift_ppm: float = 0.0
    missing_share: float = 0.0
    duplicate_share: float = 0.0
    stale_share: float = 0.0
    stale_ms: float = 0.0

    def __post_init__(self):
        _check(self, "rate_hz", 0.1, 1000)
        _check(self, "budget_ms", 1, 1e6)
        for name in ("steps", "stages", "first_frames", "chunk_frames", "count"):
            _check(self, name, 1, 1024)
        for name in ("start_s", "stagger_s"):
            _check(self, name, 0, LONGEST_S)
        for name in ("delay_ms", "jitter_ms", "burst_ms", "stale_ms"):
            _check(self, name, 0, 1e5)
        for name in ("missing_share", "duplicate_share", "stale_share"):
            _check(self, name, 0, 1)
        _check(self, "clock_s", -1e9, 1e9)
        _check(self, "drift_ppm", -1e4, 1e4)
        _check_spans("stalls", self.stalls, 0.001, LONGEST_S)
        if self.end_s is not None and self.end_s <= self.start_s + (self.count - 1) * self.stagger_s:
            raise ConfigError(f"end_s must be behind the last start, got {self.end_s}")
        self.settings()  # checks the rest

    @property
    def fill_ms(self) -> float:
        """How long a chunk's first frame waits for its last one."""
        return (self.chunk_frames - 1) * 1000 / self.rate_hz

    @property
    def min_passes(self) -> int:
        """Ticks that a chunk takes at least."""
        return self.min_steps * self.stages

    def settings(self) -> StreamSettings:
        """Returns what the scheduler is asked for."""
        return StreamSettings(
            rate_hz=self.rate_hz,
            budget_ms=self.budget_ms,
            steps=self.steps,
            min_steps=self.min_steps,
            first_frames=self.first_frames,
            chunk_frames=self.chunk_frames,
            stages=self.stages,
            batch_key=self.batch_key,
        )


@dataclass(frozen=True)
class Segment:
    """A time in which sources and device stay as they are.

    Attributes:
      begin_s: where it starts.
      end_s: where it ends.
      demand_hz: frames that come in a second, over all streams.
      capacity_hz: frames of these streams that the device can finish in a second, at floor steps and best batches.
      preferred_hz: the same at the steps that the streams prefer.
      takes_chunks: whether every stream's whole chunks can be in time one right behind the other, in ticks of all rows.
      busy: share of the time for a tick per chunk, each of one stream alone, at the steps that the streams prefer.
    """

    begin_s: float
    end_s: float
    demand_hz: float
    capacity_hz: float
    preferred_hz: float
    takes_chunks: bool
    busy: float = 0.0

    @property
    def load(self) -> float:
        """Demand as a share of the capacity."""
        return self.demand_hz / self.capacity_hz


@dataclass(frozen=True)
class Trace:
    """A run to simulate.

    Attributes:
      name: of the trace, unique.
      description: what it is for.
      load: the most that is demanded at any time, as a share of what the device can do at floor steps.
      budgets: what frames are given, in words.
      duration_s: how long sources send.
      device: what runs the ticks.
      streams: what sends frames.
      seed: of everything random.
    """

    name: str
    description: str
    duration_s: float
    device: DeviceTrace
    streams: tuple[StreamTrace, ...]
    load: float | None = None
    budgets: str = ""
    seed: int = 0

    def __post_init__(self):
        _check(self, "duration_s", 0.1, LONGEST_S)
        if not self.name or not self.streams:
            raise ConfigError("name and streams must not be empty")
        for source in self.sources:
            if source.start_s >= self.duration_s:
                raise ConfigError(
                    f"start_s must be before duration_s={self.duration_s}, got {source.start_s}"
                )
        frames = sum((self.end_s(s) - s.start_s) * s.rate_hz for s in self.sources)
        if frames > MOST_FRAMES:
            raise ConfigError(f"a trace may have {MOST_FRAMES} frames, this one has {frames:.0f}; shorten it")

    @functools.cached_property
    def sources(self) -> tuple[StreamTrace, ...]:
        """The streams one by one: `count` is 1 in each."""
        return tuple(
            dataclasses.replace(s, count=1, start_s=s.start_s + i * s.stagger_s)
            for s in self.streams
            for i in range(s.count)
        )

    def end_s(self, source: StreamTrace) -> float:
        """Returns when a source leaves."""
        return self.duration_s if source.end_s is None else min(source.end_s, self.duration_s)

    @functools.cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The whole run, cut where a stream joins or leaves or the device's speed changes."""
        cuts = {0.0, self.duration_s, *(at for at, _ in self.device.speed)}
        cuts |= {s.start_s for s in self.sources} | {self.end_s(s) for s in self.sources}
        times = sorted(at for at in cuts if 0 <= at <= self.duration_s)
        return tuple(self._segment(a, b) for a, b in itertools.pairwise(times))

    def _segment(self, begin_s: float, end_s: float) -> Segment:
        active = [s for s in self.sources if s.start_s <= begin_s and self.end_s(s) >= end_s]
        speed = self.device.speed_at(begin_s)
        return Segment(
            begin_s,
            end_s,
            sum(s.rate_hz for s in active),
            speed * capacity_hz(self.device, [(s, s.min_steps) for s in active]),
            speed * capacity_hz(self.device, [(s, s.steps) for s in active]),
            all(
                s.fill_ms + (s.min_passes * self.device.tick_ms(1, s.min_steps) + self.device.tail_ms) / speed
                <= s.budget_ms
                for s in active
            ),
            sum(s.rate_hz / s.chunk_frames * self.device.tick_ms(1, s.steps) / 1000 for s in active) / speed,
        )

    @property
    def peak_load(self) -> float:
        """The most that is demanded at any time, as a share of the capacity at floor steps."""
        return max(segment.load for segment in self.segments)

    @property
    def peak_busy(self) -> float:
        """The most time that is needed for a tick per chunk at any time, as a share, see `Segment.busy`."""
        return max(segment.busy for segment in self.segments)

    @property
    def overloads(self) -> tuple[tuple[float, float], ...]:
        """When more is demanded than the device can do, as (from, to) seconds."""
        spans: list[tuple[float, float]] = []
        for segment in self.segments:
            if segment.load <= 1:
                continue
            if spans and spans[-1][1] == segment.begin_s:
                spans[-1] = (spans[-1][0], segment.end_s)
            else:
                spans.append((segment.begin_s, segment.end_s))
        return tuple(spans)


def capacity_hz(device: DeviceTrace, active: Sequence[tuple[StreamTrace, int]]) -> float:
    """Returns frames per second at full speed, for streams with so many steps, in the mix that they demand.

    Streams of one shape and one number of steps share ticks, in the batch size that gives most.
    """
    groups: dict[tuple[str | None, int], list[StreamTrace]] = {}
    for stream, steps in active:
        groups.setdefault((stream.batch_key, steps), []).append(stream)
    time_share = 0.0
    for (_, steps), streams in groups.items():
        chunks = max(b / device.tick_ms(b, steps) for b in device.batch_sizes if b <= len(streams))
        frames = sum(s.rate_hz for s in streams) / sum(s.rate_hz / s.chunk_frames for s in streams)
        time_share += sum(s.rate_hz for s in streams) / (1000 * chunks * frames)
    return sum(stream.rate_hz for stream, _ in active) / time_share if active else math.inf


def least_ms(device: DeviceTrace, stream: StreamTrace) -> float:
    """Returns the least work, in ms at full speed, that finishes a frame: all its ticks, at floor steps and alone.

    A chunk takes at least (floor steps * stages) ticks of its stream, none shorter than one that computes one row. A
    first group takes as many passes. Both can be filled up, so neither has to wait for more frames. Behind the last
    comes the tail.
    """
    return stream.min_passes * device.tick_ms(1, 1) + device.tail_ms


def bound_ms(device: DeviceTrace, stream: StreamTrace) -> float:
    """Returns the latency that a stream's whole chunks have at full speed on a device that has nothing else to do.

    A chunk's first frame waits for its last one, then come (steps x stages) ticks of its one row and a tail. All
    frames of a chunk have the latency of the first, as they are shown in the rhythm in which they came.
    """
    return stream.fill_ms + stream.steps * stream.stages * device.tick_ms(1, 1) + device.tail_ms


def first_bound_ms(device: DeviceTrace, stream: StreamTrace) -> float:
    """Returns the same of a stream's first group, whose rows take all passes together."""
    fill_ms = (stream.first_frames - 1) * 1000 / stream.rate_hz
    rows = -(-stream.first_frames // stream.chunk_frames)
    return fill_ms + device.sequential_ms(stream.steps * stream.stages, rows) + device.tail_ms


def earliest_ns(device: DeviceTrace, stream: StreamTrace, arrival_ns: int) -> int:
    """Returns a time before which no policy whatever can finish a frame, even one that knows what will come.

    It is the end of `least_ms` begun at its arrival, as fast as the device then is, with all the luck that its noise
    can bring: nothing may enter before it is there, and no other chunk or stream makes a tick shorter.
    """
    return device.end_ns(arrival_ns, least_ms(device, stream) * max(0.5, 1 - LUCK * device.noise))


@dataclass(frozen=True)
class FrameArrival:
    """A frame that reaches us; `timestamp_ns` is by the source's clock, if it gave any."""

    at_ns: int
    timestamp_ns: int | None


def arrivals(trace: Trace, index: int) -> list[FrameArrival]:
    """Returns the frames of one source in the order in which they arrive; the same for the same trace."""
    source = trace.sources[index]
    draw = random.Random(f"{trace.seed} {index}")
    clock = 1 + source.drift_ppm * 1e-6
    start_s, end_s = source.start_s, trace.end_s(source)
    found: list[FrameArrival] = []
    earliest_ns = 0
    for frame in range(int((end_s - start_s) * source.rate_hz * clock) + 1):
        taken_s = start_s + frame / (source.rate_hz * clock)
        if taken_s >= end_s or any(at <= taken_s < at + length for at, length in source.stalls):
            continue
        jitter_ms = min(draw.expovariate(1.0), JITTER_TAIL) * source.jitter_ms
        missing, duplicate, stale = draw.random(), draw.random(), draw.random()
        at_ns = round(taken_s * SECOND + (source.delay_ms + jitter_ms) * MS)
        if source.burst_ms:
            burst_ns = round(source.burst_ms * MS)
            at_ns = -(-at_ns // burst_ns) * burst_ns
        if stale < source.stale_share:
            at_ns += round(source.stale_ms * MS)
        elif not source.reorder:
            at_ns = earliest_ns = max(at_ns, earliest_ns)
        timestamp_ns = round((taken_s * clock + source.clock_s) * SECOND)
        known = source.timestamps and missing >= source.missing_share
        arrival = FrameArrival(at_ns, timestamp_ns if known else None)
        found += [arrival] * (2 if duplicate < source.duplicate_share else 1)
    return sorted(found, key=lambda a: a.at_ns)


# --- reading and writing


def read_trace(path: Path) -> Trace:
    """Returns the trace of a file; raises ConfigError, in one line, if it cannot be read or does not hold one."""
    try:
        values = json.loads(path.read_text())
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read ({e.strerror})") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: is not JSON (not even text)") from e
    except json.JSONDecodeError as e:
        raise ConfigError(f"{path}: is not JSON (line {e.lineno}: {e.msg})") from e
    except (RecursionError, ValueError) as e:  # ValueError: a number of thousands of digits
        raise ConfigError(f"{path}: is nested too deeply, or holds a number that is too long") from e
    try:
        return trace_from_dict(values)
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e


def trace_from_dict(values: Any) -> Trace:
    """Returns the trace that these values describe; raises ConfigError."""
    return build(Trace, values)


def trace_to_dict(trace: Trace) -> dict[str, Any]:
    """Returns what `trace_from_dict` takes, without what has its default."""

    def shorten(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            pairs = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
            return {f.name: shorten(v) for f, v in pairs if v != f.default}
        return [shorten(v) for v in value] if isinstance(value, tuple) else value

    return shorten(trace)


def _check(owner: Any, name: str, least: float, most: float) -> None:
    value = getattr(owner, name)
    if not least <= value <= most:  # NaN is not either
        raise ConfigError(f"{name} must be {least:.9g} to {most:.9g}, got {value!r}")


def _check_spans(name: str, spans: Sequence[tuple[float, float]], least: float, most: float) -> None:
    for at_s, value in spans:
        if not 0 <= at_s <= LONGEST_S or not least <= value <= most:
            raise ConfigError(
                f"{name} must be pairs of a second and a value from {least:.9g} to {most:.9g}, got [{at_s}, {value}]"
            )


def merged(trace: Trace) -> Iterator[tuple[int, int, int, FrameArrival | None]]:
    """Yields (time, rank, source, arrival) of a whole run in order; rank 0 joins, 1 is a frame, 2 leaves."""

    def of(index: int) -> Iterator[tuple[int, int, int, FrameArrival | None]]:
        source = trace.sources[index]
        yield round(source.start_s * SECOND), 0, index, None
        frames = arrivals(trace, index)
        yield from ((a.at_ns, 1, index, a) for a in frames)
        end_ns = round(trace.end_s(source) * SECOND)
        yield max([end_ns, *(a.at_ns for a in frames[-1:])]), 2, index, None

    yield from heapq.merge(*(of(i) for i in range(len(trace.sources))), key=lambda event: event[:3])
