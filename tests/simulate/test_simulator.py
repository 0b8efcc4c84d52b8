"""The loop under a virtual clock: what it asks of a policy, what it counts, and which goals are reached."""

import dataclasses
import itertools
import statistics
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svd2_jax.runtime.scheduler import PolicyConfig, Scheduler
from svd2_jax.runtime.types import MS, SECOND, Fate, FrameRecord, Reason, StepChange, Tick, TickEntry, Wait
from svd2_jax.simulate.baselines import Fifo, ReferencePolicy
from svd2_jax.simulate.report import Row, summarise, table
from svd2_jax.simulate.simulator import PolicyFault, SimulationResult, simulate
from svd2_jax.simulate.trace import DeviceTrace, StreamTrace, Trace, read_trace

FOLDER = Path(__file__).parents[2] / "traces"
BELOW = (
    "bursts",
    "come_and_go",
    "device_half",
    "eight",
    "faults",
    "jitter",
    "light_30",
    "overlap",
    "pipeline",
    "stalls",
    "steady_16",
    "steady_30",
)
ABOVE = ("overload_endless", "overload_four", "overload_one")
SHARE = 0.3  # of a trace's length that is run here
EXACT = DeviceTrace(fixed_ms=100, row_ms=0, noise=0)
BUDGET_MS = 1200  # of frames made by hand


def deadline(sizes, report) -> Scheduler:
    return Scheduler(PolicyConfig(), sizes, report)


def shortened(name: str, share: float = SHARE) -> Trace:
    """Returns a committed trace with all its times but those of frames and ticks shortened."""
    trace = read_trace(FOLDER / f"{name}.json")
    device = dataclasses.replace(trace.device, speed=tuple((at * share, v) for at, v in trace.device.speed))
    streams = tuple(
        dataclasses.replace(
            s,
            start_s=s.start_s * share,
            end_s=None if s.end_s is None else s.end_s * share,
            stalls=tuple((at * share, length * share) for at, length in s.stalls),
        )
        for s in trace.streams
    )
    return dataclasses.replace(trace, duration_s=trace.duration_s * share, device=device, streams=streams)


def run(trace: Trace, policy=deadline) -> tuple[SimulationResult, Row]:
    outcome = simulate(trace, "p", policy)
    return outcome, summarise(outcome)


def small(duration_s: float = 1.3, **settings) -> Trace:
    source = StreamTrace(**{"rate_hz": 10, "budget_ms": 600, "delay_ms": 0, **settings})
    return Trace("t", "", duration_s, EXACT, (source,))


# --- goals


@pytest.mark.parametrize("name", BELOW)
def test_below_capacity_nothing_is_dropped_and_all_is_in_time(name):
    # Shortened, a camera would stop in every second chunk: latency would be that of the camera.
    outcome, row = run(shortened(name, 1.0 if name == "stalls" else SHARE))
    assert row.missed_goals == ()
    assert row.late / (row.shown + row.late) < 0.001
    assert row.latency_ms[2] <= row.budget_ms[1]
    assert not {"overload", "expired"} & set(row.dropped)
    assert row.throughput is None
    assert not outcome.refused


@pytest.mark.parametrize("name", ["light_30", "stalls", "steady_16"])
def test_a_quiet_device_shows_frames_little_later_than_physics_asks(name):
    _, row = run(read_trace(FOLDER / f"{name}.json"))
    assert row.quiet
    assert row.of_bound[0] <= 1.10
    assert row.of_bound[1] <= 1.25


def test_the_goal_of_latency_stands_where_a_tick_per_chunk_takes_less_than_half_of_the_time():
    """A tick takes 100 ms; a chunk of 4 comes every 400 ms at 10 FPS, and takes 300 ms to fill and two ticks."""
    row = run(small(12))[1]
    assert (row.quiet, row.bound_ms) == (True, (500, 500))
    assert row.missed_goals == ()
    assert "bound" in dataclasses.replace(row, of_bound=(1.11, 1.2)).missed_goals
    assert "bound" in dataclasses.replace(row, of_bound=(1.0, 1.26)).missed_goals
    busy = run(small(12, rate_hz=20))[1]  # half of the time
    assert not dataclasses.replace(busy, of_bound=(2.0, 2.0)).missed_goals


