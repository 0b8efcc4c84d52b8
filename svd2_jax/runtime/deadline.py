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
from enum import Enum
from typing import NamedTuple

from svd2_jax.errors import ConfigError
from svd2_jax.runtime.latency import Costs, LatencyConfig
from svd2_jax.runtime.work import MS, NEVER_NS, Reason, StreamId

ROOMY_SHARE = 0.5  # of a tick by which a chunk that is due soon may be held up for pushing others on
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
      push_below: share of time up to which the device pushes every chunk on to its end by ticks of its own, though
        that may hold up another one for half a tick; 0 or more.
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
    push_below: float = 0.9
    admit_below: float | None = 1.0
    stall_intervals: float = 3.0
    most_queued: int = 256

    def __post_init__(self):
        if not 0 < self.raise_below <= self.lower_above:
            raise ConfigError(
                "expected 0 < raise_below <= lower_above, "
                f"got raise_below={self.raise_below} and lower_above={self.lower_above}"
            )
        for name in ("guard_ms", "raise_after_ms", "push_below", "stall_intervals"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.most_queued < 1:
            raise ConfigError(f"most_queued must be at least 1, got {self.most_queued}")

    @property
    def guard_ns(self) -> int:
        return round(self.guard_ms * MS)


class Load(Enum):
    """How busy the device is.

    ROOMY: there is time to push every chunk on to its end by ticks of its own. BUSY: not for all of them.
    OVER: there is not even time for all chunks.
    """

    ROOMY = "roomy"
    BUSY = "busy"
    OVER = "over"


class Group(NamedTuple):
    """Streams of the same group may share a tick."""

    shape: Hashable
    steps: int


class Flight(NamedTuple):
    """A chunk under way: its deadline, and how many ticks of its stream it still needs."""

    deadline_ns: int
    left: int


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


class View(NamedTuple):
    """What the policy looks at of one stream.

    Attributes:
      stream: its number.
      group: its shape, and the steps that it takes from its next tick on.
      queue: deadlines of the queued frames, oldest first.
      need: frames of what enters next: the first group or a chunk.
      first: whether that is the first group.
      ticks: of the stream that a chunk takes.
      flight: chunks in flight, oldest first.
      next_ns: when the next chunk is expected to be whole.
      overdue_ns: when the source is taken to have stalled if no frame comes before.
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


class Offer(NamedTuple):
    """A chunk that could enter; the least key goes first, `start` is the position of its first frame in the queue."""

    key: float
    view: View
    start: int


class Candidate(NamedTuple):
    """A stream's possible part of a tick: the queued frames that enter, none for a flush, and those given up."""

    view: View
    enter: tuple[int, ...] = ()
    drops: tuple[int, ...] = ()


def decide(
    now_ns: int, views: Sequence[View], costs: Mapping[Group, Costs], config: PolicyConfig, load: Load
) -> Decision:
    """Returns what a free device does at `now_ns`.

    Args:
      now_ns: the time.
      views: all streams.
      costs: tick times of each group among the views.
      config: the policy's settings.
      load: how busy the device is, see `Load`.
    """
    guard = config.guard_ns
    jobs = {view.stream: Job(view.stream, view.group, view.flight) for view in views if view.flight}
    saved = rescue(jobs.values(), now_ns, costs)
    must_push = saved.spare_ns <= guard
    tick_ns = costs[jobs[saved.first[0]].group].bound_ns[len(saved.first)] if jobs else 0
    # The device may be busy when a stream's time has come: with others, or with a push that cannot wait.
    busy = max((cost.bound_ns[cost.knee] for cost in costs.values()), default=0) if len(views) > 1 else 0
    busy = max(busy, tick_ns) if must_push else busy
    drops, offers, wakes = _offers(now_ns, views, costs, guard, busy, load)
    chosen = _choose(offers, views, now_ns, jobs, costs, guard, load)
    if not chosen and saved.lost:
        # Too late for these: they go first, but must not hold up what can be in time.
        late = [Candidate(view) for view in views if view.stream in saved.lost][:1]
        for stream, positions in saved.lost.items():
            jobs[stream] = _without_deadlines(jobs[stream], positions)
        saved = rescue(jobs.values(), now_ns, costs)
        if _in_time(late, now_ns + guard, jobs, costs):
            chosen = late
        else:
            chosen = _choose(offers, views, now_ns, jobs, costs, guard, load)
    if chosen:
        drops += [Drop(c.view.stream, c.drops, Reason.OVERLOAD) for c in chosen if c.drops]
        parts = tuple(Choice(c.view.stream, c.enter, c.view.first and bool(c.enter)) for c in chosen)
        return Decision(tuple(drops), parts, None)
    if jobs:
        until = now_ns
        if not (offers or must_push):
            until = _push_ns(now_ns, tick_ns, views, costs, guard, load)
        if until <= now_ns:
            return Decision(tuple(drops), tuple(Choice(stream) for stream in saved.first), None)
        wakes += [until, now_ns + saved.spare_ns - guard]
    return Decision(tuple(drops), (), max(min(wakes), now_ns + 1) if wakes else None)


def _push_ns(
    now_ns: int,
    tick_ns: int,
    views: Sequence[View],
    costs: Mapping[Group, Costs],
    guard_ns: int,
    load: Load,
) -> int:
    """Returns when chunks in flight are pushed on if nothing else happens before: now, unless a chunk is due soon.

    A push that still runs when a chunk becomes whole makes that one wait. A device with room takes this risk for up
    to half a tick, a busier one not at all. A queued frame that would expire during the push enters together with it,
    as late as it can.
    """
    near = round(tick_ns * (ROOMY_SHARE if load is Load.ROOMY else 1.0))
    until = [view.next_ns + near for view in views if not view.ended and abs(view.next_ns - now_ns) < near]
    for view in views:
        entries = (_latest_entry(view, deadline_ns, costs) - guard_ns for deadline_ns in view.queue)
        until += [entry_ns for entry_ns in entries if now_ns <= entry_ns < now_ns + tick_ns][:1]
    return max(until, default=now_ns)


def _latest_entry(view: View, deadline_ns: int, costs: Mapping[Group, Costs]) -> int:
    """Returns when a queued frame must enter to be finished by its deadline, if its stream has the device alone."""
    cost = costs[view.group]
    return deadline_ns - (cost.first_bound_ns if view.first else view.ticks * cost.bound_ns[1])


def _without_deadlines(job: Job, positions: Sequence[int]) -> Job:
    flight = tuple(
        chunk._replace(deadline_ns=NEVER_NS) if i in positions else chunk
        for i, chunk in enumerate(job.flight)
    )
    return job._replace(flight=flight)


def _offers(
    now_ns: int,
    views: Sequence[View],
    costs: Mapping[Group, Costs],
    guard_ns: int,
    busy_ns: int,
    load: Load,
) -> tuple[list[Drop], list[Offer], list[int]]:
    """Returns the expired frames, the chunks that could enter now, most urgent first, and when others could."""
    drops, offers, wakes = [], [], []
    for view in views:
        queue, start = view.queue, 0
        while start < len(queue) and _latest_entry(view, queue[start], costs) < now_ns + guard_ns:
            start += 1
        if start:
            drops.append(Drop(view.stream, tuple(range(start)), Reason.HOPELESS))
        count = len(queue) - start
        if not count:
            continue
        # Part of a chunk enters when nothing more comes, or its oldest frame would be lost by waiting for more.
        latest = _latest_entry(view, queue[start], costs)
        ready = count >= view.need or view.ended or latest - guard_ns - busy_ns <= now_ns
        if not ready and (load is Load.OVER or now_ns < view.overdue_ns):
            wakes.append(latest - guard_ns - busy_ns)
            if now_ns < view.overdue_ns:
                wakes.append(view.overdue_ns)
        elif load is Load.OVER:  # who waited longest
            offers.append(Offer((view.served_ns - now_ns) / view.period_ns, view, start))
        else:
            offers.append(Offer(latest if ready else NEVER_NS, view, start))
    offers.sort(key=lambda offer: (offer.key, offer.view.stream))
    return drops, offers, wakes


def _choose(
    offers: Sequence[Offer],
    views: Sequence[View],
    now_ns: int,
    jobs: Mapping[StreamId, Job],
    costs: Mapping[Group, Costs],
    guard_ns: int,
    load: Load,
) -> Sequence[Candidate]:
    """Returns the foremost offer that leaves every chunk in time, in the largest batch that does; or nothing."""
    tries, round_ns = MOST_TRIES, round(sum(costs[o.view.group].share_ns(len(offers)) for o in offers))
    for i, head in enumerate(offers):
        group, first = head.view.group, head.view.first
        cost = costs[group]
        most = 1 if first else cost.best if load is Load.OVER else cost.knee
        alike = [head] if first else [o for o in offers[i:] if o.view.group == group and not o.view.first]
        turn_ns = max(round_ns, cost.bound_ns[cost.size(len(alike), most)])
        members = [_candidate(offer, now_ns, turn_ns, load) for offer in alike[:most]]
        if load is Load.ROOMY and not first:
            taken = {member.view.stream for member in members}
            members += [
                Candidate(v) for v in views if v.flight and v.group == group and v.stream not in taken
            ]
        for size in reversed([size for size in cost.sizes if size <= min(len(members), most)]):
            if _in_time(members[:size], now_ns + guard_ns, jobs, costs):
                return members[:size]
            tries -= 1
            if not tries:
                return []
    return []


def _candidate(offer: Offer, now_ns: int, turn_ns: int, load: Load) -> Candidate:
    """Returns which queued frames would enter: the oldest, or in overload, evenly spaced ones up to the newest.

    In overload a stream has a turn each `turn_ns`: it chooses among the frames that come between two turns, and takes
    none so old that its later ticks could not wait for their turns.
    """
    view, start, end = offer.view, offer.start, len(offer.view.queue)
    if load is not Load.OVER or end - start <= view.need:
        return Candidate(view, tuple(range(start, min(start + view.need, end))))
    coming = -(-turn_ns * view.need // view.period_ns)
    start = max(start, end - max(coming, 2 * view.need))
    while start < end - view.need and view.queue[start] < now_ns + view.ticks * turn_ns:
        start += 1
    enter = evenly(range(start, end), view.need)
    return Candidate(view, enter, tuple(i for i in range(offer.start, end) if i not in enter))


def evenly(items: Sequence[int], count: int) -> tuple[int, ...]:
    """Returns `count` of the items, evenly spaced, the last one always among them."""
    return tuple(items[(i + 1) * len(items) // count - 1] for i in range(count))


def _in_time(
    members: Sequence[Candidate], now_ns: int, jobs: Mapping[StreamId, Job], costs: Mapping[Group, Costs]
) -> bool:
    """Whether all chunks, those that would enter included, can be finished in time if this tick is run."""
    lead = members[0].view
    cost = costs[lead.group]
    end = now_ns + (cost.first_bound_ns if lead.first else cost.bound_ns[len(members)])
    taking = {member.view.stream for member in members}
    after = [job for stream, job in jobs.items() if stream not in taking]
    for view, enter, _ in members:
        flight = jobs[view.stream].flight if view.stream in jobs else ()
        if enter:
            flight = (*flight, Flight(view.queue[enter[0]], 1 if view.first else view.ticks))
        if any(left <= 1 and deadline_ns < end for deadline_ns, left in flight):
            return False
        going = tuple(Flight(deadline_ns, left - 1) for deadline_ns, left in flight if left > 1)
        if going:
            after.append(Job(view.stream, view.group, going))
    return not rescue(after, end, costs, stop_lost=True).lost
