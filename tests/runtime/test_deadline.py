"""What an idle device does next, worked out by hand. Times are in ms; a tick takes 40 + 20 for each stream's step."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svd2_jax.errors import ConfigError
from svd2_jax.runtime.deadline import (
    NEVER_NS,
    Choice,
    Decision,
    Drop,
    Flight,
    Group,
    Job,
    Load,
    PolicyConfig,
    View,
    decide,
    evenly,
    rescue,
)
from svd2_jax.runtime.latency import Costs, LatencyConfig, LatencyModel, LatencySample
from svd2_jax.runtime.work import MS, Reason

CONFIG = PolicyConfig(guard_ms=0)


def costs(*groups: Group, sizes=(1, 2, 4)) -> dict[Group, Costs]:
    model = LatencyModel(sizes, LatencyConfig(least_margin=0))
    for group in groups:
        for size in sizes:
            took = (40 + 20 * size * group.steps) * MS
            model.observe(LatencySample(group.shape, size, group.steps, took))
        model.observe(LatencySample(group.shape, 1, group.steps, 100 * group.steps * MS, True))
    return {group: model.costs(*group) for group in groups}


def view(stream: int = 0, queue=(), flight=(), steps: int = 2, **changes) -> View:
    """A stream with chunks of 4 every 200 ms; all times in ms."""
    times = {"next_ns": 200, "overdue_ns": 400, "period_ns": 200, "served_ns": 0}
    times = {name: round(changes.pop(name, value) * MS) for name, value in times.items()}
    standard = {"group": Group("s", steps), "need": 4, "first": False, "ticks": steps, "ended": False}
    return View(
        stream=stream,
        queue=tuple(round(deadline * MS) for deadline in queue),
        flight=tuple(Flight(round(deadline * MS), left) for deadline, left in flight),
        **{**standard, **changes},
        **times,
    )


def decided(*views: View, now: float = 0, load: Load = Load.BUSY, sizes=(1, 2, 4)) -> Decision:
    return decide(round(now * MS), views, costs(*{v.group for v in views}, sizes=sizes), CONFIG, load)


def test_a_whole_chunk_enters_at_once():
    assert decided(view(queue=(600, 650, 700, 750))) == Decision((), (Choice(0, (0, 1, 2, 3)),), None)


def test_part_of_a_chunk_waits_until_its_oldest_frame_must_go():
    """Two ticks of 80 ms end at 600 if they begin at 440."""
    waiting = view(queue=(600, 650), overdue_ns=900)
    assert decided(waiting) == Decision((), (), 440 * MS)
    assert decided(waiting, now=440).parts == (Choice(0, (0, 1)),)


def test_part_of_a_chunk_enters_when_nothing_more_comes():
    assert decided(view(queue=(600,), ended=True)).parts == (Choice(0, (0,)),)


def test_part_of_a_chunk_enters_when_its_source_stalls_and_the_device_is_free():
    stalled, other = view(0, queue=(2000,)), view(1, queue=(2500,) * 4)
    assert decided(stalled) == Decision((), (), 400 * MS)
    assert decided(stalled, now=400).parts == (Choice(0, (0,)),)
    assert decided(stalled, other, now=400, sizes=(1,)).parts == (Choice(1, (0, 1, 2, 3)),)
    assert decided(stalled, now=400, load=Load.OVER) == Decision((), (), 1840 * MS)


def test_part_of_a_chunk_enters_with_a_push_that_it_cannot_wait_for():
    """The push takes 80 ms, and two more ticks for the frame that waits end at 240."""
    after, before = view(flight=((2000, 1),), queue=(240,)), view(flight=((2000, 1),), queue=(239,))
    for load in Load:
        assert decided(after, load=load).parts == (Choice(0),)
        assert decided(before, load=load) == Decision((), (), 79 * MS)
        assert decided(before, now=79, load=load).parts == (Choice(0, (0,)),)


def test_part_of_a_chunk_enters_at_once_with_a_push_that_must_be():
    for deadline, enter in ((240, (0,)), (241, ())):
        assert decided(view(flight=((80, 1),), queue=(deadline,))).parts == (Choice(0, enter),)


def test_a_frame_that_has_expired_holds_up_no_push():
    decision = decided(view(flight=((2000, 1),), queue=(159,)))
    assert decision == Decision((Drop(0, (0,), Reason.HOPELESS),), (Choice(0),), None)
    assert decided(view(flight=((2000, 1),), queue=(159, 200))).until_ns == 40 * MS


def test_frames_that_cannot_be_in_time_are_dropped():
    """From now two ticks take until 160."""
    decision = decided(view(queue=(100, 159, 160, 200, 250)))
    assert decision.drops == (Drop(0, (0, 1), Reason.HOPELESS),)
    assert decided(view(queue=(100, 159, 160, 200, 250, 300))).parts == (Choice(0, (2, 3, 4, 5)),)


@pytest.mark.parametrize(("load", "near"), [(Load.BUSY, 80), (Load.ROOMY, 40)])
def test_a_chunk_in_flight_is_pushed_on_unless_another_one_is_due_soon(load, near):
    """A tick takes 80 ms. A busy device holds up nobody for a push, one with room for up to half a tick."""
    pushed = view(flight=((900, 1),), next_ns=near)
    assert decided(pushed, load=load).parts == (Choice(0),)
    waits = view(flight=((900, 1),), next_ns=near - 1)
    assert decided(waits, load=load) == Decision((), (), (2 * near - 1) * MS)
    other = view(1, next_ns=near - 1)  # of another stream
    assert decided(pushed, other, load=load) == Decision((), (), (2 * near - 1) * MS)
    assert decided(waits, now=2 * near - 1, load=load).parts == (Choice(0),)  # it did not come


def test_a_chunk_in_flight_does_not_wait_for_one_that_is_due_soon_if_it_would_be_late():
    assert decided(view(flight=((160, 1),), next_ns=40)) == Decision((), (), 80 * MS)
    assert decided(view(flight=((160, 1),), next_ns=40), now=80).parts == (Choice(0),)
    assert decided(view(flight=((160, 1),), next_ns=79), now=80).parts == (Choice(0),)


def test_a_chunk_in_flight_is_pushed_on_at_once_when_the_source_stalls_or_ends():
    assert decided(view(flight=((2000, 1),), next_ns=-80)).parts == (Choice(0),)
    assert decided(view(flight=((2000, 1),), next_ns=10, ended=True)).parts == (Choice(0),)


def test_what_enters_a_device_with_room_takes_others_along():
    """Alone it takes 80 ms and with the push of the other one 120; apart they would take 160."""
    entering, pushed = view(0, queue=(900,) * 4), view(1, flight=((900, 1),))
    assert decided(entering, pushed, load=Load.ROOMY).parts == (Choice(0, (0, 1, 2, 3)), Choice(1))
    assert decided(entering, pushed).parts == (Choice(0, (0, 1, 2, 3)),)


def test_a_late_chunk_under_way_is_pushed_on_first():
    late, fresh = view(0, flight=((-50, 1),)), view(1, queue=(900,) * 4, steps=1)
    assert decided(late, fresh).parts == (Choice(0),)


def test_the_most_urgent_goes_first():
    """Different steps cannot share a tick."""
    far, near = view(0, queue=(900,) * 4), view(1, queue=(800,) * 4, steps=1)
    assert decided(far, near).parts == (Choice(0, (0, 1, 2, 3)),)  # 900 - 160 comes before 800 - 60
    nearer = view(1, queue=(790,) * 4, steps=1)
    assert decided(far, nearer).parts == (Choice(1, (0, 1, 2, 3)),)


@pytest.mark.parametrize(("ready", "taken"), [(1, 1), (2, 2), (3, 2), (4, 4), (5, 4)])
def test_streams_alike_share_a_tick_in_allowed_sizes(ready, taken):
    parts = decided(*(view(i, queue=(900 + i,) * 4) for i in range(ready))).parts
    assert [part.stream for part in parts] == list(range(taken))


def test_a_batch_is_no_larger_than_deadlines_allow():
    """Alone a chunk takes 60 ms, in company of one 80, of three 120."""
    urgent, others = (
        view(0, queue=(100,) * 4, steps=1),
        [view(i, queue=(900,) * 4, steps=1) for i in (1, 2, 3)],
    )
    assert len(decided(urgent, *others).parts) == 2
    assert len(decided(urgent._replace(queue=(60 * MS,) * 4), *others).parts) == 1


@pytest.mark.parametrize(("deadline", "goes"), [(220, 2), (219, 0)])
def test_nothing_enters_at_the_cost_of_what_is_under_way(deadline, goes):
    """The new chunk is the most urgent. It takes 60 ms, and the two under way, of different shapes, 80 each."""
    under_way = view(0, flight=((150, 1),)), view(1, flight=((deadline, 1),), group=Group("t", 2))
    assert decided(*under_way, view(2, queue=(129,) * 4, steps=1)).parts[0].stream == goes


def test_a_first_group_has_its_tick_for_itself():
    first = view(0, queue=(900,) * 5, need=5, first=True)
    other = view(1, queue=(900,) * 4)
    assert decided(first, other).parts == (Choice(0, (0, 1, 2, 3, 4), True),)


def test_a_backlog_is_taken_oldest_first():
    decision = decided(view(queue=(*range(600, 1000, 50),)))
    assert decision == Decision((), (Choice(0, (0, 1, 2, 3)),), None)


def test_under_overload_the_newest_frames_evenly_spaced_are_kept():
    decision = decided(view(queue=(*range(600, 1000, 50),)), load=Load.OVER)
    assert decision.parts == (Choice(0, (1, 3, 5, 7)),)
    assert decision.drops == (Drop(0, (0, 2, 4, 6), Reason.OVERLOAD),)


def test_under_overload_frames_that_would_need_ticks_of_their_own_are_not_taken():
    """A chunk of two steps is ready with the stream's next turn, at 160; the first four frames are too old for that."""
    decision = decided(view(queue=(160, 160, 160, 160, 700, 750, 800, 850), next_ns=0), load=Load.OVER, now=0)
    assert decision.parts == (Choice(0, (1, 3, 5, 7)),)
    decision = decided(
        view(0, queue=(160, 160, 160, 160, 700, 750, 800, 850)),
        view(1, queue=(900,) * 4),
        load=Load.OVER,
        sizes=(1,),
    )
    assert decision.parts == (Choice(0, (4, 5, 6, 7)),)


