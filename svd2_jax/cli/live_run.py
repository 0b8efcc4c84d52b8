"""What `svd2 live` does: streams through the live service, to videos, a table and metrics, with typed prompts."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svd2_jax import progress
from svd2_jax.api import Engine, SessionSpec
from svd2_jax.cli.terminal import LOOK_S, Interrupts, TypedLines, heard
from svd2_jax.errors import ConfigError, MediaError, Svd2Error
from svd2_jax.media.sinks import UrlSink, VideoSink
from svd2_jax.runtime.event_log import JsonLines
from svd2_jax.runtime.loop_config import HANG_EXIT_CODE, HangReport, LoopConfig
from svd2_jax.runtime.measure import settings_for
from svd2_jax.runtime.metrics import Metrics
from svd2_jax.runtime.scheduler import PolicyConfig
from svd2_jax.runtime.stream import Source, Stream
from svd2_jax.runtime.table import LiveTable
from svd2_jax.runtime.types import MS, Event, FrameRecord, PromptRecord, StreamId, StreamSettings
from svd2_jax.service import LiveService
from svd2_jax.text import counted, measured_blocks

BUDGET_SHARE = 1.25  # of what a stream needs when each chunk waits for the next ones to push it on
STOP_S = 3.0  # how long to wait at the end for a camera or the device to let go
TELL_S = 3.0  # how often a run without a terminal says how it goes
CLOSE_S = 10.0  # how long to finish videos when the device hangs


@dataclass(frozen=True)
class LiveRun:
    """What a live run does.

    Attributes:
      specs: what to compute, one for each stream.
      settings: rate, budget and steps of every stream.
      source: opens the input of stream i; its waits end when the event is set.
      output: video file to write, with several streams its name gets the stream's number; or the URL to send to.
      metrics: JSON-lines file to write, or None.
      chart: PNG file to write, or None.
      seconds: how long to run; None: until the input ends.
      blend_chunks: chunks over which a typed prompt comes in.
      remark: what to tell the user about a typed prompt, or None.
      describe: what to tell of each engine once it is warm; None: nothing.
      is_budget_asked: whether the user gave the latency budget; else a slow device gets a longer one.
    """

    specs: tuple[SessionSpec, ...]
    settings: StreamSettings
    source: Callable[[int, threading.Event], Source]
    output: Path | str | None = None
    metrics: Path | None = None
    chart: Path | None = None
    seconds: float | None = None
    blend_chunks: int = 4
    remark: Callable[[str], str | None] = lambda prompt: None
    describe: Callable[[Any], str] | None = None
    is_budget_asked: bool = True

    def check(self) -> None:
        """Raises an error for settings or outputs that cannot be, before the work begins."""
        settings_for(self.specs[0], self.settings)
        for i in range(len(self.specs)):
            _sink(self, i)

    @property
    def outputs(self) -> list[Path]:
        """The video files, one for each stream."""
        return output_files(self.output, len(self.specs))


def output_files(output: Path | str | None, streams: int) -> list[Path]:
    """Returns the video files that `--output` stands for, one for each stream; none for a URL."""
    if not isinstance(output, Path):
        return []
    if streams == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{i}") for i in range(streams)]


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


def run(engines: Sequence[Engine], plan: LiveRun, policy: PolicyConfig, say: Callable[[str], None]) -> bool:
    """Runs live streams until their input or time is over, or somebody presses Ctrl-C.

    Whatever ends the run, each video that has a frame is finished and kept.

    Args:
      engines: where they run.
      plan: what to do.
      policy: settings of the schedulers.
      say: is given what to tell the user.

    Returns:
      Whether every stream and every output ended well.

    Raises:
      Svd2Error: an engine failed, or no stream could be opened.
    """
    say, tell = heard(say, sys.stderr), heard(functools.partial(print, flush=True), sys.stdout)
    metrics = Metrics()
    outputs = _Outputs(plan, metrics)
    with Interrupts() as interrupts:
        try:
            outputs.open()
            errors = _run_service(engines, plan, policy, outputs, metrics, interrupts, say)
        finally:
            problems = outputs.close()
        problems += errors
        for sink in outputs.sinks:
            if (result := sink.result()) is not None:
                tell(result)
        if plan.output is None:
            tell("no video was kept; --output FILE keeps it")
        if plan.metrics is not None and not any(p.startswith(f"{plan.metrics}: ") for p in problems):
            tell(f"{plan.metrics}: what became of every frame, line by line")
        if plan.chart is not None:
            from svd2_jax.charts import live as live_chart  # matplotlib takes a second to load

            try:
                live_chart.draw(plan.chart, metrics)
                tell(f"{plan.chart}: chart of the latency against the latency budget")
            except MediaError as e:
                problems.append(str(e))
    for problem in problems:
        say(f"error: {problem}")
    return not problems


def _run_service(
    engines: Sequence[Engine],
    plan: LiveRun,
    policy: PolicyConfig,
    outputs: _Outputs,
    metrics: Metrics,
    interrupts: Interrupts,
    say: Callable[[str], None],
) -> list[str]:
    """Runs the streams; returns why some could not start or ended early."""
    stop = threading.Event()
    streams: dict[int, Stream] = {}
    table = LiveTable(metrics)
    on_screen = sys.stdout.isatty()

    def note(text: str) -> None:
        if on_screen:
            table.note = text
        else:
            say(text)

    typed = TypedLines(
        lambda line: note(_change_prompt(metrics, plan, streams, line)),
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
    service = LiveService(engines, policy, LoopConfig(stop_s=STOP_S), metrics, observers, give_up)
    service.start()
    try:
        _warm_up(engines, service, plan, say)
        plan = _with_time(service, plan, say)
        interrupts.hold()
        with table:
            not_started = _open_streams(service, plan, outputs.sinks, streams, stop, interrupts, say)
            say("live; type a prompt and press enter to change it, Ctrl-C ends")
            with typed:  # not before, as a prompt is for streams that are there
                _wait(service, stop, plan.seconds, interrupts, say, tell_often=not on_screen)
    finally:
        stop.set()
        if stuck := service.stop():
            say(f"did not end: {', '.join(stuck)}; stuck in a camera, a file, a URL or the device")
    if outputs.observers and (service.lost_events or service.observer_errors):
        outputs.problems.append(f"{plan.metrics}: {service.lost_events or 'some'} events are missing")
    ended_early = [
        f"stream {i} ended early: {stream.error}" for i, stream in streams.items() if stream.error is not None
    ]
    return not_started + ended_early


def _with_time(service: LiveService, plan: LiveRun, say: Callable[[str], None]) -> LiveRun:
    """Returns the plan; a budget that nobody asked for is made long enough for a slow device."""
    if plan.is_budget_asked:
        return plan
    least_ms = service.least_budget_ms(plan.specs[0], plan.settings)
    if least_ms <= plan.settings.budget_ms:
        return plan
    budget_ms = math.ceil(BUDGET_SHARE * least_ms)
    say(
        f"this device needs up to {least_ms:.0f} ms from a frame's arrival until it is shown: the latency budget is "
        f"{budget_ms} ms, not {plan.settings.budget_ms:g} ms"
    )
    return dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, budget_ms=budget_ms))


def _open_streams(
    service: LiveService,
    plan: LiveRun,
    sinks: Sequence[VideoSink | UrlSink],
    streams: dict[int, Stream],
    stop: threading.Event,
    interrupts: Interrupts,
    say: Callable[[str], None],
) -> list[str]:
    """Opens the streams, adds them to `streams`, and returns why others could not start; raises if none could."""
    errors: dict[int, Svd2Error] = {}
    for i, (spec, sink) in enumerate(zip(plan.specs, sinks, strict=True)):
        try:
            if not interrupts.count:
                source = _heard_to_end(plan.source(i, stop), stop, i, say)
                streams[i] = service.open(spec, plan.settings, sink, source, str(i))
        except Svd2Error as e:
            errors[i] = e
    if errors and not streams:
        raise errors[0]
    not_started = [f"cannot start stream {i}: {error}" for i, error in errors.items()]
    for text in not_started:
        say(text)
    return not_started


def _warm_up(
    engines: Sequence[Engine], service: LiveService, plan: LiveRun, say: Callable[[str], None]
) -> None:
    """Compiles, measures, and says what a tick takes."""
    say("measuring what a tick takes; programs are compiled the first time only")
    steps = range(plan.settings.min_steps, plan.settings.steps + 1)
    with progress.shown("getting ready", say):
        samples = service.warm_up(plan.specs[0], steps)
        service.prepare_prompts(spec.prompt for spec in plan.specs)
    for i, (engine, split) in enumerate(zip(engines, service.splits, strict=True)):
        if split is not None:
            say((f"replica {i}, " if len(engines) > 1 else "") + measured_blocks(split))
        if plan.describe is not None:
            say(plan.describe(engine))
    for count in reversed(steps):
        took = [
            s.duration_ns for s in samples if (s.steps, s.batch, s.first, s.lone) == (count, 1, False, False)
        ]
        typical = statistics.median(took) / MS
        say(f"  {counted(count, 'step')}: {typical:.0f} ms a tick of one stream")


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
    service: LiveService,
    stop: threading.Event,
    seconds: float | None,
    interrupts: Interrupts,
    say: Callable[[str], None],
    tell_often: bool,
) -> None:
    """Waits until all streams are over; ends them when the time has come or at Ctrl-C, at once at a second one."""
    started = told = time.monotonic()
    ends, seen = None if seconds is None else started + seconds, 0
    while not service.wait(timeout_s=LOOK_S):
        if tell_often and time.monotonic() >= told + TELL_S:
            told = time.monotonic()
            say(_state_now(service.metrics, told - started))
        if seen == 0 and interrupts.count == 1:
            say("interrupted: finishing what is in flight (Ctrl-C again drops it)")
        if seen < 2 <= interrupts.count:
            say("interrupted again: what is in flight is dropped")
            for stream in service.streams:
                stream.close()
        seen = interrupts.count
        if (seen or (ends is not None and time.monotonic() >= ends)) and not stop.is_set():
            if not seen:
                say(f"{seconds:g} s are over; finishing what is in flight")
            stop.set()
            for stream in service.streams:
                stream.end()


def _state_now(metrics: Metrics, seconds: float) -> str:
    """Returns a line that says how a run goes, where no table does."""
    whole, now = metrics.summary(), metrics.summary(recent=True)
    latency = "" if now.latency_p50_ms is None else f", latency {now.latency_p50_ms:.0f} ms"
    return (
        f"{seconds:.0f} s: {counted(whole.frames_in, 'frame')} in, {whole.shown + whole.late} shown, "
        f"{whole.late} late, {whole.frames_dropped} dropped; {now.fps_shown:.1f} FPS in all{latency}, device busy "
        f"{100 * now.utilisation:.0f} %"
    )


def _change_prompt(metrics: Metrics, plan: LiveRun, streams: Mapping[int, Stream], line: str) -> str:
    """Takes a typed line, a prompt for all streams or `2: prompt` for one; returns what becomes of it."""
    try:
        chosen, text = _addressed(line, streams)
    except ConfigError as e:
        return f"not taken: {e}"
    answers, delays = [], {}
    for i in chosen:
        try:
            streams[i].update(prompt=text, blend_chunks=plan.blend_chunks).result()
        except Exception as e:  # the text encoder's own errors end the stream, and this has to go on
            answers.append(f"not taken: stream {i}: {e}")
            continue
        latency_ms = metrics.summary(streams[i].id, recent=True).latency_p50_ms
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

    def __init__(self, streams: Mapping[int, Stream], say: Callable[[str], None]):
        self._streams, self._say = streams, say
        self._awaited: dict[StreamId, PromptRecord] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, PromptRecord):
            self._awaited[event.stream] = event
        elif isinstance(event, FrameRecord) and event.shown_ns is not None:
            awaited = self._awaited.get(event.stream)
            if awaited is not None and event.number >= awaited.frame:
                del self._awaited[event.stream]
                name = next(i for i, stream in self._streams.items() if stream.id == event.stream)
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


def _sink(plan: LiveRun, i: int) -> VideoSink | UrlSink:
    cfg = plan.specs[i].config
    if isinstance(plan.output, str):
        return UrlSink(plan.output, plan.settings.rate_hz, cfg.height, cfg.width)
    path = plan.outputs[i] if plan.output is not None else None
    return VideoSink(path, plan.settings.rate_hz, cfg.height, cfg.width)