@pytest.mark.parametrize("name", ABOVE)
def test_under_twice_the_demand_the_device_is_used_and_all_that_is_shown_is_in_time(name):
    trace = shortened(name)
    outcome, row = run(trace)
    assert row.missed_goals == ()
    assert row.miss_rate < 0.01
    assert row.throughput is not None
    assert 0.95 <= row.throughput < 1.02  # a tick at the border counts whole
    assert row.gap_s is not None
    assert row.gap_s < 2
    shown = [
        sum(f.stream == i and f.shown_ns is not None for f in outcome.frames) for i in range(row.streams)
    ]
    assert min(shown) > 0.8 * max(shown)  # all of them ask for the same
    if trace.overloads[0][1] < trace.duration_s:
        assert row.recovery_s is not None
        assert row.recovery_s <= 2


@pytest.mark.parametrize("name", ABOVE)
def test_under_twice_the_demand_the_baselines_latency_is_many_times_higher(name):
    trace = shortened(name)
    ours = run(trace)[1].latency_ms[2]
    assert run(trace, Fifo)[1].latency_ms[2] > 5 * ours
    assert run(trace, ReferencePolicy)[1].latency_ms[2] > 5 * ours


def test_streams_come_back_when_the_device_was_too_slow_for_any_frame():
    trace = read_trace(FOLDER / "overload_hopeless.json")
    outcome, row = run(trace)
    assert row.missed_goals == ()
    assert row.miss_rate < 0.01
    assert row.latency_ms[2] <= 700
    assert row.shown + row.late + sum(row.dropped.values()) + row.impossible == row.frames == 1440
    arrived = {f: f.arrival_ns / SECOND for f in outcome.frames}
    impossible = [at for f, at in arrived.items() if not outcome.is_possible(f)]
    assert row.impossible == len(impossible) > 300
    # Of the budget of 0.7 s, two ticks of one row take 0.8 s at a tenth of the speed; at 0.15, 0.53 s.
    assert all(59.9 < at < 80 for at in impossible)
    for begin_s, end_s in ((0.0, 19.0), (42.0, 59.0), (82.0, 90.0)):
        assert all(f.fate is Fate.SHOWN for f, at in arrived.items() if begin_s <= at < end_s)
    late = [f for f in outcome.frames if f.fate is Fate.LATE]
    assert len({f.started_ns for f in late}) > 10
    assert run(trace, Fifo)[1].missed_goals == ("misses", "latency")


def test_latency_does_not_follow_a_clock_that_drifts():
    trace = shortened("hour", 0.02)
    trace = dataclasses.replace(trace, streams=(dataclasses.replace(trace.streams[0], drift_ppm=1000),))
    shown = [f for f in run(trace)[0].frames if f.shown_ns is not None]
    latencies = [(f.shown_ns - f.arrival_ns) / MS for f in shown]
    tenth = len(latencies) // 10
    early, late = statistics.median(latencies[tenth : 2 * tenth]), statistics.median(latencies[-tenth:])
    assert abs(late - early) < 20  # the clocks are 72 ms apart by then


def test_steps_are_lowered_before_frames_are_dropped_and_raised_again():
    outcome, row = run(shortened("device_half"))
    assert [(c.before, c.after) for c in outcome.changes if c.stream == 0] == [(2, 1), (1, 2)]
    assert row.dropped == {}


