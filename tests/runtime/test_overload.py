"""Denoising steps follow the load, and what would not fit is not let in. Ticks take 20 + 30 for each stream's step."""

from __future__ import annotations

from collections.abc import Hashable

import pytest

from svd2_jax.runtime.deadline import PolicyConfig
from svd2_jax.runtime.latency import LatencyConfig, LatencyModel, LatencySample, TickTimes
from svd2_jax.runtime.overload import (
    NEVER_IN_TIME,
    NO_LIMIT,
    Control,
    control,
    nominal_ns,
    refusal,
    steps_at,
    ticks_per_chunk,
    utilisation,
)
from svd2_jax.runtime.types import MS, StreamSettings

CONFIG = PolicyConfig(guard_ms=0, degrade_above=0.9, restore_below=0.8, restore_after_ms=500)


def times_of(batch_key: Hashable, steps: int, slowness: float = 1.0) -> TickTimes:
    model = LatencyModel((1, 2, 4), LatencyConfig(least_margin=0))
    for size in (1, 2, 4):
        model.observe(LatencySample(batch_key, size, steps, round((20 + 30 * size * steps) * slowness * MS)))
    return model.times(batch_key, steps)


def load(steps: int = 2, rate_hz: float = 16, **settings) -> StreamSettings:
    return StreamSettings(rate_hz, **{"budget_ms": 900, "steps": steps, **settings})


@pytest.mark.parametrize(("budget_ms", "ticks"), [(518, 1), (517, 2), (348, 2), (347, NEVER_IN_TIME)])
def test_ticks_per_chunk_are_the_fewest_that_are_in_time(budget_ms, ticks):
    """187.5 ms until the frames are there; then 250 and 80 ms, or twice 80."""
    settings = StreamSettings(16, budget_ms)
    assert ticks_per_chunk(settings, 2, 80 * MS, 0) == ticks


@pytest.mark.parametrize(
    ("budget_ms", "ticks"),
    [(760, 1), (759, 2), (370, 2), (369, 3), (360, 3), (359, 4), (190, 4), (189, NEVER_IN_TIME)],
)
def test_ticks_per_chunk_count_every_stage(budget_ms, ticks):
    """150 ms for a chunk to fill; then 3 chunks of 200 ms and a tick of 10, a chunk and 2 ticks or one, or 4 ticks."""
    settings = StreamSettings(20, budget_ms, steps=2, stages=2)
    assert ticks_per_chunk(settings, 2, 10 * MS, 0) == ticks


def test_the_playout_delay_is_a_chunk_that_fills_and_its_ticks_right_behind_each_other():
    settings = StreamSettings(20, 900, steps=2, stages=2)
    assert nominal_ns(settings, times_of) == (150 + 4 * 80) * MS
    assert nominal_ns(StreamSettings(20, 400, steps=2, stages=2), times_of) == 400 * MS


@pytest.mark.parametrize(
    ("count", "share"),
    [(1, 80 / 250), (2, 140 / 250), (3, 220 / 250), (4, 260 / 250)],
)
def test_utilisation_is_that_of_the_best_batches(count, share):
    assert utilisation([load()] * count, 2, times_of, 0) == pytest.approx(share)


def test_utilisation_counts_second_ticks_of_tight_budgets():
    assert utilisation([load(budget_ms=400)], NO_LIMIT, times_of, 0) == pytest.approx(160 / 250)


def test_a_level_limits_the_steps_of_all_and_none_goes_below_its_floor():
    streams = load(2), load(4), load(3, min_steps=3), load(1)
    assert [steps_at(s, 2) for s in streams] == [2, 2, 3, 1]
    assert [steps_at(s, NO_LIMIT) for s in streams] == [2, 4, 3, 1]


def test_the_streams_with_most_steps_are_lowered_first():
    loads = [load(2), load(4, budget_ms=2000), load(3, budget_ms=2000)]  # 3 and 3 would take 200 ms and 2 80
    state = control(Control(), loads, times_of, CONFIG, 0)
    assert state.level == 2
    assert state.utilisation == pytest.approx(220 / 250)


def test_where_nothing_is_enough_it_is_the_level_of_the_least_utilisation():
    state = control(Control(), [load()] * 20, times_of, CONFIG, 0)
    assert state.level == 1
    assert state.utilisation == pytest.approx(20 * 35 / 250)


