"""Live runs around a fake engine: files and cameras in, video files and metrics out."""

import dataclasses
import functools
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
import types
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from fakes import SMALL, FakeEngine, spec

from svd2_jax import media
from svd2_jax.cli import live_run as live
from svd2_jax.cli.live_run import LiveRun
from svd2_jax.cli.terminal import TypedLines
from svd2_jax.errors import MediaError, SessionError
from svd2_jax.media import sources
from svd2_jax.media.sinks import VideoSink
from svd2_jax.runtime.metrics import Metrics
from svd2_jax.runtime.scheduler import PolicyConfig
from svd2_jax.runtime.types import Fate, FrameRecord, PromptRecord, StreamSettings

HEIGHT, WIDTH = SMALL.height, SMALL.width
FAST = 200.0  # frames per second: a test need not last as long as a video
SETTINGS = StreamSettings(rate_hz=FAST, budget_ms=2000.0)
TESTSRC = f"lavfi:testsrc=size={WIDTH}x{HEIGHT}:rate=16"  # faster than its rate, as nothing holds it


@pytest.fixture
def clip(tmp_path):
    """A file of 33 frames."""
    path = tmp_path / "in.mkv"
    with media.VideoWriter(path, FAST, HEIGHT, WIDTH) as writer:
        writer.write(np.stack(list(media.synthetic_clip(33, HEIGHT, WIDTH))))
    return path


def plan(clip, again=False, **changes):
    def source(i, stop):
        return sources.play_file(clip, HEIGHT, WIDTH, None, again, stop)

    return dataclasses.replace(LiveRun((spec(),), SETTINGS, source), **changes)


def run(live_run, engine=None):
    """Runs it; nobody is refused for what ticks were measured to take, as the machine may be busy with other things."""
    said, policy = [], PolicyConfig(admit_below=None)
    ended_well = live.run([engine or FakeEngine(device_ms=lambda *_: 1.0)], live_run, policy, said.append)
    return ended_well, "\n".join(said)


def frames_of(path):
    with media.VideoReader(path) as reader:
        return list(reader)


def record(number, arrived=None, stamped=None):
    """A frame of a stream of 16 FPS, by default in its own time; times in frames."""
    times = [
        None if at is None else round(at * 1e9 / 16)
        for at in (stamped, number if arrived is None else arrived)
    ]
    return FrameRecord(0, number, times[0], times[1], 0, Fate.SHOWN)


def test_a_file_is_played_to_its_end_and_every_frame_is_accounted_for(clip, tmp_path, capsys):
    live_run = plan(
        clip, output=tmp_path / "out.mp4", metrics=tmp_path / "out.jsonl", chart=tmp_path / "out.png"
    )
    ended_well, _ = run(live_run)
    assert ended_well
    assert len(frames_of(tmp_path / "out.mp4")) == 33
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(line["number"] for line in lines if line["kind"] == "frame") == list(range(33))
    assert lines[-1]["final"]
    assert (tmp_path / "out.png").stat().st_size > 0
    out = capsys.readouterr().out
    assert "out.mp4: 33 frames at 200 fps" in out
    assert "out.jsonl" in out
    assert "out.png" in out


def test_a_run_says_how_many_blocks_each_stage_has_and_what_is_loaded(clip):
    engine = FakeEngine(device_ms=lambda *_: 1.0)
    engine.measure_split = lambda spec: (3, 1)
    _, said = run(plan(clip, describe=lambda engine: f"{len(engine.ticks) > 0}"), engine)
    assert "\nblocks per stage, by measured times: 3+1\nTrue\n" in said


@pytest.mark.parametrize("is_asked", [False, True])
def test_a_budget_that_nobody_asked_for_is_made_long_enough_for_a_slow_device(clip, is_asked):
    short = dataclasses.replace(SETTINGS, budget_ms=50.0)
    live_run, engine = (
        plan(clip, settings=short, is_budget_asked=is_asked),
        FakeEngine(device_ms=lambda *_: 60.0),
    )
    if is_asked:
        with pytest.raises(SessionError, match="a latency budget of 50 ms cannot be met"):
            run(live_run, engine)
    else:
        ended_well, said = run(live_run, engine)
        assert ended_well
        assert re.search(
            r"\nthis device needs up to \d+ ms .* the latency budget is \d+ ms, not 50 ms\n", said
        )


def test_several_streams_have_a_file_each(clip, tmp_path):
    specs = (spec("one"), spec("another prompt"), spec("one"))
    ended_well, _ = run(plan(clip, specs=specs, output=tmp_path / "out.mp4"))
    assert ended_well
    assert sorted(p.name for p in tmp_path.glob("out*")) == ["out-0.mp4", "out-1.mp4", "out-2.mp4"]


