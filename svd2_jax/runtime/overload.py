"""How many denoising steps each stream takes, and which new streams are let in: arithmetic without a clock.

*Utilisation* is the share of time for which the device is busy if every stream gives a chunk per period and ticks
run in the best batches. A chunk needs one tick of its stream, or several where the budget is too tight to wait for
the ticks of later chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from svd2_jax.runtime.deadline import PolicyConfig
from svd2_jax.runtime.latency import Costs
from svd2_jax.runtime.work import MS, StreamId, StreamSettings

CostsOf = Callable[[Hashable, int], Costs]
GAIN = 0.02  # share of the utilisation that must be gained by a step less of all streams; times wobble by as much
NEVER_IN_TIME = 1e6  # ticks per chunk of a stream whose budget is too short


class Demand(NamedTuple):
    """What the controller looks at of one stream.

    Attributes:
      stream: its number.
      settings: what it asked for.
      steps: that it takes at present.
      chunks_per_ns: how often a chunk of it comes.
    """

    stream: StreamId
    settings: StreamSettings
    steps: int
    chunks_per_ns: float


def chunk_rate(settings: StreamSettings, gap_ns: float) -> float:
    """Returns the chunks per ns of a stream with so much time between its frames; at most twice the promised rate."""
    return 1 / (settings.chunk_frames * max(gap_ns, settings.interval_ns / 2))


@dataclass(frozen=True)
class Control:
    """What the controller remembers.

    Attributes:
      raisable_ns: since when more steps would be affordable; None if they are not, or are taken already.
      utilisation: at the present steps.
    """

    raisable_ns: int | None = None
    utilisation: float = 0.0


def ticks_per_chunk(settings: StreamSettings, steps: int, tick_ns: int, spare_ns: int) -> int | None:
    """Returns the fewest ticks per chunk with which chunks are finished in time; None if even all at once are late.

    With n ticks per chunk, one as it enters and the others right behind, its last tick is the (k mod n)-th of those
    of the (k div n)-th chunk after it, k = steps * stages - 1. `spare_ns` is kept free.
    """
    fill, period = fill_ns(settings), settings.chunk_frames * settings.interval_ns
    for ticks in range(1, steps * settings.stages + 1):
        chunks, more = divmod(steps * settings.stages - 1, ticks)
        if fill + chunks * period + (more + 1) * tick_ns + spare_ns <= settings.budget_ns:
            return ticks
    return None


def fill_ns(settings: StreamSettings) -> int:
    """Returns how long the first frame of a chunk waits for the last one."""
    return (settings.chunk_frames - 1) * settings.interval_ns


def nominal_ns(settings: StreamSettings, costs_of: CostsOf) -> int:
    """Returns the playout delay of a stream that has the device for itself, at its preferred steps; at most its budget.

    Its chunk fills, takes (steps x stages) ticks right behind each other, and a tail.
    """
    costs = costs_of(settings.shape, settings.steps)
    ticks_ns = settings.steps * settings.stages * costs.expected_ns[1]
    return min(fill_ns(settings) + ticks_ns + costs.tail_bound_ns, settings.budget_ns)


def utilisation(
    demands: Sequence[Demand], steps: Mapping[StreamId, int], costs_of: CostsOf, guard_ns: int
) -> float:
    """Returns the share of time for which these streams keep the device busy at these steps, 0 or more."""
    total = 0.0
    for group, members in _groups(demands, steps).items():
        costs = costs_of(*group)
        tick = costs.expected_ns[costs.size(len(members), costs.knee)]
        for demand in members:
            found = ticks_per_chunk(demand.settings, group[1], tick, guard_ns + costs.tail_bound_ns)
            ticks = NEVER_IN_TIME if found is None else found
            total += ticks * demand.chunks_per_ns * costs.share_ns(len(members))
    return total


def need(demands: Sequence[Demand], steps: Mapping[StreamId, int], costs_of: CostsOf) -> float:
    """Returns the least share of time in which the device could do all that is promised to come.

    That is a tick for each chunk, in the best batches. Measured rates say too much while a burst comes.
    """
    return sum(
        sum(chunk_rate(demand.settings, demand.settings.interval_ns) for demand in members)
        * costs_of(*group).least_ns(len(members))
        for group, members in _groups(demands, steps).items()
    )


def push_need(demands: Sequence[Demand], steps: Mapping[StreamId, int], costs_of: CostsOf) -> float:
    """Returns the share of time that it takes to push every chunk on to its end, by ticks of its own."""
    return sum(
        demand.chunks_per_ns * group[1] * demand.settings.stages * costs_of(*group).expected_ns[1]
        for group, members in _groups(demands, steps).items()
        for demand in members
    )


def _groups(
    demands: Sequence[Demand], steps: Mapping[StreamId, int]
) -> dict[tuple[Hashable, int], list[Demand]]:
    """Returns the streams that may share ticks, by shape and steps."""
    groups: dict[tuple[Hashable, int], list[Demand]] = {}
    for demand in demands:
        groups.setdefault((demand.settings.shape, steps[demand.stream]), []).append(demand)
    return groups


def at_level(demands: Sequence[Demand], level: int) -> dict[StreamId, int]:
    """Returns the steps of each stream when none takes more than `level`, or its floor where that is higher."""
    return {d.stream: min(max(level, d.settings.floor_steps), d.settings.steps) for d in demands}


def affordable(demands: Sequence[Demand], costs_of: CostsOf, guard_ns: int, limit: float) -> int:
    """Returns the highest level of steps whose utilisation is within the limit.

    Where none is, it is the level of the least utilisation; a level lower must gain `GAIN` of it, so a device that
    takes as long for fewer steps stays where it is.
    """
    top = max(d.settings.steps for d in demands)
    used = {
        level: utilisation(demands, at_level(demands, level), costs_of, guard_ns)
        for level in range(top, 0, -1)
    }
    price = GAIN * used[top]
    within = (lv for lv in used if used[lv] <= limit and used[lv] + price * (top - lv) <= used[top])
    return next(within, min(used, key=lambda level: used[level] + price * (top - level)))


def control(
    state: Control, demands: Sequence[Demand], costs_of: CostsOf, config: PolicyConfig, now_ns: int
) -> tuple[Control, dict[StreamId, int]]:
    """Returns the controller and the steps of each stream from now on.

    Lowers at once when the utilisation is above `lower_above`. Raises when more steps have been affordable, below
    `raise_below` or as cheap as fewer, for `raise_after_ms`.
    """
    steps = {demand.stream: demand.steps for demand in demands}
    used = utilisation(demands, steps, costs_of, config.guard_ns)
    if not demands:
        return replace(state, utilisation=used), steps
    if used > config.lower_above:
        aim = at_level(demands, affordable(demands, costs_of, config.guard_ns, config.lower_above))
        fewer = {stream: min(count, aim[stream]) for stream, count in steps.items()}
        if fewer != steps:
            return Control(None, utilisation(demands, fewer, costs_of, config.guard_ns)), fewer
    aim = at_level(demands, affordable(demands, costs_of, config.guard_ns, config.raise_below))
    more = {stream: max(count, aim[stream]) for stream, count in steps.items()}
    if more == steps:
        return Control(None, used), steps
    since = now_ns if state.raisable_ns is None else state.raisable_ns
    if now_ns - since < round(config.raise_after_ms * MS):
        return Control(since, used), steps
    return Control(None, utilisation(demands, more, costs_of, config.guard_ns)), more


def refusal(
    settings: StreamSettings, others: Sequence[Demand], costs_of: CostsOf, config: PolicyConfig
) -> str | None:
    """Returns why a stream is not let in, in one line with numbers; None if it is."""
    costs, floor = costs_of(settings.shape, settings.floor_steps), settings.floor_steps
    tick, guard = costs.bound_ns[1], config.guard_ns
    tail = costs.tail_bound_ns
    alone = floor * settings.stages * tick + tail
    least = max(fill_ns(settings) + alone, costs.first_bound_ns + tail) + guard
    if least > settings.budget_ns:
        return (
            f"a latency budget of {settings.budget_ms:g} ms cannot be met: {settings.chunk_frames} frames at "
            f"{settings.rate_hz:g} FPS take {fill_ns(settings) / MS:.0f} ms to come and {floor} denoising "
            f"step{'s take' if floor > 1 else ' takes'} {alone / MS:.0f} ms; "
            f"ask for at least {math.ceil(least / MS)} ms"
        )
    if not others or config.admit_below is None:
        return None
    new = Demand(-1, settings, floor, chunk_rate(settings, settings.interval_ns))
    demands = [*others, new]
    floors = {demand.stream: demand.settings.floor_steps for demand in demands}
    now = utilisation(others, floors, costs_of, guard)
    then = utilisation(demands, floors, costs_of, guard)
    if then > config.admit_below:
        running = "1 stream needs" if len(others) == 1 else f"{len(others)} streams need"
        return (
            f"the device is full: at minimum steps, {running} {100 * now:.0f} % of the device's time and this one "
            f"{100 * (then - now):.0f} % more, and at most {100 * config.admit_below:.0f} % can be promised (predicted "
            "from tick times; 'busy' in the table is the share of time that was used); "
            "close a stream, or ask for fewer frames per second or a longer latency budget"
        )
    return None