@pytest.mark.parametrize("tick_ms", [10, 120, 400])
def test_steps_stay_where_fewer_take_as_long(tick_ms):
    """At 400 ms no steps suffice, and times wobble by 1 %. Steps that were lowered before come back."""

    def same(batch_key: Hashable, steps: int) -> TickTimes:
        model = LatencyModel((1, 2), LatencyConfig(least_margin=0))
        for size in (1, 2):
            model.observe(
                LatencySample(batch_key, size, steps, round(tick_ms * size * (0.99 + steps / 200) * MS))
            )
        return model.times(batch_key, steps)

    loads = [load(steps=3, budget_ms=4000)] * 2
    assert control(Control(), loads, same, CONFIG, 0).level == NO_LIMIT
    state = Control(1)
    for at_ms, level in ((0, 1), (400, 1), (500, NO_LIMIT)):
        state = control(state, loads, same, CONFIG, at_ms * MS)
        assert state.level == level


def slower(factor: float):
    return lambda batch_key, steps: times_of(batch_key, steps, factor)


def test_steps_fall_at_once_and_rise_after_a_while():
    state = control(Control(), [load()], slower(3), CONFIG, 0)  # 240 of 250 ms
    assert (state.level, state.utilisation) == (1, pytest.approx(150 / 250))
    for at_ms in (1000, 1200, 1499):
        state = control(state, [load()], times_of, CONFIG, at_ms * MS)
        assert state.level == 1
    state = control(state, [load()], times_of, CONFIG, 1500 * MS)
    assert state.level == NO_LIMIT


@pytest.mark.parametrize("level", [1, NO_LIMIT])
def test_steps_do_not_rise_where_they_would_fall_again(level):
    """At two steps 212 of 250 ms: more than 80 %, less than 90 %."""
    state = Control(level)
    for at_ms in range(0, 3000, 100):
        state = control(state, [load()], slower(2.65), CONFIG, at_ms * MS)
        assert state.level == level


def test_an_interruption_starts_the_wait_anew():
    state = control(Control(1), [load()], times_of, CONFIG, 0)
    state = control(state, [load()], slower(2.65), CONFIG, 400 * MS)
    assert control(state, [load()], times_of, CONFIG, 600 * MS).level == 1


def test_a_budget_too_short_for_some_steps_never_gets_them():
    state = Control()
    for at_ms in range(0, 2000, 100):
        state = control(state, [load(budget_ms=340)], times_of, CONFIG, at_ms * MS)
        assert state.level == 1


def test_refusals_say_why_and_what_would_do():
    assert refusal(StreamSettings(16, 238), [], times_of, CONFIG) is None
    message = refusal(StreamSettings(16, 200, min_steps=2), [], times_of, CONFIG)
    assert message is not None
    assert message.endswith("and 2 denoising steps take up to 348 ms on this device; ask for at least that")
    others = [load()] * 7  # at one step 140 + 80 + 50 ms
    message = refusal(StreamSettings(16, 900), others, times_of, CONFIG)
    assert message is not None
    assert "7 running streams would use 108 % of its time and this one 4 % more, and 100 % can be" in message
    message = refusal(StreamSettings(32, 900), [load(rate_hz=80)], times_of, CONFIG)
    assert message is not None
    assert "1 running stream would use 100 % of its time" in message


def tailed(batch_key: Hashable, steps: int) -> TickTimes:
    """As `times_of`, with 40 ms behind each tick."""
    model = LatencyModel((1, 2, 4), LatencyConfig(least_margin=0))
    for size in (1, 2, 4):
        took_ns = (20 + 30 * size * steps) * MS
        model.observe(LatencySample(batch_key, size, steps, took_ns, tail_ns=40 * MS))
    return model.times(batch_key, steps)


def test_a_tail_takes_of_the_budget_but_not_of_the_device():
    assert refusal(StreamSettings(16, 278), [], tailed, CONFIG) is None  # 238 without
    message = refusal(StreamSettings(16, 200, min_steps=2), [], tailed, CONFIG)
    assert message is not None
    assert message.endswith("and 2 denoising steps take up to 388 ms on this device; ask for at least that")
    for budget_ms, ticks in ((558, 1), (557, 2)):  # as 518 and 517 without
        assert utilisation([load(budget_ms=budget_ms)], 2, tailed, 0) == pytest.approx(ticks * 80 / 250)
    settings = StreamSettings(16, 900)
    assert nominal_ns(settings, tailed) == nominal_ns(settings, times_of) + 40 * MS
