"""How many blocks each stage of a pipeline gets: arithmetic without clock, device or thread.

A transformer of identical blocks is cut into contiguous ranges, one per stage, one stage per device. The first
device also encodes and the last one decodes, and devices differ in speed. All stages work at once, on one chunk
each, so the pipeline gives a chunk every time its slowest stage finishes: only the *bottleneck* counts.

Everything here is a function of its arguments and exact or correctly rounded, so that several processes that have
the same numbers find the same split.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Counts = tuple[int, ...]  # blocks per stage, in the order of the stages
GAIN = 0.05
"""By how much faster another split has to be to be taken, as a fraction. So a pipeline may rest at 1 / 1.05 = 95.2 %
of the best throughput."""


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


def measured_split(counts: Sequence[int], measured: Sequence[StageTimes]) -> Counts:
    """Returns the best split by what was measured under a split; that one, unless another is faster by `GAIN`.

    A stage's time is the median, so that a chunk that took much longer for another reason does not count.

    Args:
      counts: the split that was measured.
      measured: at least one chunk's times.

    Raises:
      ValueError: nothing was measured, or a stage has no block.
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
    return wanted if now_s > (1 + GAIN) * then_s else counts


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
