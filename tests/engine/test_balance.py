"""Blocks end up where the pipeline is fastest, get there by moves it can make, and then stay."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svd2_jax.engine.balance import (
    BalancePolicy,
    Balancer,
    Counts,
    StageTimes,
    best_split,
    bottleneck,
    init_balancer,
    measured_split,
    moved,
    observe,
    towards,
)

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


@st.composite
def two_splits(draw):
    stages = draw(st.integers(1, 8))
    blocks = draw(st.integers(stages, 40))

    def split() -> Counts:
        ends = st.sets(st.integers(1, max(blocks - 1, 1)), min_size=stages - 1, max_size=stages - 1)
        inner = sorted(draw(ends)) if stages > 1 else []
        return tuple(b - a for a, b in itertools.pairwise((0, *inner, blocks)))

    return split(), split()


@given(two_splits())
def test_moves_between_neighbours_lead_from_any_split_to_any_other(splits):
    current, target = splits
    goal = list(itertools.accumulate(target, initial=0))
    moves = 0
    while current != target:
        following = towards(current, target)
        old, new = (list(itertools.accumulate(counts, initial=0)) for counts in (current, following))
        assert min(following) >= 1
        assert new[-1] == old[-1]
        for stage in range(1, len(current)):
            assert old[stage - 1] <= new[stage] <= old[stage + 1]
            assert min(old[stage], goal[stage]) <= new[stage] <= max(old[stage], goal[stage])
        current, moves = following, moves + 1
        assert moves <= len(target) - 1
    assert towards(target, target) == target


def test_a_far_boundary_waits_for_its_neighbours():
    # The first stage wants blocks 1 to 7; its neighbour holds only block 1 and 2.
    assert towards((1, 2, 6), (7, 1, 1)) == (3, 5, 1)
    assert towards((3, 5, 1), (7, 1, 1)) == (7, 1, 1)


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


def even(devices: Devices) -> Balancer:
    return init_balancer(best_split([1.0] * devices.blocks, [0.0] * len(devices.block_s)))


def balance(devices: Devices, state: Balancer, measurements: int) -> tuple[Balancer, int]:
    """Returns the balancer after so many measurements, and how often blocks moved."""
    moves = 0
    for _ in range(measurements):
        state, wanted = observe(state, devices.draw(state.counts))
        if wanted is not None:
            while state.counts != wanted:
                state = moved(state, towards(state.counts, wanted))
            moves += 1
    return state, moves


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
    counts = even(devices).counts
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
    state, _ = balance(devices, even(devices), 400)
    # 1 % for the 400 draws of noise, which differ between the two runs.
    assert chunks_per_s(devices, state.counts) >= (0.95 - 0.01) * chunks_per_s(devices, devices.best())


SETTLED = 400  # measurements


@pytest.mark.parametrize("outliers", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(5))
def test_noisy_measurements_settle_near_the_best_split_and_blocks_stay(seed, outliers):
    devices = some_devices(seed, outliers=outliers)
    state, moves = balance(devices, even(devices), SETTLED)
    assert devices.throughput(state.counts) >= 0.95
    assert moves <= 3
    state, moves = balance(devices, state, 1000)
    assert devices.throughput(state.counts) >= 0.95
    assert moves <= 1


@pytest.mark.parametrize("seed", range(8))
def test_quiet_measurements_settle_after_few_chunks_and_blocks_stay(seed):
    devices = some_devices(seed, noise=0.01)
    state, moves = balance(devices, even(devices), 40)
    assert devices.throughput(state.counts) >= 0.95
    assert moves <= 2
    state, moves = balance(devices, state, 300)
    assert moves == 0


@pytest.mark.parametrize("seed", range(8))
def test_a_device_that_throttles_loses_blocks_and_gets_them_back(seed):
    devices = some_devices(seed)
    state, _ = balance(devices, even(devices), SETTLED)
    slow = devices.rng.randrange(len(state.counts))
    for factor in (2.0, 0.5):
        devices.block_s[slow] *= factor
        state, early = balance(devices, state, 100)
        assert devices.throughput(state.counts) >= 0.85
        state, late = balance(devices, state, SETTLED - 100)
        assert devices.throughput(state.counts) >= 0.95
        assert early + late <= 3


# The rules one by one, with measurements without noise.

# Stage 1 takes 6 s for 4 blocks and 2 s more, stage 2 takes 4 s for 4: the best is (2, 6), 5 s and 6 s.
UNEVEN = StageTimes(stages=(6.0, 4.0), overheads=(2.0, 0.0))
SAMPLES = BalancePolicy().samples


def feed(state: Balancer, times: list[StageTimes]) -> tuple[Balancer, list[Counts | None]]:
    wishes = []
    for one in times:
        state, wanted = observe(state, one)
        wishes.append(wanted)
    return state, wishes


def test_a_move_is_wanted_after_enough_measurements_and_again_until_it_is_made():
    state, wishes = feed(init_balancer((4, 4)), [UNEVEN] * 2 * SAMPLES)
    assert wishes == ([None] * (SAMPLES - 1) + [(2, 6)]) * 2
    assert state.counts == (4, 4)


def test_a_new_split_is_judged_by_new_measurements_only():
    state, _ = feed(init_balancer((4, 4)), [UNEVEN] * SAMPLES)
    state = moved(state, (2, 6))
    assert state == init_balancer((2, 6))
    _, wishes = feed(state, [StageTimes((3.0, 6.0), (2.0, 0.0))] * 3 * SAMPLES)
    assert set(wishes) == {None}


@pytest.mark.parametrize(("overhead", "wanted"), [(0.19, None), (0.22, (4, 5))])
def test_blocks_stay_for_less_than_the_threshold(overhead, wanted):
    # 5 s + overhead now, 5 s after a block has moved.
    times = StageTimes((5.0, 4.0), (overhead, 0.0))
    _, wishes = feed(init_balancer((5, 4), BalancePolicy(threshold=0.04)), [times] * SAMPLES)
    assert wishes[-1] == wanted


def test_outliers_up_to_half_of_the_measurements_move_nothing():
    usual, outlier = StageTimes((4.0, 4.0), (0.0, 0.0)), StageTimes((40.0, 4.0), (0.0, 0.0))
    _, wishes = feed(init_balancer((4, 4)), ([usual] * 5 + [outlier] * 4) * 20)
    assert set(wishes) == {None}


def test_a_gain_within_the_noise_moves_nothing_until_there_are_more_measurements():
    # UNEVEN in the median, but the first nine could also be draws of a pipeline that is best as it is.
    swinging = [StageTimes((seconds, 4.0), (2.0, 0.0)) for seconds in (6.0, 6.0, 6.0, 2.0, 10.0) * 8]
    _, wishes = feed(init_balancer((4, 4)), swinging)
    assert wishes[SAMPLES - 1] is None
    assert wishes[4 * SAMPLES - 1] == (2, 6)


def test_the_window_bounds_the_memory():
    state, _ = feed(init_balancer((5, 3), BalancePolicy(window=20)), [UNEVEN] * 50)
    assert (len(state.history), state.seen) == (20, 50)


def test_one_stage_never_moves():
    _, wishes = feed(init_balancer((8,)), [StageTimes((1.0,), (1.0,))] * 2 * SAMPLES)
    assert set(wishes) == {None}


def test_times_of_zero_move_nothing():
    _, wishes = feed(init_balancer((4, 4)), [StageTimes((0.0, 0.0), (0.0, 0.0))] * 2 * SAMPLES)
    assert set(wishes) == {None}


def test_the_same_measurements_give_the_same_decisions():
    devices = some_devices(0)
    state = even(devices)
    times = [devices.draw(state.counts) for _ in range(100)]
    assert feed(state, times) == feed(state, times)


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
        (lambda: towards((2, 2), (2, 3)), "same blocks"),
        (lambda: towards((2, 2), (4,)), "same stages"),
        (lambda: towards((4, 0), (2, 2)), "one block on each"),
        (lambda: init_balancer(()), "at least one stage"),
        (lambda: moved(init_balancer((2, 2)), (1, 2)), "same blocks"),
        (lambda: observe(init_balancer((4,)), UNEVEN), "times of 1 stages, got 2"),
        (lambda: StageTimes((1.0,), (0.0, 0.0)), "as many overheads"),
        (lambda: StageTimes((NAN,), (0.0,)), "stage times: .*nan"),
        (lambda: StageTimes((1.0,), (-0.1,)), "overheads: .*-0.1"),
        (lambda: BalancePolicy(threshold=-0.1), "threshold"),
        (lambda: BalancePolicy(samples=8), "confidence squared"),
        (lambda: BalancePolicy(window=8), "samples <= window"),
        (lambda: BalancePolicy(confidence=0.0), "0 < confidence"),
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
    slow = StageTimes((90.0, 4.0), (0.0, 90.0))  # one chunk that took long does not count
    assert measured_split((4, 4), [*times((4.0, 12.0), (0.0, 0.0)), slow]) == (6, 2)


def test_a_measured_split_stays_where_little_is_gained():
    assert measured_split((4, 4), times((4.0, 4.0), (0.0, 1.04), 1)) == (4, 4)
    assert measured_split((10, 10), times((10.0, 10.0), (0.0, 2.0))) == (11, 9)  # 12 and then 11: 9 %
    assert measured_split((10, 10), times((10.0, 10.0), (0.0, 2.0)), threshold=0.1) == (10, 10)


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
        counts = even(devices).counts
        wanted = measured_split(counts, [devices.draw(counts) for _ in range(9)])
        assert devices.throughput(wanted) >= least
