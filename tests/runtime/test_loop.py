"""The live loop: real threads, a fake engine, and time that goes on when all of them wait."""

import gc
import itertools
import subprocess
import sys
import threading
import time
import weakref
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeClock, FakeEngine, camera, expected, picture, spec

from svd2_jax.errors import ConfigError, EngineError, SessionError
from svd2_jax.runtime.deadline import PolicyConfig
from svd2_jax.runtime.latency import LatencySample
from svd2_jax.runtime.loop import LiveLoop
from svd2_jax.runtime.loop_config import HangReport, LoopConfig
from svd2_jax.runtime.measure import batch_key_of, measure, settings_for
from svd2_jax.runtime.scheduler import Refused
from svd2_jax.runtime.stream import feed
from svd2_jax.runtime.types import (
    MS,
    SECOND,
    Fate,
    FrameRecord,
    PromptRecord,
    Reason,
    StepChange,
    StreamSettings,
    TickRecord,
)

LIVE = StreamSettings(rate_hz=16, budget_ms=1000)


class Bench:
    """A loop with a fake engine and clock, and what came out of each stream."""

    def __init__(self, clock=None, engine=None, **loop):
        self.clock = clock or FakeClock()
        self.engine = engine or FakeEngine(self.clock)
        self.events = []
        self.hangs = []
        self.shown = {}
        self.feeders = []
        self.loop = LiveLoop(
            self.engine, clock=self.clock, observers=[self.events.append], on_hang=self.hangs.append, **loop
        )

    def sink(self, name):
        taken = self.shown.setdefault(name, [])
        return lambda frame, record: taken.append((record, tuple(int(x) for x in frame[0, 0])))

    def open(self, name="a", settings=LIVE, source=None, sink=None, **made):
        stream = self.loop.open(spec(steps=settings.steps, **made), settings, sink or self.sink(name))
        if source is not None:
            feeder = threading.Thread(target=feed, args=(stream, source), name=f"svd2-source-{stream.id}")
            self.feeders.append(feeder)
            feeder.start()
        return stream

    def pixels(self, name="a"):
        return [pixel for _, pixel in self.shown[name]]

    def over(self, *streams):
        return lambda: all(stream.ended.done() for stream in streams)

    @property
    def frames(self):
        return [event for event in self.events if isinstance(event, FrameRecord)]


@contextmanager
def bench(**loop):
    """Runs a loop; ends it while the time goes on, and checks that nothing is left."""
    before = set(threading.enumerate())
    made = Bench(**loop)
    made.loop.start()
    try:
        yield made
    finally:
        left = []
        stopper = threading.Thread(target=lambda: left.append(made.loop.stop()))
        stopper.start()
        while any(thread.is_alive() for thread in (stopper, *made.feeders)):
            made.clock.run(0.1)
    assert left == [()]
    assert set(threading.enumerate()) == before
    assert made.engine.open_sessions == 0
    summary = made.loop.metrics.summary()
    assert summary.is_balanced
    assert summary.inside == 0
    assert not made.loop.observers.errors


def test_every_frame_of_a_camera_is_shown_once_in_order_and_in_time():
    with bench() as b:
        stream = b.open(source=camera(b.clock, 33))
        b.clock.run_until(b.over(stream))
        assert b.pixels() == expected(range(33))
        assert [record.number for record, _ in b.shown["a"]] == list(range(33))
        assert {event.fate for event in b.frames} == {Fate.SHOWN}
        assert stream.ended.exception() is None


def test_frames_leave_at_the_rate_they_came_in():
    with bench() as b:
        b.clock.run_until(b.over(b.open(source=camera(b.clock, 65))))
        times = [record.shown_ns for record, _ in b.shown["a"]]
        gaps_ms = np.diff(times) / MS
        assert gaps_ms[20:].min() > 50  # of 62.5; a burst would show 0
        assert b.loop.metrics.summary().jitter_p95_ms < 15


def test_a_record_tells_when_its_frame_was_where():
    with bench() as b:
        b.clock.run_until(b.over(b.open(source=camera(b.clock, 9))))
        for record, _ in b.shown["a"]:
            assert (
                record.arrival_ns
                <= record.started_ns
                < record.done_ns
                <= record.shown_ns
                <= record.deadline_ns
            )
            assert record.done_ns - record.started_ns >= 20 * MS
            assert record.timestamp_ns == record.arrival_ns


def test_a_last_chunk_that_is_not_full_comes_out_without_what_filled_it():
    with bench() as b:
        b.clock.run_until(b.over(b.open(source=camera(b.clock, 5 + 4 + 2))))
        assert b.pixels() == expected(range(11))


def test_several_streams_share_ticks_and_keep_apart():
    clock = FakeClock()
    engine = FakeEngine(clock, lambda streams, steps, first: 40.0)
    with bench(clock=clock, engine=engine) as b:
        b.loop.warm_up(measured(engine, clock))
        engine.ticks.clear()
        names = "abcd"
        streams = [
            b.open(n, source=camera(b.clock, 33, first=50 * i), prompt=n * (i + 1))
            for i, n in enumerate(names)
        ]
        b.clock.run_until(b.over(*streams))
        for i, name in enumerate(names):
            assert b.pixels(name) == expected(range(50 * i, 50 * i + 33), name * (i + 1))
        assert max(size for size, _ in b.engine.ticks) > 1


