"""Live streams: a file or a camera played at its real rate, through the scheduler, to video files and metrics."""

from __future__ import annotations

import contextlib
import math
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import numpy as np

from svd2_jax import media
from svd2_jax.api import Engine, SessionSpec
from svd2_jax.errors import ConfigError, MediaError, Svd2Error
from svd2_jax.runtime import picture
from svd2_jax.runtime.loop import HANG_EXIT_CODE, HangReport, LiveLoop, Source
from svd2_jax.runtime.measure import measure
from svd2_jax.runtime.metrics import JsonLines, Metrics
from svd2_jax.runtime.scheduler import PolicyConfig
from svd2_jax.runtime.table import LiveTable
from svd2_jax.runtime.work import SECOND, FrameRecord, StreamId, StreamSettings

BUDGET_SHARE = 1.25  # of what a stream needs when each chunk waits for the next ones to push it on
LONGEST_NAME = 14  # with it the table fits into 80 columns
LOOK_S = 0.2  # how often the main thread looks whether the end has come
CAMERA_FORMATS = {"linux": "v4l2", "darwin": "avfoundation", "win32": "dshow"}


@dataclass(frozen=True)
class LiveRun:
    """What a live run does.

    Attributes:
      specs: what to compute, one for each stream.
      settings: rate, budget and steps of every stream.
      source: opens the input of stream i; its waits end when the event is set.
      output: video file to write; with several streams its name gets the stream's number.
      metrics: JSON-lines file to write, or None.
      picture: PNG file to write, or None.
      seconds: how long to run; None: until the input ends.
      blend_chunks: chunks over which a typed prompt comes in.
    """

    specs: tuple[SessionSpec, ...]
    settings: StreamSettings
    source: Callable[[int, threading.Event], Source]
    output: Path | None = None
    metrics: Path | None = None
    picture: Path | None = None
    seconds: float | None = None
    blend_chunks: int = 4

    def check(self) -> None:
        """Raises MediaError for a video that could not be written, before the work begins."""
        for i in range(len(self.specs)):
            _sink(self, i)

    @property
    def outputs(self) -> list[Path]:
        """The video files, one for each stream."""
        if self.output is None:
            return []
        if len(self.specs) == 1:
            return [self.output]
        return [self.output.with_stem(f"{self.output.stem}-{i}") for i in range(len(self.specs))]


def default_budget_ms(spec: SessionSpec, rate_hz: float, stages: int = 1) -> float:
    """Returns a latency budget with which a stream runs at one tick a chunk.

    A chunk's first frame waits until the chunk is whole, and then for the chunks that push it through all rows and
    stages; a quarter of that is left for the device.
    """
    cfg = spec.stream
    frames = cfg.chunk_frames - 1 + cfg.steps * stages * cfg.chunk_frames
    return math.ceil(BUDGET_SHARE * 1000 * frames / rate_hz)


def run(engine: Engine, plan: LiveRun, policy: PolicyConfig, say: Callable[[str], None]) -> bool:
    """Runs live streams until their input or time is over, or somebody presses Ctrl-C.

    Args:
      engine: where they run.
      plan: what to do.
      policy: settings of the scheduler.
      say: is given what to tell the user.

    Returns:
      Whether every stream ended well.

    Raises:
      Svd2Error: the engine, an input or an output cannot be used.
    """
    stop, streams = threading.Event(), {}
    with contextlib.ExitStack() as outputs:
        sinks = [outputs.enter_context(_sink(plan, i)) for i in range(len(plan.specs))]
        metrics = Metrics()
        observers = []
        if plan.metrics is not None:
            observers.append(outputs.enter_context(_json_lines(plan.metrics, metrics, plan)))
        samples = []
        say("compiling, and measuring what a tick takes")
        steps = range(plan.settings.floor_steps, plan.settings.steps + 1)
        samples = measure(engine, plan.specs[0], steps)
        for count in reversed(steps):
            took = sorted(s.duration_ns for s in samples if s.steps == count and s.batch == 1 and not s.first)
            say(f"  {count} step{'s'[: count - 1]}: {took[len(took) // 2] / 1e6:.0f} ms a tick of one stream")

        def give_up(report: HangReport) -> None:
            stop.set()
            say(f"error: {report}; giving up")
            with contextlib.suppress(Exception):
                outputs.close()  # what was shown until now can be watched
            os._exit(HANG_EXIT_CODE)

        with LiveLoop(engine, policy, metrics=metrics, observers=observers, on_hang=give_up) as loop:
            loop.warm_up(samples)
            del samples
            table = LiveTable(metrics)
            typed = TypedLines(
                lambda line: _change_prompt(loop, streams, line, plan.blend_chunks, table),
                lambda text: setattr(table, "note", f"prompt> {text}"),
            )
            try:
                with table, typed:
                    for i, (spec, sink) in enumerate(zip(plan.specs, sinks, strict=True)):
                        name = f"{i}: {spec.prompt}"[:LONGEST_NAME]
                        stream = loop.open(spec, plan.settings, sink, plan.source(i, stop), name)
                        streams[i] = stream
                    say("live; type a prompt and press enter to change it, Ctrl-C ends")
                    _wait(loop, stop, plan.seconds, say)
            finally:
                stop.set()
            errors = {i: loop.stream_result(stream) for i, stream in streams.items()}
        for i, error in errors.items():
            if error is not None:
                say(f"error: stream {i} ended early: {error}")
    for sink in sinks:
        if sink.path is not None and sink.frames:
            print(f"{sink.path}: {sink.frames} frames at {plan.settings.rate_hz:g} fps")
    if plan.metrics is not None:
        print(f"{plan.metrics}: what became of every frame, line by line")
    if plan.picture is not None:
        picture.timeline(metrics, plan.picture)
        print(f"{plan.picture}: latency against the budget")
    return not any(errors.values())


