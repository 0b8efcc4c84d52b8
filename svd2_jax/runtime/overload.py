"""How many denoising steps each stream takes, and which new streams are let in: arithmetic without a clock.

*Utilisation* is the share of time for which the device is busy if every stream gives a chunk per period and ticks
run in the best batches. A chunk needs one tick of its stream, or several where the budget is too tight to wait for
the ticks of later chunks. None takes more steps than the *level*, or than its floor where that is higher.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from svd2_jax.runtime.deadline import PolicyConfig, TickTimesOf
from svd2_jax.runtime.types import MS, StreamSettings
from svd2_jax.text import counted

GAIN = 0.02  # share of the utilisation that must be gained by a step less of all streams; times wobble by as much
NEVER_IN_TIME = 1_000_000  # ticks per chunk of a stream whose budget is too short
NO_LIMIT = 1_000_000  # the level at which all take the steps that they prefer


@dataclass(frozen=True)
class Control:
    """What the controller remembers.

    Attributes:
      level: of steps.
      raisable_ns: since when a higher one would be affordable; None if it is not.
      utilisation: at this level; above 1 there is no time for all frames.
    """

    level: int = NO_LIMIT
    raisable_ns: int | None = None
    utilisation: float = 0.0


def steps_at(settings: StreamSettings, level: int) -> int:
    """Returns the steps that a stream takes at a level."""
    return min(max(level, settings.min_steps), settings.steps)


def ticks_per_chunk(settings: StreamSettings, steps: int, tick_ns: int, slack_ns: int) -> int:
    """Returns the fewest ticks per chunk with which chunks are finished in time; many if even all at once are late.

    With n ticks per chunk, one as it enters and the others right behind, its last tick is the (k mod n)-th of those
    of the (k div n)-th chunk after it, k = steps * stages - 1. `slack_ns` is kept free.
    """
    fill, period = fill_ns(settings), settings.chunk_frames * settings.interval_ns
    for ticks in range(1, steps * settings.stages + 1):
        chunks, more = divmod(steps * settings.stages - 1, ticks)
        if fill + chunks * period + (more + 1) * tick_ns + slack_ns <= settings.budget_ns:
            return ticks
    return NEVER_IN_TIME


def fill_ns(settings: StreamSettings) -> int:
    """Returns how long the first frame of a chunk waits for the last one."""
    return (settings.chunk_frames - 1) * settings.interval_ns


def nominal_ns(settings: StreamSettings, times_of: TickTimesOf) -> int:
    """Returns the playout delay of a stream that has the device for itself, at its preferred steps; at most its budget.

    Its chunk fills, takes (steps x stages) ticks right behind each other, and a tail.
    """
    costs = times_of(settings.batch_key, settings.steps)
    ticks_ns = settings.steps * settings.stages * costs.of_one_row.expected_ns[1]
    return min(fill_ns(settings) + ticks_ns + costs.tail_bound_ns, settings.budget_ns)


def utilisation(asked: Sequence[StreamSettings], level: int, times_of: TickTimesOf, guard_ns: int) -> float:
    """Returns the share of time for which these streams keep the device busy at a level of steps, 0 or more."""
    groups: dict[tuple[Hashable, int], list[StreamSettings]] = {}
    for settings in asked:
        groups.setdefault((settings.batch_key, steps_at(settings, level)), []).append(settings)
    total = 0.0
    for (batch_key, steps), members in groups.items():
        costs = times_of(batch_key, steps)
        tick = costs.expected_ns[costs.size(len(members), costs.knee)]
        for settings in members:
            ticks = ticks_per_chunk(settings, steps, tick, guard_ns + costs.tail_bound_ns)
            period = settings.chunk_frames * settings.interval_ns
            total += ticks * costs.share_ns(len(members)) / period
    return total


def control(
    state: Control, asked: Sequence[StreamSettings], times_of: TickTimesOf, config: PolicyConfig, now_ns: int
) -> Control:
    """Returns the controller at a later time.

    Steps are degraded at once when the utilisation is above `degrade_above`, to the highest level that fits, or to the
    one of the least utilisation. They are restored when a level's utilisation has been below `restore_below` for
    `restore_after_ms`. A lower level must gain `GAIN`: a device that takes as long for fewer steps keeps them.
    """
    top = max([settings.steps for settings in asked], default=1)
    used = {NO_LIMIT: utilisation(asked, NO_LIMIT, times_of, config.guard_ns)}
    for fewer in range(top - 1, 0, -1):
        share = utilisation(asked, fewer, times_of, config.guard_ns)
        if share * (1 + GAIN) <= min(used.values()):
            used[fewer] = share

    def within(limit: float) -> int:
        return next((level for level in used if used[level] <= limit), min(used))

    lower, higher = within(config.degrade_above), within(config.restore_below)
    level, since = min(state.level, lower), None
    if higher > level:
        since = now_ns if state.raisable_ns is None else state.raisable_ns
        if now_ns - since >= round(config.restore_after_ms * MS):
            level, since = higher, None
    return Control(level, since, utilisation(asked, level, times_of, config.guard_ns))


def least_budget_ns(settings: StreamSettings, times_of: TickTimesOf, config: PolicyConfig) -> int:
    """Returns the shortest latency budget that can be promised to a stream that has the device for itself."""
    times = times_of(settings.batch_key, settings.min_steps)
    ticks_ns = settings.min_steps * settings.stages * times.of_one_row.bound_ns[1]
    return max(fill_ns(settings) + ticks_ns, times.first_bound_ns) + times.tail_bound_ns + config.guard_ns


def refusal(
    settings: StreamSettings, others: Sequence[StreamSettings], times_of: TickTimesOf, config: PolicyConfig
) -> str | None:
    """Returns why a stream is not let in, in one line with numbers; None if it is."""
    least_ns = least_budget_ns(settings, times_of, config)
    if least_ns > settings.budget_ns:
        return (
            f"a latency budget of {settings.budget_ms:g} ms cannot be met: {settings.chunk_frames} frames at "
            f"{settings.rate_hz:g} FPS and {counted(settings.min_steps, 'denoising step')} take up to "
            f"{math.ceil(least_ns / MS)} ms on this device; ask for at least that"
        )
    now, then = (utilisation(s, 1, times_of, config.guard_ns) for s in (others, [*others, settings]))
    if others and config.admit_below is not None and then > config.admit_below:
        return (
            f"the device is full: at minimum steps, {counted(len(others), 'running stream')} would use {100 * now:.0f} "
            f"% of its time and this one {100 * (then - now):.0f} % more, and {100 * config.admit_below:.0f} % can be "
            "promised; close a stream, or ask for fewer frames per second or a longer latency budget"
        )
    return None