def test_frames_may_be_offered_by_hand_and_the_buffer_used_again():
    with bench() as b:
        stream, buffer = b.open(), picture(0)
        for i in range(9):
            buffer[:] = i
            stream.offer(buffer)
            b.clock.run(1 / 16)
        stream.end()
        b.clock.run_until(b.over(stream))
        assert b.pixels() == expected(range(9))


def test_timestamps_that_come_twice_or_out_of_order_drop_those_frames_only():
    with bench() as b:
        stream, step = b.open(), round(SECOND / 16)
        stamps = [0, 1, 2, 3, 4, 5, 5, 7, 6, 8, 9, 10, 11, 12]
        for i, stamp in enumerate(stamps):
            stream.offer(picture(i), stamp * step)
            b.clock.run(1 / 16)
        stream.end()
        b.clock.run_until(b.over(stream))
        fates = {event.number: event.reason for event in b.frames}
        assert {n: reason for n, reason in fates.items() if reason} == {
            6: Reason.DUPLICATE,
            8: Reason.DISORDER,
        }
        assert b.pixels() == expected([0, 1, 2, 3, 4, 5, 7, 9, 10, 11, 12, 13])


def test_a_new_prompt_holds_from_a_chunk_on_and_no_frame_is_lost():
    with bench() as b:
        stream = b.open(source=camera(b.clock, 49))
        b.clock.run(1.5)
        stream.update("green")
        b.clock.run_until(b.over(stream))
        lengths = [(pixel[0] - pixel[2]) % 256 for pixel in b.pixels()]
        assert len(lengths) == 49
        changed = lengths.index(len("green"))
        assert (changed - 5) % 4 == 0
        assert lengths == [11] * changed + [5] * (49 - changed)
        (told,) = [event for event in b.events if isinstance(event, PromptRecord)]
        assert (told.stream, told.prompt, told.frame) == (stream.id, "green", changed)
        assert b.loop.metrics.summary(stream.id).prompt == "green"


def test_a_prompt_may_be_blended_in_over_chunks():
    with bench() as b:
        stream = b.open(source=camera(b.clock, 49))
        b.clock.run(1.0)
        stream.update("x" * 19, blend_chunks=4)
        b.clock.run_until(b.over(stream))
        lengths = [(pixel[0] - pixel[2]) % 256 for pixel in b.pixels()]
        assert sorted(set(lengths)) == [11, 13, 15, 17, 19]
        assert lengths == sorted(lengths)


def test_a_prompt_that_is_no_prompt_is_refused_and_the_stream_goes_on():
    with bench() as b:
        stream = b.open(source=camera(b.clock, 9))
        with pytest.raises(ConfigError, match="empty"):
            stream.update("  ")
        with pytest.raises(ConfigError, match="blend_chunks"):
            stream.update("green", -1)
        b.clock.run_until(b.over(stream))
        assert b.pixels() == expected(range(9))


def test_overload_lowers_the_steps_and_the_device_follows():
    clock = FakeClock()
    engine = FakeEngine(
        clock, lambda streams, steps, first: 150.0 * steps
    )  # 250 ms a chunk: 1 step fits, 2 do not
    with bench(clock=clock, engine=engine) as b:
        b.loop.warm_up(measured(engine, clock))
        stream = b.open(source=camera(b.clock, 97))
        b.clock.run_until(b.over(stream))
        changes = [event for event in b.events if isinstance(event, StepChange)]
        assert (changes[0].before, changes[0].after) == (2, 1)
        assert 1 in {pixel[1] for pixel in b.pixels()}
        for record, pixel in b.shown["a"]:
            assert pixel[2] == record.number  # every frame is itself, also across the change
            assert pixel[1] == record.steps  # what the scheduler says it took is what the device did
        assert b.loop.metrics.summary().miss_rate == 0


def measured(engine, clock):
    """Device times of the fake engine, in a thread, as they take time of the fake clock."""
    samples = []
    thread = threading.Thread(
        target=lambda: samples.extend(measure(engine, spec(), (1, 2), now_ns=clock.now_ns)),
        name="svd2-measure",
    )
    thread.start()
    clock.run_until(lambda: not thread.is_alive(), limit_s=300)
    thread.join()
    return samples


def test_measuring_gives_a_time_for_every_kind_of_tick():
    clock = FakeClock()
    engine = FakeEngine(clock, lambda streams, steps, first: 10.0 * streams + steps + 100 * first)
    samples = measured(engine, clock)
    assert {s.batch_key for s in samples} == {batch_key_of(spec().stream)}
    times = {(s.batch, s.steps, s.first): s.duration_ns for s in samples}
    assert {s.tail_ns for s in samples} == {0}
    wanted = {(b, s, False): (10 * b + s) * MS for b in (1, 2, 4) for s in (1, 2)}
    wanted |= {(1, s, True): (110 + s) * MS for s in (1, 2)}
    assert times == wanted
    assert engine.open_sessions == 0
    assert engine.prepared == {1, 2}


