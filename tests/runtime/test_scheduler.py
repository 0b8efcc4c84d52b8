"""The scheduler in small worlds: a device of known times, streams that come, stall and go, and every rule checked."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svd2_jax.runtime.latency import LatencyConfig
from svd2_jax.runtime.scheduler import LatencySample, PolicyConfig, Refused, Scheduler
from svd2_jax.runtime.work import (
    MS,
    SECOND,
    Fate,
    FrameRecord,
    Reason,
    StepChange,
    StreamSettings,
    Tick,
    TickRecord,
)

EVERYONE = PolicyConfig(admit_below=None)


@dataclasses.dataclass(frozen=True)
class Source:
    """A stream of the world: its frames' (arrival_ns, timestamp_ns), all while it is there; when it joins and leaves."""

    settings: StreamSettings
    frames: tuple[tuple[int, int | None], ...]
    joins_ns: int
    leaves_ns: int
    closes: bool = False  # leaves at once, or when all is shown


@dataclasses.dataclass(frozen=True)
class Device:
    """Times of ticks: fixed + slope * batch * steps, in ms, times `slowness(number of the tick, start in s)`."""

    fixed_ms: float = 20.0
    slope_ms: float = 30.0
    sizes: tuple[int, ...] = (1, 2, 4)
    slowness: Callable[[int, float], float] = lambda number, at_s: 1.0

    def takes_ns(self, batch: int, steps: int, first: bool) -> int:
        work = (
            steps * (self.fixed_ms + 2 * self.slope_ms)
            if first
            else self.fixed_ms + self.slope_ms * batch * steps
        )
        return round(work * MS)


def regular(rate_hz: float, count: int, start_ns: int = 0, stamped: bool = True, **settings) -> Source:
    """A source that gives frames at its rate."""
    times = [start_ns + round(i * SECOND / rate_hz) for i in range(count)]
    frames = tuple((t, t if stamped else None) for t in times)
    return Source(StreamSettings(rate_hz, **{"budget_ms": 700, **settings}), frames, start_ns, times[-1] + 1)


