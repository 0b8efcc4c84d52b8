"""What became of every frame, in numbers: per stream and over all, in bounded memory however long it runs.

`Metrics` takes the events of `runtime.types` and knows no clock: its time is that of the events. docs/scheduling.md
defines each number.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from types import TracebackType
from typing import Any, Self

from svd2_jax.errors import SessionError
from svd2_jax.runtime.types import (
    MS,
    SECOND,
    Event,
    Fate,
    FrameRecord,
    PromptRecord,
    StepChange,
    StreamId,
    StreamSettings,
    TickRecord,
)

FINE = 0.01  # relative width of the bins of latencies over a whole run
COARSE = 0.03  # the same within one bucket of the timeline, where there are many histograms
SMALLEST_NS = 1000  # everything up to one microsecond is one bin

BUCKETS = 600  # of a timeline at most; the first minute fills them
BUCKET_NS = 100 * MS  # width of a bucket at first; doubles whenever they run out
RECENT_NS = 2 * SECOND  # "recent" is the last 2 to 4 s
KEPT_STREAMS = 256  # beyond, the streams that were silent longest are kept in the totals only
KEPT_PROMPTS = 64  # of a stream, the latest


class Histogram:
    """Counts durations in bins of equal relative width; the memory is that of the bins in use."""

    __slots__ = ("_bins", "_scale", "count", "high_ns", "low_ns", "sum_ns")

    def __init__(self, resolution: float = FINE):
        """Starts empty, with bins that are `resolution` of their value wide."""
        self._scale = 1 / math.log1p(resolution)
        self._bins: dict[int, int] = {}
        self.count = self.sum_ns = self.high_ns = 0
        self.low_ns = 0

    def add(self, value_ns: int) -> None:
        """Counts one duration; below 0 counts as 0."""
        value_ns = max(0, value_ns)
        # A bin's number is that of its middle, so that a bin of one value is off by half a width at most.
        index = round(math.log(max(value_ns, SMALLEST_NS) / SMALLEST_NS) * self._scale)
        self._bins[index] = self._bins.get(index, 0) + 1
        self.low_ns = min(self.low_ns, value_ns) if self.count else value_ns
        self.high_ns = max(self.high_ns, value_ns)
        self.count += 1
        self.sum_ns += value_ns

    def merge(self, other: Histogram) -> None:
        """Adds what another histogram of the same resolution counted."""
        if not other.count:
            return
        for index, count in other._bins.items():
            self._bins[index] = self._bins.get(index, 0) + count
        self.low_ns = min(self.low_ns, other.low_ns) if self.count else other.low_ns
        self.high_ns = max(self.high_ns, other.high_ns)
        self.count += other.count
        self.sum_ns += other.sum_ns

    def quantile_ns(self, share: float) -> float | None:
        """Returns the least value that `share` of all do not exceed, to half a bin; None when empty."""
        if not self.count:
            return None
        rank, seen = max(1, math.ceil(share * self.count)), 0
        for index in sorted(self._bins):
            seen += self._bins[index]
            if rank <= seen < self.count or rank < seen:
                return min(max(SMALLEST_NS * math.exp(index / self._scale), self.low_ns), self.high_ns)
        return self.high_ns

    @property
    def mean_ns(self) -> float | None:
        return self.sum_ns / self.count if self.count else None


class Tally:
    """Counts of any set of events: of a stream or all, over the whole run or over one bucket of time.

    Attributes:
      shown: frames shown by their deadline.
      late: frames shown behind it.
      drops: dropped frames by the name of the reason.
      latency: from arrival to shown, of all shown frames.
      jitter: see `Summary.jitter_ms`.
      steps_sum: steps of all shown frames, added up.
      steps_low: least steps of a tick, 0 before the first.
      steps_high: most steps of a tick.
      steps_last: steps of the last tick.
      step_changes: changes that the scheduler reported.
      ticks: ticks (of a stream: those it took part in).
      batch_sum: streams of all these ticks, added up.
      batch_high: most streams of a tick.
      busy_ns: device time; a stream's share of a tick is its equal part.
      queue_sum: input frames that waited (over all streams) at the start of each tick, added up.
      queue_high: most of them.
      budget_ns: the latest frame's budget.
      first_arrival_ns: least arrival.
      first_shown_ns: when the first frame was shown.
      last_shown_ns: when the last frame was.
      last_ns: time of the last event.
    """

    __slots__ = (
        "batch_high", "batch_sum", "budget_ns", "busy_ns", "drops", "first_arrival_ns", "first_shown_ns", "jitter",
        "last_ns", "last_shown_ns", "late", "latency", "queue_high", "queue_sum", "shown", "step_changes", "steps_high",
        "steps_last", "steps_low", "steps_sum", "ticks",
    )  # fmt: skip

    def __init__(self, resolution: float = COARSE):
        """Starts empty."""
        self.latency, self.jitter = Histogram(resolution), Histogram(resolution)
        self.drops: dict[str, int] = {}
        self.shown = self.late = self.ticks = self.batch_sum = self.batch_high = self.busy_ns = 0
        self.queue_sum = self.queue_high = self.budget_ns = self.step_changes = 0
        self.steps_sum = self.steps_low = self.steps_high = self.steps_last = 0
        self.first_arrival_ns: int | None = None
        self.first_shown_ns: int | None = None
        self.last_shown_ns: int | None = None
        self.last_ns: int | None = None

    @property
    def dropped(self) -> int:
        return sum(self.drops.values())

    @property
    def displayed(self) -> int:
        """Frames shown, by their deadline or not."""
        return self.shown + self.late

    def add_frame(self, record: FrameRecord, jitter_ns: int | None) -> None:
        """Counts the fate of a frame."""
        self.budget_ns = record.deadline_ns - record.arrival_ns
        self.first_arrival_ns = _least(self.first_arrival_ns, record.arrival_ns)
        self.last_ns = _most(self.last_ns, record.shown_ns or record.done_ns or record.arrival_ns)
        if record.fate is Fate.DROPPED or record.shown_ns is None:
            reason = record.reason.value if record.reason else "unknown"
            self.drops[reason] = self.drops.get(reason, 0) + 1
            return
        if record.fate is Fate.LATE:
            self.late += 1
        else:
            self.shown += 1
        self.latency.add(record.shown_ns - record.arrival_ns)
        self.steps_sum += record.steps or 0
        self.first_shown_ns = _least(self.first_shown_ns, record.shown_ns)
        self.last_shown_ns = _most(self.last_shown_ns, record.shown_ns)
        if jitter_ns is not None:
            self.jitter.add(jitter_ns)

    def add_tick(self, record: TickRecord, busy_ns: int, share: float = 1.0) -> None:
        """Counts a tick, of whose device time `busy_ns` this tally takes a share."""
        steps, entries = record.tick.steps, len(record.tick.entries)
        self.ticks += 1
        self.batch_sum += entries
        self.batch_high = max(self.batch_high, entries)
        self.busy_ns += round(busy_ns * share)
        self.queue_sum += record.queued
        self.queue_high = max(self.queue_high, record.queued)
        self.steps_low = min(self.steps_low or steps, steps)
        self.steps_high = max(self.steps_high, steps)
        self.steps_last = steps
        self.last_ns = _most(self.last_ns, record.done_ns)

    def merge(self, later: Tally) -> None:
        """Adds what a later tally counted."""
        self.latency.merge(later.latency)
        self.jitter.merge(later.jitter)
        for reason, count in later.drops.items():
            self.drops[reason] = self.drops.get(reason, 0) + count
        for name in (
            "shown",
            "late",
            "steps_sum",
            "step_changes",
            "ticks",
            "batch_sum",
            "busy_ns",
            "queue_sum",
        ):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        for name in ("batch_high", "queue_high", "steps_high"):
            setattr(self, name, max(getattr(self, name), getattr(later, name)))
        self.steps_low = min(self.steps_low or later.steps_low, later.steps_low or self.steps_low)
        self.steps_last = later.steps_last or self.steps_last
        self.budget_ns = later.budget_ns or self.budget_ns
        for name in ("first_arrival_ns", "first_shown_ns"):
            setattr(self, name, _least(getattr(self, name), getattr(later, name)))
        for name in ("last_shown_ns", "last_ns"):
            setattr(self, name, _most(getattr(self, name), getattr(later, name)))


class Timeline:
    """Tallies of consecutive stretches of time. When they run out, two become one and all are twice as wide.

    Frames are placed at their arrival, ticks at their start.

    Attributes:
      start_ns: start of bucket 0.
      width_ns: time that each bucket covers.
      buckets: bucket number -> tally, for stretches in which something happened.
    """

    def __init__(self, start_ns: int, limit: int = BUCKETS, width_ns: int = BUCKET_NS):
        """Starts empty at a time; has less than `limit` buckets behind it."""
        self.start_ns, self.width_ns, self._limit = start_ns, width_ns, limit
        self.buckets: dict[int, Tally] = {}

    def at(self, time_ns: int) -> Tally:
        """Returns the tally of a moment; one shortly before the start has a bucket, too."""
        index = (time_ns - self.start_ns) // self.width_ns
        while abs(index) >= self._limit:
            merged: dict[int, Tally] = {}
            for i in sorted(self.buckets):
                if i // 2 in merged:
                    merged[i // 2].merge(self.buckets[i])
                else:
                    merged[i // 2] = self.buckets[i]
            self.buckets, self.width_ns = merged, 2 * self.width_ns
            index //= 2
        if index not in self.buckets:
            self.buckets[index] = Tally()
        return self.buckets[index]

    def items(self) -> list[tuple[int, Tally]]:
        """Returns (start of the bucket in ns, tally) of all buckets in which something happened, in order."""
        return [(self.start_ns + i * self.width_ns, self.buckets[i]) for i in sorted(self.buckets)]


@dataclass(frozen=True)
class Summary:
    """The numbers of one stream, or of all where `stream` is None. Durations are in milliseconds.

    Attributes:
      stream: whose.
      name: what the stream is called.
      prompt: what it is re-drawn to now; empty where that was not told, and over all streams.
      span_s: from the first arrival to the last event; of recent numbers, the time that they speak of.
      frames_in: input frames.
      shown: frames shown by their deadline.
      late: frames shown behind it.
      dropped: frames that were not shown, by reason.
      inside: frames whose fate is not known yet.
      repeated: frames that were reported more than once; anything but 0 is a fault of the scheduler.
      time_to_first_ms: from the first arrival until a frame was shown; over all streams, the longest.
      budget_ms: from a frame's arrival to its deadline; over all streams, the longest.
      latency_p50_ms: from arrival to shown, over all shown frames; exact to 0.5 %.
      latency_p95_ms: the same.
      latency_p99_ms: the same.
      latency_max_ms: the longest.
      jitter_ms: mean deviation of the time between two frames shown one after the other from the time between them
        in the source: by its timestamps, or where it gave none, by the stream's rate.
      jitter_p95_ms: the deviation that 95 % do not exceed.
      miss_rate: share of the shown frames that were late.
      drop_rate: share of the frames with a known fate that were dropped.
      fps_shown: frames shown per second between the first and the last one.
      ticks: ticks of the device (of a stream: those it took part in).
      batch_mean: streams in a tick.
      batch_max: the most.
      utilisation: share of the span in which the device worked; a stream's share of a tick is its equal part.
      steps_mean: denoising steps of the shown frames.
      steps_now: denoising steps of the last tick.
      step_changes: how often the steps changed.
      queue_mean: input frames that waited at the start of a tick, over all streams.
      queue_max: the most.
    """

    stream: StreamId | None
    name: str
    prompt: str
    span_s: float
    frames_in: int
    shown: int
    late: int
    dropped: Mapping[str, int]
    inside: int
    repeated: int
    time_to_first_ms: float | None
    budget_ms: float
    latency_p50_ms: float | None
    latency_p95_ms: float | None
    latency_p99_ms: float | None
    latency_max_ms: float | None
    jitter_ms: float | None
    jitter_p95_ms: float | None
    miss_rate: float
    drop_rate: float
    fps_shown: float
    ticks: int
    batch_mean: float
    batch_max: int
    utilisation: float
    steps_mean: float
    steps_now: int
    step_changes: int
    queue_mean: float
    queue_max: int

    @property
    def label(self) -> str:
        """Name and prompt in one line."""
        return " ".join(f"{self.name}: {self.prompt}".split()) if self.prompt else self.name

    @property
    def frames_dropped(self) -> int:
        return sum(self.dropped.values())

    @property
    def is_balanced(self) -> bool:
        """Whether every input frame is accounted for exactly once; says nothing where only recent ones count."""
        settled = self.shown + self.late + self.frames_dropped
        return self.repeated == 0 and self.frames_in == settled + self.inside

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values under the attributes' names, rounded to 6 digits behind the point."""
        values = dataclasses.asdict(self)
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}