def test_a_looped_file_ends_when_its_time_is_over(clip, tmp_path):
    ended_well, _ = run(plan(clip, again=True, seconds=0.5, output=tmp_path / "out.mp4"))
    assert ended_well
    assert frames_of(tmp_path / "out.mp4")


def interrupted(clip, *delays, number=signal.SIGINT):
    """A source that lets Ctrl-C be pressed so many seconds after its first frame was asked for."""

    def source(i, stop):
        for delay in delays:
            signals = (threading.main_thread().ident, number)
            threading.Timer(delay, signal.pthread_kill, signals).start()
        yield from sources.play_file(clip, HEIGHT, WIDTH, None, True, stop)

    return source


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_finish_what_is_in_flight_and_leave_a_playable_file(
    clip, tmp_path, number
):
    source = interrupted(clip, 0.5, number=number)
    ended_well, said = run(plan(clip, source=source, output=tmp_path / "out.mp4"))
    assert ended_well
    assert "finishing what is in flight" in said
    assert frames_of(tmp_path / "out.mp4")


def test_a_second_ctrl_c_drops_what_is_in_flight(clip):
    settings = dataclasses.replace(SETTINGS, rate_hz=100.0, budget_ms=60_000.0)  # shown long after they came
    engine = FakeEngine(device_ms=lambda *_: 400.0, batch_sizes=(1,))
    ended_well, said = run(plan(clip, source=interrupted(clip, 1.0, 1.4), settings=settings), engine)
    assert ended_well
    assert "interrupted again" in said


def test_a_stream_that_fails_is_named_and_the_others_are_kept(clip, tmp_path):
    def source(i, stop):
        if i == 1:
            return iter([(0, np.zeros((HEIGHT, WIDTH + 16, 3), np.uint8))])
        return sources.play_file(clip, HEIGHT, WIDTH, None, False, stop)

    ended_well, said = run(plan(clip, specs=(spec(),) * 2, source=source, output=tmp_path / "out.mp4"))
    assert not ended_well
    assert "stream 1 ended early: a frame must be uint8" in said
    assert len(frames_of(tmp_path / "out-0.mp4")) == 33
    assert not (tmp_path / "out-1.mp4").exists()


@pytest.mark.parametrize("name", ["out.gif", "nowhere/out.mp4"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work_begins(clip, tmp_path, name):
    with pytest.raises(MediaError, match=r"format '.gif'|does not exist"):
        plan(clip, output=tmp_path / name).check()


class TypedInto:
    """Streams 7, 8 and 9 that take prompts. 8 is over; 9 has shown frames after 1000 ms each."""

    def __init__(self):
        self.calls, self.metrics = [], Metrics()
        self.streams = [
            types.SimpleNamespace(id=stream, update=functools.partial(self.update, stream))
            for stream in (7, 8, 9)
        ]
        for stream in self.streams:
            self.metrics.opened(stream.id, SETTINGS)
        for number in range(8):
            arrival = round(number * 1e9 / 8)
            self.metrics(FrameRecord(9, number, None, arrival, 0, Fate.SHOWN, shown_ns=arrival + 10**9))

    def update(self, stream, prompt, blend_chunks):
        done = Future()
        if stream == 8:
            done.set_exception(RuntimeError("it is over"))
        else:
            self.calls.append((stream, prompt, blend_chunks))
            done.set_result(None)
        return done


def typed(*lines, blend_chunks=4, remark=lambda prompt: None):
    """What each line did, and what was answered."""
    into = TypedInto()
    settings = StreamSettings(rate_hz=8, budget_ms=2000)
    live_run = LiveRun((spec(),) * 3, settings, lambda i, stop: [], blend_chunks=blend_chunks, remark=remark)
    streams = dict(enumerate(into.streams))
    said = [live._change_prompt(into.metrics, live_run, streams, line) for line in lines]
    return into.calls, said


def test_typed_lines_change_the_prompt_of_all_streams_or_of_one():
    calls, said = typed("a cat", "2: a dog", " 2 :a bird ")
    assert calls == [(7, "a cat", 4), (9, "a cat", 4), (9, "a dog", 4), (9, "a bird", 4)]
    # Stream 0 has shown nothing yet, so its latency budget counts, 2 s.
    seen = ["1.9 s, complete after 4 chunks (3.4 s)", "0.9 s, complete after 4 chunks (2.4 s)"]
    assert said == [
        f"streams 0, 2: 'a cat' from the next chunk, seen in about {seen[0]}\nnot taken: stream 1: it is over",
        f"stream 2: 'a dog' from the next chunk, seen in about {seen[1]}",
        f"stream 2: 'a bird' from the next chunk, seen in about {seen[1]}",
    ]
    assert typed("2: a cat", blend_chunks=0)[1] == [
        "stream 2: 'a cat' from the next chunk, seen in about 0.9 s"
    ]


@pytest.mark.parametrize("line", ["a: b", "12:30 in the morning", "at 5: tea", "5 o'clock: tea", "2; a dog"])
def test_a_line_that_only_looks_as_if_it_began_with_a_stream_is_a_prompt(line):
    assert typed(line)[0] == [(7, line, 4), (9, line, 4)]


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        (
            "5: winter",
            "not taken: no stream 5: this run has streams 0, 1, 2; a prompt alone is for all of them",
        ),
        (
            "5:winter",
            "not taken: no stream 5: this run has streams 0, 1, 2; a prompt alone is for all of them",
        ),
        ("-1: x", "not taken: no stream -1: this run has streams 0, 1, 2; a prompt alone is for all of them"),
        ("7:", "not taken: no stream 7: this run has streams 0, 1, 2; a prompt alone is for all of them"),
        ("0:", "not taken: no prompt behind '0:'; type for example `0: a pencil sketch`"),
        ("2:  ", "not taken: no prompt behind '2:'; type for example `2: a pencil sketch`"),
    ],
)
def test_a_line_for_a_stream_that_is_not_there_or_without_a_prompt_changes_nothing(line, answer):
    assert typed(line) == ([], [answer])


