"""The scheduler in small worlds: a device of known times, streams that come, stall and go, and every rule checked."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svd2_jax.errors import SessionError
from svd2_jax.runtime.deadline import PolicyConfig
from svd2_jax.runtime.latency import LatencyConfig, LatencySample
from svd2_jax.runtime.scheduler import Refused, Scheduler
from svd2_jax.runtime.types import (
    MS,
    SECOND,
    Fate,
    FrameRecord,
    Reason,
    StepChange,
    StreamSettings,
    Tick,
    TickRecord,
    Wait,
)

EVERYONE = PolicyConfig(admit_below=None)


@dataclasses.dataclass(frozen=True)
class Source:
    """A stream of the world: when it joins and leaves, and its frames' (arrival_ns, timestamp_ns) in between."""

    settings: StreamSettings
    frames: tuple[tuple[int, int | None], ...]
    joins_ns: int
    leaves_ns: int
    closes: bool = False  # leaves at once, or when all is shown


@dataclasses.dataclass(frozen=True)
class Device:
    """Times of ticks: fixed + slope * batch * steps, in ms, times `slowness(number of the tick, start in s)`.

    That is what a tick adds. Its frames take `tail_ms` more, behind the stages, which are through with it so early that
    the next one could be handed over `early` of its time before it can begin.
    """

    fixed_ms: float = 20.0
    slope_ms: float = 30.0
    sizes: tuple[int, ...] = (1, 2, 4)
    slowness: Callable[[int, float], float] = lambda number, at_s: 1.0
    tail_ms: float = 0.0
    early: float | None = None  # None: the driver does not tell when the stages are through

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


@dataclasses.dataclass
class Running:
    """A tick in flight: the stages take it from `begun_ns` to `free_ns`, and say so at `passed_ns`."""

    tick: Tick
    begun_ns: int
    passed_ns: int
    free_ns: int
    done_ns: int
    passed: bool = False


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
        self.running: list[Running] = []
        self.free_ns = 0  # from when the stages have nothing to do
        self.handed: list[tuple[int, int]] = []  # of each tick: when, and when the one before it was through
        self.scheduler = Scheduler(config, device.sizes, self.report)
        if known:
            for s in {source.settings for source in sources}:
                for steps, size in itertools.product(range(1, s.steps + 1), device.sizes):
                    for first in (False, True)[: 1 + (size == 1)]:
                        took = device.takes_ns(size, steps, first)
                        tail = round(device.tail_ms * MS)
                        self.scheduler.warm_up(LatencySample(s.batch_key, size, steps, took, first, tail))

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
            times += [r.done_ns if r.passed else r.passed_ns for r in self.running]
            if self.can_start and wake is not None:
                times.append(wake)
            if again is not None:
                times.append(again)
            if not times:
                break
            calls = calls + 1 if min(times) <= self.now else 0
            assert calls < 1000, "asked again and again"
            self.now = max(self.now, min(times))
            if self.running and not self.running[-1].passed and self.running[-1].passed_ns <= self.now:
                self.running[-1].passed = True
                if self.device.early is not None:
                    self.scheduler.free(self.now)
            if self.running and self.running[0].passed and self.running[0].done_ns <= self.now:
                self.finish()
            while position < len(inputs) and inputs[position][0] <= self.now:
                self.input(*inputs[position][1:])
                position += 1
            if self.can_start:
                wake = self.start()
            else:
                assert not isinstance(self.scheduler.next(self.now), Tick), "too many ticks at once"
            again = self.show()
        for source, stream in self.ids.items():
            numbers = set(range(len(self.sources[source].frames)))
            assert {n for s, n in self.records if s == stream} == numbers, "a frame is lost"
            assert self.scheduler.is_over(stream)
        return self

    @property
    def can_start(self) -> bool:
        if self.device.early is None:
            return not self.running
        return len(self.running) < 2 and all(running.passed for running in self.running)

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
        assert len(tick.entries) in self.device.sizes
        assert len({p.stream for p in tick.entries}) == len(tick.entries)
        assert len({(p.steps, self.settings[p.stream].batch_key) for p in tick.entries}) == 1
        for part in tick.entries:
            s, entered = self.settings[part.stream], self.entered[part.stream]
            assert s.min_steps <= part.steps <= s.steps
            assert list(part.frames) == sorted(part.frames)
            assert not part.frames or not entered or part.frames[0] > entered[-1], "frames enter out of order"
            assert part.first == (not entered)
            assert not part.first or len(tick.entries) == 1
            assert part.frames or self.still_under_way(part.stream), "a part without a purpose"
            whole = s.first_frames if part.first else s.chunk_frames
            assert not part.frames or len(part.frames) + part.fill == whole
            assert self.still_under_way(part.stream) <= s.steps * s.stages
            entered += part.frames
        slowness = self.device.slowness(tick.number, self.now / SECOND)
        took = round(self.device.takes_ns(len(tick.entries), tick.steps, tick.first) * slowness)
        begun, took = max(self.now, self.free_ns), max(1, took)
        self.free_ns = begun + took
        passed = max(self.now + 1, self.free_ns - round(took * (self.device.early or 0)))
        done = self.free_ns + round(self.device.tail_ms * MS)
        self.handed.append((self.now, self.running[0].done_ns if self.running else 0))
        self.running.append(
            Running(tick, begun, done if self.device.early is None else passed, begun + took, done)
        )
        return None

    def still_under_way(self, stream: int) -> int:
        """Chunks of a stream that the tick that is being finished leaves."""
        rows = [ticks for _, ticks in self.rows[stream]]
        for running in self.running:
            for part in running.tick.entries:
                if part.stream == stream:
                    rows = [ticks + 1 for ticks in rows] + [1] * bool(part.frames)
                    needed = 1 if part.first else part.steps * self.settings[stream].stages
                    rows = [ticks for ticks in rows if ticks < needed]
        return len(rows)

    def finish(self) -> None:
        tick = self.running.pop(0).tick
        finished = {}
        for part in tick.entries:
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
        before = len(self.records)
        again = self.scheduler.show(self.now)
        for stream, number in itertools.islice(self.records, before, None):
            assert (stream, number) in self.done_at, "shown before it is done"
            assert not self.shown[stream] or number > self.shown[stream][-1], "shown out of order"
            self.shown[stream].append(number)
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
        min_steps=draw(st.integers(1, steps)),
        first_frames=draw(st.sampled_from([1, 5])),
        chunk_frames=draw(st.sampled_from([1, 4])),
        stages=draw(st.sampled_from([1, 1, 2])),
        batch_key=draw(st.sampled_from(["small", "large"])),
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
    """Devices without overlap, with a hand-over that can be hidden, and with a tail that the next tick can hide."""
    sizes = draw(st.sampled_from([(1,), (1, 2), (1, 2, 4), (1, 3)]))
    slowness = (
        [1.0] if steady else draw(st.lists(st.sampled_from([1.0, 1.0, 0.5, 2.0, 1.1, 8.0]), min_size=1))
    )
    fixed_ms = draw(st.sampled_from([0.5, 5, 20, 60]))
    tail, early = draw(
        st.sampled_from(
            [(0, None), (0, None), (0, 0.0), (0, 0.3), (0, 1.0), (0.4, 0.0), (0.4, 0.3), (1, 0.0)]
        )
    )
    return Device(
        fixed_ms,
        draw(st.sampled_from([0.0, 1, 10, 40])),
        sizes,
        lambda number, at_s: slowness[number % len(slowness)],
        tail * fixed_ms,
        early,
    )