def test_measuring_tells_the_tail_from_the_tick():
    """The device takes what the stages do; frames are finished 15 ms behind them, a first group's too."""
    clock = FakeClock()
    engine = FakeEngine(clock, lambda streams, steps, first: 20.0 * streams + 100 * first)
    engine.tail_ms = 15.0
    samples = measured(engine, clock)
    assert {s.tail_ns for s in samples} == {15 * MS}
    times = {(s.batch, s.first): s.duration_ns for s in samples}
    assert times == {(1, False): 20 * MS, (2, False): 40 * MS, (4, False): 80 * MS, (1, True): 120 * MS}
    engine.batch_sizes = (1,)  # there is no second session for a first group to follow that of another
    assert {(s.first, s.duration_ns, s.tail_ns) for s in measured(engine, clock)} == {
        (False, 20 * MS, 15 * MS),
        (True, 135 * MS, 0),
    }


def test_measuring_leaves_out_batches_that_do_not_fit():
    engine = FakeEngine(device_ms=lambda streams, steps, first: 0.0)
    opened = engine.open

    def open_two(made):
        if engine.open_sessions == 2:
            raise ConfigError("no memory for a third session")
        return opened(made)

    engine.open = open_two
    assert {s.batch for s in measure(engine, spec(), (2,))} == {1, 2}


def test_a_source_that_raises_ends_its_stream_and_no_other():
    def broken(clock):
        yield from camera(clock, 20)
        raise OSError("the camera was pulled out")

    with bench() as b:
        bad, good = b.open("bad", source=broken(b.clock)), b.open("good", source=camera(b.clock, 41))
        b.clock.run_until(b.over(bad, good))
        assert str(bad.ended.exception()) == "the camera was pulled out"
        assert good.ended.exception() is None
        assert b.pixels("good") == expected(range(41))


def test_a_sink_that_raises_ends_its_stream_and_no_other():
    def broken(frame, record):
        if record.number == 7:
            raise OSError("the disk is full")

    with bench() as b:
        bad, good = (
            b.open(sink=broken, source=camera(b.clock, 41)),
            b.open("good", source=camera(b.clock, 41)),
        )
        b.clock.run_until(b.over(bad, good))
        assert str(bad.ended.exception()) == "the disk is full"
        assert b.pixels("good") == expected(range(41))


def test_a_sink_that_raises_at_the_last_frame_ends_its_stream_with_the_reason():
    def broken(frame, record):
        if record.number == 20:
            raise OSError("the disk is full")

    with bench() as b:
        stream = b.open(sink=broken, source=camera(b.clock, 21))
        b.clock.run_until(b.over(stream))
        assert str(stream.ended.exception()) == "the disk is full"


def test_steps_that_the_device_has_become_too_slow_for_end_their_stream_and_no_other():
    with bench() as b:
        settings = StreamSettings(rate_hz=16, budget_ms=1000, steps=1)
        bad, good = (
            b.loop.open(spec(steps=1), settings, b.sink("bad"), steps=(1, 2)),
            b.open("good", source=camera(b.clock, 41)),
        )
        b.clock.run(0.5)
        for _ in range(50):
            b.loop._scheduler.warm_up(LatencySample(bad.settings.batch_key, 1, 2, 3 * SECOND, False))
        change = bad.update(steps=2, min_steps=2)
        b.clock.run_until(b.over(bad, good))
        assert isinstance(change.exception(), Refused)
        assert bad.ended.exception() is change.exception()
        assert b.loop.error is None


def test_a_frame_of_the_wrong_shape_ends_its_stream_and_no_other():
    with bench() as b:
        bad, good = b.open("bad"), b.open("good", source=camera(b.clock, 21))
        b.clock.run(0.1)
        with pytest.raises(SessionError, match=r"uint8 \(16, 16, 3\), got float32 \(8, 8\)"):
            bad.offer(np.zeros((8, 8), np.float32))
        with pytest.raises(SessionError, match="it ended with: a frame must be"):
            bad.offer(picture(0))
        b.clock.run_until(b.over(bad, good))
        assert isinstance(bad.ended.exception(), SessionError)
        assert b.pixels("good") == expected(range(21))


def test_a_prompt_that_cannot_be_encoded_ends_its_stream_and_no_other():
    with bench() as b:
        bad, good = b.open("bad", source=camera(b.clock, 41)), b.open("good", source=camera(b.clock, 41))
        b.clock.run(0.5)
        b.engine.prompt_error = RuntimeError("out of memory")
        change = bad.update("green")
        b.clock.run_until(b.over(bad, good))
        assert str(change.exception()) == "out of memory"
        assert str(bad.ended.exception()) == "out of memory"
        assert b.pixels("good") == expected(range(41))


