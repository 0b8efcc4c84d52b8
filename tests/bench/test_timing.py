"""Samples are taken in turn, and the ones of the warm-up are not kept."""

import pytest

from svd2_jax.bench.timing import Sample, Spread, in_turn, timed


def test_sides_take_turns_and_the_warm_up_is_not_kept():
    calls, rounds = [], []

    def side(name):
        def sample():
            calls.append(name)
            return Sample(0.0, float(len(calls)))

        return sample

    ours, theirs = in_turn(
        [side("a"), side("b")], repeats=2, warm_up=1, progress=lambda: rounds.append(len(calls))
    )
    assert "".join(calls) == "ababab"
    assert [s.total_s for s in ours] == [3.0, 5.0]
    assert [s.total_s for s in theirs] == [4.0, 6.0]
    assert rounds == [2, 4, 6]


def test_what_a_call_returns_is_waited_for():
    waited = []
    sample = timed(lambda: "result", waited.append)
    assert waited == ["result"]
    assert 0 <= sample.handed_s <= sample.total_s


def test_a_spread_holds_the_median_and_both_ends():
    assert Spread.of([3.0, 1.0, 8.0]) == Spread(3.0, 1.0, 8.0)
    with pytest.raises(ValueError, match="no median"):
        Spread.of([])