CONFIGS = st.builds(
    PolicyConfig,
    latency=st.builds(
        LatencyConfig, knee_gain=st.sampled_from([0.0, 0.1]), speed_window=st.sampled_from([1, 5])
    ),
    guard_ms=st.sampled_from([0.0, 10.0]),
    degrade_above=st.sampled_from([0.5, 0.92]),
    restore_below=st.sampled_from([0.3, 0.5]),
    restore_after_ms=st.sampled_from([0.0, 500.0]),
    push_below=st.sampled_from([0.0, 0.9, 1e6]),
    admit_below=st.sampled_from([None, 0.7]),
    stall_intervals=st.sampled_from([0.0, 4.0, 1e6]),
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


SLOW = (10.0, 20.0)  # seconds between which a device is slow


def slow(factor: float) -> Device:
    return Device(slowness=lambda number, at_s: factor if SLOW[0] <= at_s < SLOW[1] else 1.0)


def steps_at(world: World, at_s: float, stream: int = 0) -> int:
    steps = next(source.settings.steps for i, source in enumerate(world.sources) if world.ids[i] == stream)
    return next(
        (c.after for c in reversed(world.changes) if c.stream == stream and c.at_ns <= at_s * SECOND), steps
    )


def flushes(world: World) -> int:
    return sum(not part.frames for record in world.ticks for part in record.tick.entries)


def test_on_a_free_device_each_chunk_is_pushed_on_to_its_end_at_once():
    """A chunk waits 187.5 ms for its frames, and takes two ticks of 80 ms."""
    world = World([regular(16, 5 + 4 * 50, first_frames=1)], Device()).run()
    assert world.count(Fate.SHOWN) == len(world.frames) == 205
    assert len(world.ticks) == 1 + 51 * 2
    assert flushes(world) == 51
    shown = sorted(f.shown_ns for f in world.frames)
    gaps = {round((b - a) / MS, 2) for a, b in itertools.pairwise(shown)}
    assert gaps == {62.5}
    assert max(world.latencies_ms()) == pytest.approx(187.5 + 2 * 80, abs=0.1)
    assert {f.steps for f in world.frames} == {2}


def test_one_stream_without_time_to_push_on_takes_a_tick_per_chunk_and_flows_evenly():
    """A chunk waits 187.5 ms for its frames and 250 ms for the next one, and its last tick takes 140 ms."""
    world = World([regular(16, 5 + 4 * 50, budget_ms=900)], Device(fixed_ms=80)).run()
    assert world.count(Fate.SHOWN) == len(world.frames) == 205
    assert len(world.ticks) == 1 + 50 + 1  # the last chunk is pushed out, as nothing follows
    assert flushes(world) == 1
    shown = sorted(f.shown_ns for f in world.frames if f.number >= 5)
    gaps = {round((b - a) / MS, 2) for a, b in itertools.pairwise(shown)}
    assert gaps == {62.5}
    assert max(world.latencies_ms()) == pytest.approx(187.5 + 250 + 140, abs=0.1)
    assert {f.steps for f in world.frames} == {2}


def test_a_tight_budget_takes_a_second_tick_right_behind():
    """187.5 ms and two ticks of 80 ms fit in 370 ms; another 250 ms do not."""
    world = World([regular(16, 5 + 4 * 50, budget_ms=370, first_frames=1)], Device()).run()
    assert world.count(Fate.SHOWN) == len(world.frames)
    assert flushes(world) == 51
    assert not world.changes


def test_a_budget_too_tight_for_all_steps_takes_fewer():
    world = World([regular(16, 205, budget_ms=320, first_frames=1)], Device()).run()
    assert world.count(Fate.SHOWN) == len(world.frames)
    assert {f.steps for f in world.frames} == {1}


def test_overload_lowers_steps_and_takes_all_frames():
    """Two steps take 200 of every 250 ms when the device is 2.5 times slower, and three times slower 240."""
    world = World([regular(16, 16 * 30, budget_ms=1200)], slow(3)).run()
    assert world.count(Fate.SHOWN) == len(world.frames)
    assert [(c.before, c.after) for c in world.changes] == [(2, 1), (1, 2)]
    lowered, raised = (c.at_ns / SECOND for c in world.changes)
    assert SLOW[0] < lowered < SLOW[0] + 1
    assert SLOW[1] < raised < SLOW[1] + 2


def test_overload_at_the_floor_skips_frames_evenly_and_keeps_the_newest():
    """Eight times slower, a tick of one step takes 400 ms: 10 of 16 frames a second."""
    world = World([regular(16, 16 * 30, budget_ms=1500)], slow(8)).run()
    for frame in world.frames:  # none is late or lost but for those that meet the device when it slows down
        if frame.fate is Fate.LATE or frame.reason is Reason.EXPIRED:
            assert SLOW[0] - 1 < frame.arrival_ns / SECOND < SLOW[0] + 2
    for record in world.ticks[1:]:
        (part,) = record.tick.entries
        if 12 * SECOND < record.started_ns < 19 * SECOND:
            assert part.steps == 1
            newest = max(f.number for f in world.frames if f.arrival_ns <= record.started_ns)
            assert part.frames[-1] == newest
            assert max(b - a for a, b in itertools.pairwise(part.frames)) == 2
    shown = [f for f in world.frames if 12 <= f.arrival_ns / SECOND < 18 and f.fate is Fate.SHOWN]
    assert len(shown) / 6 == pytest.approx(10, rel=0.05)
    assert max(f.shown_ns - f.arrival_ns for f in shown) <= 1500 * MS
    dropped = [f for f in world.frames if f.fate is Fate.DROPPED]
    assert all(SLOW[0] - 1 < f.arrival_ns / SECOND < SLOW[1] + 1 for f in dropped)
    assert steps_at(world, SLOW[1] + 2) == 2


@pytest.mark.parametrize("streams", [1, 3])
def test_streams_come_back_after_the_device_was_too_slow_for_any_frame(streams):
    """Eight times slower, two ticks take 1.3 s. A chunk every now and then tries whether they do."""
    sources_ = [regular(16, 480, i * 50 * MS, min_steps=2, budget_ms=800) for i in range(streams)]
    world = World(sources_, slow(8)).run()
    at = {f: f.arrival_ns / SECOND for f in world.frames}
    assert all(f.fate is Fate.SHOWN for f in world.frames if 3 < at[f] < SLOW[0] - 1 or at[f] > SLOW[1] + 1.6)
    tries = [r.tick.entries for r in world.ticks if SLOW[0] + 4 < r.started_ns / SECOND < SLOW[1]]
    tried = [parts[0].stream for parts in tries if parts[0].frames]
    assert 2 <= len(tried) <= 3
    assert {len(parts) for parts in tries} == {1}


def test_a_source_that_is_silent_does_not_keep_others_from_trying_the_device():
    """The silent stream was served before the other one, and never ends while that one sends."""
    silent = dataclasses.replace(regular(16, 5, min_steps=2, budget_ms=800), leaves_ns=31 * SECOND)
    world = World([silent, regular(16, 480, min_steps=2, budget_ms=800)], slow(8)).run()
    later = [f for f in world.frames if f.stream == 1 and f.arrival_ns > (SLOW[1] + 1.6) * SECOND]
    assert later
    assert {f.fate for f in later} == {Fate.SHOWN}


def test_of_frames_that_are_finished_too_late_only_the_newest_is_shown():
    world = World([regular(16, 480, min_steps=2, budget_ms=800)], slow(8)).run()
    chunks: dict[int, list] = {}
    for frame in world.frames:
        if frame.started_ns is not None and frame.done_ns is not None:
            chunks.setdefault(frame.started_ns, []).append(frame)
    behind = [[f for f in chunk if f.done_ns > f.deadline_ns] for chunk in chunks.values()]
    assert max(map(len, behind)) > 1
    for late in filter(None, behind):
        *older, newest = sorted(late, key=lambda f: f.number)
        assert newest.fate is Fate.LATE
        assert {(f.fate, f.reason) for f in older} <= {(Fate.DROPPED, Reason.EXPIRED)}
    assert sum(map(len, behind)) - world.count(Fate.LATE) == sum(
        f.fate is Fate.DROPPED and f.done_ns is not None for f in world.frames
    )


def test_a_stream_is_let_in_after_the_device_was_too_slow_for_the_one_before():
    first, later = (regular(16, 15 * 16, start_ns=at * SECOND, min_steps=2, budget_ms=800) for at in (0, 21))
    world = World([first, later], slow(8)).run()
    assert not world.refused
    assert all(f.fate is Fate.SHOWN for f in world.frames if f.stream == 1)


def test_steps_stay_where_fewer_take_as_long():
    """A tick takes 100 ms whatever its steps; three times slower that is more than a chunk's 250 ms."""

    class Level(Device):
        def takes_ns(self, batch: int, steps: int, first: bool) -> int:
            return 100 * MS * (steps if first else 1)

    device = Level(sizes=(1,), slowness=slow(3).slowness)
    world = World([regular(16, 480, steps=3, budget_ms=3000)], device).run()
    assert not world.changes
    assert world.count(Fate.LATE) == world.count(Reason.EXPIRED) == 0
    assert 0 < world.count(Reason.OVERLOAD) < 480 * 1 / 3 * 1 / 3


def test_bursts_are_taken_whole_where_the_device_has_time():
    """Eight frames at once every half second, and four ticks of 55 ms for each."""
    frames = tuple((i // 8 * SECOND // 2, None) for i in range(8 * 40))
    source = Source(StreamSettings(16, 1000, first_frames=4), frames, 0, frames[-1][0] + SECOND)
    world = World([source], Device(fixed_ms=40, slope_ms=7.5)).run()
    assert world.count(Fate.SHOWN) == len(world.frames)


def test_one_slow_tick_changes_nothing():
    """It takes 320 ms in place of 80."""
    world = World(
        [regular(16, 480, budget_ms=900)],
        Device(slowness=lambda number, at_s: 4.0 if number % 40 == 39 else 1.0),
    ).run()
    assert world.count(Fate.SHOWN) == len(world.frames)
    assert not world.changes


def test_a_stall_sends_what_is_there_in_time():
    """The source stops after two frames of a chunk; they and the chunk under way are shown by their deadlines."""
    source = regular(16, 5 + 8 + 2 + 40)
    frames = source.frames[:15] + tuple((at + 5 * SECOND, at + 5 * SECOND) for at, _ in source.frames[15:])
    world = World([dataclasses.replace(source, frames=frames, leaves_ns=frames[-1][0])], Device()).run()
    assert world.count(Fate.SHOWN) == len(world.frames)
    (partial,) = [p for r in world.ticks for p in r.tick.entries if p.frames == (13, 14)]
    assert partial.fill == 2


@pytest.mark.parametrize("count", [1, 3, 5, 6, 9, 11])
def test_any_number_of_frames_is_shown_to_the_end(count):
    world = World([regular(16, count)], Device()).run()
    assert world.count(Fate.SHOWN) == count
    parts = [part for record in world.ticks for part in record.tick.entries if part.frames]
    assert sum(len(part.frames) + part.fill for part in parts) == 5 + math.ceil(max(0, count - 5) / 4) * 4


def test_streams_alike_share_ticks_when_the_device_is_busy():
    sources_ = [regular(16, 205, start_ns=i * 20 * MS, budget_ms=900) for i in range(3)]
    world = World(sources_, Device(fixed_ms=60, slope_ms=10)).run()
    assert world.count(Fate.SHOWN) == len(world.frames)
    batches = Counter(len(record.tick.entries) for record in world.ticks)
    assert set(batches) == {1, 2}  # three are no batch size
    assert batches[2] > 40


def test_streams_of_other_shapes_or_steps_never_share_ticks():
    shapes = [regular(16, 105, batch_key=batch_key, steps=steps) for batch_key in "ab" for steps in (1, 2)]
    world = World(shapes, Device(5, 5)).run()  # the world checks every tick
    assert world.count(Fate.SHOWN) == len(world.frames)


def test_every_stream_progresses_under_lasting_overload():
    """One step of four streams takes 140 ms at a time, 560 when four times slower: half of what comes."""
    budgets = (900, 1200, 2500, 5000)
    streams = [
        regular(rate, rate * 20, budget_ms=b) for rate, b in zip((16, 10, 30, 16), budgets, strict=True)
    ]
    world = World(streams, Device(slowness=lambda number, at_s: 4.0)).run()
    assert world.count(Fate.LATE) == 0
    for stream in range(4):
        shown = sorted(f.shown_ns for f in world.frames if f.stream == stream and f.fate is Fate.SHOWN)
        shown = [at for at in shown if at > 4 * SECOND]  # until then the first groups take the device in turn
        assert max(b - a for a, b in itertools.pairwise(shown)) < 1.5 * SECOND


def test_fewer_steps_let_out_what_has_taken_as_many():
    """The steps that frames report are those that the device gave them."""
    world = World([regular(16, 480, steps=3, budget_ms=1500)], slow(4)).run()
    assert {f.steps for f in world.frames} == {1, 2, 3}
    assert world.count(Fate.SHOWN) + world.count(Fate.LATE) == len(world.frames)
    assert world.count(Fate.LATE) <= 4  # a chunk that met the device when it slowed down


def test_faulty_frames_are_reported_with_their_reason():
    frames = [(i * 50 * MS, i * 50 * MS) for i in range(20)]
    frames[7] = (frames[7][0], frames[6][1])
    frames[9] = (frames[9][0], frames[7][1] + 20 * MS)
    source = Source(StreamSettings(20, 700), tuple(frames), 0, SECOND)
    world = World([source], Device()).run()
    reasons = {f.number: f.reason for f in world.frames if f.reason}
    assert reasons == {7: Reason.DUPLICATE, 9: Reason.DISORDER}
    assert world.count(Fate.SHOWN) == 18


def test_closing_in_mid_tick_drops_what_is_not_shown_and_leaves_others_alone():
    closed = dataclasses.replace(regular(16, 100, budget_ms=900), leaves_ns=3 * SECOND + 30 * MS, closes=True)
    closed = dataclasses.replace(closed, frames=tuple(f for f in closed.frames if f[0] <= closed.leaves_ns))
    world = World([closed, regular(16, 100, budget_ms=900)], Device()).run()
    fates = {stream: Counter(f.fate for f in world.frames if f.stream == stream) for stream in (0, 1)}
    assert fates[1] == {Fate.SHOWN: 100}
    assert world.count(Reason.CLOSED) == fates[0][Fate.DROPPED] > 4
    assert max(f.shown_ns for f in world.frames if f.stream == 0 and f.shown_ns) <= closed.leaves_ns


def test_a_closed_stream_takes_nothing_and_a_tick_of_it_ends_well():
    events = []
    scheduler = Scheduler(PolicyConfig(), (1,), events.append)
    stream = scheduler.open(StreamSettings(10, 900, first_frames=1), 0)
    assert scheduler.arrive(stream, 0) == 0
    assert isinstance(scheduler.next(0), Tick)
    scheduler.close(stream, 1)
    assert scheduler.is_over(stream)
    with pytest.raises(SessionError, match="stream 0 has ended"):
        scheduler.arrive(stream, 2)
    scheduler.done({stream: 1}, 3)
    assert scheduler.show(4) is None
    assert [type(event) for event in events] == [FrameRecord, TickRecord]
    with pytest.raises(SessionError, match="no tick is running"):
        scheduler.done({}, 5)


def test_a_budget_that_cannot_be_met_is_refused_with_the_least_that_can():
    world = World([regular(16, 5, budget_ms=200)], Device()).run()
    assert world.refused == [
        "a latency budget of 200 ms cannot be met: 4 frames at 16 FPS and 1 denoising step take up to 249 ms on this "
        "device; ask for at least that"
    ]
    assert not World([regular(16, 5, budget_ms=249)], Device()).run().refused


def test_a_full_device_refuses_another_stream():
    """At one step four streams take 140 of every 250 ms, five 190, six 220 and seven 270."""
    world = World([regular(16, 50, i * MS, budget_ms=2000) for i in range(8)], Device(), PolicyConfig()).run()
    assert len(world.ids) == 6
    refused = (
        "the device is full: at minimum steps, 6 running streams would use 88 % of its time and this one 20 % more, "
        "and 100 % can be promised; close a stream, or ask for fewer frames per second or a longer latency budget"
    )
    assert world.refused == [refused] * 2
    assert not World(list(world.sources), Device(), EVERYONE).run().refused


def test_a_first_stream_is_let_in_though_the_device_is_too_slow_for_all_its_frames():
    world = World([regular(60, 300, budget_ms=900)], Device(fixed_ms=100), PolicyConfig()).run()
    assert not world.refused
    assert world.count(Fate.SHOWN) > 100
    assert world.count(Fate.LATE) == 0


def test_no_frame_is_late_where_ticks_of_one_row_were_never_measured():
    """Their tail is that of others. Taken for time of the stages, it would swing their times by two fifths."""
    config = PolicyConfig(
        LatencyConfig(knee_gain=0, speed_window=1), guard_ms=0, degrade_above=0.5, restore_below=0.3,
        restore_after_ms=0, push_below=0, admit_below=None, stall_intervals=0,
    )  # fmt: skip
    sizes = {"rate_hz": 5, "steps": 3, "first_frames": 1, "chunk_frames": 1}
    sources = [
        regular(count=42, budget_ms=626, min_steps=2, batch_key="small", **sizes),
        regular(count=30, start_ns=1, budget_ms=625, min_steps=3, stages=2, batch_key="large", **sizes),
    ]
    world = World(sources, Device(fixed_ms=60, slope_ms=0, sizes=(1,), tail_ms=24, early=0.3), config).run()
    assert world.count(Fate.LATE) == 0
    assert world.count(Fate.SHOWN) > 60


class Updated(World):
    """A world in which the only stream gets new settings at a frame's arrival."""

    def __init__(self, source: Source, device: Device, at: int, **changes):
        super().__init__([source], device)
        self.at, self.new = at, dataclasses.replace(source.settings, **changes)

    def input(self, kind: int, i: int, number: int) -> None:
        super().input(kind, i, number)
        if kind == 1 and number == self.at:
            self.scheduler.update(self.ids[i], self.new, self.now)
            least = min(self.settings[0].min_steps, self.new.min_steps)
            most = max(self.settings[0].steps, self.new.steps)
            self.settings[0] = dataclasses.replace(self.new, steps=most, min_steps=least)


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1)])
@pytest.mark.parametrize("fixed_ms", [20, 60])
def test_new_steps_hold_from_the_next_chunk_on_and_nothing_is_late(before, after, fixed_ms):
    source = regular(16, 205, steps=before, budget_ms=1500)
    world = Updated(source, Device(fixed_ms, 10), 100, steps=after).run()
    assert world.count(Fate.SHOWN) == 205
    assert [(c.before, c.after) for c in world.changes] == [(before, after)]
    entered = [p for r in world.ticks for p in r.tick.entries if p.frames]
    assert {p.steps for p in entered if p.frames[-1] < 100} == {before}
    assert {p.steps for p in entered if p.frames[0] > 100} == {after}