class World:
    """Plays sources and a device against a scheduler, and checks the rules that hold whatever happens."""

    def __init__(
        self, sources: list[Source], device: Device, config: PolicyConfig = EVERYONE, known: bool = True
    ):
        self.sources, self.device, self.now = sources, device, 0
        self.records: dict[tuple[int, int], FrameRecord] = {}
        self.ticks: list[TickRecord] = []
        self.changes: list[StepChange] = []
        self.refused: list[str] = []
        self.shown: dict[int, list[int]] = {}
        self.entered: dict[int, list[int]] = {}
        self.done_at: dict[tuple[int, int], int] = {}
        self.waiting: Counter[int] = Counter()  # frames not reported yet, by stream
        self.settings: dict[int, StreamSettings] = {}
        self.ids: dict[int, int] = {}
        self.rows: dict[int, list[list]] = {}  # per stream: [frames, ticks taken]
        self.running: tuple[Tick, int] | None = None
        self.scheduler = Scheduler(config, device.sizes, self.report)
        if known:
            for s in {source.settings for source in sources}:
                for steps, size in itertools.product(range(1, s.steps + 1), device.sizes):
                    for first in (False, True)[: 1 + (size == 1)]:
                        took = device.takes_ns(size, steps, first)
                        self.scheduler.warm_up(LatencySample(s.shape, size, steps, took, first))

    def report(self, event) -> None:
        match event:
            case FrameRecord():
                assert (event.stream, event.number) not in self.records, "reported twice"
                self.records[event.stream, event.number] = event
                self.waiting[event.stream] -= 1
            case TickRecord():
                self.ticks.append(event)
            case StepChange():
                self.changes.append(event)

    def run(self) -> World:
        inputs = sorted(
            event
            for i, source in enumerate(self.sources)
            for event in (
                (source.joins_ns, 0, i, 0),
                *((at, 1, i, number) for number, (at, _) in enumerate(source.frames)),
                (source.leaves_ns, 2, i, 0),
            )
        )
        wake, again, calls, position = None, None, 0, 0
        while True:
            times = [inputs[position][0]] if position < len(inputs) else []
            if self.running:
                times.append(self.running[1])
            elif wake is not None:
                times.append(wake)
            if again is not None:
                times.append(again)
            if not times:
                break
            calls = calls + 1 if min(times) <= self.now else 0
            assert calls < 1000, "asked again and again"
            self.now = max(self.now, min(times))
            if self.running and self.running[1] <= self.now:
                self.finish()
            while position < len(inputs) and inputs[position][0] <= self.now:
                self.input(*inputs[position][1:])
                position += 1
            if not self.running:
                wake = self.start()
            else:
                assert not isinstance(self.scheduler.next(self.now), Tick), "two ticks at once"
            again = self.show()
        for source, stream in self.ids.items():
            numbers = set(range(len(self.sources[source].frames)))
            assert {n for s, n in self.records if s == stream} == numbers, "a frame is lost"
            assert self.scheduler.is_over(stream)
        return self

    def input(self, kind: int, i: int, number: int) -> None:
        source = self.sources[i]
        if kind == 0:
            try:
                self.ids[i] = stream = self.scheduler.open(source.settings, self.now)
            except Refused as e:
                self.refused.append(str(e))
                return
            self.shown[stream], self.entered[stream], self.rows[stream] = [], [], []
            self.settings[stream] = source.settings
        elif i in self.ids and kind == 1:
            stream = self.ids[i]
            self.waiting[stream] += 1
            assert self.scheduler.arrive(stream, self.now, source.frames[number][1]) == number
            assert self.waiting[stream] <= self.bound(source.settings), "a queue without a bound"
        elif i in self.ids:
            (self.scheduler.close if source.closes else self.scheduler.end)(self.ids[i], self.now)

    def start(self) -> int | None:
        tick = self.scheduler.next(self.now)
        if not isinstance(tick, Tick):
            return tick.until_ns
        assert len(tick.parts) in self.device.sizes
        assert len({p.stream for p in tick.parts}) == len(tick.parts)
        assert len({(p.steps, self.settings[p.stream].shape) for p in tick.parts}) == 1
        for part in tick.parts:
            s, entered = self.settings[part.stream], self.entered[part.stream]
            assert s.floor_steps <= part.steps <= s.steps
            assert list(part.frames) == sorted(part.frames)
            assert not part.frames or not entered or part.frames[0] > entered[-1], "frames enter out of order"
            assert part.first == (not entered)
            assert not part.first or len(tick.parts) == 1
            assert part.frames or self.rows[part.stream], "a part without a purpose"
            whole = s.first_frames if part.first else s.chunk_frames
            assert not part.frames or len(part.frames) + part.fill == whole
            assert len(self.rows[part.stream]) <= s.steps * s.stages
            entered += part.frames
        slowness = self.device.slowness(tick.number, self.now / SECOND)
        took = round(self.device.takes_ns(len(tick.parts), tick.steps, tick.first) * slowness)
        self.running = tick, self.now + max(1, took)
        return None

    def finish(self) -> None:
        assert self.running
        tick, self.running = self.running[0], None
        finished = {}
        for part in tick.parts:
            rows = self.rows[part.stream]
            stages = self.settings[part.stream].stages
            rows += [[part.frames, 0]] if part.frames else []
            for row in rows:
                row[1] += 1
            count = len(rows) if part.first else sum(ticks >= part.steps * stages for _, ticks in rows)
            for frames, _ in rows[:count]:
                self.done_at.update(dict.fromkeys(((part.stream, n) for n in frames), self.now))
            del rows[:count]
            finished[part.stream] = count
        self.scheduler.done(finished, self.now)

    def show(self) -> int | None:
        shows, again = self.scheduler.shows(self.now)
        for show in shows:
            assert (show.stream, show.number) in self.done_at, "shown before it is done"
            assert not self.shown[show.stream] or show.number > self.shown[show.stream][-1], (
                "shown out of order"
            )
            self.shown[show.stream].append(show.number)
        return again

    def bound(self, s: StreamSettings) -> int:
        """Frames of a stream that may be anywhere in the system: queued, under way, waiting to be shown."""
        queued = math.ceil(s.budget_ns / s.interval_ns) + s.first_frames + s.chunk_frames
        under_way = (s.steps * s.stages + 1) * s.chunk_frames + s.first_frames
        return 2 * queued + under_way

    @property
    def frames(self) -> list[FrameRecord]:
        return list(self.records.values())

    def count(self, what: Fate | Reason) -> int:
        return sum(what in (f.fate, f.reason) for f in self.frames)

    def latencies_ms(self) -> list[float]:
        return [(f.shown_ns - f.arrival_ns) / MS for f in self.frames if f.shown_ns is not None]


