"""First in first out and the reference's automatic mode, against runs worked out by hand."""

from collections import Counter

import pytest

from svd2_jax.runtime.types import MS, Fate, FrameRecord, Reason
from svd2_jax.simulate.baselines import Bounded, Fifo, ReferencePolicy
from svd2_jax.simulate.simulator import SimulationResult, simulate
from svd2_jax.simulate.trace import DeviceTrace, StreamTrace, Trace

EXACT = DeviceTrace(fixed_ms=100, row_ms=0, noise=0)  # every tick 100 ms, a first group of two steps 200 ms


def run(policy, duration_s: float = 1.3, device: DeviceTrace = EXACT, **settings) -> SimulationResult:
    source = StreamTrace(**{"rate_hz": 10, "budget_ms": 600, "delay_ms": 0, **settings})
    return simulate(Trace("t", "", duration_s, device, (source,)), "p", policy)


def latencies_ms(outcome: SimulationResult) -> list[float | None]:
    frames = sorted(outcome.frames, key=lambda f: f.number)
    return [None if f.shown_ns is None else (f.shown_ns - f.arrival_ns) / MS for f in frames]


def starts_ms(outcome: SimulationResult) -> list[float]:
    return [t.started_ns / MS for t in outcome.ticks]


def reasons(outcome: SimulationResult) -> Counter:
    return Counter(f.reason for f in outcome.frames)


def test_first_in_first_out_by_hand():
    # Frames 0 to 4 are there at 400 and done at 600. 5 to 8 enter at 800 and come out with the tick at 1200, in which
    # 9 to 12 enter; the source ends at 1300, and one more tick pushes those out.
    outcome = run(Fifo)
    assert starts_ms(outcome) == [400, 800, 1200, 1300]
    assert latencies_ms(outcome) == [600, 500, 400, 300, 200, 800, 700, 600, 500, 500, 400, 300, 200]
    assert [f.number for f in outcome.frames if f.fate is Fate.LATE] == [5, 6]  # 600 is just in time
    assert all(f.steps == 2 for f in outcome.frames)
    assert outcome.busy_s == pytest.approx(0.5)
    assert outcome.ended_s == pytest.approx(1.4)


def test_first_in_first_out_fills_up_the_last_chunk():
    outcome = run(Fifo, duration_s=0.7)  # 7 frames: a first group, and two more when the source ends
    assert [t.tick.entries[0].fill for t in outcome.ticks] == [0, 2, 0]
    assert latencies_ms(outcome)[5:] == [400, 300]  # 700 to 800, and on to 900


def test_first_in_first_out_queues_without_bound_and_drops_nothing():
    # A chunk of 4 every 40 ms, a tick takes 100: the wait grows by 60 ms with every chunk.
    outcome = run(Fifo, duration_s=10, rate_hz=100)
    assert all(f.fate is not Fate.DROPPED for f in outcome.frames)
    waits = [w for w in latencies_ms(outcome) if w is not None]
    assert len(waits) == 1000
    assert waits[-1] == pytest.approx(1000 / 4 * 60, rel=0.02)