def test_more_steps_than_the_budget_holds_are_not_taken():
    world = Updated(regular(16, 205, budget_ms=370, first_frames=1), Device(), 100, steps=4).run()
    assert world.count(Fate.SHOWN) == 205
    assert max(f.steps for f in world.frames) <= 2


def test_minimum_steps_that_cannot_be_met_and_streams_that_ended_are_refused():
    scheduler, stream = overlapping()
    settings = StreamSettings(5, 2000, steps=30, min_steps=30)
    with pytest.raises(Refused, match="a latency budget of 2000 ms cannot be met"):
        scheduler.update(stream, settings, 0)
    scheduler.end(stream, 0)
    with pytest.raises(SessionError, match="stream 0 has ended"):
        scheduler.update(stream, settings, 0)
    with pytest.raises(SessionError, match="stream 7 has ended"):
        scheduler.update(7, settings, 0)


# --- two ticks in flight


def overlapping(tail_ms: float = 0, guard_ms: float = 10, events=None) -> tuple[Scheduler, int]:
    """A stream of single frames at one step, on a device that takes 100 ms for each, and 100 for its first group."""
    scheduler = Scheduler(
        PolicyConfig(guard_ms=guard_ms, latency=LatencyConfig(least_margin=0)),
        (1,),
        [].append if events is None else events.append,
    )
    for first in (True, False):
        scheduler.warm_up(LatencySample(None, 1, 1, 100 * MS, first, round(tail_ms * MS)))
    stream = scheduler.open(StreamSettings(5, 2000, steps=1, first_frames=1, chunk_frames=1), 0)
    return scheduler, stream


