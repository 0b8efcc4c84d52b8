"""What became of every frame, in numbers: per stream and over all, in bounded memory however long it runs.

`Metrics` takes the events of `runtime.types` and has no clock: its time is that of the events. docs/scheduling.md
defines each number.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from svd2_jax.errors import SessionError
from svd2_jax.runtime.types import (
    MS,
    NEVER_NS,
    SECOND,
    Event,
    Fate,
    FrameRecord,
    PromptRecord,
    StreamId,
    StreamSettings,
    TickRecord,
)

FINE = 0.01  # relative width of the bins of latencies over a whole run
COARSE = 0.03  # the same within one bucket of the timeline, where there are many histograms
SMALLEST_NS = 1000  # everything up to one microsecond is one bin

BUCKETS = 600  # of a timeline at most
BUCKET_NS = 100 * MS  # width of a bucket at first; doubles whenever they run out
RECENT_NS = 2 * SECOND  # "recent" is the last 2 to 4 s
STORED_STREAMS = 256  # beyond, the streams that were silent longest count in the totals only
STORED_PROMPTS = 64  # of a stream, the latest


class Histogram:
    """Counts durations in bins of equal relative width; its memory is that of the bins in use.

    Attributes:
      count: how many there were.
      sum_ns: their sum.
      low_ns: the least; `NEVER_NS` without any.
      high_ns: the most.
    """

    __slots__ = ("_bins", "_scale", "count", "high_ns", "low_ns", "sum_ns")

    def __init__(self, resolution: float = FINE):
        """Starts empty, with bins that are `resolution` of their value wide."""
        self._scale = 1 / math.log1p(resolution)
        self._bins: Counter[int] = Counter()
        self.count = self.sum_ns = self.high_ns = 0
        self.low_ns = NEVER_NS

    def add(self, value_ns: int) -> None:
        """Counts one duration; below 0 counts as 0."""
        value_ns = max(0, value_ns)
        # A bin's number is that of its middle, so that a bin of one value is off by half a width at most.
        self._bins[round(math.log(max(value_ns, SMALLEST_NS) / SMALLEST_NS) * self._scale)] += 1
        self.low_ns, self.high_ns = min(self.low_ns, value_ns), max(self.high_ns, value_ns)
        self.count += 1
        self.sum_ns += value_ns

    def merge(self, other: Histogram) -> None:
        """Adds what another histogram of the same resolution counted."""
        self._bins.update(other._bins)
        self.low_ns, self.high_ns = min(self.low_ns, other.low_ns), max(self.high_ns, other.high_ns)
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


SUMS = ("shown", "late", "steps_sum", "step_changes", "ticks", "batch_sum", "busy_ns", "queue_sum")
LEAST = ("steps_low", "first_shown_ns")
MOST = ("budget_ns", "steps_high", "batch_high", "queue_high", "last_shown_ns")


class Tally:
    """Counts of any set of events: of one stream or all, over the whole run or over one bucket of time.

    Attributes:
      shown: frames shown by their deadline.
      late: frames shown behind it.
      drops: dropped frames by the name of the reason.
      latency: from arrival to shown, of all shown frames.
      jitter: of all shown frames but the first, see `jitter_ms` in docs/scheduling.md.
      steps_sum: steps of all shown frames, added up.
      steps_low: least steps of a tick; `NEVER_NS` before the first.
      steps_high: most steps of a tick.
      steps_last: steps of the last tick.
      step_changes: changes that the scheduler reported.
      ticks: ticks (of a stream: those it took part in).
      batch_sum: streams of all these ticks, added up.
      batch_high: most streams of a tick.
      busy_ns: device time; a stream's share of a tick is its equal part.
      queue_sum: input frames that waited (over all streams) at the start of each tick, added up.
      queue_high: most of them.
      budget_ns: longest latency budget of a frame.
      first_shown_ns: when the first frame was shown; `NEVER_NS` before.
      last_shown_ns: when the last frame was shown.
    """

    __slots__ = (*SUMS, *LEAST, *MOST, "drops", "jitter", "latency", "steps_last")

    def __init__(self, resolution: float = COARSE):
        """Starts empty."""
        self.latency, self.jitter = Histogram(resolution), Histogram(resolution)
        self.drops: Counter[str] = Counter()
        self.shown = self.late = self.ticks = self.batch_sum = self.batch_high = self.busy_ns = 0
        self.queue_sum = self.queue_high = self.budget_ns = self.step_changes = 0
        self.steps_sum = self.steps_high = self.steps_last = self.last_shown_ns = 0
        self.steps_low = self.first_shown_ns = NEVER_NS

    @property
    def dropped(self) -> int:
        return self.drops.total()

    @property
    def displayed(self) -> int:
        """Frames shown, by their deadline or not."""
        return self.shown + self.late

    def add_frame(self, record: FrameRecord, jitter_ns: int | None = None) -> None:
        """Counts the fate of a frame."""
        self.budget_ns = max(self.budget_ns, record.deadline_ns - record.arrival_ns)
        if record.fate is Fate.DROPPED or record.shown_ns is None:
            self.drops[record.reason.value if record.reason else "unknown"] += 1
            return
        if record.fate is Fate.LATE:
            self.late += 1
        else:
            self.shown += 1
        self.latency.add(record.shown_ns - record.arrival_ns)
        self.steps_sum += record.steps or 0
        self.first_shown_ns = min(self.first_shown_ns, record.shown_ns)
        self.last_shown_ns = max(self.last_shown_ns, record.shown_ns)
        if jitter_ns is not None:
            self.jitter.add(jitter_ns)

    def add_tick(self, record: TickRecord, busy_ns: int) -> None:
        """Counts a tick, of which this tally's device time is `busy_ns`."""
        steps, entries = record.tick.steps, len(record.tick.entries)
        self.ticks += 1
        self.batch_sum += entries
        self.batch_high = max(self.batch_high, entries)
        self.busy_ns += busy_ns
        self.queue_sum += record.queued
        self.queue_high = max(self.queue_high, record.queued)
        self.steps_low, self.steps_high = min(self.steps_low, steps), max(self.steps_high, steps)
        self.steps_last = steps

    def merge(self, later: Tally) -> None:
        """Adds what a later tally counted."""
        self.latency.merge(later.latency)
        self.jitter.merge(later.jitter)
        self.drops.update(later.drops)
        self.steps_last = later.steps_last or self.steps_last
        for name in SUMS:
            setattr(self, name, getattr(self, name) + getattr(later, name))
        for names, choose in ((LEAST, min), (MOST, max)):
            for name in names:
                setattr(self, name, choose(getattr(self, name), getattr(later, name)))


