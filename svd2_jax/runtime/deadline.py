"""What the device does next, and which frames are given up: a pure function of (time, queues, costs, config).

The promise behind every decision: what has entered the device can still be finished in time. For that, `rescue`
plays through how the chunks under way would be finished if nothing more entered, most urgent first; its result is
the time to spare. A tick is started only if afterwards there still is time to spare, and where there is none left
to wait, the first tick of the rescue is run. docs/scheduling.md tells it in words.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from svd2_jax.errors import ConfigError
from svd2_jax.runtime.latency import Costs, LatencyConfig
from svd2_jax.runtime.work import MS, Reason, StreamId

NEVER_NS = 1 << 62  # later than any deadline
MOST_TRIES = 8  # of possible ticks in one decision; what fails so often waits for the next one


@dataclass(frozen=True)
class PolicyConfig:
    """Settings of the scheduler.

    Attributes:
      latency: how device times are believed.
      guard_ms: time kept free before every deadline, for what the host itself takes and for threads that wake late;
        at least 0.
      lower_above: utilisation of the device above which streams are given fewer denoising steps, above 0.
      raise_below: utilisation that more steps may lead to, 0 to `lower_above`.
      raise_after_ms: how long that must have been so before steps are raised.
      risk_hold_ms: how long steps stay after they were lowered because frames were lost, though the utilisation
        was low enough.
      admit_below: utilisation of all streams at their floor steps up to which another one is let in; None lets in
        every stream that could be served alone. The first stream is always let in.
      stall_intervals: a source is taken to have stalled when its next frame is overdue by so many of its intervals.
      most_queued: input frames of one stream that wait at most; fewer where its budget holds fewer.
    """

    latency: LatencyConfig = field(default_factory=LatencyConfig)
    guard_ms: float = 10.0
    lower_above: float = 0.92
    raise_below: float = 0.82
    raise_after_ms: float = 500.0
    risk_hold_ms: float = 5000.0
    admit_below: float | None = 1.0
    stall_intervals: float = 4.0
    most_queued: int = 256

    def __post_init__(self):
        if not 0 < self.raise_below <= self.lower_above:
            raise ConfigError(
                "expected 0 < raise_below <= lower_above, "
                f"got raise_below={self.raise_below} and lower_above={self.lower_above}"
            )
        for name in ("guard_ms", "raise_after_ms", "risk_hold_ms", "stall_intervals"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.most_queued < 1:
            raise ConfigError(f"most_queued must be at least 1, got {self.most_queued}")

    @property
    def guard_ns(self) -> int:
        return round(self.guard_ms * MS)


class Group(NamedTuple):
    """Streams of the same group may share a tick."""

    shape: Hashable
    steps: int


class Flight(NamedTuple):
    """A chunk under way: its deadline, and how many ticks of its stream it still needs."""

    deadline_ns: int
    left: int


class View(NamedTuple):
    """What the policy looks at of one stream.

    Attributes:
      stream: whose.
      group: its shape and the steps that it takes from its next tick on.
      queue: deadlines of the waiting input frames, oldest first.
      need: frames of what enters next: the first group or a chunk.
      first: whether that is the first group.
      ticks: of the stream that a chunk takes.
      flight: chunks under way, oldest first.
      next_ns: when the next chunk's last frame is expected.
      overdue_ns: when the source is taken to have stalled, if no frame comes before.
      period_ns: expected time between two chunks.
      ended: whether no more frames come.
      served_ns: when its last chunk entered.
    """

    stream: StreamId
    group: Group
    queue: tuple[int, ...]
    need: int
    first: bool
    ticks: int
    flight: tuple[Flight, ...]
    next_ns: int
    overdue_ns: int
    period_ns: int
    ended: bool
    served_ns: int


class Choice(NamedTuple):
    """A stream's part of the next tick: which of its queued frames enter (positions in the queue), or none."""

    stream: StreamId
    enter: tuple[int, ...] = ()
    first: bool = False


class Drop(NamedTuple):
    """Queued frames to give up: positions in the queue."""

    stream: StreamId
    positions: tuple[int, ...]
    reason: Reason


class Decision(NamedTuple):
    """What to drop, what to run, and, with nothing to run, when to ask again (None: when something happens)."""

    drops: tuple[Drop, ...]
    parts: tuple[Choice, ...]
    until_ns: int | None


class Job(NamedTuple):
    """Chunks under way of one stream."""

    stream: StreamId
    group: Group
    flight: tuple[Flight, ...]