def test_under_overload_the_stream_that_waited_longest_goes_first():
    urgent, waiting = view(0, queue=(300,) * 4, served_ns=-100), view(1, queue=(900,) * 4, served_ns=-300)
    assert decided(urgent, waiting, load=Load.OVER, sizes=(1,)).parts[0].stream == 1
    assert decided(urgent, waiting, sizes=(1,)).parts[0].stream == 0


def test_nothing_to_do_is_nothing_to_wait_for():
    assert decide(0, [], {}, CONFIG, Load.ROOMY) == Decision((), (), None)


def test_rescue_takes_the_most_urgent_first_and_tells_the_time_to_spare():
    group = Group("s", 2)
    jobs = [Job(i, group, (Flight(300 * MS - i, 1),)) for i in range(3)]
    saved = rescue(jobs, 0, costs(group))
    assert saved.first == (2, 1)
    assert saved.spare_ns == 300 * MS - (120 + 80) * MS
    assert rescue([], 0, {}).spare_ns == NEVER_NS


def test_rescue_names_the_lost():
    group = Group("s", 2)
    saved = rescue([Job(7, group, (Flight(70 * MS, 1), Flight(500 * MS, 2)))], 0, costs(group))
    assert saved.lost == {7: [0]}
    assert saved.spare_ns == -10 * MS