def test_steps_that_cannot_be_set_end_their_stream_and_no_other():
    clock = FakeClock()
    engine = FakeEngine(clock, lambda streams, steps, first: 150.0 * steps)
    engine.forbidden_steps = {1}
    with bench(clock=clock, engine=engine) as b:
        b.loop.warm_up(measured(engine, clock))
        bad = b.open(source=camera(b.clock, 97))
        b.clock.run_until(b.over(bad))
        assert "no programs for 1 steps" in str(bad.ended.exception())
        engine.forbidden_steps = set()
        b.clock.run_until(b.over(b.open("next", source=camera(b.clock, 9))))
        assert len(b.pixels("next")) == 9


def test_frames_that_cannot_be_read_end_their_stream_and_no_other():
    with bench() as b:
        bad = b.open("bad", source=camera(b.clock, 21))
        b.clock.run(0.5)
        b.engine.read_error = RuntimeError("the copy failed")
        b.clock.run_until(b.over(bad))
        b.engine.read_error = None
        assert str(bad.ended.exception()) == "the copy failed"
        good = b.open("good", source=camera(b.clock, 9))
        b.clock.run_until(b.over(good))
        assert b.pixels("good") == expected(range(9))


def test_a_tick_that_fails_ends_its_streams_and_the_loop_goes_on():
    def fault(number, sessions):
        if number == 5:
            raise RuntimeError("the device said no")

    with bench() as b:
        b.engine.fault = fault
        bad = b.open("bad", source=camera(b.clock, 97))
        b.clock.run_until(b.over(bad))
        assert str(bad.ended.exception()) == "the device said no"
        assert b.loop.error is None
        good = b.open("good", source=camera(b.clock, 9))
        b.clock.run_until(b.over(good))
        assert b.pixels("good") == expected(range(9))


def test_a_tick_that_fails_leaves_the_streams_that_were_not_in_it():
    def fault(number, sessions):
        if number > 9 and sessions[0].spec.stream.width == 32:
            raise RuntimeError("no memory for a wide tick")

    def wide(clock):
        for timestamp_ns, frame in camera(clock, 97):
            yield timestamp_ns, np.concatenate([frame, frame], axis=1)

    with bench() as b:
        b.engine.fault = fault
        bad = b.open("bad", source=wide(b.clock), width=32)
        good = b.open("good", source=camera(b.clock, 41))
        b.clock.run_until(b.over(bad, good))
        assert str(bad.ended.exception()) == "no memory for a wide tick"
        assert good.ended.exception() is None
        assert b.pixels("good") == expected(range(41))


def test_ticks_that_fail_again_and_again_end_the_loop():
    def fault(number, sessions):
        raise RuntimeError("the device is gone")

    with bench() as b:
        b.engine.fault = fault
        streams = [b.open(str(i), source=camera(b.clock, 41)) for i in range(5)]
        b.clock.run_until(lambda: b.loop.error)
        assert "3 ticks failed one after another: the device is gone" in str(b.loop.error)
        b.clock.run_until(b.over(*streams))
        assert all(stream.ended.exception() is not None for stream in streams)
        with pytest.raises(EngineError, match="the device is gone"):
            b.loop.wait()
        with pytest.raises(EngineError, match="does not run"):
            b.open("late")


FAST = StreamSettings(rate_hz=60, budget_ms=1500, min_steps=2)


@contextmanager
def overlapping(device_ms=lambda streams, steps, first: 62.0):
    """A loop whose device takes 62 ms in the stages and 30 behind them; of a `FAST` stream a chunk comes each 67 ms."""
    clock = FakeClock()
    engine = FakeEngine(clock, device_ms)
    engine.tail_ms = 30.0
    with bench(clock=clock, engine=engine, policy=PolicyConfig(admit_below=None)) as b:
        b.loop.warm_up(measured(engine, clock))
        engine.ticks.clear()
        yield b


def test_the_frames_of_a_tick_are_finished_while_the_next_one_runs():
    """Each tick waits until the next one was handed over: nothing would go on if that waited for it in turn."""
    handed = [threading.Event() for _ in range(40)]
    overlapped = []
    clock = FakeClock()
    engine = FakeEngine(clock, lambda streams, steps, first: 40.0)
    engine.tail_ms = 30.0
    with bench(clock=clock, engine=engine) as b:
        b.loop.warm_up(measured(engine, clock))
        engine.ticks.clear()
        engine.fault = lambda number, sessions: handed[number].set()

        def wait_for_the_next(number):
            if 5 <= number < 10:
                overlapped.append(handed[number + 1].wait(timeout=60))

        engine.finish_fault = wait_for_the_next
        # A chunk each 40 ms for a tick of 40 and a tail of 30: without overlap there would not be time for all of them.
        settings = StreamSettings(rate_hz=95, budget_ms=1500, min_steps=2)
        stream = b.open(settings=settings, source=camera(clock, 5 + 4 * 30, rate_hz=95))
        b.clock.run_until(b.over(stream))
        assert overlapped == [True] * 5
        assert b.pixels() == expected(range(125))
        ticks = [event for event in b.events if isinstance(event, TickRecord)]
        assert [record.tick.number for record in ticks] == list(range(len(ticks)))
        assert all(a.done_ns < b.done_ns for a, b in itertools.pairwise(ticks))
        assert 0.9 < b.loop.metrics.summary().utilisation <= 1


