"""The simulated device: when ticks end, and which chunks they finish, worked out by hand."""

import dataclasses

import pytest

from svd2_jax.runtime.work import MS, SECOND, Part, StreamSettings, Tick
from svd2_jax.simulate.device import SimulatedDevice
from svd2_jax.simulate.trace import DeviceTrace

EXACT = DeviceTrace(fixed_ms=100, row_ms=10, knee_rows=0, noise=0)
SETTINGS = StreamSettings(rate_hz=10, budget_ms=500, steps=4)


def device(trace: DeviceTrace = EXACT, **settings) -> SimulatedDevice:
    made = SimulatedDevice(trace, seed=0)
    made.open(0, dataclasses.replace(SETTINGS, **settings))
    return made


def run(made: SimulatedDevice, *chunk: int, steps: int, first: bool = False) -> list[tuple[int, ...]]:
    """Runs a tick of stream 0 with these frames and returns the chunks that it finishes."""
    made.start(Tick(0, (Part(0, chunk, 0, steps, first),), 0), 0)
    return made.finish()[0]


def ends_ms(trace: DeviceTrace, start_ms: int, batch: int = 1, steps: int = 1) -> float:
    made = SimulatedDevice(trace, seed=0)
    for stream in range(batch):
        made.open(stream, SETTINGS)
    made.start(Tick(0, tuple(Part(s, (0,), 0, steps) for s in range(batch)), 0), start_ms * MS)
    assert made.done_ns is not None
    return made.done_ns / MS


def test_a_chunk_is_finished_by_the_tick_that_is_its_last_step():
    made = device()
    assert [run(made, n, steps=3) for n in range(5)] == [[], [], [(0,)], [(1,)], [(2,)]]
    assert made.under_way(0) == 2


def test_a_tick_without_a_chunk_moves_on_what_is_under_way():
    made = device()
    assert [run(made, *chunk, steps=3) for chunk in ((0,), (), (), ())] == [[], [], [(0,)], []]


def test_a_chunk_passes_every_stage_once_for_each_step():
    made = device(stages=3)
    assert [run(made, n, steps=2) for n in range(7)] == [[], [], [], [], [], [(0,)], [(1,)]]


def test_fewer_steps_let_out_what_has_taken_as_many():
    made = device()
    for n in range(3):
        run(made, n, steps=4)  # now in rows 2, 1 and 0
    # Of two steps: 0 and 1 had them already, 2 takes its second one now, and 3 its first.
    assert run(made, 3, steps=2) == [(0,), (1,), (2,)]
    assert run(made, 4, steps=2) == [(3,)]


def test_more_steps_hold_back_everything_for_as_many_ticks():
    made = device()
    assert [run(made, n, steps=2) for n in range(3)] == [[], [(0,)], [(1,)]]
    assert [run(made, n, steps=4) for n in range(3, 7)] == [[], [], [(2,)], [(3,)]]


def test_a_first_group_takes_all_its_steps_in_one_tick():
    made = device()
    made.start(Tick(0, (Part(0, (0, 1, 2, 3, 4), 0, 3, first=True),), 0), 0)
    assert made.done_ns == 3 * (100 + 2 * 10) * MS  # two rows, three passes
    assert made.finish() == {0: [(0, 1, 2, 3, 4)]}
    assert made.under_way(0) == 0


def test_every_row_of_a_tick_costs_time():
    assert [ends_ms(EXACT, 0, b, s) for b, s in ((1, 1), (1, 3), (2, 3))] == [110, 130, 160]


def test_a_change_of_speed_holds_for_what_is_left_of_the_tick():
    trace = dataclasses.replace(EXACT, row_ms=0, speed=((1.0, 0.5), (2.0, 1.0)))
    assert ends_ms(trace, 0) == 100
    assert ends_ms(trace, 950) == 1100  # 50 ms at full and 50 at half speed
    assert ends_ms(trace, 1500) == 1700
    assert ends_ms(trace, 1900) == 2050
    assert ends_ms(trace, 2000) == 2100
    crawling = dataclasses.replace(trace, speed=((1.0, 0.05), (2.0, 1.0)))
    assert ends_ms(crawling, 950) == 2000  # 50, then 50 in a whole second


def test_noise_and_outliers_come_as_often_and_as_large_as_asked_for():
    trace = dataclasses.replace(EXACT, row_ms=0, noise=0.02, outlier_share=0.1, outlier_factor=5)
    made = device(trace)
    times = [made.sample_ms(SETTINGS, 1, 1, False) for _ in range(2000)]
    outliers = [t for t in times if t > 300]
    assert len(outliers) / 2000 == pytest.approx(0.1, abs=0.03)
    usual = [t for t in times if t <= 300]
    assert sum(usual) / len(usual) == pytest.approx(100, rel=0.01)
    assert max(usual) < 110


def test_one_tick_runs_at_a_time():
    made = device()
    made.start(Tick(0, (Part(0, (0,)),), 0), SECOND)
    with pytest.raises(AssertionError, match="runs already"):
        made.start(Tick(1, (Part(0, (1,)),), 0), SECOND)
