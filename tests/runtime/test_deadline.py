"""What an idle device does next, worked out by hand. Times are in ms; a tick takes 40 + 20 for each stream's step."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Hashable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svd2_jax.errors import ConfigError
from svd2_jax.rows import InFlight, Rows
from svd2_jax.runtime.deadline import (
    Decision,
    Job,
    Moment,
    PolicyConfig,
    ScheduledStream,
    edf_schedule,
    evenly,
)
from svd2_jax.runtime.ingest import SourceClock
from svd2_jax.runtime.latency import LatencyConfig, LatencyModel, LatencySample, TickTimes
from svd2_jax.runtime.pacing import Playout
from svd2_jax.runtime.types import MS, NEVER_NS, Fate, FrameRecord, StreamSettings, TickEntry

SIZES = (1, 2, 4)
ROOMY, BUSY = 1e6, 0.0  # `push_below`


@functools.cache
def times_of(batch_key: Hashable, steps: int, sizes: tuple[int, ...] = SIZES) -> TickTimes:
    model = LatencyModel(sizes, LatencyConfig(least_margin=0))
    for size in sizes:
        model.observe(LatencySample(batch_key, size, steps, (40 + 20 * size * steps) * MS))
    model.observe(LatencySample(batch_key, 1, steps, 100 * steps * MS, True))
    return model.times(batch_key, steps)


def frame(number: int, deadline_ms: float) -> FrameRecord:
    return FrameRecord(0, number, None, 0, round(deadline_ms * MS), Fate.DROPPED)


def stream(
    number: int = 0, queue=(), flight=(), steps: int = 2, batch_key="s", came=0.0, served=0.0, **changes
) -> ScheduledStream:
    """A stream with chunks of 4 every 200 ms, whose newest frame came at `came`.

    `queue` has deadlines, `flight` deadlines and ticks that are left, all in ms.
    """
    chunks = tuple(InFlight([frame(0, deadline)], steps, steps - left) for deadline, left in flight)
    return ScheduledStream(
        **{
            "id": number,
            "settings": StreamSettings(20, 5000, steps, batch_key=batch_key),
            "steps": steps,
            "clock": SourceClock(50 * MS, arrival_ns=round(came * MS)),
            "playout": Playout(0),
            "rows": Rows(steps, 1, chunks),
            "served_ns": round(served * MS),
            "queue": deque(frame(i, deadline) for i, deadline in enumerate(queue)),
            "started": True,
            **changes,
        }
    )


def decided(
    *streams: ScheduledStream, now: float = 0, push_below=BUSY, overloaded: bool = False, sizes=SIZES
) -> Decision:
    config = PolicyConfig(guard_ms=0, push_below=push_below)
    costs = functools.partial(times_of, sizes=sizes)
    return Moment(round(now * MS), streams, costs, config, overloaded).decide()


def entering(decision: Decision) -> list[tuple[int, tuple[int, ...]]]:
    """Streams of the tick that is run, and the numbers of their frames that enter."""
    return [(part.stream, part.frames) for part in decision.entries]


def test_a_whole_chunk_enters_at_once():
    decision = decided(stream(queue=(600, 650, 700, 750)))
    assert decision == Decision({}, (TickEntry(0, (0, 1, 2, 3), 0, 2),), None)


def test_part_of_a_chunk_waits_until_its_oldest_frame_must_go():
    """Two ticks of 80 ms end at 600 if they begin at 440."""
    waiting = stream(queue=(600, 650), came=400)
    assert decided(waiting) == Decision({}, (), 440 * MS)
    assert decided(waiting, now=440).entries == (TickEntry(0, (0, 1), 2, 2),)


def test_part_of_a_chunk_enters_when_nothing_more_comes():
    assert entering(decided(stream(queue=(600,), ended=True))) == [(0, (0,))]


def test_part_of_a_chunk_enters_when_its_source_stalls_and_the_device_is_free():
    """Two intervals of 50 ms."""
    stalled, other = stream(0, queue=(2000,)), stream(1, queue=(2500,) * 4)
    assert decided(stalled) == Decision({}, (), 100 * MS)
    assert entering(decided(stalled, now=100)) == [(0, (0,))]
    assert entering(decided(stalled, other, now=100, sizes=(1,))) == [(1, (0, 1, 2, 3))]
    assert decided(stalled, now=100, overloaded=True) == Decision({}, (), 1840 * MS)


@pytest.mark.parametrize("overloaded", [False, True])
def test_part_of_a_chunk_enters_a_tick_early_where_the_device_could_be_busy(overloaded):
    """Two ticks for the frame, and one of 80 ms that may run when its time has come."""
    for others in ([stream(1)], []):
        flight = () if others else ((2000, 1),)
        for deadline, enters in ((240, True), (241, False)):
            waiting = stream(flight=flight, queue=(deadline,))
            decision = decided(waiting, *others, sizes=(1,), overloaded=overloaded)
            assert (entering(decision) == [(0, (0,))]) == enters


def test_a_frame_that_has_expired_holds_up_no_push():
    decision = decided(stream(flight=((2000, 1),), queue=(159,)))
    assert decision == Decision({0: 1}, (TickEntry(0, (), 0, 2),), None)


def test_frames_that_cannot_be_in_time_are_dropped():
    """From now two ticks take until 160."""
    assert decided(stream(queue=(100, 159, 160, 200, 250))).expired == {0: 2}
    assert entering(decided(stream(queue=(100, 159, 160, 200, 250, 300)))) == [(0, (2, 3, 4, 5))]


@pytest.mark.parametrize(("push_below", "near"), [(BUSY, 80), (ROOMY, 40)])
def test_a_chunk_in_flight_is_pushed_on_unless_another_one_is_due_soon(push_below, near):
    """A tick takes 80 ms. A busy device holds up nobody for a push, one with room for up to half a tick."""
    decided_ = functools.partial(decided, push_below=push_below)
    pushed = stream(flight=((900, 1),), came=near - 200)
    assert entering(decided_(pushed)) == [(0, ())]
    waits = stream(flight=((900, 1),), came=near - 201)
    assert decided_(waits) == Decision({}, (), (2 * near - 1) * MS)
    other = stream(1, came=near - 201)
    assert decided_(pushed, other) == Decision({}, (), (2 * near - 1) * MS)
    assert entering(decided_(waits, now=2 * near - 1)) == [(0, ())]  # it did not come


def test_a_device_has_room_where_pushing_every_chunk_on_takes_no_more_than_its_share():
    """Two ticks of 80 ms for each chunk of 200 ms."""
    soon = stream(flight=((900, 1),), came=-150)
    assert entering(decided(soon, push_below=0.8)) == [(0, ())]
    assert not entering(decided(soon, push_below=0.79))


def test_a_chunk_in_flight_does_not_wait_for_one_that_is_due_soon_if_it_would_be_late():
    assert decided(stream(flight=((160, 1),), came=-160)) == Decision({}, (), 80 * MS)
    for came in (-160, -121):
        assert entering(decided(stream(flight=((160, 1),), came=came), now=80)) == [(0, ())]


def test_a_chunk_in_flight_is_pushed_on_at_once_when_the_source_stalls_or_ends():
    assert entering(decided(stream(flight=((2000, 1),), came=-280))) == [(0, ())]
    assert entering(decided(stream(flight=((2000, 1),), came=-190, ended=True))) == [(0, ())]


def test_a_late_chunk_under_way_is_pushed_on_first():
    late, fresh = stream(0, flight=((-50, 1),)), stream(1, queue=(900,) * 4, steps=1)
    assert entering(decided(late, fresh)) == [(0, ())]


def test_the_most_urgent_goes_first():
    """Different steps cannot share a tick."""
    far, near = stream(0, queue=(900,) * 4), stream(1, queue=(800,) * 4, steps=1)
    assert entering(decided(far, near)) == [(0, (0, 1, 2, 3))]  # 900 - 160 and 800 - 60
    nearer = stream(1, queue=(799,) * 4, steps=1)
    assert entering(decided(far, nearer)) == [(1, (0, 1, 2, 3))]


@pytest.mark.parametrize(("ready", "taken"), [(1, 1), (2, 2), (3, 2), (4, 4), (5, 4)])
def test_streams_alike_share_a_tick_in_allowed_sizes(ready, taken):
    parts = decided(*(stream(i, queue=(900 + i,) * 4) for i in range(ready))).entries
    assert [part.stream for part in parts] == list(range(taken))


def test_a_batch_is_no_larger_than_deadlines_allow():
    """Alone a chunk takes 60 ms, in company of one 80, of three 120."""
    others = [stream(i, queue=(900,) * 4, steps=1) for i in (1, 2, 3)]
    for deadline, size in ((100, 2), (60, 1)):
        assert len(decided(stream(0, queue=(deadline,) * 4, steps=1), *others).entries) == size


@pytest.mark.parametrize(("deadline", "goes"), [(220, 2), (219, 0)])
def test_nothing_enters_at_the_cost_of_what_is_under_way(deadline, goes):
    """The new chunk is the most urgent. It takes 60 ms, and the two under way, of different shapes, 80 each."""
    under_way = stream(0, flight=((150, 1),)), stream(1, flight=((deadline, 1),), batch_key="t")
    assert decided(*under_way, stream(2, queue=(129,) * 4, steps=1)).entries[0].stream == goes


def test_a_first_group_has_its_tick_for_itself():
    first = stream(0, queue=(900,) * 5, started=False)
    decision = decided(first, stream(1, queue=(900,) * 4))
    assert decision.entries == (TickEntry(0, (0, 1, 2, 3, 4), 0, 2, True),)


def test_a_backlog_is_taken_oldest_first():
    assert entering(decided(stream(queue=(*range(600, 1000, 50),)))) == [(0, (0, 1, 2, 3))]


def test_under_overload_the_newest_frames_evenly_spaced_are_taken():
    decision = decided(stream(queue=(*range(600, 1000, 50),)), overloaded=True)
    assert decision == Decision({}, (TickEntry(0, (1, 3, 5, 7), 0, 2),), None)


def test_under_overload_frames_that_would_need_ticks_of_their_own_are_not_taken():
    """A chunk of two steps is ready with the stream's next turn, at 160; the first four frames are too old for that."""
    old = stream(queue=(160, 160, 160, 160, 700, 750, 800, 850))
    assert entering(decided(old, overloaded=True)) == [(0, (1, 3, 5, 7))]
    decision = decided(old, stream(1, queue=(900,) * 4), overloaded=True, sizes=(1,))
    assert entering(decision) == [(0, (4, 5, 6, 7))]


