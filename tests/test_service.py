"""The live service: several engines behind one door, streams as handles, and an orderly end."""

import asyncio
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from fakes import SMALL, FakeClock, FakeEngine, camera, expected, picture, spec

import svd2_jax
from svd2_jax.errors import ConfigError, SessionError, Svd2Error
from svd2_jax.runtime.loop_config import LoopConfig
from svd2_jax.runtime.scheduler import PolicyConfig, Refused
from svd2_jax.runtime.stream import Life
from svd2_jax.runtime.types import Fate, StreamSettings
from svd2_jax.service import LiveService

LIVE = StreamSettings(rate_hz=16, budget_ms=1000)


@contextmanager
def serving(engines=1, device_ms=lambda streams, steps, first: 20.0, batch_sizes=(1, 2, 4), **options):
    """A service of fake engines; it is stopped while the time goes on, and nothing of it is left."""
    clock, before = FakeClock(), set(threading.enumerate())
    made = [FakeEngine(clock, device_ms, batch_sizes) for _ in range(engines)]
    service = LiveService(made, clock=clock, **options)
    service.start()
    try:
        yield service, clock, made
    finally:
        stuck = meanwhile(clock, service.stop)
    assert stuck == ()
    assert set(threading.enumerate()) == before
    assert [engine.open_sessions for engine in made] == [0] * engines
    assert service.metrics.summary().is_balanced
    assert service.metrics.summary().inside == 0