def test_a_device_that_would_be_overloaded_tick_by_tick_has_time_when_ticks_overlap():
    trace = shortened("overlap")
    device = trace.device
    outcome, row = run(trace)
    assert row.dropped == {}
    assert row.late == 0
    overlaps = [later.started_ns < earlier.done_ns for earlier, later in itertools.pairwise(outcome.ticks)]
    assert sum(overlaps) > 100
    whole = dataclasses.replace(device, fixed_ms=device.fixed_ms + device.tail_ms, tail_ms=0)
    assert sum(run(dataclasses.replace(trace, device=whole))[1].dropped.values()) > 10


@settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=25)
@given(
    tail=st.sampled_from([0.1, 0.4, 1.0]),
    noise=st.sampled_from([0.0, 0.01, 0.05]),
    load=st.sampled_from([0.5, 0.8, 2.0]),
    count=st.integers(1, 3),
    stages=st.integers(1, 3),
    closes=st.booleans(),
    seed=st.integers(0, 99),
)
def test_with_a_tail_every_frame_has_one_fate_and_few_are_late(
    tail, noise, load, count, stages, closes, seed
):
    """The simulator checks the rest: whole chunks in order, nothing shown before it is finished."""
    device = DeviceTrace(fixed_ms=100, row_ms=0, noise=noise, tail_ms=100 * tail, batch_sizes=(1, 2))
    source = StreamTrace(
        rate_hz=load * 40 / count, budget_ms=1500 + 600 * stages * count / load, count=count, stagger_s=0.1,
        stages=stages, jitter_ms=2, leaves="closes" if closes else "ends", end_s=6,
    )  # fmt: skip
    outcome, row = run(Trace("t", "", 8, device, (source,), seed=seed))
    assert len({(f.stream, f.number) for f in outcome.frames}) == len(outcome.frames) == row.frames
    shown = [f for f in outcome.frames if f.fate is not Fate.DROPPED]
    assert shown
    assert sum(f.fate is Fate.LATE for f in shown) <= 0.01 * len(shown)
    if load < 1:
        assert set(row.dropped) <= {"closed"}


def test_faults_of_the_input_are_what_is_dropped():
    _, row = run(shortened("faults"))
    assert set(row.dropped) <= {"duplicate", "disorder", "stale"}
    assert row.dropped["duplicate"] > 5
    assert row.dropped["disorder"] > 20


# --- the loop


def test_the_same_trace_gives_the_same_events():
    trace = shortened("come_and_go", 0.1)
    for policy in (deadline, Fifo, ReferencePolicy):
        assert simulate(trace, "p", policy).events == simulate(trace, "p", policy).events


def test_another_seed_gives_other_events():
    trace = shortened("jitter", 0.05)
    other = dataclasses.replace(trace, seed=trace.seed + 1)
    assert simulate(trace, "p", deadline).events != simulate(other, "p", deadline).events


def test_a_stream_that_is_refused_sends_nothing():
    trace = small(steps=1, budget_ms=120, rate_hz=30)  # a first group of 5 frames takes longer alone
    outcome, row = run(trace)
    assert list(outcome.refused) == [0]
    assert (row.streams, row.refused, row.frames) == (0, 1, 0)
    assert "refusals" in row.missed_goals
    assert table([row], "p").count("\n") == 1


def test_a_leaving_stream_shows_what_is_there_and_a_closed_one_nothing_more():
    ended = run(small())[0].frames
    closed = run(small(leaves="closes"))[0].frames
    assert {f.fate for f in ended} == {Fate.SHOWN}
    assert len(ended) == len(closed) == 13
    assert all(f.shown_ns <= 1.3 * SECOND for f in closed if f.shown_ns is not None)
    assert {f.reason for f in closed if f.fate is Fate.DROPPED} == {Reason.CLOSED}


def test_progress_tells_the_time_that_was_reached():
    seen = []
    simulate(small(), "p", Fifo, seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1.4)


class Forgetful(Fifo):
    """Never says what became of frame 3."""

    def __init__(self, sizes, report):
        super().__init__(sizes, lambda e: None if isinstance(e, FrameRecord) and e.number == 3 else report(e))