def _wait(loop: LiveLoop, stop: threading.Event, seconds: float | None, say: Callable[[str], None]) -> None:
    """Waits until all streams are over; ends them when the time has come or at Ctrl-C, at once at a second one."""
    ends = None if seconds is None else time.monotonic() + seconds
    while True:
        try:
            while not loop.wait(timeout_s=LOOK_S):
                if ends is not None and time.monotonic() >= ends:
                    ends = None
                    _end_all(loop, stop)
            return
        except KeyboardInterrupt:
            if stop.is_set():
                say("interrupted again: what is under way is dropped")
                for stream in loop.streams:
                    loop.close(stream)
            else:
                say("interrupted: finishing what is under way (Ctrl-C again drops it)")
                ends = None
                _end_all(loop, stop)


def _end_all(loop: LiveLoop, stop: threading.Event) -> None:
    stop.set()
    for stream in loop.streams:
        loop.end(stream)


def _change_prompt(
    loop: LiveLoop, streams: dict[int, StreamId], line: str, blend_chunks: int, table: LiveTable
) -> None:
    """Takes a typed line: a prompt for all streams, or `2: prompt` for one."""
    number, separator, text = line.partition(":")
    chosen = list(streams.values())
    if separator and number.strip().isdecimal() and int(number) in streams:
        chosen, line = [streams[int(number)]], text
    try:
        for stream in chosen:
            loop.set_prompt(stream, line.strip(), blend_chunks)
        table.note = f"new prompt: {line.strip()}"
    except Svd2Error as e:
        table.note = f"not taken: {e}"


def _json_lines(path: Path, metrics: Metrics, plan: LiveRun) -> JsonLines:
    settings = {
        "rate_hz": plan.settings.rate_hz,
        "budget_ms": plan.settings.budget_ms,
        "steps": plan.settings.steps,
    }
    try:
        return JsonLines(path, metrics, about={"streams": len(plan.specs), **settings})
    except OSError as e:
        raise MediaError(f"{path}: cannot be written ({e.strerror})") from e


def _sink(plan: LiveRun, i: int) -> VideoSink:
    cfg = plan.specs[i].stream
    path = plan.outputs[i] if plan.output is not None else None
    return VideoSink(path, plan.settings.rate_hz, cfg.height, cfg.width)


