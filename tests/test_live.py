"""Live runs around a fake engine: files and cameras in, video files and metrics out."""

import dataclasses
import itertools
import json
import os
import signal
import threading
import time

import numpy as np
import pytest
from fakes import SMALL, FakeEngine, spec

from svd2_jax import live, media
from svd2_jax.errors import ConfigError, MediaError
from svd2_jax.live import LiveRun, TypedLines, VideoSink
from svd2_jax.runtime.scheduler import PolicyConfig
from svd2_jax.runtime.work import Fate, FrameRecord, StreamSettings

HEIGHT, WIDTH = SMALL.height, SMALL.width
FAST = 200.0  # frames per second: a test need not last as long as a video
SETTINGS = StreamSettings(rate_hz=FAST, budget_ms=2000.0)
TESTSRC = f"lavfi:testsrc=size={WIDTH}x{HEIGHT}:rate=16"


@pytest.fixture
def clip(tmp_path):
    """A file of 33 frames."""
    path = tmp_path / "in.mkv"
    with media.VideoWriter(path, FAST, HEIGHT, WIDTH) as writer:
        writer.write(np.stack(list(media.synthetic_clip(33, HEIGHT, WIDTH))))
    return path


def plan(clip, again=False, **changes):
    def source(i, stop):
        return live.play_file(clip, HEIGHT, WIDTH, None, again, stop)

    return dataclasses.replace(LiveRun((spec(),), SETTINGS, source), **changes)


def run(live_run, engine=None):
    said = []
    ended_well = live.run(
        engine or FakeEngine(device_ms=lambda *_: 1.0), live_run, PolicyConfig(), said.append
    )
    return ended_well, "\n".join(said)


def frames_of(path):
    with media.VideoReader(path) as reader:
        return list(reader)


def record(number):
    return FrameRecord(0, number, None, 0, 0, Fate.SHOWN)