def test_first_in_first_out_serves_several_streams_in_the_order_of_their_chunks():
    source = StreamTrace(rate_hz=10, budget_ms=600, delay_ms=0, count=2, stagger_s=0.15)
    outcome = simulate(Trace("t", "", 1.3, EXACT, (source,)), "p", Fifo)
    assert [(t.started_ns // MS, t.tick.entries[0].stream) for t in outcome.ticks][:4] == [
        (400, 0), (600, 1), (800, 0), (950, 1),
    ]  # fmt: skip


def test_a_closed_stream_takes_what_is_not_shown_with_it():
    outcome = run(Fifo, leaves="closes")
    assert latencies_ms(outcome)[9:] == [None] * 4
    assert reasons(outcome)[Reason.CLOSED] == 4


def test_the_reference_batches_what_has_waited_less_than_half_a_second():
    # The same as first in first out while frames come at 10 Hz, as 800 and 1200 are multiples of 100 behind the last
    # tick. What is in the rows when the source ends stays there.
    outcome = run(ReferencePolicy)
    assert starts_ms(outcome) == [400, 800, 1200]
    assert latencies_ms(outcome) == [600, 500, 400, 300, 200, 800, 700, 600, 500, None, None, None, None]
    assert reasons(outcome) == {None: 9, Reason.CLOSED: 4}


def test_the_reference_looks_every_tenth_of_a_second():
    # With a delay of 30 ms chunks are there at 430 and 830; the worker looks at 500 and, free at 700, at 900.
    assert starts_ms(run(ReferencePolicy, delay_ms=30))[:2] == [500, 900]


def test_the_reference_takes_all_steps_at_once_for_what_has_waited_half_a_second():
    # At 5 Hz the oldest frame of a chunk is 600 ms old: each takes its two steps in one go, 200 ms.
    outcome = run(ReferencePolicy, duration_s=2.6, rate_hz=5)
    assert starts_ms(outcome) == [800, 1600, 2400]
    assert latencies_ms(outcome) == [1000, 800, 600, 400, 200, 800, 600, 400, 200, 800, 600, 400, 200]
    assert all(t.done_ns - t.started_ns == 200 * MS for t in outcome.ticks)


def test_the_reference_loses_what_is_in_its_rows_when_it_leaves_the_batch():
    # 5 to 8 enter at 800; then the camera stops for a second, so that 9 to 12 have waited when they are whole.
    outcome = run(ReferencePolicy, duration_s=2.6, stalls=((1.05, 1.0),))
    assert [f.number for f in outcome.frames if f.reason is Reason.OVERLOAD] == [5, 6, 7, 8]
    sequential = [t.tick.entries[0].frames for t in outcome.ticks if t.tick.first]
    assert sequential == [(0, 1, 2, 3, 4), (9, 10, 11, 12)]


def test_the_reference_always_batches_on_a_pipeline():
    outcome = run(ReferencePolicy, duration_s=2.6, rate_hz=5, stages=2)
    assert [t.tick.first for t in outcome.ticks] == [True, False, False]
    assert reasons(outcome) == {None: 5, Reason.CLOSED: 8}


def test_the_reference_serves_streams_in_turn():
    source = StreamTrace(rate_hz=100, budget_ms=600, delay_ms=0, count=3)
    outcome = simulate(Trace("t", "", 2, EXACT, (source,)), "p", ReferencePolicy)
    turns = [t.tick.entries[0].stream for t in outcome.ticks]
    assert turns[:9] == [0, 1, 2] * 3


def test_the_bounded_baseline_pushes_chunks_on_at_once():
    # As first in first out, but 5 to 8 enter at 800 and come out with the push at 900, done at 1000.
    outcome = run(Bounded)
    assert starts_ms(outcome) == [400, 800, 900, 1200, 1300]
    assert latencies_ms(outcome) == [600, 500, 400, 300, 200, 500, 400, 300, 200, 500, 400, 300, 200]


def test_the_bounded_baseline_queues_two_chunks_at_most_and_drops_the_oldest_frames():
    # A chunk of 4 every 40 ms, a chunk takes two ticks of 100.
    outcome = run(Bounded, duration_s=10, rate_hz=100)
    assert max(tick.queued for tick in outcome.ticks) <= 10
    assert reasons(outcome)[Reason.OVERLOAD] > 400
    assert max(w for w in latencies_ms(outcome) if w is not None) < 600


def test_the_bounded_baseline_drops_what_could_not_be_in_time():
    outcome = run(Bounded, duration_s=10, budget_ms=450)  # 300 ms to fill and two ticks of 100
    assert reasons(outcome)[Reason.EXPIRED] > 10
    assert not any(f.fate is Fate.LATE for f in outcome.frames if f.number >= 5)


@pytest.mark.parametrize("policy", [Fifo, Bounded, ReferencePolicy])
def test_every_frame_is_accounted_for_once(policy):
    outcome = run(policy, duration_s=20, rate_hz=37, jitter_ms=20, reorder=True, duplicate_share=0.1)
    frames = [e for e in outcome.events if isinstance(e, FrameRecord)]
    assert sorted(f.number for f in frames) == list(range(len(frames)))
