"""Blocks lie where the pipeline is fastest."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svd2_jax.engine.balance import Counts, StageTimes, best_split, bottleneck, measured_split
from svd2_jax.engine.stage_times import SAMPLES

# Few different values make ties, odd ones make rounding.
TIMES = st.one_of(st.sampled_from([0.0, 0.1, 1 / 3, 1.0, 2.0]), st.floats(0, 10, allow_subnormal=False))


def all_splits(blocks: int, stages: int) -> list[Counts]:
    ends = itertools.combinations(range(1, blocks), stages - 1)
    return [tuple(b - a for a, b in itertools.pairwise((0, *inner, blocks))) for inner in ends]


@st.composite
def pipelines(draw):
    stages = draw(st.integers(1, 5))
    blocks = draw(st.integers(stages, 9))
    same = [draw(TIMES)] * blocks
    costs = draw(st.one_of(st.just(same), st.lists(TIMES, min_size=blocks, max_size=blocks)))
    of_stages = st.lists(TIMES, min_size=stages, max_size=stages)
    return costs, draw(of_stages), draw(st.one_of(st.none(), of_stages))


@given(pipelines())
def test_best_split_equals_the_best_of_all_splits(pipeline):
    costs, overheads, slowness = pipeline

    def worth(counts: Counts):
        """Slowest stage first, then the next; among equals the last stage has the fewest blocks."""
        ends = list(itertools.accumulate(counts, initial=0))
        times = [
            bottleneck([end - start], costs[start:end], [overhead], [factor])
            for (start, end), overhead, factor in zip(
                itertools.pairwise(ends), overheads, slowness or [1.0] * len(counts), strict=True
            )
        ]
        return sorted(times, reverse=True), counts[::-1]

    splits = all_splits(len(costs), len(overheads))
    found = best_split(costs, overheads, slowness)
    assert found == min(splits, key=worth)
    assert bottleneck(found, costs, overheads, slowness) == min(
        bottleneck(counts, costs, overheads, slowness) for counts in splits
    )


@pytest.mark.parametrize(
    ("blocks", "overheads", "slowness", "counts"),
    [
        (30, [0, 0, 0, 0], None, (8, 8, 7, 7)),
        (30, [2, 0, 0, 5], None, (8, 9, 9, 4)),
        (12, [0, 0], [1, 2], (8, 4)),
        (12, [0, 0, 0], [1, 1, 4], (6, 5, 1)),
        # Nothing helps the last stage; the others are even all the same.
        (8, [0, 0, 0, 100], None, (3, 2, 2, 1)),
    ],
)
def test_small_splits_are_as_worked_out_by_hand(blocks, overheads, slowness, counts):
    assert best_split([1.0] * blocks, overheads, slowness) == counts


def test_bottleneck_is_the_slowest_stage():
    assert bottleneck([2, 1], [1.0, 2.0, 4.0], [0.5, 0.0]) == 4.0
    assert bottleneck([2, 1], [1.0, 2.0, 4.0], [0.5, 0.0], [3.0, 1.0]) == 9.5


@pytest.fixture(scope="module")
def golden_cases(golden_folder):
    return json.loads((golden_folder / "block_balance.json").read_text())


@pytest.mark.parametrize("devices", ["alike", "as measured"])
def test_no_golden_case_is_slower_than_the_reference(golden_cases, devices):
    for case in golden_cases:
        costs, overheads, slowness, theirs = read_golden(case, devices == "alike")
        ours = best_split(costs, overheads, slowness)
        limit = bottleneck(theirs, costs, overheads, slowness)
        assert bottleneck(ours, costs, overheads, slowness) <= limit


def read_golden(case: dict, alike: bool) -> tuple[list[float], list[float], list[float] | None, Counts]:
    """Returns block costs, overheads, slowness and the reference's split of a golden case.

    Alike: every block costs the mean, as the reference has it. Else each device has its own seconds per block.
    """
    blocks = case["total_blocks"]
    overheads = [t - d for t, d in zip(case["rank_times"], case["dit_times"], strict=True)]
    theirs = tuple(end - start for start, end in case["balanced"])
    if alike:
        return [sum(case["dit_times"]) / blocks] * blocks, overheads, None, theirs
    block_s = [
        dit / (end - start) for dit, (start, end) in zip(case["dit_times"], case["current"], strict=True)
    ]
    return [1.0] * blocks, overheads, block_s, theirs


# A pipeline and its devices, simulated.


@dataclass
class Devices:
    """True times of a pipeline's devices; `draw` gives measurements of them."""

    blocks: int
    block_s: list[float]
    overhead_s: list[float]
    rng: random.Random
    noise: float = 0.1  # sigma, as a fraction
    outliers: float = 0.0  # how many of all times are 3 to 20 times too long, as a fraction

    def draw(self, counts: Counts) -> StageTimes:
        stages = tuple(self.noisy(n * block_s) for n, block_s in zip(counts, self.block_s, strict=True))
        return StageTimes(stages, tuple(map(self.noisy, self.overhead_s)))

    def noisy(self, seconds: float) -> float:
        seconds *= max(0.05, self.rng.gauss(1, self.noise))
        return seconds * self.rng.uniform(3, 20) if self.rng.random() < self.outliers else seconds

    def bottleneck_s(self, counts: Counts) -> float:
        return bottleneck(counts, [1.0] * self.blocks, self.overhead_s, self.block_s)

    def best(self) -> Counts:
        return best_split([1.0] * self.blocks, self.overhead_s, self.block_s)

    def throughput(self, counts: Counts) -> float:
        """Returns the throughput of a split as a fraction of the best split's."""
        return self.bottleneck_s(self.best()) / self.bottleneck_s(counts)


