"""What the device does next, and which frames are given up: a pure function of (time, streams, tick times, config).

The promise behind every decision: what has entered the device can still be finished in time. For that, `edf_schedule`
plays through how the chunks in flight would be finished if nothing more entered, earliest deadline first; its result
is the slack. A tick is started only if the slack after it is not negative, and where none is left to wait, the first
tick of the schedule is run. docs/scheduling.md tells it in words.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from svd2_jax.errors import ConfigError
from svd2_jax.rows import InFlight, Rows
from svd2_jax.runtime.ingest import SourceClock
from svd2_jax.runtime.latency import LatencyConfig, TickTimes
from svd2_jax.runtime.pacing import Playout
from svd2_jax.runtime.types import MS, NEVER_NS, FrameRecord, StreamId, StreamSettings, TickEntry

ROOMY_SHARE = 0.5  # of a tick by which a chunk that is due soon may be held up for pushing others on
RIDE_BELOW = 0.7  # share of time for pushing all chunks on, up to which they are pushed with whatever enters

TickTimesOf = Callable[[Hashable, int], TickTimes]
"""Gives the tick times of a shape and a number of steps."""


@dataclass(frozen=True)
class PolicyConfig:
    """Settings of the scheduler.

    Attributes:
      latency: how device times are believed.
      guard_ms: time kept free before every deadline, for what the host itself takes and for threads that wake late;
        at least 0.
      degrade_above: utilisation of the device above which streams are given fewer denoising steps, above 0.
      restore_below: utilisation that more steps may lead to, 0 to `degrade_above`.
      restore_after_ms: how long that must have been so before steps are raised.
      push_below: share of time up to which the device pushes every chunk on to its end by ticks of its own, though
        that may hold up another one for half a tick; 0 or more.
      admit_below: utilisation of all streams at their floor steps up to which another one is let in; None lets in
        every stream that could be served alone. The first stream is always let in.
      stall_intervals: a source is taken to have stalled when its next frame is overdue by so many of its intervals.
    """

    latency: LatencyConfig = field(default_factory=LatencyConfig)
    guard_ms: float = 10.0
    degrade_above: float = 0.92
    restore_below: float = 0.82
    restore_after_ms: float = 500.0
    push_below: float = 0.9
    admit_below: float | None = 1.0
    stall_intervals: float = 2.0

    def __post_init__(self):
        if not 0 < self.restore_below <= self.degrade_above:
            given = f"{self.restore_below} and {self.degrade_above}"
            raise ConfigError(f"expected 0 < restore_below <= degrade_above, got {given}")
        for name in ("guard_ms", "restore_after_ms", "push_below", "stall_intervals"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")

    @property
    def guard_ns(self) -> int:
        return round(self.guard_ms * MS)


Group = tuple[Hashable, int]
"""Batch key and steps: streams of the same group may share a tick."""


@dataclass(slots=True)
class ScheduledStream:
    """All that is known of one stream; decisions read it and change nothing.

    Attributes:
      id: its number.
      settings: what it asked for.
      steps: that it takes from its next tick on.
      clock: what is known of its source.
      playout: how it is shown.
      rows: chunks in flight that need more ticks besides those in flight.
      served_ns: when its last chunk entered.
      arrived: frames so far.
      queue: frames that wait to enter, oldest first.
      leaving: chunks that a tick in flight finishes.
      finished: frames that wait to be shown, by number.
      started: whether its first group has entered.
      ended: whether no more frames come.
    """

    id: StreamId
    settings: StreamSettings
    steps: int
    clock: SourceClock
    playout: Playout
    rows: Rows[list[FrameRecord]]
    served_ns: int
    arrived: int = 0
    queue: deque[FrameRecord] = field(default_factory=deque)
    leaving: deque[InFlight[list[FrameRecord]]] = field(default_factory=deque)
    finished: dict[int, FrameRecord] = field(default_factory=dict)
    started: bool = False
    ended: bool = False

    @property
    def group(self) -> Group:
        return self.settings.batch_key, self.steps

    @property
    def need(self) -> int:
        """Frames of what enters next: the first group or a chunk."""
        return self.settings.chunk_frames if self.started else self.settings.first_frames

    @property
    def ticks(self) -> int:
        """Ticks of the stream that a chunk takes."""
        return self.steps * self.settings.stages

    @property
    def gap_ns(self) -> int:
        """Expected time between two frames."""
        return round(max(self.clock.gap_ns, self.settings.interval_ns / 2))

    @property
    def next_ns(self) -> int:
        """When the next chunk is expected to be whole."""
        return self.clock.arrival_ns + max(0, self.need - len(self.queue)) * self.gap_ns

    @property
    def period_ns(self) -> int:
        """Expected time between two chunks."""
        return self.gap_ns * self.settings.chunk_frames


ChunkDue = tuple[int, int]
"""A chunk under way: its deadline, and how many ticks of its stream it still needs."""


class Job(NamedTuple):
    """Chunks under way of one stream, the oldest first."""

    group: Group
    flight: tuple[ChunkDue, ...]


class Schedule(NamedTuple):
    """How the chunks in flight would be finished if nothing more entered: the most urgent first.

    Attributes:
      slack_ns: least time between a chunk's end and its deadline; below 0 if one is late; NEVER_NS without chunks.
      first: streams of the first tick.
    """

    slack_ns: int
    first: tuple[StreamId, ...]


def edf_schedule(
    jobs: Mapping[StreamId, Job], start_ns: int, times_of: TickTimesOf, begin: Collection[StreamId] = ()
) -> Schedule:
    """Plays through the ticks that finish all chunks in flight, from `start_ns` on, at bound times.

    The group with the most urgent chunk goes first, in the largest batch worth its latency, its most urgent streams
    in it. The order does not depend on the start, so starting later by d leaves d less slack. With `begin`, the first
    tick is that of these streams, which are of one group.
    """
    heaps: dict[Group, list[tuple[int, StreamId, int, tuple[ChunkDue, ...]]]] = {}
    for stream, (group, flight) in jobs.items():
        latest = -NEVER_NS if stream in begin else _latest_ns(flight, times_of(*group))
        heapq.heappush(heaps.setdefault(group, []), (latest, stream, 0, flight))
    slack, first, now = NEVER_NS, (), start_ns
    while heaps and slack >= 0:
        group = min(heaps, key=lambda group: heaps[group][0])
        heap, cost = heaps[group], times_of(*group)
        size = len(begin) if begin and not first else cost.size(len(heap), cost.knee)
        taken = [heapq.heappop(heap) for _ in range(size)]
        now += _tick_of([entry[3] for entry in taken], cost).bound_ns[size]
        first = first or tuple(entry[1] for entry in taken)
        for _, stream, ticks, flight in taken:
            ticks += 1
            while flight and flight[0][1] <= ticks:
                slack, flight = min(slack, flight[0][0] - now), flight[1:]
            if flight:
                latest = _latest_ns(flight, cost) + ticks * cost.bound_ns[1]
                heapq.heappush(heap, (latest, stream, ticks, flight))
        if not heap:
            del heaps[group]
    return Schedule(slack, first)


def _tick_of(flights: Sequence[Sequence[ChunkDue]], cost: TickTimes) -> TickTimes:
    """Returns the costs of a tick of these: of one row only where each stream has one chunk under way."""
    return cost if any(len(flight) > 1 for flight in flights) else cost.of_one_row


def _latest_ns(flight: Sequence[ChunkDue], cost: TickTimes) -> int:
    """Returns when the first of the ticks of these chunks must start to finish all of them in time."""
    return min([deadline_ns - left * cost.bound_ns[1] for deadline_ns, left in flight])


def jobs_of(streams: Iterable[ScheduledStream], times_of: TickTimesOf) -> dict[StreamId, Job]:
    """Returns the chunks under way, due a tail before their deadlines: a tick's frames are finished behind it."""
    jobs = {}
    for s in streams:
        if s.rows:
            tail_ns = times_of(*s.group).tail_bound_ns
            rows = s.rows if s.rows.steps == s.steps else s.rows.with_steps(s.steps)
            flight = [  # what fewer steps have finished takes a tick to leave, too
                (held.chunk[0].deadline_ns - tail_ns, max(1, left))
                for held, left in zip(rows.chunks, rows.ticks_left, strict=True)
            ]
            jobs[s.id] = Job(s.group, tuple(flight))
    return jobs


