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


@dataclass(frozen=True)
class PolicyConfig:
    """Settings of the scheduler.

    Attributes:
      latency: how device times are believed.
      guard_ms: time kept free before every deadline, for what the host itself takes; at least 0.
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
    guard_ms: float = 2.0
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
      lost: deadlines of the chunks that end behind them, by stream.
    """

    spare_ns: int
    first: tuple[StreamId, ...]
    lost: dict[StreamId, list[int]]


def rescue(jobs: Iterable[Job], start_ns: int, costs: Mapping[Group, Costs]) -> Rescue:
    """Plays through the ticks that finish all chunks under way, from `start_ns` on, at bound times.

    The group with the most urgent chunk goes first, in the largest batch worth its latency, its most urgent streams
    in it. The order does not depend on the start, so starting later by d leaves d less to spare; and what remains
    after the first tick is played through as here.
    """
    heaps: dict[Group, list] = {}
    for job in jobs:
        one = costs[job.group].bound_ns[1]
        heaps.setdefault(job.group, []).append((_latest(job.flight, 0, one), job.stream, 0, 0, job.flight))
    for heap in heaps.values():
        heapq.heapify(heap)
    spare, first, lost, now = NEVER_NS, (), {}, start_ns
    while heaps:
        group = min(heaps, key=lambda g: heaps[g][0][0]) if len(heaps) > 1 else next(iter(heaps))
        heap, cost = heaps[group], costs[group]
        size = cost.size(len(heap), cost.knee)
        now += cost.bound_ns[size]
        taken = [heapq.heappop(heap) for _ in range(size)]
        if not first:
            first = tuple(stream for _, stream, *_ in taken)
        for _, stream, ticks, head, flight in taken:
            ticks += 1
            while head < len(flight) and flight[head].left <= ticks:
                over = flight[head].deadline_ns - now
                spare = min(spare, over)
                if over < 0:
                    lost.setdefault(stream, []).append(head)
                head += 1
            if head < len(flight):
                key = _latest(flight[head:], ticks, cost.bound_ns[1])
                heapq.heappush(heap, (key, stream, ticks, head, flight))
        if not heap:
            del heaps[group]
    return Rescue(spare, first, lost)


def _latest(flight: Sequence[Flight], ticks: int, tick_ns: int) -> int:
    """Returns when the stream's next tick must start so that each chunk can be finished in time, after `ticks`."""
    return min(chunk.deadline_ns - (chunk.left - ticks) * tick_ns for chunk in flight)


class _Offer(NamedTuple):
    """What a stream could do in the next tick; the least key goes first."""

    key: float
    view: View
    enter: tuple[int, ...]
    drops: tuple[int, ...]  # given up if this is run


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
    drops, offers, wakes = [], [], []
    jobs = {view.stream: Job(view.stream, view.group, view.flight) for view in views if view.flight}
    saved = rescue(jobs.values(), now_ns, costs)
    for stream, heads in saved.lost.items():  # too late for these: they must not hold up the others
        job = jobs[stream]
        flight = tuple(
            chunk._replace(deadline_ns=NEVER_NS) if i in heads else chunk
            for i, chunk in enumerate(job.flight)
        )
        jobs[stream] = job._replace(flight=flight)
    if saved.lost:
        saved = rescue(jobs.values(), now_ns, costs)

    busy = _longest_tick(views, costs) if len(views) > 1 else 0
    ready: dict[Group, int] = {}
    for view in views:
        if len(view.queue) >= view.need:
            ready[view.group] = ready.get(view.group, 0) + 1
    round_ns = sum(count * costs[group].share_ns(count) for group, count in ready.items())
    for view in views:
        cost = costs[view.group]
        one = cost.bound_ns[1]
        lone = cost.first_bound_ns if view.first else view.ticks * one
        hopeless = 0
        while hopeless < len(view.queue) and view.queue[hopeless] - guard < now_ns + lone:
            hopeless += 1
        if hopeless:
            drops.append(Drop(view.stream, tuple(range(hopeless)), Reason.HOPELESS))
        tick = cost.bound_ns[cost.size(ready.get(view.group, 1), cost.best if overloaded else cost.knee)]
        enter, given_up = _entering(view, hopeless, now_ns, lone, tick, round_ns, guard, busy, overloaded)
        if enter:
            urgent = view.queue[enter[0]] - lone
            if view.flight:
                urgent = min(urgent, _latest(view.flight, 0, one))
            key = (view.served_ns - now_ns) / view.period_ns if overloaded else urgent
            offers.append(_Offer(key, view, enter, given_up))
            continue
        if len(view.queue) > hopeless and not view.ended:
            wakes.append(view.queue[hopeless] - lone - guard - busy)
        if view.flight:
            if _must_flush(view, now_ns, one, guard + busy):
                key = -NEVER_NS if overloaded else _latest(view.flight, 0, one)
                offers.append(_Offer(key, view, (), ()))
            elif view.overdue_ns > now_ns:
                wakes.append(view.overdue_ns)

    offers.sort(key=lambda offer: (offer.key, offer.view.stream))
    if saved.spare_ns > guard:
        for i, head in enumerate(offers):
            chosen = _batch(offers, i, head, now_ns, jobs, costs, guard, overloaded)
            if chosen:
                given = [Drop(o.view.stream, o.drops, Reason.OVERLOAD) for o in chosen if o.drops]
                parts = tuple(Choice(o.view.stream, o.enter, bool(o.enter) and o.view.first) for o in chosen)
                return Decision((*drops, *given), parts, None)
    if jobs and (offers or saved.spare_ns <= guard):
        return Decision(tuple(drops), tuple(Choice(stream) for stream in saved.first), None)
    if jobs:
        wakes.append(now_ns + saved.spare_ns - guard)
    return Decision(tuple(drops), (), max(min(wakes), now_ns + 1) if wakes else None)