def tick_at(scheduler: Scheduler, at_ms: float) -> Tick:
    tick = scheduler.next(round(at_ms * MS))
    assert isinstance(tick, Tick)
    return tick


def test_a_tick_may_start_when_the_stages_are_free_but_never_a_third():
    events = []
    scheduler, stream = overlapping(tail_ms=40, events=events)
    for _ in range(4):
        scheduler.arrive(stream, 0)
    assert tick_at(scheduler, 0).number == 0
    assert scheduler.next(50 * MS) == Wait(None)
    scheduler.free(100 * MS)
    assert tick_at(scheduler, 100).number == 1
    assert scheduler.next(110 * MS) == Wait(None)
    scheduler.done({stream: 1}, 140 * MS)
    assert scheduler.next(150 * MS) == Wait(None)  # the second is in the stages
    scheduler.free(200 * MS)
    assert tick_at(scheduler, 200).number == 2
    scheduler.free(205 * MS)
    assert scheduler.next(210 * MS) == Wait(None)  # nobody is in the stages, but two are in flight
    scheduler.done({stream: 1}, 240 * MS)
    scheduler.show(2000 * MS)
    assert [event.number for event in events if isinstance(event, FrameRecord)] == [0, 1]


def test_what_is_not_running_is_neither_free_nor_done():
    scheduler, stream = overlapping()
    with pytest.raises(SessionError, match="no tick is running"):
        scheduler.free(0)
    scheduler.arrive(stream, 0)
    tick_at(scheduler, 0)
    scheduler.free(50 * MS)
    with pytest.raises(SessionError, match="no tick is running"):
        scheduler.free(51 * MS)
    scheduler.done({stream: 1}, 100 * MS)
    with pytest.raises(SessionError, match="no tick is running"):
        scheduler.done({stream: 1}, 101 * MS)
    with pytest.raises(SessionError, match="no tick is running"):
        scheduler.free(102 * MS)


