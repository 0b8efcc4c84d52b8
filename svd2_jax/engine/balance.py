"""How to cut a list of blocks into contiguous stages."""

from __future__ import annotations

from collections.abc import Sequence


def best_split(block_costs: Sequence[float], stage_overheads: Sequence[float]) -> tuple[int, ...]:
    """Returns the blocks per stage whose slowest stage is the fastest possible, each stage at least one block.

    Exact: a dynamic programme over (stage, blocks so far). Among equals the earlier stages get more blocks.

    Args:
      block_costs: time of each block, in any unit.
      stage_overheads: what each stage does besides its blocks (encode on the first, decode on the last).

    Raises:
      ValueError: fewer blocks than stages.
    """
    blocks, stages = len(block_costs), len(stage_overheads)
    if blocks < stages:
        raise ValueError(f"{stages} stages need at least {stages} blocks, got {blocks}")
    upto = [0.0]
    for cost in block_costs:
        upto.append(upto[-1] + cost)
    # best[b]: least bottleneck of the stages so far when they hold the first b blocks.
    best = [0.0] + [float("inf")] * blocks
    cuts: list[list[int]] = []
    for stage, overhead in enumerate(stage_overheads):
        remaining = stages - stage - 1
        new, cut = [float("inf")] * (blocks + 1), [0] * (blocks + 1)
        for end in range(stage + 1, blocks - remaining + 1):
            for start in range(stage, end):
                bottleneck = max(best[start], overhead + upto[end] - upto[start])
                if bottleneck <= new[end]:
                    new[end], cut[end] = bottleneck, start
        best = new
        cuts.append(cut)
    counts, end = [], blocks
    for cut in reversed(cuts):
        counts.append(end - cut[end])
        end = cut[end]
    return tuple(reversed(counts))


def bottleneck(
    counts: Sequence[int], block_costs: Sequence[float], stage_overheads: Sequence[float]
) -> float:
    """Returns the time of the slowest stage of a split."""
    slowest, start = 0.0, 0
    for count, overhead in zip(counts, stage_overheads, strict=True):
        slowest = max(slowest, overhead + sum(block_costs[start : start + count]))
        start += count
    return slowest