def test_under_overload_the_stream_that_waited_longest_goes_first():
    urgent, waiting = stream(0, queue=(300,) * 4, served=-100), stream(1, queue=(900,) * 4, served=-300)
    assert decided(urgent, waiting, overloaded=True, sizes=(1,)).entries[0].stream == 1
    assert decided(urgent, waiting, sizes=(1,)).entries[0].stream == 0


def test_nothing_to_do_is_nothing_to_wait_for():
    assert decided() == Decision({}, (), None)


def test_the_most_urgent_goes_first_and_the_slack_is_told():
    saved = edf_schedule({i: Job(("s", 2), ((300 * MS - i, 1),)) for i in range(3)}, 0, times_of)
    assert saved.first == (2, 1)
    assert saved.slack_ns == 300 * MS - (120 + 80) * MS
    assert edf_schedule({}, 0, times_of).slack_ns == NEVER_NS


def test_the_slack_is_negative_when_a_chunk_is_late():
    saved = edf_schedule({7: Job(("s", 2), ((70 * MS, 1), (500 * MS, 2)))}, 0, times_of)
    assert saved.slack_ns == -10 * MS


GROUPS = ("s", 1), ("s", 2), ("t", 2)
JOBS = st.lists(
    st.tuples(
        st.sampled_from(GROUPS),
        st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 3)), min_size=1, max_size=3),
    ),
    max_size=6,
).map(
    lambda drawn: {
        i: Job(
            group,
            tuple(
                (deadline * MS, left)
                for deadline, left in zip(
                    sorted(d for d, _ in chunks),
                    (1 + i + k for i, k in enumerate(sorted(k for _, k in chunks))),
                    strict=True,
                )
            ),
        )
        for i, (group, chunks) in enumerate(drawn)
    }
)


