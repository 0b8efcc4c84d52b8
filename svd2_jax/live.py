"""Live streams: a file or a camera played at its real rate, through the scheduler, to video files and metrics."""

from __future__ import annotations

import codecs
import contextlib
import functools
import math
import os
import re
import select
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TextIO

import numpy as np

from svd2_jax import files, media, progress
from svd2_jax.api import Engine, SessionSpec
from svd2_jax.errors import ConfigError, MediaError, Svd2Error
from svd2_jax.runtime import picture
from svd2_jax.runtime.latency import LatencySample
from svd2_jax.runtime.loop import HANG_EXIT_CODE, HangReport, LiveLoop, LoopConfig, Source
from svd2_jax.runtime.measure import measure
from svd2_jax.runtime.metrics import JsonLines, Metrics
from svd2_jax.runtime.scheduler import PolicyConfig
from svd2_jax.runtime.table import LiveTable
from svd2_jax.runtime.work import (
    MS,
    SECOND,
    Event,
    FrameRecord,
    PromptRecord,
    StreamId,
    StreamSettings,
)

BUDGET_SHARE = 1.25  # of what a stream needs when each chunk waits for the next ones to push it on
STOP_S = 3.0  # how long to wait at the end for a camera or the device to let go
CLOSE_S = 10.0  # how long to finish videos when the device hangs
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
      remark: what to tell the user about a typed prompt, or None.
    """

    specs: tuple[SessionSpec, ...]
    settings: StreamSettings
    source: Callable[[int, threading.Event], Source]
    output: Path | None = None
    metrics: Path | None = None
    picture: Path | None = None
    seconds: float | None = None
    blend_chunks: int = 4
    remark: Callable[[str], str | None] = lambda prompt: None

    def check(self) -> None:
        """Raises MediaError for an output that could not be written, before the work begins."""
        paths = [path.resolve() for path in (*self.outputs, self.metrics, self.picture) if path is not None]
        for path in paths:
            if paths.count(path) > 1:
                raise MediaError(f"{path}: two outputs cannot be one file; give each a name of its own")
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
    """Returns a latency budget in ms with which a stream can run at one tick a chunk when the device is busy.

    A chunk's first frame waits until the chunk is whole, and then for the chunks that push it through all rows and
    stages; a quarter of that is left for the device. That is the longest latency. A device with time to spare pushes
    each chunk on at once, and frames are shown as soon as that allows.
    """
    cfg = spec.config
    frames = cfg.chunk_frames - 1 + cfg.steps * stages * cfg.chunk_frames
    return math.ceil(BUDGET_SHARE * 1000 * frames / rate_hz)


def prompt_delay_s(
    latency_ms: float, rate_hz: float, chunk_frames: int, blend_chunks: int = 0
) -> tuple[float, float]:
    """Returns in how many seconds a prompt that is changed now is seen first, and in how many it is seen alone.

    It holds from the next chunk that enters the device: in half a chunk on average, and with a first frame that came
    when the chunk began to fill. That frame is shown one latency after it came. Blended over n chunks, the new prompt
    is alone from the n-th on.

    Args:
      latency_ms: from a frame's arrival until it is shown.
      rate_hz: frames per second.
      chunk_frames: frames of a chunk.
      blend_chunks: chunks over which the prompt comes in.
    """
    entry_s, fill_s = chunk_frames / 2 / rate_hz, (chunk_frames - 1) / rate_hz
    first_s = max(0.0, entry_s - fill_s + latency_ms / 1000)
    return first_s, first_s + max(0, blend_chunks - 1) * chunk_frames / rate_hz


def run(engine: Engine, plan: LiveRun, policy: PolicyConfig, say: Callable[[str], None]) -> bool:
    """Runs live streams until their input or time is over, or somebody presses Ctrl-C.

    Whatever ends the run, each video that has a frame is finished and kept.

    Args:
      engine: where they run.
      plan: what to do.
      policy: settings of the scheduler.
      say: is given what to tell the user.

    Returns:
      Whether every stream and every output ended well.

    Raises:
      Svd2Error: the engine failed, or no stream could be opened.
    """
    say, tell = _heard(say, sys.stderr), _heard(functools.partial(print, flush=True), sys.stdout)
    metrics = Metrics()
    outputs = _Outputs(plan, metrics)
    with _Interrupts() as interrupts:
        try:
            outputs.open()
            say("measuring what a tick takes; programs are compiled the first time only")
            steps = range(plan.settings.floor_steps, plan.settings.steps + 1)
            with progress.shown("getting ready", say):
                samples = measure(engine, plan.specs[0], steps)
            for count in reversed(steps):
                took = [s.duration_ns for s in samples if (s.steps, s.batch, s.first) == (count, 1, False)]
                typical = statistics.median(took) / MS
                say(f"  {count} step{'s'[: count - 1]}: {typical:.0f} ms a tick of one stream")
            for spec in plan.specs:
                engine.prepare_prompt(spec.prompt)
            interrupts.hold()
            errors = _run_loop(engine, plan, policy, samples, outputs, metrics, interrupts, say)
        finally:
            problems = outputs.close()
        problems += errors
        for sink in outputs.sinks:
            if sink.is_kept:
                tell(f"{sink.path}: {sink.frames} frames at {plan.settings.rate_hz:g} fps")
            elif sink.path is not None and not sink.has_failed:
                tell(f"{sink.path}: not written, as no frame was shown")
        if plan.output is None:
            tell("no video was kept; --output FILE keeps it")
        if plan.metrics is not None and not any(p.startswith(f"{plan.metrics}: ") for p in problems):
            tell(f"{plan.metrics}: what became of every frame, line by line")
        if plan.picture is not None:
            try:
                files.write_whole(plan.picture, functools.partial(picture.timeline, metrics))
                tell(f"{plan.picture}: chart of the latency against the latency budget")
            except MediaError as e:
                problems.append(str(e))
    for problem in problems:
        say(f"error: {problem}")
    return not problems


def _run_loop(
    engine: Engine,
    plan: LiveRun,
    policy: PolicyConfig,
    samples: list[LatencySample],
    outputs: _Outputs,
    metrics: Metrics,
    interrupts: _Interrupts,
    say: Callable[[str], None],
) -> list[str]:
    """Runs the streams; returns why some could not start or ended early."""
    stop = threading.Event()
    streams: dict[int, StreamId] = {}
    errors: dict[int, Svd2Error] = {}
    table = LiveTable(metrics)
    on_screen = sys.stdout.isatty()

    def note(text: str) -> None:
        if on_screen:
            table.note = text
        else:
            say(text)

    typed = TypedLines(
        lambda line: note(_change_prompt(loop, plan, streams, line)),
        (lambda text: note(f"prompt> {text}")) if on_screen else None,
    )

    def give_up(report: HangReport) -> None:
        stop.set()
        with contextlib.suppress(Exception):
            typed.__exit__()
            table.__exit__(None, None, None)
        say(f"error: {report}; giving up")
        closing = threading.Thread(target=outputs.close, daemon=True)  # what was shown can be watched
        closing.start()
        closing.join(CLOSE_S)
        os._exit(HANG_EXIT_CODE)

    observers = [*outputs.observers, _PromptWatch(streams, note)]
    loop = LiveLoop(engine, policy, LoopConfig(stop_s=STOP_S), metrics, observers, on_hang=give_up)
    loop.start()
    try:
        loop.warm_up(samples)
        samples.clear()
        with table:
            for i, (spec, sink) in enumerate(zip(plan.specs, outputs.sinks, strict=True)):
                try:
                    if not interrupts.count:
                        source = _heard_to_end(plan.source(i, stop), stop, i, say)
                        streams[i] = loop.open(spec, plan.settings, sink, source, str(i))
                except Svd2Error as e:
                    errors[i] = e
            if errors and not streams:
                raise errors[0]
            for i, error in errors.items():
                say(_not_started(i, error))
            say("live; type a prompt and press enter to change it, Ctrl-C ends")
            with typed:  # not before, as a prompt is for streams that are there
                _wait(loop, stop, plan.seconds, interrupts, say)
    finally:
        stop.set()
        if stuck := loop.stop():
            say(f"did not end: {', '.join(stuck)}; stuck in a camera, a file or the device")
    if outputs.observers and (loop.lost_events or loop.observer_errors):
        outputs.problems.append(f"{plan.metrics}: {loop.lost_events or 'some'} events are missing")
    results = {i: loop.stream_result(stream) for i, stream in streams.items()}
    ended_early = [f"stream {i} ended early: {error}" for i, error in results.items() if error is not None]
    return [_not_started(i, error) for i, error in errors.items()] + ended_early


def _not_started(i: int, error: Exception) -> str:
    return f"cannot start stream {i}: {error}"


def _heard_to_end(source: Source, stop: threading.Event, i: int, say: Callable[[str], None]) -> Source:
    """Gives what the source of stream i gives; says so when it ends or fails, unless somebody stops it."""
    try:
        yield from source
    except Exception as e:
        if not stop.is_set():
            say(f"stream {i}: the input has failed: {e}")
        raise
    if not stop.is_set():
        say(f"stream {i}: the input has ended; finishing what is in flight")


def _wait(
    loop: LiveLoop,
    stop: threading.Event,
    seconds: float | None,
    interrupts: _Interrupts,
    say: Callable[[str], None],
) -> None:
    """Waits until all streams are over; ends them when the time has come or at Ctrl-C, at once at a second one."""
    ends, seen = None if seconds is None else time.monotonic() + seconds, 0
    while not loop.wait(timeout_s=LOOK_S):
        if seen == 0 and interrupts.count == 1:
            say("interrupted: finishing what is in flight (Ctrl-C again drops it)")
        if seen < 2 <= interrupts.count:
            say("interrupted again: what is in flight is dropped")
            for stream in loop.streams:
                loop.close(stream)
        seen = interrupts.count
        if (seen or (ends is not None and time.monotonic() >= ends)) and not stop.is_set():
            if not seen:
                say(f"{seconds:g} s are over; finishing what is in flight")
            stop.set()
            for stream in loop.streams:
                loop.end(stream)


class _Interrupts:
    """Counts Ctrl-C and SIGTERM while streams are live, so that nothing is cut off; before, they end the program."""

    def __init__(self):
        self.count = 0
        self._held = False
        self._before: dict[int, Any] = {}

    def hold(self) -> None:
        """From now on, counts."""
        self._held = True

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # signals are for others elsewhere
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, *_: object) -> None:
        if not self._held:
            raise KeyboardInterrupt
        self.count += 1


def _heard(say: Callable[[str], None], stream: TextIO) -> Callable[[str], None]:
    """Returns `say`, which writes to a stream that nobody may read any more: that must not end the streams."""

    def safely(text: str) -> None:
        try:
            say(text)
        except BrokenPipeError:
            with contextlib.suppress(OSError, ValueError):  # else Python complains again at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (OSError, ValueError):
            pass

    return safely


def _change_prompt(loop: LiveLoop, plan: LiveRun, streams: Mapping[int, StreamId], line: str) -> str:
    """Takes a typed line, a prompt for all streams or `2: prompt` for one; returns what becomes of it."""
    try:
        chosen, text = _addressed(line, streams)
    except ConfigError as e:
        return f"not taken: {e}"
    answers, delays = [], {}
    for i in chosen:
        try:
            loop.set_prompt(streams[i], text, plan.blend_chunks)
        except Exception as e:  # the text encoder's own errors end the stream, and this has to go on
            answers.append(f"not taken: stream {i}: {e}")
            continue
        latency_ms = loop.metrics.summary(streams[i], recent=True).latency_p50_ms
        delays[i] = prompt_delay_s(
            plan.settings.budget_ms if latency_ms is None else latency_ms,  # before the first frame: at most
            plan.settings.rate_hz, plan.specs[i].config.chunk_frames, plan.blend_chunks,
        )  # fmt: skip
    if delays:
        names = f"stream{'s'[: len(delays) - 1]} {', '.join(map(str, delays))}"
        first_s, alone_s = max(delays.values())
        answer = f"{names}: {text!r} from the next chunk, seen in about {first_s:.1f} s"
        if plan.blend_chunks > 1:
            answer += f", complete after {plan.blend_chunks} chunks ({alone_s:.1f} s)"
        answers.insert(0, answer)
        if remark := plan.remark(text):
            answers.append(remark)
    return "\n".join(answers)


def _addressed(line: str, streams: Iterable[int]) -> tuple[list[int], str]:
    """Returns which streams a typed line is for, and its prompt.

    `2: prompt` is for stream 2, anything else for all. A number that is no stream makes a line a prompt only where
    the colon has a digit right behind it, as a time of day has.

    Raises:
      ConfigError: there is no such stream, or no prompt behind its number.
    """
    streams = list(streams)
    found = re.fullmatch(r"\s*(-?\d+)\s*:(.*)", line, re.DOTALL)
    if found is None:
        return streams, line.strip()
    number, text = int(found[1]), found[2]
    if number in streams:
        if not text.strip():
            raise ConfigError(f"no prompt behind '{number}:'; type for example `{number}: a pencil sketch`")
        return [number], text.strip()
    if text[:1].isdigit():
        return streams, line.strip()
    names = f"stream{'s'[: len(streams) - 1]} {', '.join(map(str, streams))}"
    raise ConfigError(f"no stream {number}: this run has {names}; a prompt alone is for all of them")


class _PromptWatch:
    """Takes a loop's events, and says when the first frame of a new prompt is shown."""

    def __init__(self, streams: Mapping[int, StreamId], say: Callable[[str], None]):
        self._streams, self._say = streams, say
        self._awaited: dict[StreamId, PromptRecord] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, PromptRecord):
            self._awaited[event.stream] = event
        elif isinstance(event, FrameRecord) and event.shown_ns is not None:
            awaited = self._awaited.get(event.stream)
            if awaited is not None and event.number >= awaited.frame:
                del self._awaited[event.stream]
                name = next(i for i, stream in self._streams.items() if stream == event.stream)
                self._say(f"stream {name}: {awaited.prompt!r} is being shown")