def test_a_remark_on_a_typed_prompt_follows_the_answer():
    _, (said,) = typed("2: anime", remark=lambda prompt: f"note: what is {prompt}?")
    assert said.splitlines()[1:] == ["note: what is anime?"]


def test_a_prompt_is_seen_when_the_first_frame_of_its_chunk_is_shown():
    # The next chunk of 4 begins half a chunk's time (250 ms) from now on average; its first frame came 375 ms before.
    assert live.prompt_delay_s(1000, 8, 4) == (0.875, 0.875)
    assert live.prompt_delay_s(1000, 8, 4, blend_chunks=4) == (0.875, 0.875 + 3 * 0.5)
    assert live.prompt_delay_s(50, 8, 4, blend_chunks=1) == (0, 0)  # not in the past


def test_it_is_said_when_a_new_prompt_is_being_shown():
    said = []
    watch = live._PromptWatch(
        dict(enumerate(types.SimpleNamespace(id=stream) for stream in (7, 9))), said.append
    )
    frame = functools.partial(FrameRecord, 9, timestamp_ns=None, arrival_ns=0, deadline_ns=0)
    watch(frame(number=4, fate=Fate.SHOWN, shown_ns=1))
    watch(PromptRecord(9, 0, "winter", frame=9))
    watch(frame(number=8, fate=Fate.SHOWN, shown_ns=1))
    watch(frame(number=9, fate=Fate.DROPPED))
    assert said == []
    for number in (10, 11):
        watch(frame(number=number, fate=Fate.LATE, shown_ns=1))
    assert said == ["stream 1: 'winter' is being shown"]


def test_the_end_of_an_input_is_said(clip):
    _, said = run(plan(clip, specs=(spec(),) * 2))
    for i in range(2):
        assert said.splitlines().count(f"stream {i}: the input has ended; finishing what is in flight") == 1


def test_a_camera_that_is_gone_is_told_of(clip):
    def source(i, stop):
        yield 0, np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        raise MediaError("the camera is gone")

    ended_well, said = run(plan(clip, source=source))
    assert not ended_well
    assert "stream 0: the input has failed: the camera is gone" in said.splitlines()


def test_the_end_of_the_time_is_said(clip):
    _, said = run(plan(clip, again=True, seconds=0.5))
    assert "0.5 s are over; finishing what is in flight" in said
    assert "the input has ended" not in said


def test_a_run_without_a_terminal_says_now_and_then_how_it_goes(clip, monkeypatch):
    monkeypatch.setattr(live, "TELL_S", 0.3)
    _, said = run(plan(clip, again=True, seconds=1.2))
    lines = [line for line in said.splitlines() if " frames in, " in line]
    assert 2 <= len(lines) <= 4
    assert re.fullmatch(
        r"\d+ s: \d+ frames in, \d+ shown, \d+ late, \d+ dropped; [\d.]+ FPS in all(, latency \d+ ms)?, "
        r"device busy \d+ %",
        lines[-1],
    )


