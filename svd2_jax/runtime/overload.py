"""How many denoising steps each stream takes, and which new streams are let in: arithmetic without a clock.

*Utilisation* is the share of time for which the device is busy if every stream gives a chunk per period and ticks
run in the best batches. A chunk needs one tick of its stream, or several where the budget is too tight to wait for
the ticks of later chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from svd2_jax.runtime.deadline import PolicyConfig
from svd2_jax.runtime.latency import Costs
from svd2_jax.runtime.work import MS, StreamId, StreamSettings

CostsOf = Callable[[Hashable, int], Costs]
GAIN = 0.02  # share of the utilisation that must be gained for a step less of all streams, more than times wobble


class Load(NamedTuple):
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
      held_ns: until when steps are not raised.
      utilisation: at the present steps.
    """

    raisable_ns: int | None = None
    held_ns: int = 0
    utilisation: float = 0.0


def ticks_per_chunk(settings: StreamSettings, steps: int, tick_ns: int, spare_ns: int) -> int | None:
    """Returns the fewest ticks per chunk with which chunks are finished in time; None if even all at once are late.

    With n ticks per chunk, one as it enters and the others right behind, its last tick is the (k mod n)-th of those
    of the (k div n)-th chunk after it, k = steps * stages - 1. `spare_ns` is kept free.
    """
    depth = steps * settings.stages
    for ticks in range(1, depth + 1):
        if delay_ns(settings, steps, tick_ns, ticks) + spare_ns <= settings.budget_ns:
            return ticks
    return None


def delay_ns(settings: StreamSettings, steps: int, tick_ns: int, ticks: int) -> int:
    """Returns the time from the arrival of a chunk's first frame to its end, with so many ticks per chunk."""
    chunks, more = divmod(steps * settings.stages - 1, ticks)
    fill = (settings.chunk_frames - 1) * settings.interval_ns
    return fill + chunks * settings.chunk_frames * settings.interval_ns + (more + 1) * tick_ns


def nominal_ns(settings: StreamSettings, streams: int, costs_of: CostsOf, guard_ns: int) -> int:
    """Returns the playout delay that a stream needs in normal running, at its preferred steps; at most its budget."""
    costs = costs_of(settings.shape, settings.steps)
    tick = costs.bound_ns[costs.size(streams, costs.knee)]
    # The device may be busy with others; and the last tick's frames take a tail longer.
    spare = guard_ns + costs.tail_bound_ns + (tick if streams > 1 else 0)
    ticks = ticks_per_chunk(settings, settings.steps, tick, spare)
    if ticks is None:
        return settings.budget_ns
    return min(delay_ns(settings, settings.steps, tick, ticks) + spare, settings.budget_ns)


class _Sum:
    """Utilisation of streams at given steps, kept up to date while steps change."""

    def __init__(
        self, loads: Sequence[Load], steps: Mapping[StreamId, int], costs_of: CostsOf, guard_ns: int
    ):
        self._costs_of, self._guard_ns = costs_of, guard_ns
        self._companions: dict[Hashable, int] = {}
        for load in loads:
            shape = load.settings.shape
            self._companions[shape] = self._companions.get(shape, 0) + 1
        self._rates: dict[tuple[Hashable, int], float] = {}  # ticks per ns
        self._counts: dict[tuple[Hashable, int], int] = {}
        self._ticks: dict[tuple[StreamSettings, int], float] = {}
        for load in loads:
            self.add(load, steps[load.stream], 1)

    def add(self, load: Load, steps: int, sign: int) -> None:
        key = load.settings.shape, steps
        rate = self._ticks_of(load.settings, steps) * load.chunks_per_ns
        self._counts[key] = self._counts.get(key, 0) + sign
        self._rates[key] = self._rates.get(key, 0.0) + sign * rate

    def _ticks_of(self, settings: StreamSettings, steps: int) -> float:
        found = self._ticks.get((settings, steps))
        if found is None:
            costs = self._costs_of(settings.shape, steps)
            tick = costs.expected_ns[costs.size(self._companions[settings.shape], costs.knee)]
            ticks = ticks_per_chunk(settings, steps, tick, self._guard_ns + costs.tail_bound_ns)
            # Too slow for the budget: as good as not to be had.
            found = self._ticks[settings, steps] = 1e6 if ticks is None else float(ticks)
        return found

    @property
    def value(self) -> float:
        return sum(
            self._rates[key] * self._costs_of(*key).share_ns(count)
            for key, count in self._counts.items()
            if count
        )


def utilisation(
    loads: Sequence[Load], steps: Mapping[StreamId, int], costs_of: CostsOf, guard_ns: int
) -> float:
    """Returns the share of time for which these streams keep the device busy at these steps, 0 or more."""
    return _Sum(loads, steps, costs_of, guard_ns).value


def need(loads: Sequence[Load], steps: Mapping[StreamId, int], costs_of: CostsOf) -> float:
    """Returns the least share of time in which the device could do all that is promised to come.

    That is a tick for each chunk, in the best batches. Measured rates say too much while a burst comes.
    """
    rates: dict[tuple[Hashable, int], list[float]] = {}
    for load in loads:
        rate = chunk_rate(load.settings, load.settings.interval_ns)
        rates.setdefault((load.settings.shape, steps[load.stream]), []).append(rate)
    return sum(sum(of) * costs_of(*group).least_ns(len(of)) for group, of in rates.items())