class VideoSink:
    """Writes a stream's frames to a video file, or drops them where there is none.

    Input frame n is frame n of the file: where one was not shown, the one before it stays, as on a screen.
    """

    def __init__(self, path: Path | None, fps: float, height: int, width: int):
        """Checks what can be checked; entering the sink opens the file."""
        self.path, self.frames = path, 0
        self._writer = None if path is None else media.VideoWriter(path, fps, height, width)
        self._stack = contextlib.ExitStack()
        self._last: np.ndarray | None = None

    def __enter__(self) -> Self:
        if self._writer is not None:
            self._stack.enter_context(self._writer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._writer is not None and not self.frames:  # a video without a frame is not kept
            kind, e = MediaError, MediaError("no frame was shown")
        self._stack.__exit__(kind, e, at)

    def __call__(self, frame: np.ndarray, record: FrameRecord) -> None:
        """Takes the next shown frame."""
        if self._writer is not None:
            held = frame if self._last is None else self._last
            for _ in range(record.number - self.frames):
                self._writer.write(held[None])
            self._writer.write(frame[None])
        self._last, self.frames = frame, record.number + 1


def play_file(
    path: Path, height: int, width: int, rate_hz: float | None, again: bool, stop: threading.Event
) -> Source:
    """Plays a video file as if it were a camera: each frame comes when it is its time.

    Args:
      path: the file.
      height: pixels of the frames.
      width: pixels of the frames.
      rate_hz: frames per second; None is the file's own rate.
      again: whether to start over at the end, for ever.
      stop: ends the stream when it is set.

    Raises:
      MediaError: the file cannot be read; at once, not with the first frame.
    """
    reader = media.VideoReader(path, height, width)
    rate_hz = rate_hz or reader.fps

    def play() -> Iterator[tuple[int, np.ndarray]]:
        current, number, started = reader, 0, time.monotonic()
        while True:
            with current:
                for frame in current:
                    due = number / rate_hz
                    if stop.wait(max(0.0, started + due - time.monotonic())):
                        return
                    yield round(due * SECOND), frame
                    number += 1
            if not again:
                return
            current = media.VideoReader(path, height, width)

    return play()


def watch_camera(device: str, height: int, width: int, stop: threading.Event) -> Source:
    """Gives a camera's frames as they come, with the camera's own timestamps.

    Args:
      device: `/dev/video0`, or with FFmpeg's name of the kind of device in front, as in `avfoundation:0` or
        `lavfi:testsrc=size=320x240:rate=16`.
      height: pixels of the frames.
      width: pixels of the frames.
      stop: ends the stream when it is set.

    Raises:
      MediaError: the camera cannot be opened; at once, not with the first frame.
    """
    camera = open_camera(device, height, width)

    def watch() -> Iterator[tuple[int | None, np.ndarray]]:
        with camera:
            for frame in camera:
                if stop.is_set():
                    return
                yield camera.timestamp_ns, frame

    return watch()


def open_camera(device: str, height: int, width: int) -> media.VideoReader:
    """Opens a camera, see `watch_camera`.

    Raises:
      MediaError: it cannot be opened.
      ConfigError: this platform has no usual kind of camera.
    """
    kind, separator, name = device.partition(":")
    if not separator or not kind.isalnum():
        if sys.platform not in CAMERA_FORMATS:
            raise ConfigError(
                f"camera {device}: put FFmpeg's kind of device in front, as in v4l2:/dev/video0"
            )
        kind, name = CAMERA_FORMATS[sys.platform], device
    return media.VideoReader(name, height, width, device=kind)


class TypedLines:
    """Takes lines that are typed while a block runs; on a terminal they can be seen while they are typed."""

    def __init__(
        self, take: Callable[[str], None], show: Callable[[str], None], stream: TextIO | None = None
    ):
        """Takes what to call with a whole line, and with what is typed of the next one so far."""
        self._take, self._show, self._stream = take, show, stream or sys.stdin
        self._stop = threading.Event()
        self._before: Any = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        try:
            fd = self._stream.fileno()
        except (OSError, ValueError, AttributeError):  # closed, or not a file
            return self
        on_terminal = os.isatty(fd)
        if on_terminal:
            try:
                import termios
                import tty
            except ImportError:  # not on Windows
                return self
            with contextlib.suppress(OSError):  # not the terminal that the process belongs to
                if os.tcgetpgrp(fd) != os.getpgrp():  # in the background: reading would stop the process
                    return self
            self._before = termios.tcgetattr(fd)
            tty.setcbreak(fd)
        body = self._read_keys if on_terminal else self._read_lines
        self._thread = threading.Thread(target=body, args=(fd,), name="svd2-typed", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(1.0)
        if self._before is not None:
            import termios

            termios.tcsetattr(self._stream.fileno(), termios.TCSADRAIN, self._before)

    def _read_keys(self, fd: int) -> None:
        typed = b""
        while not self._stop.is_set():
            if not select.select([fd], [], [], LOOK_S)[0]:
                continue
            key = os.read(fd, 1)
            if not key:
                return
            if key in b"\r\n":
                line, typed = typed.decode(errors="replace").strip(), b""
                if line:
                    self._take(line)
                continue
            typed = typed[:-1] if key in b"\x7f\b" else typed + key
            self._show(typed.decode(errors="replace"))

    def _read_lines(self, fd: int) -> None:
        pending = b""
        while not self._stop.is_set():
            if not select.select([fd], [], [], LOOK_S)[0]:
                continue
            data = os.read(fd, 4096)
            *lines, pending = (pending + data).split(b"\n")
            for line in [*lines, *([pending] if not data else [])]:
                if text := line.decode(errors="replace").strip():
                    self._take(text)
            if not data:
                return
