"""The live loop: frames of several streams in, through one device, and out at their time.

`LiveLoop` is the shell around `Scheduler`: it owns the threads, the pixels and the sessions, and decides nothing.

    ingest, one a stream   pulls the source and offers its frames
    device                 asks the scheduler for a tick, hands it to the engine and waits until its stages are through
    finisher               waits until the frames of a tick are finished, while the device thread runs the next one
    reader                 brings finished frames to the host
    delivery               asks the scheduler which frames are due, and passes them on at their time
    outlet, one a stream   calls the stream's sink, so that a slow one stalls nobody else
    report                 calls the observers of events, so that a slow disk stalls nobody
    watchdog               notices a device that hangs

All but the outlets share one lock, held for microseconds: never during device work, copies of pixels, or a call of
somebody else's code (source, sink, engine, observer).
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Self, TypeAlias, TypeVar

import numpy as np

from svd2_jax.api import Chunk, Engine, Session, SessionSpec, Ticket, Work, check_prompt
from svd2_jax.config import StreamConfig
from svd2_jax.errors import ConfigError, EngineError, SessionError
from svd2_jax.runtime.clock import Clock, MonotonicClock
from svd2_jax.runtime.latency import LatencySample
from svd2_jax.runtime.measure import settings_for, with_steps
from svd2_jax.runtime.metrics import Metrics
from svd2_jax.runtime.outlet import Outlet, Sink
from svd2_jax.runtime.scheduler import PolicyConfig, Scheduler
from svd2_jax.runtime.work import (
    SECOND,
    Event,
    Fate,
    FrameRecord,
    Part,
    PromptRecord,
    StreamId,
    StreamSettings,
    Tick,
)

T = TypeVar("T")

HANG_EXIT_CODE = 3
KEPT_RESULTS = 1000  # how streams ended; beyond, the oldest are forgotten

Source: TypeAlias = Iterable[tuple[int | None, np.ndarray]]
"""Gives (timestamp in ns, frame uint8 [H, W, 3]) when there is one: whoever iterates waits for the camera."""


@dataclass(frozen=True)
class HangReport:
    """A call of the device that does not come back.

    Attributes:
      what: "tick 17 (stream 0, 2)", or another call.
      seconds: since it began.
      limit_s: what it was allowed.
    """

    what: str
    seconds: float
    limit_s: float

    def __str__(self) -> str:
        return f"the device hangs: {self.what} takes {self.seconds:.1f} s already, allowed are {self.limit_s:.1f} s"


def exit_on_hang(report: HangReport) -> None:
    """Says so on stderr and ends the process with code 3: nothing can interrupt a call of the device."""
    sys.stderr.write(f"error: {report}; giving up\n")
    sys.stderr.flush()
    os._exit(HANG_EXIT_CODE)


@dataclass(frozen=True)
class LoopConfig:
    """How the loop behaves around the policy.

    Attributes:
      hang_s: a call of the device that takes longer than this, and than `hang_factor` times what was predicted, hangs.
      hang_factor: see `hang_s`.
      sink_frames: due frames that may wait for a stream's sink; one more ends the stream.
      waiting_events: events that may wait for the observers; beyond, they are lost to them (and counted).
      failed_ticks: so many ticks that fail one after another end the loop, not only their streams.
      stop_s: how long `stop` waits for the threads.
    """

    hang_s: float = 10.0
    hang_factor: float = 20.0
    sink_frames: int = 48
    waiting_events: int = 100_000
    failed_ticks: int = 3
    stop_s: float = 10.0


@dataclass(eq=False)
class _Live:
    """A stream from opening until nothing is left of it.

    Attributes:
      id: its number.
      spec: what it computes.
      outlet: its way out.
      session: its device side; None until it is open, and again once it was closed.
      inputs: pixels of the frames that have not entered a tick, by number.
      flight: numbers of the frames of each chunk on the device, oldest first.
      arrived: frames offered so far.
      next_frame: number of the first frame that the next chunk to enter a tick can begin with.
      opening: whether `open` still works on its device side.
      ended: whether somebody said that no more frames come.
      gone: whether it was closed or has failed: nothing more enters, and what is not due is dropped.
      over: whether the scheduler is through with it.
      drained: whether its sink is called no more.
      error: why it ended before its time.
    """

    id: StreamId
    spec: SessionSpec
    outlet: Outlet
    session: Session | None = None
    inputs: dict[int, np.ndarray] = field(default_factory=dict)
    flight: deque[tuple[int, ...]] = field(default_factory=deque)
    arrived: int = 0
    next_frame: int = 0
    opening: bool = True
    ended: bool = False
    gone: bool = False
    over: bool = False
    drained: bool = False
    error: BaseException | None = None


class _Call(NamedTuple):
    """What a thread wants of the device, for the watchdog."""

    what: str
    started_ns: int
    limit_ns: int


class _Entry(NamedTuple):
    """A stream's part of a tick that is about to start, with its frames."""

    live: _Live
    session: Session
    part: Part
    frames: list[np.ndarray]