class Rescue(NamedTuple):
    """How the chunks under way would be finished if nothing more entered.

    Attributes:
      spare_ns: least time between a chunk's end and its deadline; below 0 if one is lost; NEVER_NS without chunks.
      first: streams of the first tick.
      lost: positions of the chunks that end behind their deadlines, by stream.
    """

    spare_ns: int
    first: tuple[StreamId, ...]
    lost: dict[StreamId, list[int]]


def rescue(
    jobs: Iterable[Job], start_ns: int, costs: Mapping[Group, Costs], stop_lost: bool = False
) -> Rescue:
    """Plays through the ticks that finish all chunks under way, from `start_ns` on, at bound times.

    The group with the most urgent chunk goes first, in the largest batch worth its latency, its most urgent streams
    in it. The order does not depend on the start, so starting later by d leaves d less to spare; and what remains
    after the first tick is played through as here.

    Args:
      jobs: chunks under way, by stream.
      start_ns: when the device is free.
      costs: what ticks take, by group.
      stop_lost: return as soon as one chunk is found lost.
    """
    heaps: dict[Group, list[tuple]] = {}
    for stream, group, flight in jobs:
        latest = _latest(flight, costs[group].bound_ns[1])
        heaps.setdefault(group, []).append((latest[0], stream, 0, 0, flight, latest))
    for heap in heaps.values():
        heapq.heapify(heap)
    spare, first, lost, now = NEVER_NS, (), {}, start_ns
    while heaps:
        group = min(heaps, key=lambda g: heaps[g][0][0]) if len(heaps) > 1 else next(iter(heaps))
        heap, cost = heaps[group], costs[group]
        size, one = cost.size(len(heap), cost.knee), cost.bound_ns[1]
        now += cost.bound_ns[size]
        taken = [heapq.heappop(heap) for _ in range(size)]
        if not first:
            first = tuple(entry[1] for entry in taken)
        for _, stream, ticks, head, flight, latest in taken:
            ticks += 1
            while head < len(flight) and flight[head][1] <= ticks:
                over = flight[head][0] - now
                if over < spare:
                    spare = over
                if over < 0:
                    lost.setdefault(stream, []).append(head)
                    if stop_lost:
                        return Rescue(spare, first, lost)
                head += 1
            if head < len(flight):
                heapq.heappush(heap, (latest[head] + ticks * one, stream, ticks, head, flight, latest))
        if not heap:
            del heaps[group]
    return Rescue(spare, first, lost)


def _latest(flight: Sequence[Flight], tick_ns: int) -> list[int]:
    """Returns when the stream's next tick must start to finish in time each chunk and all behind it."""
    least, latest = NEVER_NS, []
    for deadline_ns, left in reversed(flight):
        least = min(least, deadline_ns - left * tick_ns)
        latest.append(least)
    latest.reverse()
    return latest


def backlog_spare_ns(now_ns: int, views: Sequence[View], costs: Mapping[Group, Costs]) -> int:
    """Returns the least time to spare if all whole chunks that wait now are done, most urgent first.

    Below 0, some would be lost. Counts shares of the best batches, so it errs on the hopeful side.
    """
    ready = sum(len(view.queue) >= view.need for view in views)
    work = []
    for view in views:
        if len(view.queue) < view.need:
            continue
        cost = costs[view.group]
        share = cost.first_expected_ns if view.first else cost.share_ns(ready)
        tail = 0 if view.first else (view.ticks - 1) * cost.expected_ns[1]
        for i in range(0, len(view.queue) - view.need + 1, view.need):
            work.append((view.queue[i] - tail, share))
    spare, end = NEVER_NS, now_ns
    for latest, share in sorted(work):
        end += share
        spare = min(spare, latest - end)
    return round(spare)


class Offer(NamedTuple):
    """What a stream could do in the next tick.

    Attributes:
      key: the least goes first.
      view: of the stream.
      start: position of the first queued frame that may enter; None: what is under way is pushed on.
      first: whether a first group would enter.
    """

    key: float
    view: View
    start: int | None
    first: bool


class Entry(NamedTuple):
    """An offer in detail: positions of the queued frames that enter, and of those that are given up for them."""

    view: View
    enter: tuple[int, ...]
    drops: tuple[int, ...]
    first: bool


class _Times(NamedTuple):
    """What ticks of a group take, at their bounds: alone, as a first group, in the batch at hand; and all's round."""

    one_ns: int
    first_ns: int
    batch_ns: int
    round_ns: int


