"""Denoising steps follow the load, and what would not fit is not let in. Ticks take 20 + 30 for each stream's step."""

from __future__ import annotations

from collections.abc import Hashable

import pytest

from svd2_jax.runtime.deadline import PolicyConfig
from svd2_jax.runtime.latency import Costs, LatencyConfig, LatencyModel, LatencySample
from svd2_jax.runtime.overload import (
    Control,
    Demand,
    affordable,
    at_level,
    chunk_rate,
    control,
    need,
    nominal_ns,
    push_need,
    refusal,
    ticks_per_chunk,
    utilisation,
)
from svd2_jax.runtime.work import MS, StreamSettings

CONFIG = PolicyConfig(guard_ms=0, lower_above=0.9, raise_below=0.8, raise_after_ms=500)


def costs_of(shape: Hashable, steps: int, slowness: float = 1.0) -> Costs:
    model = LatencyModel((1, 2, 4), LatencyConfig(least_margin=0))
    for size in (1, 2, 4):
        model.observe(LatencySample(shape, size, steps, round((20 + 30 * size * steps) * slowness * MS)))
    return model.costs(shape, steps)


def load(stream: int = 0, steps: int = 2, now: int | None = None, rate_hz: float = 16, **settings) -> Demand:
    asked = StreamSettings(rate_hz, **{"budget_ms": 900, "steps": steps, **settings})
    return Demand(stream, asked, steps if now is None else now, chunk_rate(asked, asked.interval_ns))


@pytest.mark.parametrize(("budget_ms", "ticks"), [(518, 1), (517, 2), (348, 2), (347, None)])
def test_ticks_per_chunk_are_the_fewest_that_are_in_time(budget_ms, ticks):
    """187.5 ms until the frames are there; then 250 and 80 ms, or twice 80."""
    settings = StreamSettings(16, budget_ms)
    assert ticks_per_chunk(settings, 2, 80 * MS, 0) == ticks


@pytest.mark.parametrize(
    ("budget_ms", "ticks"),
    [(760, 1), (759, 2), (370, 2), (369, 3), (360, 3), (359, 4), (190, 4), (189, None)],
)
def test_ticks_per_chunk_count_every_stage(budget_ms, ticks):
    """150 ms for a chunk to fill; then 3 chunks of 200 ms and a tick of 10, a chunk and 2 ticks or one, or 4 ticks."""
    settings = StreamSettings(20, budget_ms, steps=2, stages=2)
    assert ticks_per_chunk(settings, 2, 10 * MS, 0) == ticks


def test_the_playout_delay_is_a_chunk_that_fills_and_its_ticks_right_behind_each_other():
    settings = StreamSettings(20, 900, steps=2, stages=2)
    assert nominal_ns(settings, costs_of) == (150 + 4 * 80) * MS
    assert nominal_ns(StreamSettings(20, 400, steps=2, stages=2), costs_of) == 400 * MS


def test_pushing_on_takes_every_tick_of_every_chunk():
    loads = [load(0), load(1, steps=1, stages=2, rate_hz=8)]
    assert push_need(loads, {0: 2, 1: 1}, costs_of) == pytest.approx(2 * 80 / 250 + 2 * 50 / 500)


@pytest.mark.parametrize(
    ("count", "share"),
    [(1, 80 / 250), (2, 140 / 250), (3, 220 / 250), (4, 260 / 250)],
)
def test_utilisation_is_that_of_the_best_batches(count, share):
    loads = [load(i) for i in range(count)]
    steps = {i: 2 for i in range(count)}
    assert utilisation(loads, steps, costs_of, 0) == pytest.approx(share)


def test_utilisation_counts_second_ticks_of_tight_budgets():
    assert utilisation([load(budget_ms=400)], {0: 2}, costs_of, 0) == pytest.approx(160 / 250)


def test_the_stream_with_most_steps_is_lowered_first():
    loads = [load(0, 2), load(1, 4, budget_ms=2000), load(2, 3, budget_ms=2000)]
    level = affordable(loads, costs_of, 0, 0.95)
    assert at_level(loads, level) == {0: 2, 1: 2, 2: 2}  # 3 and 3 would take 200 ms and the other one 80
    assert utilisation(loads, at_level(loads, level), costs_of, 0) == pytest.approx(220 / 250)


def test_no_stream_goes_below_its_floor():
    loads = [load(0, 2, floor_steps=2), load(1, 2)]
    assert at_level(loads, affordable(loads, costs_of, 0, 0.01)) == {0: 2, 1: 1}


def test_what_is_needed_at_least_is_a_tick_per_chunk_in_the_best_batches():
    """Three streams in pairs take 70 ms each, though only two of them at a time."""
    loads = [load(i, budget_ms=400) for i in range(3)]
    assert need(loads, dict.fromkeys(range(3), 2), costs_of) == pytest.approx(3 * 70 / 250)


