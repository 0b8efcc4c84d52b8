"""The simulated device: when ticks end, which chunks they finish, and what no policy can have it do."""

import copy
import dataclasses
import itertools

import pytest

from svd2_jax.runtime.types import MS, SECOND, StreamSettings, Tick, TickEntry
from svd2_jax.simulate.device import SimulatedDevice
from svd2_jax.simulate.trace import DeviceTrace, StreamTrace, earliest_ns

EXACT = DeviceTrace(fixed_ms=100, row_ms=10, knee_rows=0, noise=0)
SETTINGS = StreamSettings(rate_hz=10, budget_ms=500, steps=4)


def device(trace: DeviceTrace = EXACT, **settings) -> SimulatedDevice:
    made = SimulatedDevice(trace, seed=0)
    made.open(0, dataclasses.replace(SETTINGS, **settings))
    return made


def run(made: SimulatedDevice, *chunk: int, steps: int, first: bool = False) -> list[tuple[int, ...]]:
    """Runs a tick of stream 0 with these frames and returns the chunks that it finishes."""
    made.start(Tick(0, (TickEntry(0, chunk, 0, steps, first),), 0), 0)
    made.pass_on()
    return made.finish()[0]


def ends_ms(trace: DeviceTrace, start_ms: int, batch: int = 1, steps: int = 1) -> float:
    made = SimulatedDevice(trace, seed=0)
    for stream in range(batch):
        made.open(stream, SETTINGS)
    made.start(Tick(0, tuple(TickEntry(s, (0,), 0, steps) for s in range(batch)), 0), start_ms * MS)
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
    made.start(Tick(0, (TickEntry(0, (0, 1, 2, 3, 4), 0, 3, first=True),), 0), 0)
    assert made.done_ns == 3 * (100 + 2 * 10) * MS  # two rows, three passes
    made.pass_on()
    assert made.finish() == {0: [(0, 1, 2, 3, 4)]}
    assert made.under_way(0) == 0


def test_every_row_of_a_tick_costs_time():
    assert [device(EXACT).sample_ms(SETTINGS, b, s, False) for b, s in ((1, 1), (1, 3), (2, 3))] == [
        110,
        130,
        160,
    ]


def test_a_tick_of_chunks_in_one_row_each_takes_as_long_as_with_one_step():
    assert [ends_ms(EXACT, 0, b, s) for b, s in ((1, 1), (1, 3), (2, 3))] == [110, 110, 120]


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


def test_frames_are_finished_behind_the_stages_while_the_next_tick_runs():
    made = device(dataclasses.replace(EXACT, row_ms=0, tail_ms=40, speed=((0.1, 0.5),)), steps=1)
    made.start(Tick(0, (TickEntry(0, (0,)),), 0), 0)
    assert (made.free_ns, made.done_ns) == (100 * MS, 180 * MS)  # the tail at half the speed
    made.pass_on()
    assert made.under_way(0) == 0
    assert (made.free_ns, made.done_ns) == (None, 180 * MS)
    made.start(Tick(1, (TickEntry(0, (1,)),), 0), 100 * MS)
    assert (made.free_ns, made.done_ns) == (300 * MS, 180 * MS)
    assert made.finish() == {0: [(0,)]}
    assert made.done_ns == 380 * MS
    made.pass_on()
    made.start(Tick(2, (TickEntry(0, (2,)),), 0), 300 * MS)
    made.pass_on()
    with pytest.raises(AssertionError, match="two ticks are in flight"):
        made.start(Tick(3, (TickEntry(0, (3,)),), 0), 350 * MS)
    assert made.busy_ns == 500 * MS


def test_one_tick_runs_at_a_time():
    made = device()
    made.start(Tick(0, (TickEntry(0, (0,)),), 0), SECOND)
    with pytest.raises(AssertionError, match="runs already"):
        made.start(Tick(1, (TickEntry(0, (1,)),), 0), SECOND)


# --- frames that no policy can show in time


def alone_ms(device_trace: DeviceTrace, at_ms: int, **settings) -> float:
    source = StreamTrace(**{"rate_hz": 10, "budget_ms": 500, "steps": 2, **settings})
    return earliest_ns(device_trace, source, at_ms * MS) / MS