GROUPS = Group("s", 1), Group("s", 2), Group("t", 2)
JOBS = st.lists(
    st.tuples(
        st.sampled_from(GROUPS),
        st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 3)), min_size=1, max_size=3),
    ),
    max_size=6,
).map(
    lambda drawn: [
        Job(
            i,
            group,
            tuple(
                Flight(deadline * MS, left)
                for deadline, left in zip(
                    sorted(d for d, _ in chunks),
                    (1 + i + k for i, k in enumerate(sorted(k for _, k in chunks))),
                    strict=True,
                )
            ),
        )
        for i, (group, chunks) in enumerate(drawn)
    ]
)


@given(JOBS, st.integers(0, 500))
def test_rescue_later_leaves_so_much_less_to_spare(jobs, later):
    known = costs(*GROUPS)
    now, then = rescue(jobs, 0, known), rescue(jobs, later * MS, known)
    assert then.first == now.first
    if jobs:
        assert now.spare_ns - then.spare_ns == later * MS


@given(JOBS)
def test_rescue_goes_on_as_it_began(jobs):
    """After its first tick the rest has the same time to spare: whoever follows it keeps its promise."""
    known = costs(*GROUPS)
    saved = rescue(jobs, 0, known)
    if not jobs:
        return
    cost = known[next(job.group for job in jobs if job.stream == saved.first[0])]
    end = cost.bound_ns[len(saved.first)]
    rest, spare = [], NEVER_NS
    for job in jobs:
        ticked = [Flight(d, left - (job.stream in saved.first)) for d, left in job.flight]
        spare = min([spare, *(d - end for d, left in ticked if left == 0)])
        if flight := tuple(chunk for chunk in ticked if chunk.left):
            rest.append(job._replace(flight=flight))
    assert min(spare, rescue(rest, end, known).spare_ns) == saved.spare_ns


@given(st.lists(st.integers(), min_size=1, max_size=40), st.integers(1, 40))
def test_evenly_spaced_items_end_with_the_last(items, count):
    count = min(count, len(items))
    positions = evenly(range(len(items)), count)
    gaps = {b - a for a, b in itertools.pairwise((-1, *positions))}
    assert positions[-1] == len(items) - 1
    assert len(positions) == count
    assert max(gaps) - min(gaps) <= 1


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match=r"raise_below=0.9 and lower_above=0.8"):
        PolicyConfig(lower_above=0.8, raise_below=0.9)
    with pytest.raises(ConfigError, match="guard_ms must be at least 0, got -1"):
        PolicyConfig(guard_ms=-1)