def test_the_frames_of_a_tick_are_read_before_the_next_one_is_waited_for():
    seen = []
    with overlapping() as b:
        b.engine.stages_fault = lambda number: seen.append(f"stages {number}")
        b.engine.finish_fault = lambda number: seen.append(f"finished {number}")
        b.engine.before_read = lambda: seen.append("read")
        b.clock.run_until(b.over(b.open(settings=FAST, source=camera(b.clock, 97, rate_hz=60))))
        assert b.pixels() == expected(range(97))
    for number in range(3, 20):  # the second chunk is finished by tick 2, and so on
        at = seen.index(f"finished {number}")
        assert seen[at : at + 3] == [f"finished {number}", "read", f"stages {number + 1}"]


@pytest.mark.parametrize("wait", ["stages_fault", "finish_fault"])
def test_a_tick_that_fails_in_either_wait_ends_its_streams_and_the_loop_goes_on(wait):
    """When the frames of tick 6 are found to be lost, tick 7 of the same stream runs already."""

    def fault(number):
        if number == 6:
            raise RuntimeError("the device said no")

    with overlapping() as b:
        setattr(b.engine, wait, fault)
        bad = b.open("bad", settings=FAST, source=camera(b.clock, 97, rate_hz=60))
        b.clock.run_until(b.over(bad))
        assert str(bad.ended.exception()) == "the device said no"
        assert len(b.engine.ticks) == (7 if wait == "stages_fault" else 8)
        assert b.loop.error is None
        assert b.pixels("bad") == expected(range(len(b.pixels("bad"))))
        good = b.open("good", source=camera(b.clock, 9))
        b.clock.run_until(b.over(good))
        assert b.pixels("good") == expected(range(9))


def test_a_tick_that_fails_leaves_others_in_the_next_one():
    """Ticks of two streams take turns and overlap; the frames of one are lost while the other one's tick runs."""
    shapes, running = [], []

    def note(number, sessions):
        shapes.append([session.spec.stream.width for session in sessions])

    def fault(number):
        if number >= 8 and shapes[number] == [32]:
            running.append(shapes[number + 1 :])
            raise RuntimeError("no memory for a wide picture")

    def wide():
        for timestamp_ns, frame in camera(b.clock, 97, rate_hz=24):
            yield timestamp_ns, np.concatenate([frame, frame], axis=1)

    settings = StreamSettings(rate_hz=24, budget_ms=1500, min_steps=2)
    with overlapping() as b:
        b.engine.fault, b.engine.finish_fault = note, fault
        bad = b.open("bad", settings=settings, source=wide(), width=32)
        b.clock.run(0.06)
        good = b.open("good", settings=settings, source=camera(b.clock, 41, rate_hz=24))
        b.clock.run_until(b.over(bad, good))
        assert running == [[[16]]]
        assert str(bad.ended.exception()) == "no memory for a wide picture"
        assert good.ended.exception() is None
        assert b.pixels("good") == expected(range(41))


def test_what_fails_behind_a_failed_tick_of_the_same_stream_counts_with_it():
    """Two ticks of a stream are in flight, and with the first the second is lost."""

    def fault(number):
        if number in lost:
            raise RuntimeError(f"tick {number} is lost")

    with overlapping() as b:
        b.engine.finish_fault = fault
        lost = {6, 7}
        for _ in range(4):
            stream = b.open(settings=FAST, source=camera(b.clock, 97, rate_hz=60))
            b.clock.run_until(b.over(stream))
            assert str(stream.ended.exception()) == f"tick {min(lost)} is lost"
            assert b.loop._failed_ticks == 1
            good = b.open("good", source=camera(b.clock, 9))
            b.clock.run_until(b.over(good))
            assert b.loop._failed_ticks == 0
            lost = {len(b.engine.ticks) + 6, len(b.engine.ticks) + 7}


@pytest.mark.parametrize("wait", ["stages_fault", "finish_fault"])
def test_ticks_that_fail_in_either_wait_again_and_again_end_the_loop(wait):
    def fault(number):
        raise RuntimeError("the device is gone")

    with overlapping() as b:
        setattr(b.engine, wait, fault)
        streams = [b.open(str(i), settings=FAST, source=camera(b.clock, 41)) for i in range(5)]
        b.clock.run_until(lambda: b.loop.error)
        assert "3 ticks failed one after another: the device is gone" in str(b.loop.error)
        b.clock.run_until(b.over(*streams))
        assert all(stream.ended.exception() is not None for stream in streams)