def test_no_frame_is_finished_before_its_ticks_would_be_on_an_empty_device():
    exact = DeviceTrace(fixed_ms=100, row_ms=10, knee_rows=0, noise=0, speed=((1.0, 0.5), (2.0, 1.0)))
    assert alone_ms(exact, 0) == 110  # one step, one row
    assert alone_ms(exact, 0, min_steps=2) == 220  # two ticks of one row
    assert alone_ms(exact, 0, min_steps=2, stages=3) == 660
    assert alone_ms(exact, 945) == 1055 + 55  # half of it at half the speed
    assert alone_ms(exact, 1890) == 2000 + 55
    tailed = dataclasses.replace(exact, tail_ms=40)
    assert alone_ms(tailed, 0) == 150
    lucky = dataclasses.replace(exact, noise=0.1)  # four times a tenth faster at most
    assert alone_ms(lucky, 0) == pytest.approx(66)


def in_time(trace: DeviceTrace, source: StreamTrace, arrivals_ms: list[int]) -> set[int]:
    """Returns every frame that any sequence of ticks finishes by its deadline, found by trying all of them.

    A policy may wait for any frame, take any of those that are there, leave others out, and take any steps; to start at
    another time than that of an arrival or of a tick's end gains nothing.
    """
    settings = source.settings()
    arrival_ns = [ms * MS for ms in arrivals_ms]
    found: set[int] = set()

    def go(device: SimulatedDevice, now_ns: int, entered: int, begun: bool) -> None:
        if now_ns > arrival_ns[-1] + settings.budget_ns or len(found) == len(arrival_ns):
            return
        if later := [at for at in arrival_ns if at > now_ns]:
            go(device, later[0], entered, begun)
        there = [i for i, at in enumerate(arrival_ns) if at <= now_ns and i > entered]
        need = settings.chunk_frames if begun else settings.first_frames
        sizes = range(0 if device.under_way(0) else 1, need + 1)
        chunks = [chunk for size in sizes for chunk in itertools.combinations(there, size)]
        for chunk, steps in itertools.product(chunks, range(settings.min_steps, settings.steps + 1)):
            after = copy.deepcopy(device)
            fill = need - len(chunk) if chunk else 0
            after.start(Tick(0, (TickEntry(0, chunk, fill, steps, first=not begun),), 0), now_ns)
            end_ns = after.done_ns
            assert end_ns is not None
            after.pass_on()
            done = [i for frames in after.finish()[0] for i in frames]
            found.update(i for i in done if end_ns <= arrival_ns[i] + settings.budget_ns)
            go(after, end_ns, max((entered, *chunk)), True)

    start = SimulatedDevice(trace, seed=0)
    start.open(0, settings)
    go(start, arrival_ns[0], -1, False)
    return found


@pytest.mark.parametrize("speed", [((0.25, 0.5), (0.6, 1.0)), ((0.15, 0.25), (0.42, 1.0)), ((0.0, 0.45),)])
@pytest.mark.parametrize(("min_steps", "stages", "first_frames"), [(1, 1, 2), (2, 1, 2), (1, 2, 3)])
@pytest.mark.parametrize("budget_ms", [130, 210, 260])
def test_no_sequence_of_ticks_whatever_shows_a_frame_that_is_held_to_be_impossible(
    speed, min_steps, stages, first_frames, budget_ms
):
    trace = DeviceTrace(fixed_ms=80, row_ms=20, knee_rows=1, noise=0, speed=speed)
    source = StreamTrace(
        rate_hz=10, budget_ms=budget_ms, steps=2, min_steps=min_steps, stages=stages,
        first_frames=first_frames, chunk_frames=2,
    )  # fmt: skip
    arrivals_ms = [0, 100, 230, 380]
    possible = {
        i for i, ms in enumerate(arrivals_ms) if earliest_ns(trace, source, ms * MS) <= (ms + budget_ms) * MS
    }
    shown = in_time(trace, source, arrivals_ms)
    assert shown <= possible
    if first_frames == source.chunk_frames:  # else a first group's second row may be what makes it late
        assert shown == possible