class _Outputs:
    """The files that a run writes; each is finished or given up for itself."""

    def __init__(self, plan: LiveRun, metrics: Metrics):
        self.sinks = [_sink(plan, i) for i in range(len(plan.specs))]
        self.observers: list[JsonLines] = []
        self.problems: list[str] = []
        self._plan, self._metrics = plan, metrics
        self._lock = threading.Lock()

    def open(self) -> None:
        """Opens them."""
        for sink in self.sinks:
            sink.open()
        if self._plan.metrics is not None:
            self.observers.append(_json_lines(self._plan.metrics, self._metrics, self._plan))

    def close(self) -> list[str]:
        """Finishes them; returns what went wrong."""
        with self._lock:
            for sink in self.sinks:
                if problem := sink.close():
                    self.problems.append(problem)
            for lines in self.observers:
                lines.close()
                if lines.error is not None:
                    why = lines.error.strerror or lines.error
                    self.problems.append(f"{self._plan.metrics}: is not complete ({why})")
            self.observers.clear()
            return self.problems


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
    cfg = plan.specs[i].config
    path = plan.outputs[i] if plan.output is not None else None
    return VideoSink(path, plan.settings.rate_hz, cfg.height, cfg.width)


class VideoSink:
    """Writes a stream's frames to a video file, or drops them where there is none.

    A frame is placed by the time at which it was taken: where none was shown, the one before it stays, as on a screen.
    """

    def __init__(self, path: Path | None, fps: float, height: int, width: int):
        """Checks what can be checked; `open` opens the file."""
        self.path, self.frames = path, 0
        self._fps = fps
        self._writer = None if path is None else media.VideoWriter(path, fps, height, width)
        self.is_kept = self.has_failed = self._is_open = False
        self._first: FrameRecord | None = None
        self._last: np.ndarray | None = None

    def open(self) -> None:
        """Opens the file; raises MediaError."""
        if self._writer is not None:
            self._writer.__enter__()
            self._is_open = True

    def close(self) -> str | None:
        """Finishes the file, or removes it if it has no frame or could not be written; returns what went wrong."""
        if self._writer is None or not self._is_open:
            return None
        self._is_open = False
        lost = MediaError("nothing to keep") if self.has_failed or not self.frames else None
        try:
            self._writer.__exit__(type(lost) if lost else None, lost, None)
        except Svd2Error as e:
            self.has_failed = True
            return str(e)
        self.is_kept = lost is None
        return None

    def __call__(self, frame: np.ndarray, record: FrameRecord) -> None:
        """Takes the next shown frame."""
        self._first = self._first or record
        place = self._place(record, self._first)
        if place >= self.frames:  # else frames come faster than the file plays
            held = frame if self._last is None else self._last
            self._write(held, place - self.frames)
            self._write(frame, 1)
            self.frames = place + 1
        self._last = frame

    def _place(self, record: FrameRecord, first: FrameRecord) -> int:
        """Returns which frame of the file this is."""
        arrived = record.arrival_ns - first.arrival_ns
        since = arrived
        if record.timestamp_ns is not None and first.timestamp_ns is not None:
            # A camera's clock that jumps must not stop the picture for long.
            since = min(record.timestamp_ns - first.timestamp_ns, arrived + SECOND)
        return round(since * self._fps / SECOND)

    def _write(self, frame: np.ndarray, times: int) -> None:
        if self._writer is None or not self._is_open:
            return
        try:
            for _ in range(times):
                self._writer.write(frame[None])
        except BaseException:
            self.has_failed = True
            raise


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