def test_closing_while_frames_are_being_finished_drops_them_and_nothing_else():
    with overlapping() as b:
        gone = b.open("gone", settings=FAST, source=camera(b.clock, 97, rate_hz=60))
        closed = []

        def close(number):
            if number == 6:  # its frames are about to be finished, and tick 7 of the same stream runs
                closed.append(len(b.engine.ticks))
                gone.close()

        b.engine.finish_fault = close
        b.clock.run_until(b.over(gone))
        assert closed == [8]
        assert gone.ended.exception() is None
        assert {e.reason for e in b.frames if e.reason} == {Reason.CLOSED}
        assert b.pixels("gone") == expected(range(len(b.pixels("gone"))))
        stays = b.open("stays", source=camera(b.clock, 41))
        b.clock.run_until(b.over(stays))
        assert b.pixels("stays") == expected(range(41))


def test_prompts_and_steps_change_between_ticks_that_overlap():
    with overlapping(lambda streams, steps, first: 31.0 * steps) as b:
        settings = StreamSettings(rate_hz=60, budget_ms=2500, steps=2)
        stream = b.open(settings=settings, source=camera(b.clock, 201, rate_hz=60))
        b.clock.run(1.0)
        stream.update("green")
        b.engine.device_ms = lambda streams, steps, first: 45.0 * steps  # too slow for two
        b.clock.run_until(b.over(stream))
        changes = [event for event in b.events if isinstance(event, StepChange)]
        assert (changes[0].before, changes[0].after) == (2, 1)
        numbers = [record.number for record, _ in b.shown["a"]]
        lengths = [(pixel[0] - pixel[2]) % 256 for pixel in b.pixels()]
        changed = lengths.index(len("green"))
        assert lengths == [11] * changed + [5] * (len(lengths) - changed)
        assert numbers == sorted(numbers)
        for record, pixel in b.shown["a"]:
            assert pixel[2] == record.number % 256
            assert pixel[1] == record.steps


def test_a_slow_sink_ends_with_its_reason_and_holds_up_nobody():
    free = threading.Event()

    with bench(config=LoopConfig(sink_frames=8)) as b:
        slow = b.open(sink=lambda frame, record: free.wait(), source=camera(b.clock, 97))
        good = b.open("good", source=camera(b.clock, 41))
        # The slow sink's thread never comes to wait for the clock: it does not count as one that has work to do.
        [stuck] = [t for t in threading.enumerate() if t.name == f"svd2-sink-{slow.id}"]
        stuck.name = "stuck"
        b.clock.run_until(b.over(slow, good))
        assert "too slow: 8 frames wait" in str(slow.ended.exception())
        assert b.pixels("good") == expected(range(41))
        free.set()
        stuck.join()


def test_closing_in_the_middle_of_a_tick_drops_what_is_inside_and_nothing_else():
    clock = FakeClock()
    engine = FakeEngine(clock, lambda streams, steps, first: 100.0)
    with bench(clock=clock, engine=engine) as b:
        gone, stays = b.open("gone", source=camera(b.clock, 97)), b.open("stays", source=camera(b.clock, 41))

        def is_in_a_tick():
            return (calls := b.loop._reader.calls) and f"(stream {gone.id}" in calls[0][0]

        b.clock.run_until(lambda: len(engine.ticks) >= 6 and is_in_a_tick())
        gone.close()
        b.clock.settle()
        assert not gone.ended.done()  # its session is held until the tick is through
        b.clock.run_until(b.over(gone, stays))
        assert gone.ended.exception() is None
        assert {e.reason for e in b.frames if e.stream == gone.id and e.reason} == {Reason.CLOSED}
        assert b.pixels("stays") == expected(range(41))
        with pytest.raises(SessionError, match="it is over"):
            gone.offer(picture(0))


def test_ending_a_stream_by_hand_shows_what_came_until_then():
    with bench() as b:
        stream = b.open(source=camera(b.clock, 1000))
        b.clock.run(2.0)
        stream.end()
        b.clock.run_until(b.over(stream))
        count = len(b.pixels())
        assert 30 <= count <= 34
        assert b.pixels() == expected(range(count))
        assert stream.ended.exception() is None


def test_a_stream_whose_last_frames_are_hopeless_is_over_all_the_same():
    clock = FakeClock()
    engine = FakeEngine(clock)
    with bench(clock=clock, engine=engine) as b:
        stream = b.open(source=camera(b.clock, 41))
        b.clock.run(1.0)
        engine.device_ms = lambda streams, steps, first: 1500.0
        b.clock.run_until(b.over(stream))
        assert any(event.fate is Fate.DROPPED for event in b.frames)
        assert sum(event.stream == stream.id for event in b.frames) == 41
        assert stream.ended.exception() is None


def test_a_stream_that_cannot_be_opened_leaves_nothing():
    with bench() as b:
        b.engine.open_error = ConfigError("no memory for it")
        with pytest.raises(ConfigError, match="no memory"):
            b.open()
        b.clock.run_until(lambda: not b.loop.streams)
        with pytest.raises(ConfigError, match="give milliseconds"):
            b.open(settings=StreamSettings(rate_hz=16, budget_ms=10))
        with pytest.raises(SessionError, match="cannot be met"):
            b.open(settings=StreamSettings(rate_hz=16, budget_ms=190))
        assert not b.loop.streams


