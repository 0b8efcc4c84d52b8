"""Device times are believed when they last, and predicted where nothing was measured."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svd2_jax.runtime.latency import LatencyConfig, LatencyModel, LatencySample, fit_line
from svd2_jax.runtime.types import MS


def sample(
    duration_ms: float, batch: int = 1, steps: int = 1, first: bool = False, batch_key="s"
) -> LatencySample:
    return LatencySample(batch_key, batch, steps, round(duration_ms * MS), first)


def learned(*samples: LatencySample, sizes=(1, 2, 4)) -> LatencyModel:
    model = LatencyModel(sizes)
    for one in samples:
        model.observe(one)
    return model


def expected_ms(model: LatencyModel, batch: int = 1, steps: int = 1, batch_key="s") -> float:
    return model.times(batch_key, steps).expected_ns[batch] / MS


def test_nothing_known_takes_no_time():
    costs = LatencyModel((1, 2)).times("s", 2)
    assert costs.expected_ns == {1: 0, 2: 0}
    assert costs.first_bound_ns == 0


def test_what_was_measured_is_expected():
    model = learned(sample(50), sample(80, 2), sample(300, steps=2, first=True))
    assert expected_ms(model) == 50
    assert expected_ms(model, 2) == 80
    assert model.times("s", 2).first_expected_ns == 300 * MS


def test_single_outliers_change_nothing():
    model = learned(*[sample(50)] * 10)
    for _ in range(3):
        model.observe(sample(5000))
        model.observe(sample(5000))
        for _ in range(3):
            assert expected_ms(model) == 50
            model.observe(sample(50))


def test_a_device_that_halves_its_speed_is_believed_after_three_ticks_for_all_kinds():
    model = learned(*[sample(50)] * 10, sample(80, 2), sample(90, steps=2))
    for _ in range(3):
        assert expected_ms(model) == 50
        model.observe(sample(100))
    assert model.speed == 2
    assert expected_ms(model) == 100
    assert expected_ms(model, 2) == 160
    assert expected_ms(model, steps=2) == 180


def test_a_doubted_speed_is_replaced_by_the_next_tick():
    model = learned(*[sample(50)] * 10, *[sample(150)] * 5)
    assert model.speed == 3
    model.doubt()
    assert expected_ms(model) == 50
    for duration in (200, 200):
        model.observe(sample(duration))
        assert expected_ms(model) == duration
    assert model.margin == 1 + LatencyConfig().least_margin
    fast = learned(*[sample(50)] * 10, *[sample(25)] * 5)
    fast.doubt()
    assert expected_ms(fast) == 25


def test_kinds_first_used_on_a_slow_device_keep_their_proportions():
    """The warm-up knows each kind by one tick only; then the device slows down while the kind changes."""
    model = learned(sample(50), *[sample(90, steps=2)] * 20)
    for _ in range(3):
        model.observe(sample(180, steps=2))
    for _ in range(100):
        model.observe(sample(100))
    assert model.speed == pytest.approx(2)
    assert expected_ms(model, steps=2) == pytest.approx(180)
    for _ in range(3):
        model.observe(sample(50))
    assert model.speed == pytest.approx(1)
    assert expected_ms(model, steps=2) == pytest.approx(90)


def test_unseen_kinds_lie_on_the_line_through_the_seen_ones():
    model = learned(sample(30), sample(50, 2), sample(50, steps=2))
    assert expected_ms(model, 4) == pytest.approx(90)  # 10 + 20 for each stream's step
    assert expected_ms(model, 4, 2) == pytest.approx(170)
    assert model.times("s", 2).first_expected_ns == pytest.approx(
        100 * MS
    )  # two passes over two latent frames
    assert expected_ms(model, 1, batch_key="other") == pytest.approx(30)


def test_first_groups_scale_with_their_steps():
    model = learned(sample(200, steps=2, first=True))
    assert model.times("s", 3).first_expected_ns == 300 * MS
    assert expected_ms(model) == 100  # no better guess


@given(st.lists(st.tuples(st.integers(1, 8), st.floats(0.1, 1000)), min_size=1, max_size=8))
def test_fitted_lines_neither_fall_nor_begin_below_zero(points):
    fixed, slope = fit_line(points)
    assert fixed >= 0
    assert slope >= 0
    if len({x for x, _ in points}) == 1:
        assert fixed + slope * points[0][0] == pytest.approx(sum(y for _, y in points) / len(points))


@given(st.floats(0, 100), st.floats(0.1, 100))
def test_fitting_finds_a_line(fixed, slope):
    found = fit_line([(x, fixed + slope * x) for x in (1, 2, 4)])
    assert found == pytest.approx((fixed, slope), abs=1e-6)


def test_the_bound_covers_the_noise_but_not_rare_outliers():
    draw = random.Random(1)
    model = learned(*[sample(50)] * 3)
    for i in range(200):
        model.observe(sample(50 * (1 + draw.gauss(0, 0.05)) * (10 if i % 50 == 0 else 1)))
    assert 1.06 < model.margin < 1.25  # the 95 % quantile of 5 % noise is 8 %
    assert model.times("s", 1).bound_ns[1] == pytest.approx(50 * MS * model.margin, rel=0.05)


def test_a_steady_device_has_the_least_margin():
    model = learned(*[sample(50)] * 100)
    assert model.margin == 1 + LatencyConfig().least_margin


def with_tail(tail_ms: float | None, batch: int = 1, first: bool = False) -> LatencySample:
    tail_ns = None if tail_ms is None else round(tail_ms * MS)
    return LatencySample("s", batch, 1, 50 * MS, first, tail_ns)


def test_ticks_of_one_row_that_nobody_measured_have_the_tail_of_others():
    model = learned(with_tail(20), LatencySample("s", 1, 1, 40 * MS, lone=True))
    times = model.times("s", 1).of_one_row
    assert times.expected_ns[1] == 40 * MS
    assert times.tails_ns[1] == 20 * MS
    model.observe(LatencySample("s", 1, 1, 40 * MS, tail_ns=5 * MS, lone=True))
    assert model.times("s", 1).of_one_row.tails_ns[1] == 5 * MS


def test_tails_are_the_median_of_those_measured_and_nothing_where_none_was():
    model = learned(*(with_tail(tail) for tail in (20, None, 22, 300, None)), with_tail(5, 2))
    costs = model.times("s", 1)
    assert costs.tails_ns == {1: 22 * MS, 2: 5 * MS, 4: 0}
    assert costs.first_tail_ns == 0
    assert costs.tail_bound_ns == pytest.approx(22 * MS * model.margin, rel=1e-6)
    assert model.times("s", 2).tail_bound_ns == model.times("other", 1).tail_bound_ns == 0
    assert model.knows_tails
    assert not learned(sample(50), with_tail(0)).knows_tails


def test_the_longest_tail_is_the_bound_and_all_of_them_follow_the_speed():
    model = learned(*(with_tail(20) for _ in range(3)), with_tail(30, 2), with_tail(40, first=True))
    assert model.times("s", 1).tail_bound_ns == pytest.approx(40 * MS * model.margin, rel=1e-6)
    for _ in range(5):
        model.observe(sample(100))
    assert model.speed == 2
    costs = model.times("s", 1)
    assert (costs.tails_ns[1], costs.tails_ns[2], costs.first_tail_ns) == (40 * MS, 60 * MS, 80 * MS)


@pytest.mark.parametrize(
    ("times_ms", "knee", "best"),
    [
        ((50, 60, 80), 4, 4),
        ((50, 100, 200), 1, 1),
        ((50, 70, 135), 2, 4),  # 4 gives 3.7 % more than 2
        ((50, 70, 150), 2, 2),
    ],
)
def test_the_knee_is_the_last_batch_size_that_pays(times_ms, knee, best):
    costs = learned(*(sample(t, b) for t, b in zip(times_ms, (1, 2, 4), strict=True))).times("s", 1)
    assert (costs.knee, costs.best) == (knee, best)


def test_batches_are_the_largest_allowed_and_shares_follow():
    costs = learned(sample(50), sample(60, 2), sample(80, 4)).times("s", 1)
    assert [costs.size(n, 4) for n in (1, 2, 3, 4, 9)] == [1, 2, 2, 4, 4]
    assert costs.size(4, 2) == 2
    assert [costs.share_ns(n) / MS for n in (1, 2, 3, 4, 8)] == pytest.approx([50, 30, 110 / 3, 20, 20])
    assert [costs.least_ns(n) / MS for n in (1, 2, 3, 4, 6)] == pytest.approx([50, 30, 30, 20, 20])