class _Passed(NamedTuple):
    """A tick that the stages are through with, and whose frames are still being finished.

    Attributes:
      tick: what ran.
      taken: the streams that took part.
      ticket: to wait for; None: there is nothing, as the tick has failed or no stream of it was left.
      error: why it failed, if it did.
      is_new: whether that ended any stream. If not, it went the way of the tick before it.
    """

    tick: Tick
    taken: Sequence[_Live]
    ticket: Ticket | None
    error: Exception | None = None
    is_new: bool = False


class LiveLoop:
    """Runs live streams on an engine. Every method may be called from any thread; use it as a context manager."""

    def __init__(
        self,
        engine: Engine,
        policy: PolicyConfig | None = None,
        config: LoopConfig | None = None,
        metrics: Metrics | None = None,
        observers: Sequence[Callable[[Event], None]] = (),
        on_hang: Callable[[HangReport], None] = exit_on_hang,
        clock: Clock | None = None,
    ):
        """Creates the loop; `start`, or entering it, starts its threads.

        Args:
          engine: the device side.
          policy: settings of the scheduler.
          config: settings of the loop.
          metrics: is given every event as it happens; None makes one.
          observers: are given every event too, one after another, in a thread of their own. One that raises is
            given nothing more; see `observer_errors`.
          on_hang: is called once when the device hangs. Should it return, the loop ends with an EngineError.
          clock: where time comes from.
        """
        self.metrics = metrics or Metrics()
        self.observer_errors: list[BaseException] = []
        self.lost_events = 0
        self._engine, self._on_hang = engine, on_hang
        self._config, self._clock = config or LoopConfig(), clock or MonotonicClock()
        self._lock = threading.Lock()
        # One condition for each kind of thread, so that nothing wakes those that it does not concern.
        (
            self._device_work,
            self._finisher_work,
            self._delivery_work,
            self._reader_work,
            self._report_work,
            self._watch,
            self._state,
        ) = (threading.Condition(self._lock) for _ in range(7))
        self._scheduler = Scheduler(policy or PolicyConfig(), engine.batch_sizes, self._take_event)
        self._observers = list(observers)
        self._events: deque[Event] = deque()
        self._due: list[FrameRecord] = []  # shown by the call of the scheduler that is in progress
        self._streams: dict[StreamId, _Live] = {}
        self._results: dict[StreamId, BaseException | None] = {}
        self._orders: deque[Callable[[], None]] = deque()  # for the device thread, between ticks
        self._passed: deque[_Passed] = deque()  # for the finisher
        self._finished: deque[tuple[_Live, tuple[int, ...], Chunk]] = deque()  # for the reader
        self._calls: dict[str, _Call] = {}  # by thread
        self._failed_ticks = 0
        self._threads: list[threading.Thread] = []
        self._stream_threads: set[threading.Thread] = set()
        self._started = self._closing = self._stopping = self._driven = self._silent = False
        self._error: BaseException | None = None

    # --- start and end

    def start(self) -> None:
        """Starts the threads."""
        if self._started:
            raise SessionError("the loop was started already; make a new one")
        self._started = True
        bodies = {
            "device": self._drive,
            "finisher": self._finish,
            "reader": self._read,
            "delivery": self._deliver,
            "report": self._observe,
            "watchdog": self._watch_device,
        }
        self._threads = [_thread(name, self._guarded, name, body) for name, body in bodies.items()]
        for thread in self._threads:
            thread.start()

    def stop(self) -> tuple[str, ...]:
        """Closes all streams and ends all threads; waits for them for at most `stop_s` in all.

        Returns:
          The names of the threads that did not end: they are stuck in a source, a sink, an observer or the device.
        """
        deadline = time.monotonic() + self._config.stop_s
        with self._lock:
            self._closing = True
            for live in list(self._streams.values()):
                self._close(live)
            self._stopping = True
            self._wake_all()
            threads = [*self._threads, *self._stream_threads]
        last = [thread for thread in threads if thread.name.endswith("-report")]
        for thread in [thread for thread in threads if thread not in last]:
            _join(thread, deadline)
        with self._lock:
            self._silent = True
            for live in self._streams.values():
                live.outlet.end(at_once=True)
            self._wake_all()
        for thread in last:
            _join(thread, max(deadline, time.monotonic() + 0.2))
        return tuple(thread.name for thread in threads if thread.is_alive())

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def error(self) -> BaseException | None:
        """What ended the loop itself, if anything did."""
        return self._error

    # --- streams

    def warm_up(self, samples: Iterable[LatencySample]) -> None:
        """Tells the scheduler what ticks take, see `measure.measure`; without, it finds out with the first frames.

        The watchdog needs it, too, where a tick may take longer than its `hang_s`.
        """
        with self._lock:
            for sample in samples:
                self._scheduler.warm_up(sample)

    def open(
        self,
        spec: SessionSpec,
        settings: StreamSettings,
        sink: Sink,
        source: Source | None = None,
        name: str | None = None,
    ) -> StreamId:
        """Lets a stream join; compiles what it needs, if nobody did.

        Args:
          spec: what to compute. Its steps are those of the settings.
          settings: what it asks for; sizes of groups and the shape are taken from the spec, see `settings_for`.
          sink: takes the finished frames. Once `wait` says that the stream is over, it is called no more.
          source: gives the frames; None: they come through `offer`.
          name: what to call it in reports.

        Raises:
          Refused: the device cannot take it on.
          ConfigError: such a stream cannot run live.
          EngineError: the loop does not run.
        """
        spec = self._engine.resolved(spec)
        settings = settings_for(spec, settings)
        spec = with_steps(spec, settings.steps)
        live = self._admit(spec, settings, sink)
        try:
            self._engine.prepare(spec, range(settings.floor_steps, settings.steps + 1))
            self._begin(live, self._engine.open(spec))
            self.metrics.opened(live.id, settings, name, spec.prompt)
        except BaseException as e:
            self._fail(live, e)
            with self._lock:
                live.opening = False
                self._forget_if_done(live)
            raise
        if source is not None:
            self._start_own("ingest", live, self._ingest, live, source)
        return live.id

    def offer(self, stream: StreamId, frame: np.ndarray, timestamp_ns: int | None = None) -> int:
        """Hands in a frame, uint8 [H, W, 3], that is there now; returns its number. The frame is copied.

        Raises:
          SessionError: the stream takes no more frames; or not such a frame, and it ends with this error.
        """
        with self._lock:
            live = self._find(stream)
        try:
            pixels = _checked_frame(frame, live.spec.config)
        except SessionError as e:
            self._fail(live, e)
            raise
        with self._lock:
            live, number = self._find(stream), live.arrived
            # Before the scheduler knows of it, as it may report its fate at once.
            live.inputs[number] = pixels
            try:
                # The time is taken with the lock held, as the scheduler's must not go back.
                self._scheduler.arrive(stream, self._clock.now_ns(), timestamp_ns)
            except SessionError:
                del live.inputs[number]
                raise
            live.arrived += 1
            self.metrics.arrived(stream, number)
            self._device_work.notify()
            return number

    def set_prompt(self, stream: StreamId, text: str, blend_chunks: int = 0) -> None:
        """Changes a stream's prompt from its next chunk on. Waits for the text encoder; the stream does not.

        Raises:
          ConfigError: there is no such prompt.
          SessionError: the stream is over.
          Exception: what the text encoder raises; the stream ends with it.
        """
        check_prompt(text)
        if blend_chunks < 0:
            raise ConfigError(f"blend_chunks must be at least 0, got {blend_chunks}")
        with self._lock:
            live = self._find(stream)
        try:
            self._engine.prepare_prompt(text)
        except Exception as e:
            self._fail(live, e)
            raise
        with self._lock:
            self._order(self._change_prompt, live, text, blend_chunks)

    def end(self, stream: StreamId) -> None:
        """Says that no more frames come; those that are there are still finished and shown."""
        with self._lock:
            if (live := self._streams.get(stream)) is not None and not live.gone:
                live.ended = True
                self._scheduler.end(stream, self._clock.now_ns())
                self._look_for_ends()
                self._device_work.notify()

    def close(self, stream: StreamId) -> None:
        """Ends a stream at once: frames that are not due yet are dropped."""
        with self._lock:
            if (live := self._streams.get(stream)) is not None:
                self._close(live)

    def wait(self, stream: StreamId | None = None, timeout_s: float | None = None) -> bool:
        """Waits until a stream, or every stream, is over; returns whether that is so.

        Raises:
          EngineError: the loop itself failed.
        """
        with self._lock:
            until_ns = None if timeout_s is None else self._clock.now_ns() + round(timeout_s * SECOND)
            while self._error is None and (self._streams if stream is None else stream in self._streams):
                if until_ns is not None and self._clock.now_ns() >= until_ns:
                    return False
                self._clock.wait(self._state, until_ns)
            if self._error is not None:
                raise EngineError(str(self._error)) from self._error
            return True

    def stream_result(self, stream: StreamId) -> BaseException | None:
        """Returns why a stream ended before its time; None if it did not, or has not yet.

        Raises:
          SessionError: there was no such stream, or it is long forgotten.
        """
        with self._lock:
            if stream in self._streams:
                return self._streams[stream].error
            if stream not in self._results:
                raise SessionError(f"there is no stream {stream}")
            return self._results[stream]

    @property
    def streams(self) -> tuple[StreamId, ...]:
        """The streams that are not over."""
        with self._lock:
            return tuple(self._streams)

    # --- the threads

    def _drive(self) -> None:
        """Device thread: one tick after another, and orders in between."""
        try:
            while True:
                try:
                    todo = self._next_work()
                    if todo is None:
                        return
                    todo()
                except Exception as e:
                    self._end_loop(e)  # which leaves orders: sessions to close
                todo = None  # nothing is held while this waits
        finally:
            with self._lock:
                self._driven = True
                self._finisher_work.notify()

    def _next_work(self) -> Callable[[], None] | None:
        """Waits for the next thing to do; None: there will be nothing."""
        with self._lock:
            while True:
                if self._orders:
                    return self._orders.popleft()
                if self._stopping:
                    return None
                work = self._scheduler.next(self._clock.now_ns())
                self._look_for_ends()
                if isinstance(work, Tick):
                    return functools.partial(self._run_tick, work, [self._enter(part) for part in work.parts])
                if not self._orders:
                    self._clock.wait(self._device_work, work.until_ns)

    def _enter(self, part: Part) -> _Entry:
        """Takes the pixels of a part out of the store."""
        live = self._streams[part.stream]
        assert live.session is not None, f"stream {part.stream} has frames before its session is open"
        if part.frames:
            live.flight.append(part.frames)
            live.next_frame = part.frames[-1] + 1
        return _Entry(live, live.session, part, [live.inputs.pop(number) for number in part.frames])

    def _run_tick(self, tick: Tick, entries: Sequence[_Entry]) -> None:
        """Takes a tick through the stages; the streams of one that fails end."""
        taken: list[_Live] = []
        ticket, error = None, None
        try:
            with self._watched(_name(tick), tick.predicted_ns):
                work = []
                for live, session, part, frames in entries:
                    try:
                        if session.steps != part.steps:
                            session.set_steps(part.steps)
                    except Exception as e:
                        self._fail(live, e)
                        continue
                    taken.append(live)
                    work.append(Work(session, _stacked(frames, part.fill)))
                if work:
                    ticket = self._engine.tick(work)
                    ticket.wait_stages()
        except Exception as e:
            ticket, error = None, e
        with self._lock:
            is_new = error is not None and self._end_streams(taken, error)
            self._scheduler.free(self._clock.now_ns())
            self._passed.append(_Passed(tick, taken, ticket, error, is_new))
            self._finisher_work.notify()

    def _finish(self) -> None:
        """Finisher thread: one tick after another, in the order in which they ran."""
        while (passed := self._take(self._passed, self._finisher_work, lambda: self._driven)) is not None:
            self._finish_tick(passed)
            passed = None  # nothing is held while this waits

    def _finish_tick(self, passed: _Passed) -> None:
        """Waits for the frames of a tick and tells the scheduler; the streams of one that fails end."""
        tick, taken, ticket, error, is_new = passed
        chunks: Sequence[Sequence[Chunk]] = ()
        if ticket is not None:
            try:
                with self._watched(f"finishing the frames of {_name(tick)}", tick.predicted_ns):
                    ticket.wait()
                chunks = ticket.chunks
            except Exception as e:
                error = e
        with self._lock:
            if ticket is not None and error is not None:
                is_new = self._end_streams(taken, error)
            finished: dict[StreamId, int] = {}
            for live, done in zip(taken, chunks, strict=error is None):
                if live.gone:  # if an earlier tick of it failed, nobody knows whose frames these are
                    continue
                finished[live.id] = len(done)
                self._finished.extend((live, live.flight.popleft(), chunk) for chunk in done)
            # Their pixels follow within the time of a copy: the reader fetches them while the next tick runs.
            self._scheduler.done(finished, self._clock.now_ns())
            self._look_for_ends()
            self._device_work.notify()
            self._reader_work.notify()
            self._delivery_work.notify()
            if error is None:
                self._failed_ticks = 0
            elif is_new:
                self._failed_ticks += 1
            is_last = is_new and self._failed_ticks >= self._config.failed_ticks
        if is_last:
            failed = EngineError(f"{self._failed_ticks} ticks failed one after another: {error}")
            self._end_loop(failed, error)

    def _end_streams(self, taken: Iterable[_Live], error: Exception) -> bool:
        """Ends the streams of a tick that failed; returns whether any of them was left. The lock is held."""
        left = [live for live in taken if not live.gone]
        for live in left:
            self._close(live, error)
        return bool(left)

    def _change_prompt(self, live: _Live, text: str, blend_chunks: int) -> None:
        """Device thread, between ticks."""
        if live.session is not None and not live.gone:
            try:
                with self._watched(f"the change of a prompt (stream {live.id})"):
                    live.session.set_prompt(text, blend_chunks)
            except Exception as e:
                self._fail(live, e)
                return
            with self._lock:
                self._take_event(PromptRecord(live.id, self._clock.now_ns(), text, live.next_frame))

    def _close_session(self, live: _Live) -> None:
        """Device thread, between ticks."""
        try:
            if live.session is not None:
                with self._watched(f"closing a session (stream {live.id})"):
                    live.session.close()
        except Exception as e:
            self._fail(live, e)
        with self._lock:
            live.session = None
            self._forget_if_done(live)

    @contextmanager
    def _watched(self, what: str, predicted_ns: int = 0) -> Iterator[None]:
        """Lets the watchdog know of a call that the device may not come back from."""
        limit_ns = max(round(self._config.hang_s * SECOND), round(self._config.hang_factor * predicted_ns))
        thread = threading.current_thread().name
        self._calls[thread] = _Call(what, self._clock.now_ns(), limit_ns)
        try:
            yield
        finally:
            with self._lock:
                del self._calls[thread]
                if self._stopping:
                    self._watch.notify()

    def _read(self) -> None:
        """Reader thread: brings finished frames to the host."""
        while (found := self._take(self._finished, self._reader_work, lambda: self._stopping)) is not None:
            live, numbers, chunk = found
            try:
                # One by one they are shown and freed, so each has its memory. What only fills a chunk is left out.
                with self._watched(f"reading frames (stream {live.id})"):
                    pixels = chunk.frames()
                live.outlet.fill({number: pixels[i].copy() for i, number in enumerate(numbers)})
            except Exception as e:
                live.outlet.end(at_once=True)
                self._fail(live, e)
            found = live = chunk = pixels = None  # nothing is held while this waits

    def _take(self, waiting: deque[T], work: threading.Condition, is_over: Callable[[], bool]) -> T | None:
        """Waits for the next of what waits for a thread; None: there will be nothing. Takes the lock itself."""
        with self._lock:
            while not waiting:
                if is_over():
                    return None
                self._clock.wait(work, None)
            return waiting.popleft()

    def _deliver(self) -> None:
        """Delivery thread: passes frames on when they are due."""
        with self._lock:
            while not self._stopping:
                _, again_ns = self._scheduler.shows(self._clock.now_ns())
                due, self._due = self._due, []
                behind = [live for live, record in self._with_streams(due) if not live.outlet.show(record)]
                for live in behind:  # last, as this lets outlets end
                    live.outlet.end(at_once=True)
                    live.drained = True  # nobody waits for a sink that is stuck
                    waiting = self._config.sink_frames
                    self._close(live, SessionError(f"the sink is too slow: {waiting} frames wait for it"))
                if due:
                    self._look_for_ends()
                    self._device_work.notify()
                    continue
                self._clock.wait(self._delivery_work, again_ns)

    def _observe(self) -> None:
        """Report thread: hands events to the observers."""
        while True:
            with self._lock:
                while not self._events:
                    if self._silent:
                        return
                    self._clock.wait(self._report_work, None)
                events = list(self._events)
                self._events.clear()
            for event, observer in itertools.product(events, tuple(self._observers)):
                if observer in self._observers:
                    try:
                        observer(event)
                    except Exception as e:
                        self._observers.remove(observer)
                        self.observer_errors.append(e)

    def _watch_device(self) -> None:
        """Watchdog thread: looks at calls of the device, several times within what they are allowed."""
        every_ns = round(min(1.0, self._config.hang_s / 4) * SECOND)
        while True:
            with self._lock:
                now_ns, calls = self._clock.now_ns(), list(self._calls.values())
                if self._stopping and not calls:
                    return
                call = next((call for call in calls if now_ns - call.started_ns > call.limit_ns), None)
                if call is None:
                    self._clock.wait(self._watch, now_ns + every_ns)
                    continue
            report = HangReport(call.what, (now_ns - call.started_ns) / SECOND, call.limit_ns / SECOND)
            self._on_hang(report)
            self._end_loop(EngineError(str(report)))
            return

    def _ingest(self, live: _Live, source: Source) -> None:
        """Ingest thread: offers what the source gives."""
        frames = None
        try:
            frames = iter(source)
            for timestamp_ns, frame in frames:
                if live.gone or live.ended:
                    break
                self.offer(live.id, frame, timestamp_ns)
            self.end(live.id)
        except Exception as e:
            if not live.ended:  # somebody else's call of `end` is no reason to fail
                self._fail(live, e)
        finally:
            if (close := getattr(frames, "close", None)) is not None:
                close()

    def _hand_over(self, live: _Live) -> None:
        """Outlet thread."""
        try:
            live.outlet.run()
        except Exception as e:
            live.outlet.end(at_once=True)
            self._fail(live, e)
        with self._lock:
            live.drained = True
            self._forget_if_done(live)

    def _start_own(self, kind: str, live: _Live, body: Callable[..., None], *args: object) -> None:
        """Starts a thread of a stream."""

        def run() -> None:
            try:
                body(*args)
            finally:
                self._stream_threads.discard(threading.current_thread())

        thread = _thread(f"{kind}-{live.id}", run)
        self._stream_threads.add(thread)
        thread.start()

    def _guarded(self, name: str, body: Callable[[], None]) -> None:
        """Runs a thread of the loop; should it end before its time, so does the loop."""
        try:
            body()
            problem = "ended by itself"
        except BaseException as e:
            problem = f"failed: {type(e).__name__}: {e}"
            self._end_loop(EngineError(f"the loop's {name} thread {problem}"), e)
        if not self._stopping:
            self._end_loop(EngineError(f"the loop's {name} thread {problem}"))

    def _end_loop(self, error: BaseException, cause: BaseException | None = None) -> None:
        """Ends every stream with the reason, and the loop."""
        with self._lock:
            if self._error is None:
                error.__cause__ = cause or error.__cause__
                self._error = error
            self._closing = True
            for live in list(self._streams.values()):
                with suppress(Exception):  # the scheduler may be what is broken
                    self._close(live, self._error)
                live.gone = live.over = True
                live.outlet.end()
                self._order_close(live)
            self._stopping = True
            self._wake_all()

    # --- inner workings; the lock is held where not said otherwise

    def _admit(self, spec: SessionSpec, settings: StreamSettings, sink: Sink) -> _Live:
        """Asks the scheduler, and prepares the stream's way out. Takes the lock itself."""
        with self._lock:
            if not self._started or self._closing:
                why = str(self._error) if self._error else "stopped" if self._started else "not started"
                raise EngineError(f"the loop does not run: {why}")
            stream = self._scheduler.open(settings, self._clock.now_ns())
            live = _Live(stream, spec, Outlet(sink, self._config.sink_frames, self._clock))
            self._streams[stream] = live
        self._start_own("outlet", live, self._hand_over, live)
        return live

    def _begin(self, live: _Live, session: Session) -> None:
        """Gives an admitted stream its device side. Takes the lock itself."""
        with self._lock:
            if not live.gone:
                live.session, live.opening = session, False
                return
        session.close()
        raise SessionError(f"stream {live.id} was closed while it opened")

    def _with_streams(self, records: Iterable[FrameRecord]) -> list[tuple[_Live, FrameRecord]]:
        return [(self._streams[record.stream], record) for record in records]

    def _find(self, stream: StreamId) -> _Live:
        live = self._streams.get(stream)
        if live is None or live.gone:
            error = live.error if live is not None else self._results.get(stream)
            why = f"it ended with: {error}" if error is not None else "it is over"
            raise SessionError(f"stream {stream} takes nothing more: {why}")
        return live

    def _take_event(self, event: Event) -> None:
        """Is given every event, most of them by the scheduler within calls of it."""
        self.metrics(event)
        if isinstance(event, FrameRecord):
            if event.fate is not Fate.DROPPED:
                self._due.append(event)
            elif (live := self._streams.get(event.stream)) is not None:
                live.inputs.pop(event.number, None)
                live.outlet.forget(event.number)
        if self._observers:
            if len(self._events) < self._config.waiting_events:
                self._events.append(event)
                self._report_work.notify()
            else:
                self.lost_events += 1

    def _order(self, order: Callable[..., None], *args: object) -> None:
        self._orders.append(functools.partial(order, *args))
        self._device_work.notify()

    def _fail(self, live: _Live, error: BaseException) -> None:
        """Ends a stream with its reason. Takes the lock itself."""
        with self._lock:
            self._close(live, error)

    def _close(self, live: _Live, error: BaseException | None = None) -> None:
        """Ends a stream at once; what is due already is still handed over. A second time changes nothing."""
        if live.gone:
            return
        live.gone, live.error = True, error
        self._scheduler.close(live.id, self._clock.now_ns())
        live.inputs.clear()
        self._look_for_ends()
        self._device_work.notify()
        self._delivery_work.notify()

    def _look_for_ends(self) -> None:
        """Lets the sink and the device side of streams end that the scheduler is through with."""
        for live in self._streams.values():
            if not live.over and self._scheduler.is_over(live.id):
                live.over = True
                live.outlet.end()
                self._order_close(live)

    def _order_close(self, live: _Live) -> None:
        if live.session is not None:
            self._order(self._close_session, live)

    def _forget_if_done(self, live: _Live) -> None:
        """Removes a stream of which nothing is left but how it ended."""
        if not live.over or not live.drained or live.opening or live.session is not None:
            return
        if self._streams.pop(live.id, None) is None:
            return
        if live.error is not None:
            traceback.clear_frames(live.error.__traceback__)  # they hold pictures
        self._results[live.id] = live.error
        if len(self._results) > KEPT_RESULTS:
            del self._results[next(iter(self._results))]
        self._state.notify_all()

    def _wake_all(self) -> None:
        for condition in (
            self._device_work, self._finisher_work, self._delivery_work, self._reader_work, self._report_work,
            self._watch, self._state,
        ):  # fmt: skip
            condition.notify_all()