def some_devices(seed: int, **kwargs: float) -> Devices:
    """Returns 2 to 8 devices that differ by up to a half, sometimes one throttled, with encode and decode."""
    rng = random.Random(seed)
    blocks, stages = rng.choice([16, 30, 40]), rng.choice([2, 3, 4, 5, 8])
    block_s = [rng.uniform(0.8, 1.25) for _ in range(stages)]
    if rng.random() < 0.3:
        block_s[rng.randrange(stages)] *= 2
    overhead_s = [rng.uniform(0, 5), *[0.0] * (stages - 2), rng.uniform(0, 8)]
    return Devices(blocks, block_s, overhead_s, rng, **kwargs)


def even(devices: Devices) -> Counts:
    return best_split([1.0] * devices.blocks, [0.0] * len(devices.block_s))


def finish_times(times: list[tuple[float, ...]]) -> list[float]:
    """Returns when each chunk leaves the last stage; `times[chunk][stage]` are seconds of work.

    A stage starts a chunk when it has finished the one before and the previous stage has finished this one.
    """
    finished, leaves = [0.0] * len(times[0]), []
    for chunk in times:
        arrives = 0.0
        for stage, seconds in enumerate(chunk):
            arrives = finished[stage] = max(finished[stage], arrives) + seconds
        leaves.append(arrives)
    return leaves


def lockstep_finish_times(times: list[tuple[float, ...]]) -> list[float]:
    """The same if all stages hand over at once: every tick lasts as long as its slowest stage."""
    chunks, stages = len(times), len(times[0])
    now, leaves = 0.0, []
    for tick in range(chunks + stages - 1):
        now += max(times[tick - s][s] for s in range(stages) if 0 <= tick - s < chunks)
        leaves.append(now)
    return leaves[stages - 1 :]


@pytest.mark.parametrize("finishes", [finish_times, lockstep_finish_times])
@pytest.mark.parametrize("seed", range(5))
def test_a_pipeline_gives_one_chunk_per_bottleneck(finishes, seed):
    devices = some_devices(seed, noise=0.0)
    counts = even(devices)
    drawn = devices.draw(counts)
    leaves = finishes([tuple(map(sum, zip(drawn.stages, drawn.overheads, strict=True)))] * 50)
    steady = leaves[len(counts) :]  # while the pipeline fills, ticks are shorter
    for before, after in itertools.pairwise(steady[: 50 - 2 * len(counts)]):
        assert after - before == pytest.approx(devices.bottleneck_s(counts))  # sums of 50 rounded numbers