@pytest.mark.parametrize("tail_ms", [0, 30, 60])
def test_the_next_tick_is_not_chosen_before_a_guard_ahead_of_its_turn(tail_ms):
    """Without a tail the device is through at 100, and with one so much later; the next can be through 100 behind."""
    scheduler, stream = overlapping(tail_ms)
    for _ in range(2):
        scheduler.arrive(stream, 0)
    assert tick_at(scheduler, 0).predicted_ns == (100 + tail_ms) * MS
    scheduler.free(60 * MS)
    assert scheduler.next(60 * MS) == Wait(90 * MS)
    late = scheduler.arrive(stream, 80 * MS)
    assert scheduler.next(80 * MS) == Wait(90 * MS)
    tick = tick_at(scheduler, 90)
    assert tick.predicted_ns == (10 + 100 + tail_ms) * MS
    assert tick.entries[0].frames == (1,)
    assert late == 2


def test_a_tick_that_is_through_early_is_followed_at_once():
    scheduler, stream = overlapping()
    for _ in range(2):
        scheduler.arrive(stream, 0)
    tick_at(scheduler, 0)
    scheduler.free(50 * MS)
    assert scheduler.next(50 * MS) == Wait(90 * MS)
    scheduler.done({stream: 1}, 55 * MS)
    assert tick_at(scheduler, 55).number == 1