def decide(
    now_ns: int, views: Sequence[View], costs: Mapping[Group, Costs], config: PolicyConfig, overloaded: bool
) -> Decision:
    """Returns what an idle device does now.

    Args:
      now_ns: the time.
      views: all streams that have frames waiting or chunks under way.
      costs: what ticks take, for each group among the views.
      config: the policy's settings.
      overloaded: more chunks come than the device can do: the stream that waited longest goes first, and each takes
        what is newest, evenly spaced; otherwise the most urgent goes first, and each takes its oldest frames.
    """
    guard = config.guard_ns
    times = _times(views, costs, overloaded)
    drops, offers, wakes = _offers(now_ns, views, costs, times, guard, overloaded)
    jobs = {view.stream: Job(view.stream, view.group, view.flight) for view in views if view.flight}
    chosen = _choose(offers, now_ns, jobs, costs, times, guard, overloaded)
    if not chosen and jobs:
        saved = rescue(jobs.values(), now_ns, costs)
        if saved.lost:  # too late for these: they must not hold up the others
            for stream, positions in saved.lost.items():
                jobs[stream] = _without_deadlines(jobs[stream], positions)
            saved = rescue(jobs.values(), now_ns, costs)
            chosen = _choose(offers, now_ns, jobs, costs, times, guard, overloaded)
        if not chosen:
            if offers or saved.spare_ns <= guard:
                return Decision(tuple(drops), tuple(Choice(stream) for stream in saved.first), None)
            wakes.append(now_ns + saved.spare_ns - guard)
    if chosen:
        drops += [Drop(entry.view.stream, entry.drops, Reason.OVERLOAD) for entry in chosen if entry.drops]
        parts = tuple(Choice(entry.view.stream, entry.enter, entry.first) for entry in chosen)
        return Decision(tuple(drops), parts, None)
    return Decision(tuple(drops), (), max(min(wakes), now_ns + 1) if wakes else None)


def _without_deadlines(job: Job, positions: Sequence[int]) -> Job:
    flight = tuple(
        chunk._replace(deadline_ns=NEVER_NS) if i in positions else chunk
        for i, chunk in enumerate(job.flight)
    )
    return job._replace(flight=flight)


def _times(views: Sequence[View], costs: Mapping[Group, Costs], overloaded: bool) -> dict[Group, _Times]:
    ready: dict[Group, int] = {}
    for view in views:
        if len(view.queue) >= view.need:
            ready[view.group] = ready.get(view.group, 0) + 1
    round_ns = round(sum(count * costs[group].share_ns(count) for group, count in ready.items()))
    times = {}
    for group, cost in costs.items():
        size = cost.size(ready.get(group, 1), cost.best if overloaded else cost.knee)
        times[group] = _Times(cost.bound_ns[1], cost.first_bound_ns, cost.bound_ns[size], round_ns)
    return times


def _offers(
    now_ns: int,
    views: Sequence[View],
    costs: Mapping[Group, Costs],
    times: Mapping[Group, _Times],
    guard_ns: int,
    overloaded: bool,
) -> tuple[list[Drop], list[Offer], list[int]]:
    """Returns the hopeless frames, what streams could do now, foremost first, and when others could do something."""
    # Others may keep the device busy when a stream's time has come.
    busy = max((cost.bound_ns[cost.knee] for cost in costs.values()), default=0) if len(views) > 1 else 0
    spare = guard_ns + busy
    drops, offers, wakes = [], [], []
    for view in views:
        time, queue = times[view.group], view.queue
        lone = time.first_ns if view.first else view.ticks * time.one_ns
        start, least = 0, now_ns + lone + guard_ns
        while start < len(queue) and queue[start] < least:
            start += 1
        if start:
            drops.append(Drop(view.stream, tuple(range(start)), Reason.HOPELESS))
        waits = len(queue) - start
        whole = waits >= view.need or (view.ended and waits > 0)
        flush = not whole and bool(view.flight) and _must_flush(view, now_ns, time.one_ns + spare)
        stalled = now_ns >= view.overdue_ns
        if waits:
            # Part of a chunk enters when nothing more comes, or the oldest frame would be lost by waiting for more,
            # be it only for the end of a flush.
            latest = queue[start] - lone
            urgent = latest - spare - flush * time.batch_ns <= now_ns
            if whole or urgent or (stalled and not overloaded):
                if overloaded:
                    key = (view.served_ns - now_ns) / view.period_ns
                elif not (whole or urgent or flush):
                    key = NEVER_NS  # the device has nothing else to do
                else:
                    key = min(latest, _latest(view.flight, time.one_ns)[0]) if view.flight else latest
                offers.append(Offer(key, view, start, view.first))
                continue
            wakes.append(latest - spare)
        if flush:
            key = -NEVER_NS if overloaded else _latest(view.flight, time.one_ns)[0]
            offers.append(Offer(key, view, None, False))
        elif not stalled:
            wakes.append(view.overdue_ns)
    offers.sort(key=lambda offer: (offer.key, offer.view.stream))
    return drops, offers, wakes