def test_a_run_without_an_output_says_at_its_end_that_no_video_was_kept(clip, tmp_path, capsys):
    run(plan(clip, metrics=tmp_path / "out.jsonl"))
    assert "no video was kept; --output FILE keeps it" in capsys.readouterr().out
    run(plan(clip, output=tmp_path / "out.mp4"))
    assert "no video was kept" not in capsys.readouterr().out


def test_a_video_that_was_not_written_for_want_of_frames_is_said_to_be_missing(clip, tmp_path, capsys):
    live_run = plan(clip, source=lambda i, stop: iter(()), output=tmp_path / "out.mp4")
    assert run(live_run)[0]
    assert f"{tmp_path / 'out.mp4'}: not written, as no frame was shown" in capsys.readouterr().out


def test_a_line_that_waits_in_a_pipe_is_taken_when_the_streams_are_live(clip, capsys, monkeypatch):
    read, write = os.pipe()
    os.write(write, b"winter\n")
    os.close(write)
    with os.fdopen(read) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        _, said = run(plan(clip, again=True, seconds=1.0, blend_chunks=0))
    lines = said.splitlines()
    live_at = next(i for i, line in enumerate(lines) if line.startswith("live; "))
    assert lines[live_at + 1].startswith("stream 0: 'winter' from the next chunk, seen in about ")
    assert "stream 0: 'winter' is being shown" in lines
    assert "0: winter" in capsys.readouterr().out


def test_the_table_of_a_run_shows_the_prompt_whole_where_there_is_room(clip, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    run(plan(clip, specs=(spec("a pencil sketch of an old harbour"),)))
    assert "0: a pencil sketch of an old harbour " in capsys.readouterr().out


def until(is_so):
    for _ in range(2000):
        if is_so():
            return
        time.sleep(0.005)
    raise AssertionError("not so after 10 s")


def test_lines_come_from_a_pipe():
    read, write = os.pipe()
    lines = []
    with os.fdopen(read) as stream, TypedLines(lines.append, lambda text: None, stream):
        os.write(write, b"a red house\n\n  a blue")
        os.write(write, b" one\nand the last")
        os.close(write)
        until(lambda: len(lines) == 3)
    assert lines == ["a red house", "a blue one", "and the last"]


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="pseudo-terminals are there on Unix only")
def test_what_was_typed_on_a_terminal_before_is_taken():
    ours, theirs = os.openpty()
    lines = []
    with os.fdopen(theirs) as terminal:
        os.write(ours, b"winter\n")
        with TypedLines(lines.append, lambda text: None, terminal):
            until(lambda: lines)
    os.close(ours)
    assert lines == ["winter"]


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="pseudo-terminals are there on Unix only")
def test_what_is_typed_on_a_terminal_is_shown_before_it_is_taken():
    ours, theirs = os.openpty()
    lines, shown = [], []
    with os.fdopen(theirs) as terminal, TypedLines(lines.append, shown.append, terminal):
        os.write(ours, "caf\u00e9\x7f\x04e\x1b[A\n".encode())
        until(lambda: lines)
    os.close(ours)
    assert lines == ["cafe"]  # a character is deleted whole, an arrow and Ctrl-D are none
    assert shown == ["c", "ca", "caf", "caf\u00e9", "caf", "cafe"]


@pytest.mark.parametrize(
    ("records", "levels"),
    [
        # Dropped frames are held by the one before; what comes first is the first frame.
        ([record(1), record(2), record(5)], [10, 20, 20, 20, 50]),
        # Duplicates were dropped: numbers run ahead of time.
        ([record(0, 0), record(4, 1), record(8, 2)], [0, 40, 80]),
        # A camera of twice the rate: what comes in time for a frame that is taken already is left out.
        ([record(0, 0), record(1, 0.5), record(2, 1), record(3, 1.6), record(4, 2)], [0, 20, 30]),
        # Network jitter, told by timestamps; then a clock that jumps by an hour.
        ([record(0, 0, 0), record(1, 1.7, 1), record(2, 2, 2), record(3, 3, 57600)], [0, 10, *[20] * 17, 30]),
    ],
)
def test_a_video_has_each_frame_at_its_time(tmp_path, records, levels):
    sink = VideoSink(tmp_path / "out.mkv", 16, HEIGHT, WIDTH)
    sink.open()
    for one in records:
        sink(np.full((HEIGHT, WIDTH, 3), 30 + 10 * one.number, np.uint8), one)
    assert sink.close() is None
    seen = [float(frame.mean()) - 30 for frame in frames_of(tmp_path / "out.mkv")]
    np.testing.assert_allclose(seen, levels, atol=3)  # the codec is lossy