@given(JOBS, st.integers(0, 500))
def test_a_later_start_leaves_so_much_less_slack(jobs, later):
    now, then = edf_schedule(jobs, 0, times_of), edf_schedule(jobs, later * MS, times_of)
    assert then.first == now.first
    if jobs and now.slack_ns >= later * MS:
        assert now.slack_ns - then.slack_ns == later * MS
    elif jobs:
        assert then.slack_ns < 0


@given(JOBS)
def test_a_schedule_goes_on_as_it_began(jobs):
    """After its first tick the rest has the same time to spare: whoever follows it keeps its promise."""
    saved = edf_schedule(jobs, 0, times_of)
    if not jobs:
        return
    end = times_of(*jobs[saved.first[0]].group).bound_ns[len(saved.first)]
    rest, spare = {}, NEVER_NS
    for stream, job in jobs.items():
        ticked = [(d, left - (stream in saved.first)) for d, left in job.flight]
        spare = min([spare, *(d - end for d, left in ticked if left == 0)])
        if flight := tuple((d, left) for d, left in ticked if left):
            rest[stream] = Job(job.group, flight)
    after = min(spare, edf_schedule(rest, end, times_of).slack_ns)
    assert after == saved.slack_ns if saved.slack_ns >= 0 else after < 0


@given(st.integers(1, 40), st.integers(1, 40))
def test_evenly_spaced_frames_end_with_the_last(length, count):
    count = min(count, length)
    positions = [f.number for f in evenly([frame(i, 0) for i in range(length)], count)]
    gaps = {b - a for a, b in itertools.pairwise((-1, *positions))}
    assert positions[-1] == length - 1
    assert len(positions) == count
    assert max(gaps) - min(gaps) <= 1


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match=r"expected 0 < restore_below <= degrade_above, got 0.9 and 0.8"):
        PolicyConfig(degrade_above=0.8, restore_below=0.9)
    with pytest.raises(ConfigError, match="guard_ms must be at least 0, got -1"):
        PolicyConfig(guard_ms=-1)