class Decision(NamedTuple):
    """What a free device does.

    Attributes:
      expired: how many of the oldest queued frames of each stream cannot be shown in time any more.
      entries: of the tick to run; empty: none. Queued frames older than those that enter are given up.
      until_ns: with nothing to run, when to ask again; None: when something happens.
    """

    expired: dict[StreamId, int]
    entries: tuple[TickEntry, ...] = ()
    until_ns: int | None = None


class Offer(NamedTuple):
    """Queued frames of a stream that could enter; the least goes first."""

    key: float
    stream: ScheduledStream
    frames: Sequence[FrameRecord]


@dataclass
class Moment:
    """All that a decision depends on.

    Attributes:
      now_ns: the time.
      streams: all of them.
      times_of: what ticks take.
      config: the policy's settings.
      overloaded: whether there is no time for all frames.
    """

    now_ns: int
    streams: Sequence[ScheduledStream]
    times_of: TickTimesOf
    config: PolicyConfig
    overloaded: bool

    def __post_init__(self):
        self.times = {s.id: self.times_of(*s.group) for s in self.streams}
        self.jobs = jobs_of(self.streams, self.times_of)

    def decide(self) -> Decision:
        """Returns what a free device does."""
        guard, now_ns = self.config.guard_ns, self.now_ns
        expired, offers, wakes = self._offers()
        if chosen := self._choose(offers):
            return Decision(expired, tuple(_entry(s, frames) for _, s, frames in chosen))
        saved = edf_schedule(self.jobs, now_ns, self.times_of)
        push = tuple([_entry(s) for s in self.streams if s.id in saved.first])
        if push:
            flights = [self.jobs[entry.stream].flight for entry in push]
            tick_ns = _tick_of(flights, self.times[push[0].stream]).bound_ns[len(push)]
            until = now_ns if offers or saved.slack_ns <= guard else self._push_ns(tick_ns)
            if until <= now_ns:
                return Decision(expired, push)
            wakes += [until, now_ns + saved.slack_ns - guard]
        return Decision(expired, (), max(min(wakes), now_ns + 1) if wakes else None)

    def _push_ns(self, tick_ns: int) -> int:
        """Returns when chunks in flight are pushed on if nothing else happens before: now, unless a chunk is due soon.

        A push that still runs when a chunk becomes whole makes that one wait. A device with time to push every chunk on
        by ticks of its own takes this risk for up to half a tick, a busier one not at all.
        """
        near = round(tick_ns * (ROOMY_SHARE if self._pushing(1) <= self.config.push_below else 1.0))
        due = [s.next_ns for s in self.streams if not s.ended and abs(s.next_ns - self.now_ns) < near]
        return max(due, default=self.now_ns - near) + near

    def _pushing(self, batch: int) -> float:
        """Returns the share of time that it takes to push every chunk on to its end, so many streams at once."""
        ones = [(s, self.times[s.id].of_one_row.share_ns(batch)) for s in self.streams]
        return sum(s.ticks * share_ns / s.period_ns for s, share_ns in ones)

    def _offers(self) -> tuple[dict[StreamId, int], list[Offer], list[int]]:
        """Returns the expired frames, the chunks that could enter now, most urgent first, and when others could."""
        expired, offers, wakes = {}, [], []
        # The device may be busy when a stream's time has come.
        several = len(self.streams) > 1 or self.jobs
        busy = max((cost.bound_ns[cost.knee] for cost in self.times.values()), default=0) if several else 0
        for s in self.streams:
            # How long before its deadline a frame must enter, if its stream has the device alone.
            cost = self.times[s.id]
            takes_ns = s.ticks * cost.of_one_row.bound_ns[1] if s.started else cost.first_bound_ns
            takes_ns += cost.tail_bound_ns + self.config.guard_ns
            frames = [frame for frame in s.queue if frame.deadline_ns - takes_ns >= self.now_ns]
            if len(frames) < len(s.queue):
                expired[s.id] = len(s.queue) - len(frames)
            if not frames:
                continue
            # Part of a chunk enters when nothing more comes, or its oldest frame would be lost by waiting for more.
            latest = frames[0].deadline_ns - takes_ns
            ready = len(frames) >= s.need or s.ended or latest - busy <= self.now_ns
            interval = max(s.gap_ns, s.settings.interval_ns)
            stalled = s.clock.arrival_ns + round(self.config.stall_intervals * interval)
            if ready or (self.now_ns >= stalled and not self.overloaded):
                key = latest if ready else NEVER_NS
                if self.overloaded:  # who waited longest
                    key = (s.served_ns - self.now_ns) / s.period_ns
                offers.append(Offer(key, s, frames))
            else:
                wakes += [at for at in (latest - busy, stalled) if at > self.now_ns]
        return expired, sorted(offers, key=lambda offer: (offer.key, offer.stream.id)), wakes

    def _choose(self, offers: Sequence[Offer]) -> Sequence[Offer]:
        """Returns the foremost offer in the largest batch that leaves every chunk in time, or nothing."""
        if not offers:
            return []
        head, alike = offers[0].stream, offers[:1]
        if head.started:
            alike = [o for o in offers if o.stream.started and o.stream.group == head.group]
        cost = self.times[head.id]
        most = cost.size(len(alike), cost.best if self.overloaded else cost.knee)
        round_ns = max(cost.bound_ns[most], len(offers) * cost.share_ns(len(offers)))
        members = [o._replace(frames=self._entering(o, round_ns)) for o in alike[:most]]
        if head.started and self._pushing(len(self.streams)) <= RIDE_BELOW:
            # A larger batch takes less time than two ticks: chunks that are alone on the device are pushed with it.
            taken, group = {o.stream.id for o in members}, [s for s in self.streams if s.group == head.group]
            members += [Offer(NEVER_NS, s, ()) for s in group if s.id not in taken and len(s.rows) == 1]
            most = cost.size(len(members), cost.knee)
        sizes = reversed([size for size in cost.sizes if size <= most])
        return next((members[:size] for size in sizes if self._in_time(members[:size])), [])

    def _entering(self, offer: Offer, round_ns: float) -> Sequence[FrameRecord]:
        """Returns which frames would enter: the oldest, or in overload, evenly spaced ones up to the newest.

        In overload a stream has a turn each `round_ns`: it chooses among the frames that come between two turns, and
        takes none so old that its later ticks could not wait for their turns.
        """
        _, s, frames = offer
        if not self.overloaded or len(frames) <= s.need:
            return frames[: s.need]
        coming = frames[-max(math.ceil(round_ns / s.gap_ns), 2 * s.need) :]
        young = [frame for frame in coming if frame.deadline_ns >= self.now_ns + s.ticks * round_ns]
        return evenly(max(young, frames[-s.need :], key=len), s.need)

    def _in_time(self, members: Sequence[Offer]) -> bool:
        """Whether all chunks, those that would enter included, can be finished in time if this tick is run."""
        lead, jobs, start_ns = members[0].stream, dict(self.jobs), self.now_ns + self.config.guard_ns
        times = self.times[lead.id]
        if not lead.started:  # a first group has its tick for itself, and is finished by it
            start_ns += times.first_bound_ns
            in_time = start_ns <= members[0].frames[0].deadline_ns - times.tail_bound_ns
            return in_time and edf_schedule(jobs, start_ns, self.times_of).slack_ns >= 0
        for _, s, frames in members:
            if frames:
                before = jobs[s.id].flight if s.id in jobs else ()
                entering = frames[0].deadline_ns - times.tail_bound_ns, s.ticks
                jobs[s.id] = Job(s.group, (*before, entering))
        begin = [o.stream.id for o in members]
        return edf_schedule(jobs, start_ns, self.times_of, begin).slack_ns >= 0


def evenly(frames: Sequence[FrameRecord], count: int) -> Sequence[FrameRecord]:
    """Returns `count` of the frames, evenly spaced, the last one always among them."""
    return [frames[(i + 1) * len(frames) // count - 1] for i in range(count)]


def _entry(s: ScheduledStream, frames: Sequence[FrameRecord] = ()) -> TickEntry:
    """Returns a stream's part of a tick that these frames enter; without, it pushes on what is in flight."""
    fill = s.need - len(frames) if frames else 0
    return TickEntry(s.id, tuple([f.number for f in frames]), fill, s.steps, bool(frames) and not s.started)
