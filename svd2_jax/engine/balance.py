"""How many blocks each stage of a pipeline gets, and when they move: arithmetic without clock, device or thread.

A transformer of identical blocks is cut into contiguous ranges, one per stage, one stage per device. The first
device also encodes and the last one decodes; devices differ in speed and may throttle while they run. All stages
work at once, on one chunk each, so the pipeline gives a chunk every time its slowest stage finishes: only the
*bottleneck* counts.

    state = init_balancer(best_split([1.0] * blocks, guessed_overheads))
    for every chunk:
        state, wanted = observe(state, StageTimes(stages, overheads))
        if wanted is not None:
            while (counts := state.counts) != wanted:
                ...move blocks to towards(counts, wanted)...
                state = moved(state, towards(counts, wanted))

Everything here is a function of its arguments and exact or correctly rounded, so that several processes that feed
it the same numbers take the same decisions without talking to each other.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Counts = tuple[int, ...]  # blocks per stage, in the order of the stages


def best_split(
    block_costs: Sequence[float],
    stage_overheads: Sequence[float],
    slowness: Sequence[float] | None = None,
) -> Counts:
    """Returns the blocks per stage whose slowest stage is the fastest possible, each stage at least one block.

    Exact: a dynamic programme over (stage, blocks so far). Among splits with the same slowest stage the one with
    the faster second slowest wins, then the third and so on, so stages that are not the bottleneck share their work
    evenly too. Among equals still, the last stage gets the fewest blocks, then the one before it, and so on.

    Args:
      block_costs: time of each block on a device of slowness 1, in any unit, >= 0.
      stage_overheads: what each stage does besides its blocks (encode on the first, decode on the last), >= 0, in
        the same unit.
      slowness: factor of each stage's device on the costs of its blocks, >= 0; 1 for all if None.

    Raises:
      ValueError: fewer blocks than stages, no stages, lengths that differ, or a number that is negative or not
        finite.
    """
    slowness = _checked_slowness(block_costs, stage_overheads, slowness)
    blocks, stages = len(block_costs), len(stage_overheads)
    if not 0 < stages <= blocks:
        raise ValueError(
            f"expected at least one stage and a block for each, got {stages} stages, {blocks} blocks"
        )
    # fsum rounds once, so ranges of the same blocks cost exactly the same wherever they start: ties stay ties.
    costs = [[math.fsum(block_costs[i:j]) for j in range(blocks + 1)] for i in range(blocks)]
    # best[b]: the stages so far when they hold the first b blocks; their times, slowest first, and their counts.
    last_end = blocks - stages + 1
    best: dict[int, tuple[tuple[float, ...], Counts]] = {
        end: ((stage_overheads[0] + slowness[0] * costs[0][end],), (end,)) for end in range(1, last_end + 1)
    }
    for stage in range(1, stages):
        overhead, factor, new = stage_overheads[stage], slowness[stage], {}
        for end in range(stage + 1, last_end + stage + 1):
            found: tuple[tuple[float, ...], Counts] = (math.inf,), ()
            for start in range(end - 1, stage - 1, -1):
                time, (times, counts) = overhead + factor * costs[start][end], best[start]
                if time > found[0][0]:
                    break  # and it only grows as the stage starts earlier
                if times[0] > found[0][0]:
                    continue
                times = tuple(sorted((*times, time), reverse=True))
                if times < found[0]:
                    found = times, (*counts, end - start)
            new[end] = found
        best = new
    return best[blocks][1]


def bottleneck(
    counts: Sequence[int],
    block_costs: Sequence[float],
    stage_overheads: Sequence[float],
    slowness: Sequence[float] | None = None,
) -> float:
    """Returns the time of the slowest stage of a split; the other arguments are those of `best_split`.

    Raises:
      ValueError: counts that are negative or do not add up to the blocks, lengths that differ, or a number that is
        negative or not finite.
    """
    slowness = _checked_slowness(block_costs, stage_overheads, slowness)
    if len(counts) != len(stage_overheads):
        raise ValueError(f"expected one count for each of {len(stage_overheads)} stages, got {list(counts)}")
    if min(counts, default=0) < 0 or sum(counts) != len(block_costs):
        raise ValueError(f"expected counts >= 0 that add up to {len(block_costs)} blocks, got {list(counts)}")
    slowest, start = 0.0, 0
    for count, overhead, factor in zip(counts, stage_overheads, slowness, strict=True):
        slowest = max(slowest, overhead + factor * math.fsum(block_costs[start : start + count]))
        start += count
    return slowest


def towards(current: Sequence[int], target: Sequence[int]) -> Counts:
    """Returns the split nearest to the target that a running pipeline can take in one move.

    In one move blocks change hands between neighbours only: each boundary stays within the blocks that its two
    neighbours hold now. Every stage keeps at least one block, no boundary moves away from its target or past it,
    and at most stages - 1 moves lead from any split to any other.

    Args:
      current: blocks of each stage now.
      target: blocks of each stage in the end; as many stages and blocks.

    Raises:
      ValueError: a stage without blocks, or splits of different numbers of stages or blocks.
    """
    current, target = _checked_counts(current), _checked_counts(target)
    if len(current) != len(target) or sum(current) != sum(target):
        raise ValueError(
            f"expected splits of the same blocks over the same stages, got {current} and {target}"
        )
    now, wanted = _ends(current), _ends(target)
    # Two neighbours cannot be clipped onto each other: the targets rise, and so do the lower and the upper limits.
    ends = [0]
    for stage in range(1, len(current)):
        ends.append(min(max(wanted[stage], now[stage - 1]), now[stage + 1]))
    ends.append(now[-1])
    return tuple(after - before for before, after in itertools.pairwise(ends))


@dataclass(frozen=True)
class StageTimes:
    """What every device did for one chunk, measured under one split.

    Attributes:
      stages: seconds per chunk of each stage's blocks, finite and >= 0.
      overheads: seconds per chunk of whatever else each stage's device does (encode, decode), finite and >= 0.
    """

    stages: tuple[float, ...]
    overheads: tuple[float, ...]

    def __post_init__(self):
        if len(self.stages) != len(self.overheads):
            raise ValueError(
                f"expected as many overheads as stages, got {len(self.overheads)} and {len(self.stages)}"
            )
        _check_numbers("stage times", self.stages)
        _check_numbers("overheads", self.overheads)


@dataclass(frozen=True)
class BalancePolicy:
    """When blocks move.

    Attributes:
      threshold: gain in throughput below which blocks stay, as a fraction, >= 0. At the default the pipeline may
        rest at 1 / 1.05 = 95.2 % of the best split's throughput.
      samples: measurements between two decisions, and the fewest that one rests on, >= confidence squared.
      window: measurements that are kept, >= samples; best samples times a power of two. Larger sees smaller gains
        through more noise: a gain g (a fraction) is seen for sure when the noise of one measurement (sigma, a
        fraction) is below about g * sqrt(window) / (2.5 * confidence), for the defaults 11 %.
      confidence: by how many standard errors both bottlenecks may be wrong in the unfavourable direction and the
        move still pay, > 0. Larger waits longer, smaller chases noise.
    """

    threshold: float = 0.05
    samples: int = 9
    window: int = 288
    confidence: float = 3.0

    def __post_init__(self):
        _check_numbers("threshold and confidence", (self.threshold, self.confidence))
        if self.confidence == 0 or not self.confidence**2 <= self.samples <= self.window:
            raise ValueError(
                "expected 0 < confidence squared <= samples <= window, "
                f"got {self.confidence=}, {self.samples=} and {self.window=}"
            )


@dataclass(frozen=True)
class Balancer:
    """All a balancer remembers. Make it with `init_balancer`.

    Attributes:
      counts: blocks per stage of the present split.
      policy: when blocks move.
      history: the last measurements under the present split, oldest first, at most `policy.window`.
      seen: how many measurements the present split had.
    """

    counts: Counts
    policy: BalancePolicy
    history: tuple[StageTimes, ...] = ()
    seen: int = 0


def init_balancer(counts: Sequence[int], policy: BalancePolicy | None = None) -> Balancer:
    """Returns the balancer of a pipeline that starts with this split; the default policy if None.

    Raises:
      ValueError: no stages, or a stage without blocks.
    """
    return Balancer(_checked_counts(counts), policy or BalancePolicy())


def observe(state: Balancer, times: StageTimes) -> tuple[Balancer, Counts | None]:
    """Returns the balancer with one measurement more, and the split it wants now or None to stay.

    A device's seconds per block and overhead are medians over the newest measurements, so that a chunk that took
    much longer for another reason does not count. A move is wanted if the best split is predicted to be faster than
    the present one by more than the threshold, and still faster when both bottlenecks are off by `confidence`
    standard errors, the present one's less and the other's more than estimated. This is asked of the newest
    `samples` measurements, then of twice as many and so on: the few see a large change soon, the many see a small
    one through the noise.

    A wanted split is a wish: the balancer goes on from the present one until `moved` says otherwise, and wants it
    again at the next decision if it still pays. The way there is `towards`.

    Args:
      state: the balancer.
      times: one chunk, measured while the present split was in use; one that began under an earlier split, or
        that includes a compilation, should be left out.

    Raises:
      ValueError: times of another number of stages.
    """
    if len(times.stages) != len(state.counts):
        raise ValueError(f"expected times of {len(state.counts)} stages, got {len(times.stages)}")
    policy = state.policy
    history = (*state.history, times)[-policy.window :]
    state = dataclasses.replace(state, history=history, seen=state.seen + 1)
    if state.seen % policy.samples:
        return state, None
    newest = policy.samples
    while newest <= len(history):
        wanted = _better_split(state.counts, history[-newest:], policy)
        if wanted is not None:
            return state, wanted
        newest *= 2
    return state, None


def moved(state: Balancer, counts: Sequence[int]) -> Balancer:
    """Returns the balancer after the pipeline took a split, wanted or not, without any measurements.

    Seconds per block would carry over if blocks cost the same on a device whatever their number, but then a wrong
    belief would too; a new split is judged by what it does.

    Raises:
      ValueError: another number of stages or blocks, or a stage without blocks.
    """
    counts = _checked_counts(counts)
    if len(counts) != len(state.counts) or sum(counts) != sum(state.counts):
        raise ValueError(f"expected a split of the same blocks and stages as {state.counts}, got {counts}")
    return Balancer(counts, state.policy)


def measured_split(
    counts: Sequence[int], measured: Sequence[StageTimes], threshold: float = BalancePolicy.threshold
) -> Counts:
    """Returns the best split by the medians of what was measured under a split; that one, if little is gained.

    For a pipeline before it runs, where a move costs nothing and need not be sure to pay, as in `observe`.

    Args:
      counts: the split that was measured.
      measured: at least one chunk's times.
      threshold: gain in throughput up to which the split stays, as a fraction.

    Raises:
      ValueError: nothing was measured.
    """
    counts = _checked_counts(counts)
    if not measured:
        raise ValueError("expected at least one measurement")
    stages_s = zip(*(t.stages for t in measured), strict=True)
    block_s = [statistics.median(values) / count for values, count in zip(stages_s, counts, strict=True)]
    overhead_s = [statistics.median(values) for values in zip(*(t.overheads for t in measured), strict=True)]
    block_costs = [1.0] * sum(counts)
    wanted = best_split(block_costs, overhead_s, block_s)
    now_s = bottleneck(counts, block_costs, overhead_s, block_s)
    then_s = bottleneck(wanted, block_costs, overhead_s, block_s)
    return wanted if now_s > (1 + threshold) * then_s else counts


def _better_split(counts: Counts, measured: Sequence[StageTimes], policy: BalancePolicy) -> Counts | None:
    """Returns the best split by these measurements if moving there pays for sure."""
    wanted = measured_split(counts, measured, policy.threshold)
    if wanted == counts:
        return None
    stages_s = list(zip(*(t.stages for t in measured), strict=True))
    overheads_s = list(zip(*(t.overheads for t in measured), strict=True))

    # How many of n draws lie below their distribution's median is binomial, with mean n / 2 and deviation
    # sqrt(n) / 2. So the draws that many deviations off the middle rank bound the median, whatever the
    # distribution: no sigma to estimate, and an outlier is only one more draw on its side.
    below = int((len(measured) - policy.confidence * math.sqrt(len(measured))) / 2)

    def bottleneck_s(split: Counts, rank: int) -> float:
        """Returns the bottleneck if each stage takes the time of this rank among those its measurements predict."""
        return max(
            sorted(s / now * then + o for s, o in zip(stage, overhead, strict=True))[rank]
            for stage, overhead, now, then in zip(stages_s, overheads_s, counts, split, strict=True)
        )

    return wanted if bottleneck_s(counts, below) > bottleneck_s(wanted, -1 - below) else None


def _ends(counts: Counts) -> list[int]:
    """Returns where each stage ends, after a leading 0."""
    return list(itertools.accumulate(counts, initial=0))


def _checked_counts(counts: Sequence[int]) -> Counts:
    if not counts or min(counts) < 1:
        raise ValueError(f"expected at least one stage and one block on each, got {list(counts)}")
    return tuple(counts)


def _checked_slowness(
    block_costs: Sequence[float], stage_overheads: Sequence[float], slowness: Sequence[float] | None
) -> Sequence[float]:
    _check_numbers("block costs", block_costs)
    _check_numbers("stage overheads", stage_overheads)
    if slowness is None:
        return [1.0] * len(stage_overheads)
    _check_numbers("slowness", slowness)
    if len(slowness) != len(stage_overheads):
        raise ValueError(f"expected slowness for {len(stage_overheads)} stages, got {len(slowness)} numbers")
    return slowness


def _check_numbers(name: str, values: Sequence[float]) -> None:
    for i, value in enumerate(values):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: expected finite numbers >= 0, got {value} at position {i}")