def _entry(offer: Offer, now_ns: int, time: _Times, overloaded: bool) -> Entry:
    """Returns which queued frames would enter now, and which would be given up for them.

    Under overload, frames evenly spaced up to the newest. Otherwise the oldest, if the device is expected to come to
    the others in time; if not, only as many chunks of evenly spaced frames stay as it comes to.
    """
    view = offer.view
    if offer.start is None:
        return Entry(view, (), (), False)
    queue, need = view.queue, view.need
    everything = tuple(range(offer.start, len(queue)))
    if len(everything) <= need:
        return Entry(view, everything, (), offer.first)
    step = max(time.round_ns, time.batch_ns)
    if overloaded:
        # Frames that still have the time to share a batch and to wait for the stream's next turns.
        least, start = now_ns + time.batch_ns + (view.ticks - 1) * step, offer.start
        while start < len(queue) - need and queue[start] < least:
            start += 1
        kept = evenly(everything[start - offer.start :], need)
    else:
        lone = time.first_ns if view.first else view.ticks * time.one_ns
        chunks, kept = len(everything) // need, everything
        while any(queue[kept[i * need]] < now_ns + lone + i * step for i in range(1, chunks)):
            chunks -= 1
            kept = evenly(everything, chunks * need)
    stay = set(kept)
    return Entry(view, kept[:need], tuple(i for i in everything if i not in stay), offer.first)


def evenly(items: Sequence[int], count: int) -> tuple[int, ...]:
    """Returns `count` of the items, evenly spaced, the last one always among them."""
    return tuple(items[(i + 1) * len(items) // count - 1] for i in range(count))


def _must_flush(view: View, now_ns: int, tick_ns: int) -> bool:
    """Whether chunks under way would be late, or nothing pushes them on, if they waited for the next chunk."""
    if now_ns >= view.overdue_ns or (view.ended and not view.queue):
        return True
    coming, period = max(view.next_ns, now_ns) + tick_ns, view.period_ns
    return any(coming + (left - 1) * period > deadline_ns for deadline_ns, left in view.flight)


def _choose(
    offers: Sequence[Offer],
    now_ns: int,
    jobs: Mapping[StreamId, Job],
    costs: Mapping[Group, Costs],
    times: Mapping[Group, _Times],
    guard_ns: int,
    overloaded: bool,
) -> list[Entry]:
    """Returns the foremost offer that leaves every chunk in time, in the largest batch that does; or nothing."""
    tries = MOST_TRIES
    for i, head in enumerate(offers):
        group = head.view.group
        cost = costs[group]
        if head.first:
            members, sizes = [head], (1,)
        else:
            most = cost.best if overloaded else cost.knee
            members = [o for o in offers[i:] if o.view.group == group and not o.first][:most]
            sizes = [size for size in reversed(cost.sizes) if size <= min(len(members), most)]
        entries = [
            _entry(offer, now_ns + guard_ns, times[group], overloaded) for offer in members[: sizes[0]]
        ]
        for size in sizes:
            if _in_time(entries[:size], now_ns, jobs, costs, guard_ns):
                return entries[:size]
            tries -= 1
            if not tries:
                return []
    return []


def _in_time(
    entries: Sequence[Entry],
    now_ns: int,
    jobs: Mapping[StreamId, Job],
    costs: Mapping[Group, Costs],
    guard_ns: int,
) -> bool:
    """Whether all chunks, those that would enter included, can be finished in time if this tick is run."""
    cost = costs[entries[0].view.group]
    end = now_ns + guard_ns + (cost.first_bound_ns if entries[0].first else cost.bound_ns[len(entries)])
    taking = {entry.view.stream for entry in entries}
    after = [job for stream, job in jobs.items() if stream not in taking]
    for entry in entries:
        view = entry.view
        if entry.first:
            if view.queue[entry.enter[0]] < end:
                return False
            continue
        flight = jobs[view.stream].flight if view.flight else ()
        if entry.enter:
            flight = (*flight, Flight(view.queue[entry.enter[0]], view.ticks))
        going = []
        for deadline_ns, left in flight:
            if left > 1:
                going.append(Flight(deadline_ns, left - 1))
            elif deadline_ns < end:
                return False
        if going:
            after.append(Job(view.stream, view.group, tuple(going)))
    return not rescue(after, end, costs, stop_lost=True).lost