@pytest.mark.parametrize("tick_ms", [10, 120, 400])
def test_steps_stay_where_fewer_take_as_long(tick_ms):
    """At 400 ms no steps suffice, and times wobble by 1 %. Steps that were lowered before come back."""

    def same(shape: Hashable, steps: int) -> Costs:
        model = LatencyModel((1, 2), LatencyConfig(least_margin=0))
        for size in (1, 2):
            model.observe(
                LatencySample(shape, size, steps, round(tick_ms * size * (0.99 + steps / 200) * MS))
            )
        return model.costs(shape, steps)

    loads = [load(i, steps=3, budget_ms=4000) for i in range(2)]
    assert control(Control(), loads, same, CONFIG, 0)[1] == {0: 3, 1: 3}
    state, lower = Control(), [load(i, steps=3, now=1, budget_ms=4000) for i in range(2)]
    for at_ms in (0, 400):
        state, steps = control(state, lower, same, CONFIG, at_ms * MS)
        if tick_ms == 10:
            assert steps == {0: 1, 1: 1}


def slower(factor: float):
    return lambda shape, steps: costs_of(shape, steps, factor)


def test_steps_fall_at_once_and_rise_after_a_while():
    state, steps = control(Control(), [load()], slower(3), CONFIG, 0)  # 240 of 250 ms
    assert steps == {0: 1}
    assert state.utilisation == pytest.approx(150 / 250)
    for at_ms in (1000, 1200, 1499):
        state, steps = control(state, [load(now=1)], costs_of, CONFIG, at_ms * MS)
        assert steps == {0: 1}
    state, steps = control(state, [load(now=1)], costs_of, CONFIG, 1500 * MS)
    assert steps == {0: 2}


def test_steps_do_not_rise_where_they_would_fall_again():
    """At two steps 212 of 250 ms: more than 80 %, less than 90 %."""
    for now in (1, 2):
        state = Control()
        for at_ms in range(0, 3000, 100):
            state, steps = control(state, [load(now=now)], slower(2.65), CONFIG, at_ms * MS)
            assert steps == {0: now}


def test_an_interruption_starts_the_wait_anew():
    state, _ = control(Control(), [load(now=1)], costs_of, CONFIG, 0)
    state, _ = control(state, [load(now=1)], slower(2.65), CONFIG, 400 * MS)
    state, steps = control(state, [load(now=1)], costs_of, CONFIG, 600 * MS)
    assert steps == {0: 1}


def test_a_budget_too_short_for_some_steps_never_gets_them():
    tight = load(now=1, budget_ms=340)
    state = Control()
    for at_ms in range(0, 2000, 100):
        state, steps = control(state, [tight], costs_of, CONFIG, at_ms * MS)
        assert steps == {0: 1}


def test_refusals_say_why_and_what_would_do():
    assert refusal(StreamSettings(16, 238), [], costs_of, CONFIG) is None
    message = refusal(StreamSettings(16, 200, floor_steps=2), [], costs_of, CONFIG)
    assert message is not None
    assert message.endswith("and 2 denoising steps take 160 ms; ask for at least 348 ms")
    others = [load(i) for i in range(7)]  # at one step 140 + 80 + 50 ms
    message = refusal(StreamSettings(16, 900), others, costs_of, CONFIG)
    assert message is not None
    assert (
        "at minimum steps, 7 streams need 108 % of the device's time and this one 4 % more, and at most 100 %"
        in message
    )
    message = refusal(StreamSettings(32, 900), [load(rate_hz=80)], costs_of, CONFIG)
    assert message is not None
    assert "1 stream needs 100 % of the device's time" in message


def tailed(shape: Hashable, steps: int) -> Costs:
    """As `costs_of`, with 40 ms behind each tick."""
    model = LatencyModel((1, 2, 4), LatencyConfig(least_margin=0))
    for size in (1, 2, 4):
        took_ns = (20 + 30 * size * steps) * MS
        model.observe(LatencySample(shape, size, steps, took_ns, tail_ns=40 * MS))
    return model.costs(shape, steps)


def test_a_tail_takes_of_the_budget_but_not_of_the_device():
    assert refusal(StreamSettings(16, 278), [], tailed, CONFIG) is None  # 238 without
    message = refusal(StreamSettings(16, 200, floor_steps=2), [], tailed, CONFIG)
    assert message is not None
    assert message.endswith("and 2 denoising steps take 200 ms; ask for at least 388 ms")
    for budget_ms, ticks in ((558, 1), (557, 2)):  # as 518 and 517 without
        loads = [load(budget_ms=budget_ms)]
        assert utilisation(loads, {0: 2}, tailed, 0) == pytest.approx(ticks * 80 / 250)
    settings = StreamSettings(16, 900)
    assert nominal_ns(settings, tailed) == nominal_ns(settings, costs_of) + 40 * MS