class Wide(Fifo):
    """Makes ticks of three."""

    def next(self, now_ns):
        made = super().next(now_ns)
        return dataclasses.replace(made, entries=made.entries * 3) if isinstance(made, Tick) else made


class Eager(Fifo):
    """Runs a chunk before the first group."""

    def next(self, now_ns):
        made = super().next(now_ns)
        return Tick(0, (TickEntry(0, made.entries[0].frames),), 0) if isinstance(made, Tick) else made


class Early(Fifo):
    """Says that frames are done which are not."""

    def done(self, finished, now_ns):
        super().done({s: max(n, 1) for s, n in finished.items()}, now_ns)


class Twice(Fifo):
    """Reports frames again."""

    def __init__(self, sizes, report):
        def again(event):
            report(event)
            if isinstance(event, FrameRecord):
                report(event)

        super().__init__(sizes, again)


class Restless(Fifo):
    """Never waits."""

    def next(self, now_ns):
        made = super().next(now_ns)
        return made if isinstance(made, Tick) else Wait(now_ns)


@pytest.mark.parametrize(
    ("policy", "fault"),
    [
        (Forgetful, r"never reports frames \[3\]"),
        (Wide, r"3 streams in a tick; the device takes \(1, 2, 4\)"),
        (Eager, "a chunk before the first group"),
        (Early, "shows frame 5, which is not finished"),
        (Twice, "reports frame 0 twice"),
        (Restless, "asked again and again"),
    ],
)
def test_a_policy_that_breaks_a_rule_is_caught(policy, fault):
    with pytest.raises(PolicyFault, match=fault):
        simulate(small(), "p", policy)


# --- the numbers


def frame(
    number: int, arrival_s: float, shown_s: float | None, steps: int = 2, fate: Fate = Fate.SHOWN
) -> FrameRecord:
    arrival, shown = round(arrival_s * SECOND), None if shown_s is None else round(shown_s * SECOND)
    reason = Reason.OVERLOAD if shown is None else None
    deadline = arrival + BUDGET_MS * MS
    return FrameRecord(0, number, None, arrival, deadline, fate, arrival, shown, shown, steps, reason)


def overloaded(*frames: FrameRecord) -> Row:
    """A run of 12 s at 10 frames/s with these frames; from 2 to 6 s the device can do 5 a second."""
    device = DeviceTrace(fixed_ms=40, row_ms=0, speed=((2.0, 0.05), (6.0, 1.0)))
    trace = Trace("t", "", 12, device, (StreamTrace(rate_hz=10, budget_ms=BUDGET_MS),))
    opened = {0: trace.sources[0]}
    outcome = SimulationResult(
        trace, "p", [*frames, StepChange(0, 0, 1, 2)], streams=opened, ended_s=12, busy_s=3
    )
    assert trace.overloads == ((2.0, 6.0),)
    return summarise(outcome)


def test_frames_that_nobody_could_show_in_time_are_judged_for_themselves():
    """From 1 to 3 s a tick takes 1 s, and frames are given half of that."""
    device = DeviceTrace(fixed_ms=100, row_ms=0, noise=0, speed=((1.0, 0.1), (3.0, 1.0)))
    trace = Trace("t", "", 4, device, (StreamTrace(rate_hz=5, budget_ms=500),))
    fates = {0.2: 0.5, 0.4: 0.8, 1.4: 2.4, 1.6: None, 2.4: 3.2, 3.2: 3.6, 3.4: None}
    frames = [
        dataclasses.replace(
            frame(i, at, shown), deadline_ns=round((at + 0.5) * SECOND), fate=fate_of(at, shown, 0.5)
        )
        for i, (at, shown) in enumerate(fates.items())
    ]
    outcome = SimulationResult(trace, "p", frames, streams={0: trace.sources[0]}, ended_s=4)
    # 2.4 waits for 0.06 of a tick to be done by 3.0: the rest then takes 94 ms, past 2.9.
    assert [at for f, at in zip(frames, fates, strict=True) if not outcome.is_possible(f)] == [1.4, 1.6, 2.4]
    row = summarise(outcome)
    assert (row.frames, row.shown, row.late, row.dropped) == (7, 3, 0, {"overload": 1})
    assert (row.impossible, row.impossible_shown) == (3, 2)
    assert row.latency_ms[2] < 500
    assert (row.miss_rate, row.worst_miss_rate) == (0, 0)
    assert row.gap_s == pytest.approx(1.4)  # late or not, something was shown at 2.4
    assert row.throughput is None  # no whole chunk could be in time
    assert "3 (2 shown)" in table([row], "p")