def meanwhile(clock, function):
    """Calls a function that waits for others in a thread, while the time goes on."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    while thread.is_alive():
        clock.run(0.05)
    return results[0]


def warm_up(service, clock, steps):
    """Measures in a thread, as that takes time of the fake clock."""
    thread = threading.Thread(target=lambda: service.warm_up(spec(), steps), name="svd2-warm-up")
    thread.start()
    clock.run_until(lambda: not thread.is_alive(), limit_s=300)


def values(taken):
    return [tuple(int(x) for x in frame[0, 0]) for frame in taken]


def test_a_source_is_re_drawn_from_its_first_to_its_last_frame():
    taken = []
    with serving() as (service, clock, _):
        stream = service.open(spec(), LIVE, lambda frame, record: taken.append(frame), camera(clock, 21))
        clock.run_until(stream.ended.done)
        stream.result()
        assert values(taken) == expected(range(21))


def test_several_engines_share_the_streams_and_no_engine_gets_two_before_each_has_one():
    with serving(engines=3) as (service, clock, engines):
        taken = [[] for _ in range(6)]
        streams = [
            service.open(
                spec(), LIVE, lambda frame, _, i=i: taken[i].append(frame), camera(clock, 21, first=30 * i)
            )
            for i in range(6)
        ]
        assert [engine.open_sessions for engine in engines] == [2, 2, 2]
        assert len({stream.id for stream in streams}) == 6
        clock.run_until(lambda: all(stream.ended.done() for stream in streams))
        for i in range(6):
            assert values(taken[i]) == expected(range(30 * i, 30 * i + 21))
        assert service.metrics.summary().frames_in == 6 * 21


def test_a_warm_up_measures_the_stages_of_every_engine_before_its_ticks():
    with serving(engines=2) as (service, clock, engines):
        assert service.splits == ()
        measured = []

        def measure_split(spec):
            measured.append(len(engines[1].ticks))
            return (3, 1)

        engines[1].measure_split = measure_split
        warm_up(service, clock, (1, 2))
        assert service.splits == (None, (3, 1))
        assert measured == [0]


def test_a_stream_goes_where_there_is_room_and_is_refused_when_all_engines_are_full():
    # One stream of 16 FPS with one step of 150 ms needs 60 % of a device.
    with serving(engines=2, device_ms=lambda streams, steps, first: 150.0 * streams * steps) as (
        service,
        clock,
        engines,
    ):
        warm_up(service, clock, (1, 2))
        for _ in range(2):
            service.open(spec(), LIVE, lambda frame, record: None)
        assert [engine.open_sessions for engine in engines] == [1, 1]
        with pytest.raises(Refused, match="the device is full"):
            service.open(spec(), LIVE, lambda frame, record: None)


def test_an_engine_that_has_failed_is_left_out():
    with serving(engines=2) as (service, clock, engines):

        def fault(number, sessions):
            raise RuntimeError("the device is gone")

        engines[0].fault = fault
        for _ in range(3):
            service.open(spec(), LIVE, lambda frame, record: None, camera(clock, 9))
            clock.run(1.0)
            if not service.is_healthy:
                break
        clock.run_until(lambda: not service.is_healthy)
        taken = []
        stream = service.open(spec(), LIVE, lambda frame, record: taken.append(frame), camera(clock, 9))
        clock.run_until(stream.ended.done)
        assert values(taken) == expected(range(9))
        assert service.error is not None


def test_draining_shows_what_is_there_and_takes_nothing_more():
    taken = []
    with serving() as (service, clock, _):
        stream = service.open(spec(), LIVE, lambda frame, record: taken.append(frame), camera(clock, 1000))
        clock.run(2.0)
        assert meanwhile(clock, lambda: service.drain(10))
        assert stream.life is Life.CLOSED
        assert values(taken) == expected(range(len(taken)))
        assert 30 <= len(taken) <= 34
        with pytest.raises(SessionError, match="takes nothing more: it is over"):
            stream.offer(picture(0))


def test_a_viewer_that_is_slow_loses_its_oldest_frames_and_the_stream_goes_on():
    free = threading.Event()

    class Viewer:
        when_slow = svd2_jax.WhenSlow.DROP_OLDEST

        def __init__(self):
            self.numbers = []

        def __call__(self, frame, record):
            self.numbers.append(record.number)
            free.wait()

    with serving(config=LoopConfig(sink_frames=8)) as (service, clock, _):
        viewer = Viewer()
        stream = service.open(spec(), LIVE, viewer)
        (thread,) = [t for t in threading.enumerate() if t.name == f"svd2-sink-{stream.id}"]
        thread.name = "stuck"  # it does not come to wait for the clock, see FakeClock
        for i in range(41):
            stream.offer(picture(i))
            clock.run(1 / 16)
        stream.end()
        clock.run(2.0)
        assert viewer.numbers == [0]
        free.set()
        thread.name = f"svd2-sink-{stream.id}"
        clock.run_until(stream.ended.done)
        stream.result()
        assert viewer.numbers == [0, *range(33, 41)]  # the newest 8
        summary = service.metrics.summary(stream.id)
        assert summary.dropped == {"sink": 32}
        assert summary.late == 8  # they were due long before the viewer took them


def test_a_file_that_is_slow_ends_its_stream_and_its_frames_are_accounted_for():
    free = threading.Event()
    with serving(config=LoopConfig(sink_frames=8)) as (service, clock, _):
        stream = service.open(spec(), LIVE, lambda frame, record: free.wait(), camera(clock, 97))
        (thread,) = [t for t in threading.enumerate() if t.name == f"svd2-sink-{stream.id}"]
        thread.name = "stuck"
        clock.run_until(stream.ended.done)
        assert "too slow: 8 frames wait" in str(stream.ended.exception())
        assert set(service.metrics.summary(stream.id).dropped) == {"sink", "closed"}
        free.set()
        thread.join()


def test_noise_scale_and_steps_change_at_the_next_chunk_and_nothing_is_lost():
    taken = []
    with serving() as (service, clock, _):
        settings = StreamSettings(rate_hz=16, budget_ms=2000, steps=2, min_steps=2)
        sink = lambda frame, record: taken.append((frame, record))  # noqa: E731
        stream = service.open(spec(), settings, sink, camera(clock, 81), steps=(1, 2, 3))
        clock.run(1.5)
        change = stream.update(noise_scale=0.5, steps=3, min_steps=3)
        clock.run(1.5)
        assert change.result() is None
        assert stream.settings.steps == 3
        again = stream.update(steps=1, min_steps=1)
        clock.run_until(stream.ended.done)
        assert again.done()
        assert stream.spec.noise_scale == 0.5
        steps = [record.steps for _, record in taken]
        assert [record.number for _, record in taken] == list(range(81))
        assert sorted(set(steps)) == [1, 2, 3]
        assert all(int(frame[0, 0, 1]) == record.steps for frame, record in taken)
        assert {record.fate for _, record in taken} == {Fate.SHOWN}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "x", "blend_chunks": -1}, "blend_chunks must be at least 0"),
        ({"prompt": "x", "blend_chunks": "z"}, "blend_chunks must be a whole number, at least 0; got 'z'"),
        ({"steps": "z"}, "steps must be a whole number, at least 1; got 'z'"),
        ({"noise_scale": 0.0}, r"noise_scale must be in \(0, 1\]"),
        ({"noise_scale": "much"}, "noise_scale must be a number"),
        ({"steps": 4}, r"was opened for 1, 2 denoising steps, and 1 to 4 are asked for: name them"),
        ({"min_steps": 3}, "min_steps must be 1 to steps=2, got 3"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_a_change_that_cannot_be_is_refused_and_changes_nothing(change, message):
    taken = []
    with serving() as (service, clock, _):
        stream = service.open(spec(), LIVE, lambda frame, record: taken.append(frame), camera(clock, 21))
        before = stream.spec, stream.settings
        with pytest.raises(ConfigError, match=message):
            stream.update(**change)
        assert (stream.spec, stream.settings) == before
        clock.run_until(stream.ended.done)
        assert values(taken) == expected(range(21))


def test_a_change_of_a_stream_that_is_over_says_so():
    with serving() as (service, clock, _):
        stream = service.open(spec(), LIVE, lambda frame, record: None, camera(clock, 5))
        clock.run_until(stream.ended.done)
        with pytest.raises(SessionError, match="it is over"):
            stream.update(prompt="green")


def test_a_change_is_told_when_the_stream_ends_before_it():
    with serving() as (service, clock, engines):
        encoding = threading.Event()
        engines[0].prepare_prompt = lambda prompt: encoding.wait()
        stream = service.open(spec(), LIVE, lambda frame, record: None)
        (thread,) = [t for t in threading.enumerate() if t.name == "svd2-encoder"]
        thread.name = "encoding"
        change = stream.update(prompt="green")
        stream.close()
        clock.run(0.1)
        with pytest.raises(SessionError, match="ended before the change"):
            change.result(0)
        encoding.set()
        thread.name = "svd2-encoder"


def test_streams_live_in_asyncio():
    engine = FakeEngine(device_ms=lambda *_: 1.0)

    async def watch(service):
        frames, loop = asyncio.Queue(), asyncio.get_running_loop()
        settings = StreamSettings(rate_hz=100, budget_ms=20_000)
        sink = lambda frame, record: loop.call_soon_threadsafe(frames.put_nowait, frame)  # noqa: E731
        stream = await asyncio.to_thread(service.open, spec(), settings, sink)
        for i in range(13):
            stream.offer(picture(i))
            await asyncio.sleep(0.005)
        await asyncio.wrap_future(stream.update(prompt="green"))
        stream.end()
        await asyncio.wrap_future(stream.ended)
        return [frames.get_nowait() for _ in range(frames.qsize())]

    with LiveService(engine) as service:
        assert values(asyncio.run(watch(service))) == expected(range(13))


def test_a_frame_too_many_for_the_loop_is_refused_and_not_kept():
    """Frames come faster than the loop's thread takes them."""
    with serving() as (service, clock, _):
        stream = service.open(spec(), LIVE, lambda frame, record: None)
        held, go_on = threading.Event(), threading.Event()
        service.loops[0].inbox.put(lambda: (held.set(), go_on.wait()))
        held.wait()
        for i in range(256):
            stream.offer(picture(i))
        with pytest.raises(SessionError, match="256 messages wait for the loop already"):
            stream.offer(picture(0))
        go_on.set()
        clock.settle()
        assert service.metrics.summary(stream.id).frames_in == 256