def test_a_file_is_played_to_its_end_and_every_frame_is_accounted_for(clip, tmp_path, capsys):
    live_run = plan(
        clip, output=tmp_path / "out.mp4", metrics=tmp_path / "out.jsonl", picture=tmp_path / "out.png"
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


def test_several_streams_have_a_file_each(clip, tmp_path):
    specs = (spec("one"), spec("another prompt"), spec("one"))
    ended_well, _ = run(plan(clip, specs=specs, output=tmp_path / "out.mp4"))
    assert ended_well
    assert sorted(p.name for p in tmp_path.glob("out*")) == ["out-0.mp4", "out-1.mp4", "out-2.mp4"]


def test_a_looped_file_ends_when_its_time_is_over(clip, tmp_path):
    ended_well, _ = run(plan(clip, again=True, seconds=0.5, output=tmp_path / "out.mp4"))
    assert ended_well
    assert frames_of(tmp_path / "out.mp4")


def interrupted(clip, *delays):
    """A source that lets Ctrl-C be pressed so many seconds after its first frame was asked for."""

    def source(i, stop):
        for delay in delays:
            signals = (threading.main_thread().ident, signal.SIGINT)
            threading.Timer(delay, signal.pthread_kill, signals).start()
        yield from live.play_file(clip, HEIGHT, WIDTH, None, True, stop)

    return source


def test_ctrl_c_finishes_what_is_under_way_and_leaves_a_playable_file(clip, tmp_path):
    ended_well, said = run(plan(clip, source=interrupted(clip, 0.5), output=tmp_path / "out.mp4"))
    assert ended_well
    assert "finishing what is under way" in said
    assert frames_of(tmp_path / "out.mp4")


def test_a_second_ctrl_c_drops_what_is_under_way(clip):
    settings = dataclasses.replace(SETTINGS, rate_hz=100.0, budget_ms=60_000.0)  # shown long after they came
    engine = FakeEngine(device_ms=lambda *_: 400.0, batch_sizes=(1,))
    ended_well, said = run(plan(clip, source=interrupted(clip, 1.0, 1.4), settings=settings), engine)
    assert ended_well
    assert "interrupted again" in said


def test_a_stream_that_fails_is_named_and_the_others_are_kept(clip, tmp_path):
    def source(i, stop):
        if i == 1:
            return iter([(0, np.zeros((HEIGHT, WIDTH + 16, 3), np.uint8))])
        return live.play_file(clip, HEIGHT, WIDTH, None, False, stop)

    ended_well, said = run(plan(clip, specs=(spec(),) * 2, source=source, output=tmp_path / "out.mp4"))
    assert not ended_well
    assert "stream 1 ended early: a frame must be uint8" in said
    assert len(frames_of(tmp_path / "out-0.mp4")) == 33
    assert not (tmp_path / "out-1.mp4").exists()


@pytest.mark.parametrize("name", ["out.gif", "nowhere/out.mp4"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work_begins(clip, tmp_path, name):
    with pytest.raises(MediaError, match=r"format '.gif'|does not exist"):
        plan(clip, output=tmp_path / name).check()


def test_typed_lines_change_the_prompt_of_all_streams_or_of_one():
    class Loop:
        def __init__(self):
            self.calls = []

        def set_prompt(self, stream, text, blend_chunks):
            if text == "bad":
                raise ConfigError("no such prompt")
            self.calls.append((stream, text, blend_chunks))

    class Table:
        note = ""

    loop, table, streams = Loop(), Table(), {0: 7, 1: 9}
    for line in ("a cat", "1: a dog", "5: a bird", "bad"):
        live._change_prompt(loop, streams, line, 4, table)
    assert loop.calls == [
        (7, "a cat", 4), (9, "a cat", 4), (9, "a dog", 4), (7, "5: a bird", 4), (9, "5: a bird", 4)
    ]  # fmt: skip
    assert table.note == "not taken: no such prompt"


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
def test_what_is_typed_on_a_terminal_is_shown_before_it_is_taken():
    ours, theirs = os.openpty()
    lines, shown = [], []
    with os.fdopen(theirs) as terminal, TypedLines(lines.append, shown.append, terminal):
        os.write(ours, b"a cx\x7fat\n")
        until(lambda: lines)
    os.close(ours)
    assert lines == ["a cat"]
    assert shown == ["a", "a ", "a c", "a cx", "a c", "a ca", "a cat"]


def test_a_video_holds_a_frame_where_others_were_dropped(tmp_path):
    with VideoSink(tmp_path / "out.mkv", 16, HEIGHT, WIDTH) as sink:
        for number, level in ((1, 50), (2, 90), (5, 200)):
            sink(np.full((HEIGHT, WIDTH, 3), level, np.uint8), record(number))
    levels = [round(float(frame.mean())) for frame in frames_of(tmp_path / "out.mkv")]
    np.testing.assert_allclose(levels, [50, 50, 90, 90, 90, 200], atol=3)  # the codec is lossy


def test_a_video_without_a_frame_is_not_kept(tmp_path):
    with VideoSink(tmp_path / "out.mp4", 16, HEIGHT, WIDTH):
        pass
    assert not list(tmp_path.iterdir())


def test_a_played_file_has_the_timestamps_of_its_rate_and_starts_over(clip):
    source = live.play_file(clip, HEIGHT, WIDTH, 400.0, True, threading.Event())
    taken = list(itertools.islice(source, 70))
    assert [at for at, _ in taken] == [round(1e9 * n / 400) for n in range(70)]
    np.testing.assert_array_equal(taken[0][1], taken[33][1])
    source.close()


def test_a_played_file_stops_in_the_middle_of_a_wait(clip):
    stop = threading.Event()
    source = live.play_file(clip, HEIGHT, WIDTH, 0.001, False, stop)
    next(source)
    threading.Timer(0.05, stop.set).start()
    assert list(source) == []


def test_a_camera_gives_frames_with_its_own_timestamps():
    stop = threading.Event()
    frames = list(itertools.islice(live.watch_camera(TESTSRC, HEIGHT, WIDTH, stop), 4))
    assert [at for at, _ in frames] == [0, 62_500_000, 125_000_000, 187_500_000]
    assert frames[0][1].shape == (HEIGHT, WIDTH, 3)
    source = live.watch_camera(TESTSRC, HEIGHT, WIDTH, stop)
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
        live.open_camera(device, HEIGHT, WIDTH)


def test_the_default_budget_lets_each_chunk_wait_for_those_that_push_it_on():
    # 3 intervals until the chunk is whole and 2 chunks of 4 for its steps, at 16 FPS, and a quarter more.
    assert live.default_budget_ms(spec(steps=2), 16.0) == np.ceil(1.25 * 1000 * (3 + 8) / 16)
    assert live.default_budget_ms(spec(steps=1), 16.0, stages=4) == np.ceil(1.25 * 1000 * (3 + 16) / 16)