def _entering(
    view: View,
    hopeless: int,
    now_ns: int,
    lone_ns: int,
    tick_ns: int,
    round_ns: float,
    guard_ns: int,
    busy_ns: int,
    overloaded: bool,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns which queued frames would enter now, and which would be given up for them."""
    queue, need = view.queue, view.need
    waiting = len(queue) - hopeless
    everything = tuple(range(hopeless, len(queue)))
    if waiting < need:
        # Part of a chunk: only when nothing more comes, or the oldest frame would be lost by waiting for more.
        if waiting and (view.ended or queue[hopeless] - lone_ns - guard_ns - busy_ns <= now_ns):
            return everything, ()
        return (), ()
    if waiting == need:
        return everything, ()
    if overloaded:
        # Frames that still have the time to share a batch, and to wait for the stream's next turns, if there are enough.
        natural = now_ns + guard_ns + tick_ns + round((view.ticks - 1) * max(round_ns, tick_ns))
        start = hopeless
        while start < len(queue) - need and queue[start] < natural:
            start += 1
        kept = everything[start - hopeless :]
        enter = evenly(kept, need)
    else:
        chunks = waiting // need
        kept = everything
        step = max(round_ns, tick_ns)
        while chunks > 1:
            kept = everything if chunks == waiting // need else evenly(everything, chunks * need)
            if all(queue[kept[i * need]] >= now_ns + guard_ns + lone_ns + i * step for i in range(chunks)):
                break
            chunks -= 1
        if chunks == 1 and waiting >= 2 * need:
            kept = evenly(everything, need)
        enter = kept[:need]
        if len(kept) > need:
            return enter, tuple(i for i in everything if i not in set(kept))
    return enter, tuple(i for i in everything if i not in set(enter) and (i < enter[-1]))


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


def evenly(items: Sequence[int], count: int) -> tuple[int, ...]:
    """Returns `count` of the items, evenly spaced, the last one always among them."""
    return tuple(items[(i + 1) * len(items) // count - 1] for i in range(count))


def _must_flush(view: View, now_ns: int, tick_ns: int, spare_ns: int) -> bool:
    """Whether chunks under way would be late, or nothing pushes them on, if they waited for the next chunk."""
    if view.ended and not view.queue:
        return True
    if now_ns >= view.overdue_ns:
        return True
    coming = max(view.next_ns, now_ns) + tick_ns + spare_ns
    return any(coming + (chunk.left - 1) * view.period_ns > chunk.deadline_ns for chunk in view.flight)


def _batch(
    offers: Sequence[_Offer],
    start: int,
    head: _Offer,
    now_ns: int,
    jobs: Mapping[StreamId, Job],
    costs: Mapping[Group, Costs],
    guard_ns: int,
    overloaded: bool,
) -> list[_Offer]:
    """Returns the largest batch with this offer that leaves every chunk in time; nothing if there is none."""
    group = head.view.group
    cost = costs[group]
    if head.enter and head.view.first:
        members, sizes = [head], (1,)
    else:
        most = cost.best if overloaded else cost.knee
        members = [o for o in offers[start:] if o.view.group == group and not (o.enter and o.view.first)][
            :most
        ]
        sizes = [size for size in reversed(cost.sizes) if size <= min(len(members), most)]
    for size in sizes:
        if _in_time(members[:size], now_ns, jobs, costs, guard_ns):
            return list(members[:size])
    return []


def _in_time(
    members: Sequence[_Offer],
    now_ns: int,
    jobs: Mapping[StreamId, Job],
    costs: Mapping[Group, Costs],
    guard_ns: int,
) -> bool:
    """Whether all chunks, those that would enter included, can be finished in time if this tick is run."""
    cost = costs[members[0].view.group]
    first = bool(members[0].enter) and members[0].view.first
    end = now_ns + guard_ns + (cost.first_bound_ns if first else cost.bound_ns[len(members)])
    after = dict(jobs)
    for offer in members:
        view, stream = offer.view, offer.view.stream
        if first:
            if view.queue[offer.enter[0]] < end:
                return False
            continue
        flight = [
            chunk._replace(left=chunk.left - 1) for chunk in (jobs[stream].flight if view.flight else ())
        ]
        if offer.enter:
            flight.append(Flight(view.queue[offer.enter[0]], view.ticks - 1))
        if any(chunk.left <= 0 and chunk.deadline_ns < end for chunk in flight):
            return False
        going = tuple(chunk for chunk in flight if chunk.left > 0)
        if going:
            after[stream] = Job(stream, view.group, going)
        else:
            after.pop(stream, None)
    return rescue(after.values(), end, costs).spare_ns >= 0


def _longest_tick(views: Sequence[View], costs: Mapping[Group, Costs]) -> int:
    return max(costs[view.group].bound_ns[costs[view.group].knee] for view in views)