def test_a_chunk_that_the_tick_in_flight_finishes_is_not_pushed_on():
    """The stream has ended and its last chunk is behind the stages: there is nothing to do."""
    scheduler, stream = overlapping(tail_ms=40)
    scheduler.arrive(stream, 0)
    scheduler.end(stream, 0)
    tick_at(scheduler, 0)
    scheduler.free(100 * MS)
    assert scheduler.next(100 * MS) == Wait(None)
    scheduler.done({stream: 1}, 140 * MS)
    assert scheduler.next(140 * MS) == Wait(None)
    scheduler.show(2000 * MS)
    assert scheduler.is_over(stream)


@pytest.mark.parametrize(("arrives_ms", "chosen"), [(0, False), (75, True)])
def test_frames_are_not_given_up_while_they_may_still_be_in_time(arrives_ms, chosen):
    """A device that wobbles: expired is what is late if the tick at hand takes all that it may."""
    events = []
    scheduler, _ = overlapping(guard_ms=0, events=events)
    for took in (100, 150, 100, 150, 100, 150, 100, 100):
        scheduler.warm_up(LatencySample(None, 1, 1, took * MS))
    assert scheduler.model.times(None, 1).bound_ns[1] == 150 * MS
    tight = scheduler.open(StreamSettings(5, 255, steps=1, first_frames=1, chunk_frames=1), 0)
    scheduler.arrive(tight, 0)
    tick_at(scheduler, 0)
    scheduler.done({tight: 1}, 100 * MS)
    scheduler.arrive(tight, 100 * MS)
    tick_at(scheduler, 100)
    scheduler.arrive(tight, (100 + arrives_ms) * MS)
    scheduler.free(150 * MS)
    if chosen:  # by 175 + 255 at the latest from 250 on: 150 later it is through
        assert tick_at(scheduler, 200).entries[0].frames == (2,)
        return
    assert scheduler.next(200 * MS) == Wait(250 * MS)  # by 355; from 250 on it would be through at 400
    scheduler.done({tight: 1}, 204 * MS)
    assert tick_at(scheduler, 204).entries[0].frames == (2,)
    assert not any(isinstance(event, FrameRecord) for event in events)