def test_only_streams_that_can_share_ticks_are_taken():
    with pytest.raises(ConfigError, match="sequential"):
        settings_for(spec(mode="sequential"), LIVE)
    made = settings_for(spec(), LIVE)
    assert (made.first_frames, made.chunk_frames, made.batch_key) == (5, 4, spec(steps=1).stream)


def run_until_it_hangs(engine: FakeEngine, clock: FakeClock) -> tuple[Bench, int, HangReport]:
    """Returns the bench, its stream, and the only report of an engine that hangs in tick 4; the loop has ended."""
    b = Bench(clock=clock, engine=engine, config=LoopConfig(stop_s=0.05))
    b.loop.start()
    stream = b.open(source=camera(clock, 2000))
    clock.run_until(lambda: b.hangs, limit_s=30)
    clock.run(5)
    [report] = b.hangs
    assert isinstance(report, HangReport)
    assert 10 < report.seconds <= 11.5
    assert report.limit_s == 10
    with pytest.raises(EngineError, match="hangs"):
        b.loop.wait()
    return b, stream, report


def test_a_device_that_hangs_is_reported_once_and_ends_the_loop():
    clock = FakeClock()
    engine = FakeEngine(clock)
    engine.hang = {4}
    b, stream, report = run_until_it_hangs(engine, clock)
    assert f"tick 4 (stream {stream.id})" in str(report)
    assert "svd2-reader" in b.loop.stop()
    assert b.loop.metrics.summary().inside == 0
    clock.run(2e9)  # even this device comes back at last, and the loop's threads end
    wait_for_threads()


def test_frames_that_are_never_finished_are_noticed_once():
    clock = FakeClock()
    engine = FakeEngine(clock)
    engine.hang_behind = {4}
    b, stream, report = run_until_it_hangs(engine, clock)
    assert report.what == f"tick 4 (stream {stream.id})"
    assert len(engine.ticks) <= 6  # two are in flight, and no third one starts
    assert "svd2-reader" in b.loop.stop()
    assert b.loop.metrics.summary().inside == 0
    clock.run(2e9)
    wait_for_threads()


def wait_for_threads():
    for thread in threading.enumerate():
        if thread.name.startswith("svd2-"):
            thread.join(5)
            assert not thread.is_alive()


def test_a_copy_to_the_host_that_hangs_is_noticed_too():
    b = Bench(config=LoopConfig(stop_s=0.05))
    back_ns = b.clock.now_ns() + 100 * SECOND
    b.engine.before_read = lambda: b.clock.sleep_until(back_ns)
    b.loop.start()
    stream = b.open(source=camera(b.clock, 2000))
    b.clock.run_until(lambda: b.hangs)
    assert b.hangs[0].what == f"tick 0 (stream {stream.id})"
    b.loop.stop()
    b.clock.run(101)
    wait_for_threads()


def test_a_slow_tick_that_was_expected_to_be_slow_does_not_hang():
    clock = FakeClock()
    engine = FakeEngine(clock, lambda streams, steps, first: 800.0)
    with bench(clock=clock, engine=engine, config=LoopConfig(hang_s=0.5)) as b:
        b.loop.warm_up(measured(engine, clock))
        stream = b.open(settings=StreamSettings(rate_hz=16, budget_ms=5000), source=camera(clock, 41))
        b.clock.run_until(b.over(stream))
        assert not b.hangs


def test_a_hanging_device_ends_the_process_with_a_line_and_code_3():
    script = """
import itertools, time
from fakes import FakeEngine, picture, spec
from svd2_jax.runtime.stream import feed
from svd2_jax.runtime.loop import LiveLoop
from svd2_jax.runtime.loop_config import HangReport, LoopConfig
from svd2_jax.runtime.types import StreamSettings

def source():
    for i in itertools.count():
        yield None, picture(i)
        time.sleep(0.01)

engine = FakeEngine(device_ms=lambda streams, steps, first: 1.0)
engine.hang = {3}
with LiveLoop(engine, config=LoopConfig(hang_s=0.2)) as loop:
    feed(loop.open(spec(), StreamSettings(rate_hz=100, budget_ms=500), lambda frame, record: None), source())
    loop.wait()
"""
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=tests,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: the device hangs: tick 3 (stream 0) takes ")


def test_a_thread_of_the_loop_that_dies_ends_the_loop_with_the_reason():
    with bench() as b:
        stream = b.open(source=camera(b.clock, 97))
        b.clock.run(0.5)

        def broken(now_ns):
            raise ZeroDivisionError("a bug")

        b.loop._scheduler.show = broken
        b.clock.run_until(lambda: b.loop.error)
        assert "the loop's thread failed: ZeroDivisionError: a bug" in str(b.loop.error)
        b.clock.run_until(b.over(stream))
        assert stream.ended.exception() is b.loop.error