def watch_camera(
    device: str, height: int, width: int, stop: threading.Event, rate_hz: float | None = None
) -> Source:
    """Gives a camera's frames as they come, with the camera's own timestamps.

    Args:
      device: `/dev/video0`, or with FFmpeg's name of the kind of device in front, as in `avfoundation:0` or
        `lavfi:testsrc=size=320x240:rate=16,realtime`.
      height: pixels of the frames.
      width: pixels of the frames.
      stop: ends the stream, with the camera's next frame, when it is set.
      rate_hz: frames per second to ask the camera for; None leaves it as it is.

    Raises:
      MediaError: the camera cannot be opened; at once, not with the first frame.
    """
    camera = open_camera(device, height, width, rate_hz)

    def watch() -> Iterator[tuple[int | None, np.ndarray]]:
        with camera:
            for frame in camera:
                if stop.is_set():
                    return
                yield camera.timestamp_ns, frame

    return watch()


def open_camera(device: str, height: int, width: int, rate_hz: float | None = None) -> media.VideoReader:
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
    asked = {} if rate_hz is None or kind not in CAMERA_FORMATS.values() else {"framerate": f"{rate_hz:g}"}
    return media.VideoReader(name, height, width, device=kind, device_options=asked)


class TypedLines:
    """Takes lines that are typed while a block runs; on a terminal they can be shown while they are typed."""

    def __init__(
        self,
        take: Callable[[str], None],
        show: Callable[[str], None] | None,
        stream: TextIO | None = None,
    ):
        """Takes what to call with a whole line, and with what is typed of the next one so far.

        Without `show` the terminal itself shows what is typed.
        """
        self._take, self._show, self._stream = take, show, stream or sys.stdin
        self._stop = threading.Event()
        self._before: Any = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        try:
            fd = self._stream.fileno()
        except (OSError, ValueError, AttributeError):  # closed, or not a file
            return self
        body = self._read_lines
        if os.isatty(fd):
            with contextlib.suppress(OSError, AttributeError):  # not the terminal that the process belongs to
                if os.tcgetpgrp(fd) != os.getpgrp():  # in the background: reading would stop the process
                    return self
            if self._show is not None:
                try:
                    import termios
                    import tty
                except ImportError:  # not on Windows
                    return self
                self._before = termios.tcgetattr(fd)
                tty.setcbreak(fd)
                body = self._read_keys
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
        assert self._show is not None
        decoder, typed = codecs.getincrementaldecoder("utf-8")("replace"), ""
        while data := self._read(fd, 1):
            if data == b"\x1b":
                self._skip_escape(fd)
                continue
            for key in decoder.decode(data):
                if key in "\r\n":
                    line, typed = typed.strip(), ""
                    if line:
                        self._take(line)
                elif key in "\x7f\b":
                    typed = typed[:-1]
                    self._show(typed)
                elif key.isprintable():
                    typed += key
                    self._show(typed)

    def _skip_escape(self, fd: int) -> None:
        """Skips an arrow or the like, `ESC [ ... letter`; its bytes are there already."""
        inside = False
        while select.select([fd], [], [], 0)[0]:
            byte = os.read(fd, 1)
            if inside and b"@" <= byte <= b"~":
                return
            if not inside and byte not in (b"[", b"O"):
                return
            inside = True

    def _read_lines(self, fd: int) -> None:
        pending = b""
        while data := self._read(fd, 4096):
            *lines, pending = (pending + data).split(b"\n")
            self._take_lines(lines)
        self._take_lines([pending])

    def _take_lines(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            if text := line.decode(errors="replace").strip():
                self._take(text)

    def _read(self, fd: int, most: int) -> bytes:
        """Waits for what is typed; nothing at its end, or when the block ends."""
        while not self._stop.is_set():
            if select.select([fd], [], [], LOOK_S)[0]:
                with contextlib.suppress(OSError):
                    return os.read(fd, most)
                return b""
        return b""