def fate_of(arrival_s: float, shown_s: float | None, budget_s: float) -> Fate:
    if shown_s is None:
        return Fate.DROPPED
    return Fate.SHOWN if shown_s <= arrival_s + budget_s else Fate.LATE


def test_throughput_counts_what_is_done_under_overload():
    row = overloaded(*(frame(i, i, i + 0.5) for i in range(12)))
    assert row.throughput == pytest.approx(4 / 20)  # done at 2.5, 3.5, 4.5 and 5.5; 5 a second can be
    assert row.busy == pytest.approx(0.25)
    assert "throughput" in row.missed_goals


def test_recovery_lasts_until_a_whole_second_is_in_time_with_all_steps():
    well = [frame(i, i / 10, i / 10 + 0.5) for i in range(120)]
    assert overloaded(*well).recovery_s == 0
    for late, recovery in (({65}, 0.5), ({65, 72}, 1.2), ({65, 90}, 0.5)):
        some = [dataclasses.replace(f, fate=Fate.LATE) if f.number in late else f for f in well]
        assert overloaded(*some).recovery_s == pytest.approx(recovery)
    repeated = [frame(200, 6.5, None, fate=Fate.DROPPED), frame(201, 7.5, None, fate=Fate.DROPPED)]
    sources_fault = dataclasses.replace(repeated[1], reason=Reason.DUPLICATE)
    assert overloaded(*well, *repeated).recovery_s == pytest.approx(1.5)
    assert overloaded(*well, repeated[0], sources_fault).recovery_s == pytest.approx(0.5)
    fewer = [dataclasses.replace(f, steps=1) if 60 <= f.number <= 90 else f for f in well]
    assert overloaded(*fewer).recovery_s == pytest.approx(3.0)
    assert "recovery" in overloaded(*fewer).missed_goals
    never = [dataclasses.replace(f, fate=Fate.LATE) if f.number >= 60 else f for f in well]
    assert overloaded(*never).recovery_s == float("inf")
    assert overloaded(*never).to_dict()["recovery_s"] == "never"
    assert "never" in table([overloaded(*never)], "p")


def test_a_gap_is_the_longest_time_without_a_frame_under_overload():
    shown = [frame(i, i / 10, i / 10 + 0.5) for i in range(120) if not 30 <= i < 55]
    assert overloaded(*shown).gap_s == pytest.approx(2.6)  # from 3.4 to 6.0
    assert "starvation" in overloaded(*shown).missed_goals


def test_a_frame_dropped_below_capacity_is_a_goal_missed():
    trace = small(12)
    shown, lost = frame(0, 1, 1.5), frame(1, 2, None, fate=Fate.DROPPED)

    def missed(*frames: FrameRecord) -> tuple[str, ...]:
        return summarise(
            SimulationResult(trace, "p", list(frames), streams={0: trace.sources[0]})
        ).missed_goals

    assert missed(shown) == ()
    assert missed(shown, lost) == ("drops",)
    assert missed(shown, dataclasses.replace(lost, reason=Reason.DUPLICATE)) == ()