class Timeline:
    """Tallies of stretches of time in which something happened. When they run out, all become twice as wide.

    Frames are placed at their arrival, ticks at their start.

    Attributes:
      width_ns: time that each bucket covers.
      buckets: number -> tally; bucket i starts at i * width_ns.
      prompts: a stream's latest prompts in order, each with the time from which it held: 0 for the first.
    """

    def __init__(self):
        """Starts empty."""
        self.width_ns = BUCKET_NS
        self.buckets: defaultdict[int, Tally] = defaultdict(Tally)
        self.prompts: deque[tuple[int, str]] = deque(maxlen=STORED_PROMPTS)

    def at(self, time_ns: int) -> Tally:
        """Returns the tally of a moment."""
        while len(self.buckets) >= BUCKETS and time_ns // self.width_ns not in self.buckets:
            self.buckets = self._merged(2 * self.width_ns)
            self.width_ns *= 2
        return self.buckets[time_ns // self.width_ns]

    def items(self, width_ns: int | None = None) -> list[tuple[int, Tally]]:
        """Returns (start in ns, tally) of all stretches in which something happened, in order.

        Each is `width_ns` long, a multiple of the timeline's own width, which is the default.
        """
        width_ns = width_ns or self.width_ns
        buckets = self.buckets if width_ns == self.width_ns else self._merged(width_ns)
        return [(i * width_ns, buckets[i]) for i in sorted(buckets)]

    def _merged(self, width_ns: int) -> defaultdict[int, Tally]:
        merged: defaultdict[int, Tally] = defaultdict(Tally)
        for i in sorted(self.buckets):
            merged[i * self.width_ns // width_ns].merge(self.buckets[i])
        return merged


@dataclass(frozen=True)
class Summary:
    """The numbers of one stream, or of all where `stream` is None; docs/scheduling.md defines each of them.

    Names end in their unit; rates and the utilisation are shares from 0 to 1. What needs a shown frame is None without.
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
class _Numbers:
    """What is stored of one stream, or over all streams."""

    name: str
    total: Tally = field(default_factory=lambda: Tally(FINE))
    recent: dict[int, Tally] = field(default_factory=dict)  # of the present 2 s, and of those before
    timeline: Timeline = field(default_factory=Timeline)
    interval_ns: int | None = None
    arrived: int = 0
    open_numbers: set[int] = field(default_factory=set)  # arrived, fate unknown; the scheduler bounds them
    repeated: int = 0
    time_to_first_ns: int | None = None
    first_arrival_ns: int = NEVER_NS
    last_ns: int = 0  # time of the last event
    last_shown: FrameRecord | None = None

    def recent_at(self, now_ns: int) -> Tally:
        """Returns the tally of the present 2 s; the one before stays beside it."""
        slot = now_ns // RECENT_NS
        if slot not in self.recent:
            self.recent = {i: tally for i, tally in self.recent.items() if i == slot - 1}
            self.recent[slot] = Tally(FINE)
        return self.recent[slot]

    def tallies(self, event: Event, at_ns: int, now_ns: int) -> tuple[Tally, Tally, Tally]:
        """Returns all tallies that count an event which belongs to `at_ns` and becomes known now."""
        self.last_ns = max(self.last_ns, event.at_ns)
        return self.total, self.recent_at(now_ns), self.timeline.at(at_ns)

    def jitter_ns(self, record: FrameRecord) -> int | None:
        """Returns how far the time since the frame shown before is from that in the source; None if unknown."""
        before, self.last_shown = self.last_shown, record
        if before is None or before.shown_ns is None or record.shown_ns is None:
            return None
        if before.timestamp_ns is not None and record.timestamp_ns is not None:
            expected = record.timestamp_ns - before.timestamp_ns
        elif self.interval_ns is not None:
            expected = (record.number - before.number) * self.interval_ns
        else:
            return None
        return abs(record.shown_ns - before.shown_ns - expected)


class Metrics:
    """Takes events in, in order of time, and gives sums out. May be used from several threads.

    What is asked of a stream raises SessionError if the stream is not known, or no longer.
    """

    def __init__(self, stored_streams: int = STORED_STREAMS):
        """Starts empty; stores the numbers of the latest `stored_streams` streams."""
        self._most_streams = stored_streams
        self._lock = threading.Lock()
        self._all = _Numbers("all")
        self._streams: dict[StreamId, _Numbers] = {}  # the one that was silent longest first
        self._now_ns = self._ran_ns = 0  # of the last event, and of the last tick's end

    def opened(
        self, stream: StreamId, settings: StreamSettings, name: str | None = None, prompt: str | None = None
    ) -> None:
        """Tells a stream's rate (for the jitter of sources without timestamps), its name and its prompt."""
        with self._lock:
            numbers = self._stream(stream)
            numbers.interval_ns, numbers.total.budget_ns = settings.interval_ns, settings.budget_ns
            numbers.name = name or numbers.name
            if prompt is not None:
                numbers.timeline.prompts.append((0, prompt))  # from before the first event

    def arrived(self, stream: StreamId, number: int) -> None:
        """Counts an input frame as inside. Without this, a frame counts from the first event that implies it."""
        with self._lock:
            self._arrive(self._stream(stream), number)

    def __call__(self, event: Event) -> None:
        """Takes one event."""
        with self._lock:
            self._now_ns = max(self._now_ns, event.at_ns)
            if isinstance(event, FrameRecord):
                self._add_frame(event)
            elif isinstance(event, TickRecord):
                self._add_tick(event)
            elif isinstance(event, PromptRecord):
                self._stream(event.stream).timeline.prompts.append((event.at_ns, event.prompt))
            else:
                for numbers in (self._all, self._stream(event.stream)):
                    for tally in numbers.tallies(event, event.at_ns, self._now_ns):
                        tally.step_changes += 1

    @property
    def streams(self) -> tuple[StreamId, ...]:
        """The streams whose numbers are stored, ascending."""
        with self._lock:
            return tuple(sorted(self._streams))

    def timeline(self, stream: StreamId | None = None) -> Timeline:
        """Returns a stream's timeline, or the one over all; read it when no more events come."""
        with self._lock:
            return self._known(stream).timeline

    def summary(self, stream: StreamId | None = None, recent: bool = False) -> Summary:
        """Returns the numbers of a stream or of all; with `recent`, those that speak of the last 2 to 4 s."""
        with self._lock:
            numbers = self._known(stream)
            tally, begin_ns, end_ns = numbers.total, numbers.first_arrival_ns, numbers.last_ns
            if recent:
                numbers.recent_at(self._now_ns)
                tally = Tally(FINE)
                for one in numbers.recent.values():
                    tally.merge(one)
                # Not from the first arrival on, which is a latency before what is recent.
                slot_ns = (self._now_ns // RECENT_NS - 1) * RECENT_NS
                begin_ns, end_ns = max(slot_ns, begin_ns if begin_ns < NEVER_NS else 0), self._now_ns
            inside = sum(
                len(n.open_numbers) for n in (self._streams.values() if stream is None else [numbers])
            )
            return _summarise(stream, numbers, tally, inside, max(0, end_ns - begin_ns))

    def _stream(self, stream: StreamId) -> _Numbers:
        numbers = self._streams.pop(stream, None) or _Numbers(f"stream {stream}")
        self._streams[stream] = numbers
        if len(self._streams) > self._most_streams:
            for other, silent in self._streams.items():
                if not silent.open_numbers and other != stream:
                    del self._streams[other]
                    break
        return numbers

    def _known(self, stream: StreamId | None) -> _Numbers:
        if stream is None:
            return self._all
        if stream not in self._streams:
            raise SessionError(
                f"no numbers of stream {stream!r} are stored; those stored are of {sorted(self._streams)}"
            )
        return self._streams[stream]

    def _arrive(self, numbers: _Numbers, number: int) -> None:
        if number >= numbers.arrived:
            numbers.open_numbers.update(range(numbers.arrived, number + 1))
            self._all.arrived += number + 1 - numbers.arrived
            numbers.arrived = number + 1

    def _add_frame(self, record: FrameRecord) -> None:
        own = self._stream(record.stream)
        both = (self._all, own)
        self._arrive(own, record.number)
        is_repeated = record.number not in own.open_numbers
        own.open_numbers.discard(record.number)
        jitter_ns = None if record.shown_ns is None else own.jitter_ns(record)
        for numbers in both:
            numbers.repeated += is_repeated
            numbers.first_arrival_ns = min(numbers.first_arrival_ns, record.arrival_ns)
            for tally in numbers.tallies(record, record.arrival_ns, self._now_ns):
                tally.add_frame(record, jitter_ns)
        if record.shown_ns is not None and own.total.displayed == 1:
            for numbers in both:
                first_ns = record.shown_ns - own.first_arrival_ns
                numbers.time_to_first_ns = max(numbers.time_to_first_ns or 0, first_ns)

    def _add_tick(self, record: TickRecord) -> None:
        # While two ticks are in flight, the device works once.
        busy_ns = max(0, record.done_ns - max(record.started_ns, self._ran_ns))
        self._ran_ns = max(self._ran_ns, record.done_ns)
        streams = [self._stream(entry.stream) for entry in record.tick.entries]
        for numbers, own_ns in ((self._all, busy_ns), *((s, busy_ns // len(streams)) for s in streams)):
            for tally in numbers.tallies(record, record.started_ns, self._now_ns):
                tally.add_tick(record, own_ns)


def _summarise(
    stream: StreamId | None, numbers: _Numbers, tally: Tally, inside: int, span_ns: int
) -> Summary:
    total, prompts = numbers.total, numbers.timeline.prompts
    return Summary(
        stream=stream,
        name=numbers.name,
        prompt=prompts[-1][1] if prompts else "",
        span_s=span_ns / SECOND,
        frames_in=numbers.arrived,
        shown=tally.shown,
        late=tally.late,
        dropped=dict(sorted(tally.drops.items())),
        inside=inside,
        repeated=numbers.repeated,
        time_to_first_ms=_ms(numbers.time_to_first_ns),
        budget_ms=total.budget_ns / MS,
        latency_p50_ms=_ms(tally.latency.quantile_ns(0.5)),
        latency_p95_ms=_ms(tally.latency.quantile_ns(0.95)),
        latency_p99_ms=_ms(tally.latency.quantile_ns(0.99)),
        latency_max_ms=_ms(tally.latency.high_ns if tally.latency.count else None),
        jitter_ms=_ms(tally.jitter.mean_ns),
        jitter_p95_ms=_ms(tally.jitter.quantile_ns(0.95)),
        miss_rate=_share(tally.late, tally.displayed),
        drop_rate=_share(tally.dropped, tally.displayed + tally.dropped),
        fps_shown=_share((tally.displayed - 1) * SECOND, tally.last_shown_ns - tally.first_shown_ns),
        ticks=tally.ticks,
        batch_mean=_share(tally.batch_sum, tally.ticks),
        batch_max=tally.batch_high,
        utilisation=min(1.0, _share(tally.busy_ns, span_ns)),  # a long tick may have begun before the span
        steps_mean=_share(tally.steps_sum, tally.displayed),
        steps_now=total.steps_last,
        step_changes=tally.step_changes,
        queue_mean=_share(tally.queue_sum, tally.ticks),
        queue_max=tally.queue_high,
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _ms(ns: float | None) -> float | None:
    return None if ns is None else ns / MS