def test_what_a_tick_adds_is_learned_whether_it_followed_at_once_or_not():
    """Alone it takes 140 ms, behind another one 100, and 120 if it is handed over in the middle of its tail."""
    for started, done in ((100, 240), (120, 260), (140, 280), (200, 340)):
        scheduler, stream = overlapping(tail_ms=40)
        for _ in range(2):
            scheduler.arrive(stream, 0)
        tick_at(scheduler, 0)
        scheduler.free(100 * MS)
        if started < 140:
            tick_at(scheduler, started)
        scheduler.done({stream: 1}, 140 * MS)
        if started >= 140:
            tick_at(scheduler, started)
        scheduler.free((done - 40) * MS)
        scheduler.done({stream: 1}, done * MS)
        assert scheduler.model.speed == pytest.approx(1)
        for first, expected in ((True, 100), (False, 100)):
            costs = scheduler.model.times(None, 1)
            assert (costs.first_expected_ns if first else costs.expected_ns[1]) == expected * MS
        assert scheduler.model.times(None, 1).tail_bound_ns == 40 * MS


def test_deadlines_are_a_tail_earlier():
    """Frames of 16 a second with a budget for two ticks of 80 ms and 183 ms more: not with a tail of 20 ms."""
    source = regular(16, 105, budget_ms=370, first_frames=1)
    for tail_ms, lowered in ((0, 0), (20, 1)):
        device = Device(tail_ms=tail_ms, early=0.0)
        world = World([source], device).run()
        assert world.count(Fate.SHOWN) == len(world.frames) == 105
        assert {f.steps for f in world.frames} == {2 - lowered}