def test_a_video_without_a_frame_is_not_kept(tmp_path):
    sink = VideoSink(tmp_path / "out.mp4", 16, HEIGHT, WIDTH)
    sink.open()
    assert sink.close() is None
    assert not list(tmp_path.iterdir())


def test_each_video_is_kept_whatever_becomes_of_the_others(clip, tmp_path):
    outputs = live._Outputs(plan(clip, specs=(spec(),) * 2, output=tmp_path / "out.mp4"), Metrics())
    outputs.open()
    for sink in outputs.sinks:
        sink(np.zeros((HEIGHT, WIDTH, 3), np.uint8), record(0))
    (tmp_path / "out-0.mp4").mkdir()  # so that it cannot be moved to its place
    (problem,) = outputs.close()
    assert "out-0.mp4" in problem
    assert [sink.is_kept for sink in outputs.sinks] == [False, True]
    assert len(frames_of(tmp_path / "out-1.mp4")) == 1


def test_a_listener_who_is_gone_does_not_cost_the_video(clip, tmp_path):
    def gone(text):
        raise BrokenPipeError

    live_run = plan(clip, output=tmp_path / "out.mp4")
    assert live.run([FakeEngine(device_ms=lambda *_: 1.0)], live_run, PolicyConfig(), gone)
    assert len(frames_of(tmp_path / "out.mp4")) == 33


def test_a_stream_that_is_not_let_in_leaves_the_others_running(clip, tmp_path):
    def source(i, stop):
        if i == 0:
            raise MediaError("no such camera")
        return sources.play_file(clip, HEIGHT, WIDTH, None, False, stop)

    ended_well, said = run(plan(clip, specs=(spec(),) * 2, source=source, output=tmp_path / "out.mp4"))
    assert not ended_well
    told, error = (line for line in said.splitlines() if "no such camera" in line)
    assert told == "cannot start stream 0: no such camera"  # at once
    assert error == f"error: {told}"  # and when all is over
    assert len(frames_of(tmp_path / "out-1.mp4")) == 33


@pytest.mark.skipif(sys.platform != "linux", reason="the file that is always full is Linux's")
def test_metrics_that_could_not_be_written_are_not_said_to_be_there(clip, capsys):
    ended_well, said = run(plan(clip, metrics=Path("/dev/full")))
    assert not ended_well
    assert "/dev/full: is not complete (No space left on device)" in said
    assert "/dev/full" not in capsys.readouterr().out


def test_a_played_file_has_the_timestamps_of_its_rate_and_starts_over(clip):
    source = sources.play_file(clip, HEIGHT, WIDTH, 400.0, True, threading.Event())
    taken = list(itertools.islice(source, 70))
    assert [at for at, _ in taken] == [round(1e9 * n / 400) for n in range(70)]
    np.testing.assert_array_equal(taken[0][1], taken[33][1])
    source.close()


def test_a_played_file_stops_in_the_middle_of_a_wait(clip):
    stop = threading.Event()
    source = sources.play_file(clip, HEIGHT, WIDTH, 0.001, False, stop)
    next(source)
    threading.Timer(0.05, stop.set).start()
    assert list(source) == []


def test_a_camera_gives_frames_with_its_own_timestamps():
    stop = threading.Event()
    frames = list(itertools.islice(sources.watch_camera(TESTSRC, HEIGHT, WIDTH, stop), 4))
    assert [at for at, _ in frames] == [0, 62_500_000, 125_000_000, 187_500_000]
    assert frames[0][1].shape == (HEIGHT, WIDTH, 3)
    source = sources.watch_camera(TESTSRC, HEIGHT, WIDTH, stop)
    next(source)
    stop.set()
    assert list(source) == []


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("nosuchkind:0", "knows no such kind of camera"),
        ("lavfi:nosuchfilter", "cannot be opened as a lavfi camera"),
    ],
)
def test_a_camera_that_is_not_there_is_named(device, message):
    with pytest.raises(MediaError, match=message):
        sources.open_camera(device, HEIGHT, WIDTH)


def test_the_default_budget_lets_each_chunk_wait_for_those_that_push_it_on():
    # 3 intervals until the chunk is whole and 2 chunks of 4 for its steps, at 16 FPS, and a quarter more.
    assert live.default_budget_ms(spec(steps=2), 16.0) == np.ceil(1.25 * 1000 * (3 + 8) / 16)
    assert live.default_budget_ms(spec(steps=1), 16.0, stages=4) == np.ceil(1.25 * 1000 * (3 + 16) / 16)