def test_what_waits_for_a_loop_that_dies_is_told():
    changes = []

    with bench() as b:
        stream = b.open(source=camera(b.clock, 97))

        def broken():
            changes.append(stream.update("green"))  # reaches the inbox when nobody takes it any more
            raise ZeroDivisionError("a bug")

        b.loop.inbox.put(broken)
        b.clock.run_until(b.over(stream))
        assert isinstance(changes[0].exception(), SessionError)


def test_a_stream_that_is_ended_while_it_opens_leaves_nothing():
    with bench() as b:
        b.engine.prepare = lambda spec, steps: [stream.end() for stream in b.loop.streams]
        with pytest.raises(SessionError, match="closed while it opened"):
            b.open()
        assert not b.loop.streams


def test_an_observer_that_raises_is_left_out_and_told_of():
    clock = FakeClock()
    seen = []

    def broken(event):
        raise OSError("no disk")

    loop = LiveLoop(FakeEngine(clock), observers=[broken, seen.append], clock=clock)
    loop.start()
    stream = loop.open(spec(), LIVE, lambda frame, record: None)
    feeder = threading.Thread(target=feed, args=(stream, camera(clock, 9)), name="svd2-source")
    feeder.start()
    clock.run_until(stream.ended.done)
    feeder.join()
    loop.stop()
    assert [str(e) for e in loop.observers.errors] == ["no disk"]
    assert sum(isinstance(event, FrameRecord) for event in seen) == 9
    assert any(isinstance(event, TickRecord) for event in seen)


def test_stopping_drops_what_is_inside_and_ends_all_threads():
    with bench() as b:
        streams = [b.open(str(i), source=camera(b.clock, 1000)) for i in range(3)]
        b.clock.run(1.0)
    assert all(stream.ended.exception() is None for stream in streams)
    assert not b.loop.observers.thread.calls
    assert {e.reason for e in b.frames if e.reason} == {Reason.CLOSED}


def test_streams_that_come_and_go_leave_nothing_behind():
    with bench() as b:
        held = []
        for i in range(100):
            source, settings = camera(b.clock, 6, rate_hz=100), StreamSettings(rate_hz=100, budget_ms=1000)
            stream = b.open(settings=settings, source=source, prompt="x" * (i + 1))
            held.append(weakref.ref(b.loop._states[stream.id]))
            if i % 3 == 0:
                b.clock.run(0.05)
                stream.close()
            b.clock.run_until(b.over(stream))
        b.clock.settle()
        del stream
        gc.collect()
        assert sum(ref() is not None for ref in held) == 0
        loop = b.loop
        assert not loop._states
        assert [len(box) for box in (loop.inbox, loop.observers.thread.jobs)] == [0, 0]
        assert not any(worker.calls for worker in loop._workers)
        assert sum(worker.is_alive() for worker in loop._workers) == 4  # no stream's
        assert len(loop._workers) < 10
        assert b.engine.open_sessions == 0


def test_pixels_are_freed_when_their_fate_is_known():
    with bench() as b:
        stream = b.open(source=camera(b.clock, 200))
        state = b.loop._states[stream.id]
        for _ in range(20):
            b.clock.run(0.5)
            assert sum(number >= state.next_frame for number in state.pixels) <= 8  # not entered yet
            assert len(state.pixels) <= 24
        b.clock.run_until(b.over(stream))
        assert not state.pixels
        assert not state.due


def test_pixels_of_frames_that_are_dropped_when_they_are_finished_are_freed():
    """A tick that takes as long as the budget makes frames late; only the newest late one of a chunk is shown."""
    clock = FakeClock()
    engine = FakeEngine(clock)
    with bench(clock=clock, engine=engine) as b:
        stream = b.open(source=camera(b.clock, 200))
        state = b.loop._states[stream.id]
        b.clock.run(2.0)
        for _ in range(3):
            engine.device_ms = lambda streams, steps, first: 950.0
            b.clock.run(2.0)
            engine.device_ms = lambda streams, steps, first: 20.0
            b.clock.run(1.5)
        assert any(e.fate is Fate.DROPPED and e.done_ns is not None for e in b.frames)
        assert set(state.pixels) <= {n for n in range(state.arrived)} - {e.number for e in b.frames}
        b.clock.run_until(b.over(stream))


def test_it_runs_on_the_real_clock():
    engine = FakeEngine(device_ms=lambda streams, steps, first: 1.0)
    shown = []

    def source():
        for i in range(29):
            yield None, picture(i)
            time.sleep(0.005)

    before = set(threading.enumerate())
    with LiveLoop(engine) as loop:
        settings = StreamSettings(rate_hz=200, budget_ms=30_000)
        stream = loop.open(spec(), settings, lambda frame, record: shown.append(record.number))
        feed(stream, source())
        stream.result(timeout_s=60)
        assert loop.wait()
    assert shown == sorted(shown)
    summary = loop.metrics.summary(stream.id)
    assert summary.is_balanced
    assert len(shown) + summary.frames_dropped == summary.frames_in == 29
    assert set(threading.enumerate()) == before
    with pytest.raises(EngineError, match="stopped"):
        loop.open(spec(), LIVE, lambda frame, record: None)