def lowered(
    loads: Sequence[Load],
    steps: Mapping[StreamId, int],
    costs_of: CostsOf,
    guard_ns: int,
    limit: float,
    at_least: int = 0,
) -> tuple[dict[StreamId, int], float]:
    """Returns the steps after lowering until the utilisation is within the limit, and what it then is.

    The stream with most steps goes first, one step at a time, none below its floor. If the floors do not suffice
    either, it ends where the utilisation is least. Streams with equal steps share ticks, so on the way down it may
    rise. Steps that gain nothing (a device that takes as long for fewer) are not taken off.

    Args:
      loads: the streams.
      steps: where to begin.
      costs_of: what ticks take.
      guard_ns: time kept free before a deadline.
      limit: of the utilisation.
      at_least: how many steps to take off even if the utilisation is within the limit.
    """
    now, total = dict(steps), _Sum(loads, steps, costs_of, guard_ns)
    value = start = found = worth = total.value
    price, best = GAIN * start / max(1, len(loads)), 0
    off: list[tuple[StreamId, int]] = []
    for level in range(max(now.values(), default=0), 1, -1):
        for load in loads:
            if value <= limit and len(off) >= at_least:
                break
            if now[load.stream] == level > load.settings.floor_steps:
                total.add(load, level, -1)
                total.add(load, level - 1, 1)
                now[load.stream] = level - 1
                off.append((load.stream, level - 1))
                value = total.value
                if value + price * len(off) < worth:
                    found, worth, best = value, value + price * len(off), len(off)
    if value <= limit and value + price * len(off) < start:
        found, best = value, len(off)
    return {**steps, **dict(off[:best])}, found


def control(
    state: Control, loads: Sequence[Load], costs_of: CostsOf, config: PolicyConfig, now_ns: int, at_risk: bool
) -> tuple[Control, dict[StreamId, int]]:
    """Returns the controller and the steps of each stream from now on.

    Lowers at once when the utilisation is above `lower_above`, or frames were lost although it is not. Raises when
    more steps have been affordable, below `raise_below` or as cheap as fewer, for `raise_after_ms`.
    """
    guard = config.guard_ns
    steps = {load.stream: load.steps for load in loads}
    now = utilisation(loads, steps, costs_of, guard)
    if now > config.lower_above or at_risk:
        fewer, value = lowered(
            loads, steps, costs_of, guard, config.lower_above, len(loads) if at_risk else 0
        )
        held = state.held_ns
        if now <= config.lower_above and fewer != steps:
            held = now_ns + round(config.risk_hold_ms * MS)
        return Control(None, held, value), fewer
    preferred = {load.stream: load.settings.steps for load in loads}
    if steps == preferred or now_ns < state.held_ns:
        return replace(state, raisable_ns=None, utilisation=now), steps
    aim, _ = lowered(loads, preferred, costs_of, guard, config.raise_below)
    more = {stream: max(steps[stream], aim[stream]) for stream in steps}
    cheap = aim == preferred or utilisation(loads, more, costs_of, guard) <= config.raise_below
    if more == steps or not cheap:
        return replace(state, raisable_ns=None, utilisation=now), steps
    since = now_ns if state.raisable_ns is None else state.raisable_ns
    if now_ns - since < round(config.raise_after_ms * MS):
        return replace(state, raisable_ns=since, utilisation=now), steps
    return Control(None, state.held_ns, utilisation(loads, more, costs_of, guard)), more


def refusal(
    settings: StreamSettings, others: Iterable[Load], costs_of: CostsOf, config: PolicyConfig
) -> str | None:
    """Returns why a stream is not let in, in one line with numbers; None if it is."""
    costs, floor = costs_of(settings.shape, settings.floor_steps), settings.floor_steps
    tick, guard = costs.bound_ns[1], config.guard_ns
    fill = (settings.chunk_frames - 1) * settings.interval_ns
    tail = costs.tail_bound_ns
    alone = floor * settings.stages * tick + tail
    least = max(fill + alone, costs.first_bound_ns + tail) + guard
    if least > settings.budget_ns:
        return (
            f"a latency budget of {settings.budget_ms:g} ms cannot be met: {settings.chunk_frames} frames at "
            f"{settings.rate_hz:g} FPS take {fill / MS:.0f} ms to come and {floor} denoising "
            f"step{'s take' if floor > 1 else ' takes'} {alone / MS:.0f} ms; "
            f"ask for at least {math.ceil(least / MS)} ms"
        )
    others = list(others)
    if not others or config.admit_below is None:
        return None
    new = Load(-1, settings, floor, chunk_rate(settings, settings.interval_ns))
    loads = [*others, new]
    floors = {load.stream: load.settings.floor_steps for load in loads}
    now = utilisation(others, floors, costs_of, guard)
    then = utilisation(loads, floors, costs_of, guard)
    if then > config.admit_below:
        running = "1 stream needs" if len(others) == 1 else f"{len(others)} streams need"
        return (
            f"the device is full: at minimum steps, {running} {100 * now:.0f} % of the device's time and this one "
            f"{100 * (then - now):.0f} % more, and at most {100 * config.admit_below:.0f} % can be promised (predicted "
            "from tick times; 'busy' in the table is the share of time that was used); "
            "close a stream, or ask for fewer frames per second or a longer latency budget"
        )
    return None