def test_a_device_that_would_be_overloaded_tick_by_tick_shows_all_when_they_overlap():
    """A chunk comes each 133 ms and takes 100 and then 40 behind the stages."""
    source = regular(30, 605, budget_ms=900, stages=2, min_steps=2)
    device = Device(fixed_ms=40, slope_ms=30, sizes=(1,), tail_ms=40, early=0.0)
    world = World([source], device).run()
    assert world.count(Fate.SHOWN) == len(world.frames)
    busy = Device(fixed_ms=80, slope_ms=30, sizes=(1,))
    assert World([source], busy).run().count(Fate.DROPPED) > 10
    assert sum(handed < done for handed, done in world.handed) > 100


def test_on_one_device_the_next_tick_is_handed_over_before_the_last_is_through():
    streams = [regular(16, 405, batch_key=batch_key, budget_ms=2000, min_steps=2) for batch_key in "ab"]
    world = World(streams, Device(fixed_ms=60, early=0.3)).run()
    assert world.count(Fate.SHOWN) == len(world.frames)
    ahead_ms = [(done - at) / MS for at, done in world.handed[1:] if done]
    assert len(ahead_ms) > 90
    assert all(0 < ahead <= 10 for ahead in ahead_ms)


def test_batch_sizes_begin_with_one():
    with pytest.raises(ValueError, match=r"expected batch sizes from 1 on, got \[2, 4\]"):
        Scheduler(PolicyConfig(), (2, 4), print)