@st.composite
def sources(draw, faults: bool, closes: bool) -> Source:
    rate = draw(st.sampled_from([5, 12, 16, 30, 60]))
    steps = draw(st.integers(1, 3))
    settings = StreamSettings(
        rate_hz=rate,
        budget_ms=draw(st.integers(150, 1500)),
        steps=steps,
        floor_steps=draw(st.integers(1, steps)),
        first_frames=draw(st.sampled_from([1, 5])),
        chunk_frames=draw(st.sampled_from([1, 4])),
        stages=draw(st.sampled_from([1, 1, 2])),
        shape=draw(st.sampled_from(["small", "large"])),
    )
    joins = draw(st.integers(0, 2 * SECOND))
    count = draw(st.integers(0, 60))
    delays = st.one_of(st.just(0), st.integers(0, 200 * MS))
    jitter = draw(st.lists(delays, min_size=count, max_size=count)) if draw(st.booleans()) else [0] * count
    stall_at, stall = draw(st.integers(0, 60)), draw(st.sampled_from([0, 0, SECOND // 2, 2 * SECOND]))
    stamps = draw(st.sampled_from(["none", "source", "faulty"] if faults else ["none", "source"]))
    frames, arrival = [], joins
    for i in range(count):
        taken = joins + round(i * SECOND / rate) + (stall if i >= stall_at else 0)
        arrival = max(arrival, taken + jitter[i])
        stamp: int | None = taken - 12345 * SECOND
        if stamps == "faulty":
            stamp += draw(st.sampled_from([0, 0, 0, 0, -SECOND // rate, 3 * SECOND, -5 * SECOND]))
            stamp = draw(st.sampled_from([stamp, stamp, stamp, None]))
        frames.append((arrival, None if stamps == "none" else stamp))
    leaves = draw(st.one_of(st.just(arrival + SECOND // rate), st.integers(joins, joins + 3 * SECOND)))
    frames = tuple(frame for frame in frames if frame[0] <= leaves)
    return Source(settings, frames, joins, leaves, closes and draw(st.booleans()))


@st.composite
def devices(draw, steady: bool) -> Device:
    sizes = draw(st.sampled_from([(1,), (1, 2), (1, 2, 4), (1, 3)]))
    slowness = (
        [1.0] if steady else draw(st.lists(st.sampled_from([1.0, 1.0, 0.5, 2.0, 1.1, 8.0]), min_size=1))
    )
    return Device(
        draw(st.sampled_from([0.5, 5, 20, 60])),
        draw(st.sampled_from([0.0, 1, 10, 40])),
        sizes,
        lambda number, at_s: slowness[number % len(slowness)],
    )


CONFIGS = st.builds(
    PolicyConfig,
    latency=st.builds(
        LatencyConfig, knee_gain=st.sampled_from([0.0, 0.1]), speed_window=st.sampled_from([1, 5])
    ),
    guard_ms=st.sampled_from([0.0, 2.0]),
    lower_above=st.sampled_from([0.5, 0.92]),
    raise_below=st.sampled_from([0.3, 0.5]),
    raise_after_ms=st.sampled_from([0.0, 500.0]),
    risk_hold_ms=st.sampled_from([0.0, 1000.0]),
    admit_below=st.sampled_from([None, 0.7]),
    stall_intervals=st.sampled_from([0.0, 4.0, 1e6]),
    most_queued=st.sampled_from([6, 256]),
)
QUICK = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=60)


@QUICK
@given(
    st.lists(sources(faults=True, closes=True), min_size=1, max_size=5),
    devices(steady=False),
    CONFIGS,
    st.booleans(),
)
def test_every_rule_holds_in_any_world(given_sources, device, config, known):
    world = World(given_sources, device, config, known).run()
    guard = config.guard_ns
    for frame in world.frames:
        done = frame.done_ns
        if frame.fate is Fate.LATE:
            assert done is not None
            assert done > frame.deadline_ns - guard, "done in time and shown late"
        if frame.fate is not Fate.DROPPED:
            assert frame.started_ns < done <= frame.shown_ns
            assert done == world.done_at[frame.stream, frame.number]
        assert (frame.reason is not None) == (frame.fate is Fate.DROPPED)


@QUICK
@given(st.lists(sources(faults=True, closes=False), min_size=1, max_size=5), devices(steady=True), CONFIGS)
def test_what_enters_a_steady_device_is_shown_in_time(given_sources, device, config):
    world = World(given_sources, device, config).run()
    assert world.count(Fate.LATE) == 0
    for frame in world.frames:
        if frame.started_ns is not None:
            assert frame.fate is Fate.SHOWN