@pytest.mark.parametrize("seed", range(3))
def test_a_balanced_pipeline_measures_as_fast_as_the_best_one(seed):
    def chunks_per_s(devices: Devices, counts: Counts) -> float:
        drawn = [devices.draw(counts) for _ in range(400)]
        work = [tuple(map(sum, zip(d.stages, d.overheads, strict=True))) for d in drawn]
        return len(work) / lockstep_finish_times(work)[-1]

    devices = some_devices(seed)
    counts = measured_split(even(devices), [devices.draw(even(devices)) for _ in range(SAMPLES)])
    # 92 % is the least of 40 pipelines, see benchmarks/block_balance.md.
    assert chunks_per_s(devices, counts) >= 0.9 * chunks_per_s(devices, devices.best())


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: best_split([1.0], [0.0, 0.0]), "2 stages, 1 block"),
        (lambda: best_split([1.0], []), "0 stages"),
        (lambda: best_split([1.0, NAN], [0.0]), "block costs: .*nan at position 1"),
        (lambda: best_split([1.0], [-1.0]), "stage overheads: .*-1.0 at position 0"),
        (lambda: best_split([1.0], [0.0], [INF]), "slowness: .*inf at position 0"),
        (lambda: best_split([1.0], [0.0], [1.0, 1.0]), "slowness for 1 stages, got 2"),
        (lambda: bottleneck([1], [1.0, 1.0], [0.0]), "add up to 2 blocks"),
        (lambda: bottleneck([3, -1], [1.0, 1.0], [0.0, 0.0]), "counts >= 0"),
        (lambda: bottleneck([2], [1.0, 1.0], [0.0, 0.0]), "each of 2 stages"),
        (lambda: measured_split((4, 0), [StageTimes((1.0, 1.0), (0.0, 0.0))]), "one block on each"),
        (lambda: measured_split((), [StageTimes((), ())]), "at least one stage"),
        (lambda: StageTimes((1.0,), (0.0, 0.0)), "as many overheads"),
        (lambda: StageTimes((NAN,), (0.0,)), "stage times: .*nan"),
        (lambda: StageTimes((1.0,), (-0.1,)), "overheads: .*-0.1"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


# --- the split that a warm-up's measurements ask for


def times(stages, overheads, count=3):
    return [StageTimes(stages, overheads)] * count


def test_a_measured_split_is_the_best_by_medians():
    # Stage 1 takes 6 s for 4 blocks and 2 s more, stage 2 takes 4 s for 4: the best is (2, 6), 5 s and 6 s.
    assert measured_split((4, 4), times((6.0, 4.0), (2.0, 0.0))) == (2, 6)
    slow = StageTimes((90.0, 4.0), (0.0, 90.0))  # one chunk that took long does not count
    assert measured_split((4, 4), [*times((4.0, 12.0), (0.0, 0.0)), slow]) == (6, 2)


def test_a_measured_split_stays_where_little_is_gained():
    assert measured_split((4, 4), times((4.0, 4.0), (0.0, 1.04), 1)) == (4, 4)
    assert measured_split((10, 10), times((10.0, 10.0), (0.0, 2.0))) == (11, 9)  # 12 and then 11: 9 %
    assert measured_split((8,), times((1.0,), (1.0,))) == (8,)
    assert measured_split((4, 4), times((0.0, 0.0), (0.0, 0.0))) == (4, 4)


def test_a_split_needs_a_measurement():
    with pytest.raises(ValueError, match="at least one measurement"):
        measured_split((4, 4), [])


# It may rest 5 % below the best throughput: 1 / 1.05. Noise adds what wrong medians cost.
@pytest.mark.parametrize(
    ("noise", "outliers", "least"), [(0.01, 0.0, 0.95), (0.1, 0.0, 0.9), (0.1, 0.1, 0.9)]
)
def test_nine_measurements_come_near_the_best_split(noise, outliers, least):
    for seed in range(40):
        devices = some_devices(seed, noise=noise, outliers=outliers)
        counts = even(devices)
        wanted = measured_split(counts, [devices.draw(counts) for _ in range(SAMPLES)])
        assert devices.throughput(wanted) >= least