def test_a_service_needs_an_engine():
    with pytest.raises(ConfigError, match="at least one engine"):
        LiveService([])
    for wrong in (None, "tiny", [FakeEngine(), "tiny"]):
        with pytest.raises(ConfigError, match=r"takes engines, as svd2_jax\.load\(\) makes them, got"):
            LiveService(wrong)


def sink(frame, record):
    pass


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.open(spec(), {"rate_hz": 8}, sink=print), "settings must be StreamSettings, got dict; as in"),
        (lambda s: s.open(spec(), LIVE, sink="out.mp4"), "sink must be a function .*, got 'out.mp4'"),
        (lambda s: s.open(spec(), LIVE, sink, source=5), "the frames of a source must be several pairs .*; got 5"),
        (lambda s: s.open(spec(), LIVE, sink, source="in.mp4"), "must be several pairs .*; got 'in.mp4'"),
        (lambda s: s.open(spec(), LIVE, sink, steps=2), r"steps must be several numbers, as in \(1, 2\); got 2"),
        (lambda s: s.prepare_prompts(5), "prompts must be several texts, .*; got 5"),
        (lambda s: s.prepare_prompts("abc"), "prompts must be several texts, .*; got 'abc'"),
        (lambda s: s.prepare_prompts([5]), "the prompt must be text, got int"),
        (lambda s: s.wait("a"), "timeout_s must be a number of seconds, or None; got 'a'"),
        (lambda s: s.drain("x"), "timeout_s must be a number of seconds, or None; got 'x'"),
        (lambda s: s.metrics.summary(99), r"no numbers of stream 99 are stored; those stored are of \[\]"),
        (lambda s: StreamSettings(8, "1000"), "budget_ms must be a number above 0"),
        (lambda s: StreamSettings(8, 1000, steps="2"), "steps must be a whole number, at least 1; got '2'"),
    ],
)  # fmt: skip
def test_a_service_refuses_wrong_arguments_in_one_line(call, message):
    with serving() as (service, _, engines):
        with pytest.raises(Svd2Error, match=message):
            call(service)
        assert not engines[0].prepared_prompts


def test_a_source_of_bare_frames_is_told_what_a_source_gives():
    with serving() as (service, clock, _):
        stream = service.open(spec(), LIVE, sink, iter([picture(0), picture(1)]))
        clock.run_until(stream.ended.done)
        with pytest.raises(
            SessionError, match=r"gives pairs \(timestamp in ns or None, frame\), got ndarray"
        ):
            stream.result()


def test_a_timestamp_that_is_no_number_ends_its_stream_and_not_the_service():
    with serving() as (service, _, _):
        stream = service.open(spec(), LIVE, sink)
        with pytest.raises(SessionError, match="a timestamp must be a whole number of ns, or None; got '1'"):
            stream.offer(picture(0), "1")
        assert service.is_healthy


def test_frames_of_another_kind_are_refused_by_name():
    with serving(policy=PolicyConfig(admit_below=None)) as (service, _, _):
        stream = service.open(spec(), LIVE, lambda frame, record: None)
        with pytest.raises(SessionError, match="a frame must be a numpy array"):
            stream.offer([[0]])
        with pytest.raises(SessionError, match="it ended with: a frame must be"):
            stream.offer(np.zeros((SMALL.height, SMALL.width, 3), np.uint8))