def _checked_frame(frame: np.ndarray, cfg: StreamConfig) -> np.ndarray:
    """Returns a copy of a frame; raises SessionError if it is not one of this stream's."""
    expected = (cfg.height, cfg.width, 3)
    if not isinstance(frame, np.ndarray):
        raise SessionError(f"a frame must be a numpy array {expected}, got {type(frame).__name__}")
    if frame.shape != expected or frame.dtype != np.uint8:
        raise SessionError(f"a frame must be uint8 {expected}, got {frame.dtype} {frame.shape}")
    return np.array(frame, order="C")


def _name(tick: Tick) -> str:
    """Returns what a tick is called in reports."""
    return f"tick {tick.number} (stream {', '.join(str(part.stream) for part in tick.parts)})"


def _stacked(frames: Sequence[np.ndarray], fill: int) -> np.ndarray | None:
    """Returns frames as one array, the last one repeated `fill` times; None if there are none."""
    return np.stack([*frames, *[frames[-1]] * fill]) if frames else None


def _thread(name: str, body: Callable[..., None], *args: object) -> threading.Thread:
    return threading.Thread(target=body, args=args, name=f"svd2-{name}", daemon=True)


def _join(thread: threading.Thread, deadline: float) -> None:
    if thread is not threading.current_thread() and thread.ident is not None:
        thread.join(max(0.0, deadline - time.monotonic()))