@dataclass
class _Stream:
    """What is kept of one stream; over all streams where no single one is meant."""

    name: str
    prompts: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=KEPT_PROMPTS))
    total: Tally = field(default_factory=lambda: Tally(FINE))
    recent: tuple[int, Tally, Tally] = field(default_factory=lambda: (0, Tally(FINE), Tally(FINE)))
    timeline: Timeline | None = None
    interval_ns: int | None = None
    arrived: int = 0
    open_numbers: set[int] = field(
        default_factory=set
    )  # arrived, fate unknown; as many as the scheduler may hold
    repeated: int = 0
    time_to_first_ns: int | None = None
    budget_ns: int = 0
    last: FrameRecord | None = None

    def recent_at(self, now_ns: int) -> Tally:
        """The tally of the present 2 s; the one before is kept beside it."""
        number, _, latest = self.recent
        if (current := now_ns // RECENT_NS) > number:
            before = latest if current == number + 1 else Tally(FINE)
            self.recent = (current, before, Tally(FINE))
        return self.recent[2]

    def tallies(self, at_ns: int, now_ns: int) -> tuple[Tally, Tally, Tally]:
        """All tallies that count an event which belongs to `at_ns` and becomes known now."""
        if self.timeline is None:
            self.timeline = Timeline(at_ns)
        return self.total, self.recent_at(now_ns), self.timeline.at(at_ns)


class Metrics:
    """Takes events in, in order of time, and gives sums out. May be used from several threads."""

    def __init__(self, kept_streams: int = KEPT_STREAMS):
        """Starts empty; keeps the single numbers of the latest streams only."""
        self._kept = kept_streams
        self._lock = threading.Lock()
        self._all = _Stream("all")
        self._streams: dict[StreamId, _Stream] = {}  # the one that was silent longest first
        self._now_ns = self._ran_ns = 0  # of the last event, and of the last tick's end

    def opened(
        self, stream: StreamId, settings: StreamSettings, name: str | None = None, prompt: str | None = None
    ) -> None:
        """Tells a stream's rate (for the jitter of sources without timestamps), what to call it, and its prompt."""
        with self._lock:
            kept = self._stream(stream)
            kept.interval_ns, kept.budget_ns = settings.interval_ns, settings.budget_ns
            kept.name = name or kept.name
            if prompt is not None:
                kept.prompts.append((0, prompt))  # from before the first event

    def arrived(self, stream: StreamId, number: int) -> None:
        """Counts an input frame as inside. Without this, a frame counts from the first event that implies it."""
        with self._lock:
            self._arrive(self._stream(stream), number)

    def __call__(self, event: Event) -> None:
        """Takes one event."""
        with self._lock:
            if isinstance(event, FrameRecord):
                self._add_frame(event)
            elif isinstance(event, TickRecord):
                self._add_tick(event)
            elif isinstance(event, PromptRecord):
                self._stream(event.stream).prompts.append((event.at_ns, event.prompt))
            else:
                self._add_change(event)

    @property
    def streams(self) -> tuple[StreamId, ...]:
        """The streams whose numbers are kept, ascending."""
        with self._lock:
            return tuple(sorted(self._streams))

    def prompts(self, stream: StreamId) -> tuple[tuple[int, str], ...]:
        """Returns a stream's latest prompts in order, each with the time from which it held: 0 for the first.

        Raises:
          SessionError: the stream is not known, or no longer.
        """
        with self._lock:
            return tuple(self._known(stream).prompts)

    def timeline(self, stream: StreamId | None = None) -> Timeline:
        """Returns a stream's timeline, or the one over all; read it when no more events come."""
        with self._lock:
            kept = self._all if stream is None else self._known(stream)
            return kept.timeline or Timeline(self._now_ns)

    def summary(self, stream: StreamId | None = None, recent: bool = False) -> Summary:
        """Returns the numbers of a stream or of all; with `recent`, those that speak of the last 2 to 4 s.

        Raises:
          SessionError: the stream is not known, or no longer.
        """
        with self._lock:
            kept = self._all if stream is None else self._known(stream)
            tally = kept.total
            begin_ns, end_ns = tally.first_arrival_ns, tally.last_ns
            if recent:
                kept.recent_at(self._now_ns)
                # Not from the first arrival on, which is a latency before what is recent.
                begin_ns = max(begin_ns or 0, (kept.recent[0] - 1) * RECENT_NS)
                end_ns = self._now_ns
                tally = Tally(FINE)
                tally.merge(kept.recent[1])
                tally.merge(kept.recent[2])
            span_ns = 0 if begin_ns is None or end_ns is None else max(0, end_ns - begin_ns)
            return _summarise(stream, kept, tally, self._inside(stream), span_ns)

    # --- inner workings

    def _inside(self, stream: StreamId | None) -> int:
        some = self._streams.values() if stream is None else [self._streams[stream]]
        return sum(len(kept.open_numbers) for kept in some)

    def _stream(self, stream: StreamId) -> _Stream:
        kept = self._streams.pop(stream, None) or _Stream(f"stream {stream}")
        self._streams[stream] = kept
        if len(self._streams) > self._kept:
            for other, silent in self._streams.items():
                if not silent.open_numbers and other != stream:
                    del self._streams[other]
                    break
        return kept

    def _known(self, stream: StreamId) -> _Stream:
        if stream not in self._streams:
            raise SessionError(
                f"no numbers of stream {stream!r} are kept; those kept are of {sorted(self._streams)}"
            )
        return self._streams[stream]

    def _arrive(self, kept: _Stream, number: int) -> None:
        if number >= kept.arrived:
            kept.open_numbers.update(range(kept.arrived, number + 1))
            self._all.arrived += number + 1 - kept.arrived
            kept.arrived = number + 1

    def _add_frame(self, record: FrameRecord) -> None:
        kept = self._stream(record.stream)
        self._now_ns = max(self._now_ns, record.shown_ns or record.done_ns or record.arrival_ns)
        self._arrive(kept, record.number)
        if record.number in kept.open_numbers:
            kept.open_numbers.remove(record.number)
        else:
            kept.repeated += 1
            self._all.repeated += 1
        jitter_ns = None
        if record.shown_ns is not None:
            if kept.last is not None:
                jitter_ns = _jitter_ns(kept.last, record, kept.interval_ns)
            kept.last = record
        for one in (self._all, kept):
            one.budget_ns = max(one.budget_ns, record.deadline_ns - record.arrival_ns)
            for tally in one.tallies(record.arrival_ns, self._now_ns):
                tally.add_frame(record, jitter_ns)
        total = kept.total
        if total.first_shown_ns is not None and total.first_arrival_ns is not None and total.displayed == 1:
            kept.time_to_first_ns = total.first_shown_ns - total.first_arrival_ns
            self._all.time_to_first_ns = _most(self._all.time_to_first_ns, kept.time_to_first_ns)

    def _add_tick(self, record: TickRecord) -> None:
        self._now_ns = max(self._now_ns, record.done_ns)
        # While two ticks are in flight, the device works once.
        busy_ns = max(0, record.done_ns - max(record.started_ns, self._ran_ns))
        self._ran_ns = max(self._ran_ns, record.done_ns)
        for tally in self._all.tallies(record.started_ns, self._now_ns):
            tally.add_tick(record, busy_ns)
        for entry in record.tick.entries:
            for tally in self._stream(entry.stream).tallies(record.started_ns, self._now_ns):
                tally.add_tick(record, busy_ns, 1 / len(record.tick.entries))

    def _add_change(self, change: StepChange) -> None:
        self._now_ns = max(self._now_ns, change.at_ns)
        for kept in (self._all, self._stream(change.stream)):
            for tally in kept.tallies(change.at_ns, self._now_ns):
                tally.step_changes += 1
                tally.last_ns = _most(tally.last_ns, change.at_ns)


class JsonLines:
    """Writes every event as one line of JSON, and a summary now and then; docs/scheduling.md lists the keys.

    Every line is one write to the system, so a crash leaves whole lines. A disk that fails does not stop the
    streams: `error` keeps the reason, and nothing more is written.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        metrics: Metrics | None = None,
        every_s: float = 10.0,
        about: Mapping[str, Any] | None = None,
    ):
        """Starts a new file.

        Args:
          path: the file; one that is there is replaced.
          metrics: where summaries come from; fed by somebody else, before this. None: no summaries.
          every_s: time between two summaries.
          about: what to say in the first line.

        Raises:
          OSError: the file cannot be written.
        """
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by close())
        self._metrics, self._every_ns = metrics, round(every_s * SECOND)
        self._next_ns: int | None = None
        self._at_ns = 0
        self.error: OSError | None = None
        self._write({"kind": "start", "format": 1, **(about or {})})

    def __call__(self, event: Event) -> None:
        """Writes one event."""
        self._write(to_dict(event))
        self._at_ns = max(self._at_ns, _time_of(event))
        if self._next_ns is None:
            self._next_ns = self._at_ns + self._every_ns
        if self._at_ns >= self._next_ns:
            self._write_summary(final=False)
            self._next_ns = self._at_ns + self._every_ns

    def close(self) -> None:
        """Writes the final summary and closes the file; a second close does nothing."""
        if not self._file.closed:
            self._write_summary(final=True)
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def _write_summary(self, final: bool) -> None:
        if self._metrics is not None:
            streams = [self._metrics.summary(stream).to_dict() for stream in self._metrics.streams]
            overall = self._metrics.summary().to_dict()
            line = {
                "kind": "summary",
                "at_ns": self._at_ns,
                "final": final,
                "all": overall,
                "streams": streams,
            }
            self._write(line)

    def _write(self, line: Mapping[str, Any]) -> None:
        if self.error is not None:
            return
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        try:
            if (written := self._file.write(data)) != len(data):
                self._file.truncate(self._file.tell() - (written or 0))  # whole lines only
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            self.error = e


def to_dict(event: Event) -> dict[str, Any]:
    """Returns an event as plain values: its fields by their names, and its kind."""
    if isinstance(event, FrameRecord):
        values = dataclasses.asdict(event)
        reason = event.reason.value if event.reason else None
        return {"kind": "frame", **values, "fate": event.fate.value, "reason": reason}
    if isinstance(event, StepChange):
        return {"kind": "steps", **dataclasses.asdict(event)}
    if isinstance(event, PromptRecord):
        return {"kind": "prompt", **dataclasses.asdict(event)}
    tick = event.tick
    return {
        "kind": "tick",
        "number": tick.number,
        "entries": [{"stream": p.stream, "frames": list(p.frames), "fill": p.fill} for p in tick.entries],
        "steps": tick.steps,
        "first": tick.first,
        "predicted_ns": tick.predicted_ns,
        "started_ns": event.started_ns,
        "done_ns": event.done_ns,
        "queued": event.queued,
    }


def fan_out(*takers: Callable[[Event], None]) -> Callable[[Event], None]:
    """Returns a function that hands each event to all takers, in this order."""

    def report(event: Event) -> None:
        for taker in takers:
            taker(event)

    return report


def _time_of(event: Event) -> int:
    if isinstance(event, FrameRecord):
        return event.shown_ns or event.done_ns or event.arrival_ns
    return event.done_ns if isinstance(event, TickRecord) else event.at_ns


def _jitter_ns(before: FrameRecord, record: FrameRecord, interval_ns: int | None) -> int | None:
    """Deviation of the time between two shown frames from that in the source; None where that is not known."""
    if before.shown_ns is None or record.shown_ns is None:
        return None
    if before.timestamp_ns is not None and record.timestamp_ns is not None:
        expected = record.timestamp_ns - before.timestamp_ns
    elif interval_ns is not None:
        expected = (record.number - before.number) * interval_ns
    else:
        return None
    return abs(record.shown_ns - before.shown_ns - expected)


def _summarise(stream: StreamId | None, kept: _Stream, tally: Tally, inside: int, span_ns: int) -> Summary:
    shown_ns = (tally.last_shown_ns or 0) - (tally.first_shown_ns or 0)
    known = tally.displayed + tally.dropped
    return Summary(
        stream=stream,
        name=kept.name,
        prompt=kept.prompts[-1][1] if kept.prompts else "",
        span_s=span_ns / SECOND,
        frames_in=kept.arrived,
        shown=tally.shown,
        late=tally.late,
        dropped=dict(sorted(tally.drops.items())),
        inside=inside,
        repeated=kept.repeated,
        time_to_first_ms=_ms(kept.time_to_first_ns),
        budget_ms=kept.budget_ns / MS,
        latency_p50_ms=_ms(tally.latency.quantile_ns(0.5)),
        latency_p95_ms=_ms(tally.latency.quantile_ns(0.95)),
        latency_p99_ms=_ms(tally.latency.quantile_ns(0.99)),
        latency_max_ms=_ms(tally.latency.high_ns if tally.latency.count else None),
        jitter_ms=_ms(tally.jitter.mean_ns),
        jitter_p95_ms=_ms(tally.jitter.quantile_ns(0.95)),
        miss_rate=_share(tally.late, tally.displayed),
        drop_rate=_share(tally.dropped, known),
        fps_shown=_share((tally.displayed - 1) * SECOND, shown_ns),
        ticks=tally.ticks,
        batch_mean=_share(tally.batch_sum, tally.ticks),
        batch_max=tally.batch_high,
        utilisation=min(1.0, _share(tally.busy_ns, span_ns)),  # a long tick may have begun before the span
        steps_mean=_share(tally.steps_sum, tally.displayed),
        steps_now=kept.total.steps_last,
        step_changes=tally.step_changes,
        queue_mean=_share(tally.queue_sum, tally.ticks),
        queue_max=tally.queue_high,
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _ms(ns: float | None) -> float | None:
    return None if ns is None else ns / MS


def _least(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def _most(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else max(a, b)
