"""The live loop: frames of several streams in, through one device, and out at their time.

One thread owns the scheduler, the streams and the time. It waits for messages in its inbox, and everybody else only
puts messages there:

    loop           decides, keeps the books, and notices a device that hangs
    device         hands ticks and changes of sessions to the engine, in order
    reader         waits for ticks, in order: until the stages are through, until frames are finished, for their pixels
    encoder        encodes prompts
    sink, for each stream    calls the stream's sink, so that a slow one stalls nobody else
    report         calls the observers of events, so that a slow disk stalls nobody

So there is no lock but those inside mailboxes. Methods may be called from any thread, also from asyncio's: none but
`LiveLoop.open`, `LiveLoop.wait`, `LiveLoop.stop` and `Stream.result` waits for anything.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_futures
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Self, TypeAlias, TypeVar

import numpy as np

from svd2_jax.api import Engine, Session, SessionSpec, Ticket, Work, check_prompt
from svd2_jax.config import StreamConfig
from svd2_jax.errors import ConfigError, EngineError, SessionError
from svd2_jax.runtime.clock import Clock, MonotonicClock
from svd2_jax.runtime.driver import Driver
from svd2_jax.runtime.latency import LatencySample
from svd2_jax.runtime.mailbox import Mailbox, Message, Then, Worker
from svd2_jax.runtime.measure import settings_for, with_steps
from svd2_jax.runtime.metrics import Metrics
from svd2_jax.runtime.scheduler import PolicyConfig, Scheduler
from svd2_jax.runtime.work import (
    SECOND,
    Event,
    Fate,
    FrameRecord,
    Part,
    PromptRecord,
    Reason,
    Show,
    StreamId,
    StreamSettings,
    Tick,
    shown_fate,
)

T = TypeVar("T")

HANG_EXIT_CODE = 3
WAITING_OFFERS = 256  # messages that may wait when a frame is offered; the loop takes microseconds for each

Sink: TypeAlias = Callable[[np.ndarray, FrameRecord], object]
"""Takes a frame, uint8 [H, W, 3], when it is due, and its record. Called in a thread of the stream's own.

A sink may have an attribute `when_slow`, see `WhenSlow`; a function without it ends its stream.
"""


class WhenSlow(Enum):
    """What happens when more frames wait for a sink than the loop keeps."""

    END = "end"  # a file: every frame matters, so its stream ends with the reason
    DROP_OLDEST = "drop-oldest"  # a viewer: only what is newest matters


class Life(Enum):
    """Where a stream is."""

    OPENING = auto()  # its programs are compiled
    LIVE = auto()  # takes frames
    DRAINING = auto()  # takes no more frames; those that are there are finished and shown
    CLOSED = auto()  # the scheduler is through with it


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
      sink_frames: due frames that may wait for a stream's sink; for more, see `WhenSlow`.
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


class Stream:
    """A live stream: what `LiveLoop.open` gives. Every method may be called from any thread."""

    def __init__(
        self, loop: LiveLoop, id: StreamId, spec: SessionSpec, settings: StreamSettings, prepared: set[int]
    ):
        """Is called by the loop. `prepared` are the numbers of steps that programs are there for."""
        self.id, self.spec = id, spec
        self.ended: Future[None] = Future()
        """Is done when nothing is left of the stream; has the error that ended it before its time."""
        self.settings = settings
        """What it asks for now; `update` changes it."""
        self.life = Life.OPENING
        self.error: BaseException | None = None
        """Why it ended, or is ending, before its time."""
        self._loop, self._prepared = loop, prepared
        self._takes_frames = True

    def __repr__(self) -> str:
        return f"<Stream {self.id}, {self.life.name.lower()}>"

    def offer(self, frame: np.ndarray, timestamp_ns: int | None = None) -> None:
        """Hands in a frame that is there now. It is copied; does not wait.

        Args:
          frame: uint8 [H, W, 3] of the spec's size.
          timestamp_ns: when it was taken, by the source's own clock.

        Raises:
          SessionError: the stream takes no more frames; this is not such a frame, and the stream ends with this error;
            or so many frames wait for the loop's thread that this one is not taken.
        """
        self._check_open()
        try:
            pixels = _checked_frame(frame, self.spec.config)
        except SessionError as e:
            self.close(e)
            raise
        loop, arrive = self._loop, functools.partial(self._loop._arrive, self.id, pixels, timestamp_ns)
        if not loop._inbox.put(arrive, WAITING_OFFERS) and not loop._inbox.is_closed:
            raise SessionError(
                f"{WAITING_OFFERS} messages wait for the loop already; offer frames as they are taken, "
                f"{self.settings.rate_hz:g} a second"
            )

    def update(
        self,
        prompt: str | None = None,
        blend_chunks: int = 0,
        noise_scale: float | None = None,
        steps: int | None = None,
        min_steps: int | None = None,
    ) -> Future[None]:
        """Changes what is not None, from the next chunk on; the stream goes on meanwhile. Does not wait.

        Args:
          prompt: what to re-draw to.
          blend_chunks: chunks over which a new prompt comes in.
          noise_scale: share of noise in (0, 1].
          steps: denoising steps when there is time enough. The stream must have been opened for them.
          min_steps: steps that overload may bring it down to.

        Returns:
          Is done when the change is in place. Where it raises, the stream has ended with that error.

        Raises:
          ConfigError: a value that cannot be; nothing was changed.
          SessionError: the stream takes nothing more.
        """
        if prompt is not None:
            check_prompt(prompt)
        if blend_chunks < 0:
            raise ConfigError(f"blend_chunks must be at least 0, got {blend_chunks}")
        spec = self.spec
        if noise_scale is not None:
            spec = dataclasses.replace(spec, noise_scale=noise_scale)  # checks it
        settings = dataclasses.replace(
            self.settings,
            steps=self.settings.steps if steps is None else steps,
            floor_steps=self.settings.floor_steps if min_steps is None else min_steps,
        )
        if not set(range(settings.floor_steps, settings.steps + 1)) <= self._prepared:
            there = ", ".join(map(str, sorted(self._prepared)))
            raise ConfigError(
                f"stream {self.id} was opened for {there} denoising steps, and {settings.floor_steps} to "
                f"{settings.steps} are asked for: name them when you open it, as in open(..., steps=(1, 2, 4))"
            )
        self._check_open()
        self.spec, self.settings = spec, settings
        done: Future[None] = Future()
        change = functools.partial(
            self._loop._change, self.id, settings, prompt, blend_chunks, noise_scale, done
        )
        if not self._loop._inbox.put(change):
            raise self._loop._not_running()
        return done

    def end(self) -> None:
        """Says that no more frames come; those that are there are still finished and shown."""
        self._takes_frames = False
        self._loop._inbox.put(functools.partial(self._loop._end, self))

    def close(self, error: BaseException | None = None) -> None:
        """Ends the stream at once: frames that are not due yet are dropped. `error` says why, if that is one."""
        if self.is_open and error is not None:
            self.error = error
        self._takes_frames = False
        self._loop._inbox.put(functools.partial(self._loop._close_stream, self, error))

    def result(self, timeout_s: float | None = None) -> None:
        """Waits until nothing is left of the stream.

        Raises:
          BaseException: what ended it before its time.
          TimeoutError: it is not over yet.
        """
        self.ended.result(timeout_s)

    @property
    def is_open(self) -> bool:
        """Whether it takes frames and changes."""
        return self._takes_frames and self.life in (Life.OPENING, Life.LIVE)

    def _check_open(self) -> None:
        if not self.is_open:
            why = f"it ended with: {self.error}" if self.error is not None else "it is over"
            raise SessionError(f"stream {self.id} takes nothing more: {why}")


@dataclass(eq=False)
class _StreamState:
    """What the loop's thread keeps of a stream.

    Attributes:
      stream: its handle.
      sink: takes its frames.
      sinker: the thread that calls it.
      settings: that the scheduler knows of.
      session: its device side; None until it is open, and again once its closing began.
      inputs: pixels of the frames that have not entered a tick, by number.
      flight: numbers of the frames of each chunk on the device, oldest first.
      finished: pixels of finished frames that were not passed on, by number; None while they are copied.
      due: frames to pass on, oldest first.
      changes: updates that are not in place yet.
      arrived: frames offered so far.
      next_frame: number of the first frame that the next chunk can begin with.
      pending: what has to come back before nothing is left: opening, closing, the sink, ticks.
      is_passing: whether the sink has a frame.
    """

    stream: Stream
    sink: Sink
    sinker: Worker
    settings: StreamSettings
    session: Session | None = None
    inputs: dict[int, np.ndarray] = field(default_factory=dict)
    flight: deque[tuple[int, ...]] = field(default_factory=deque)
    finished: dict[int, np.ndarray | None] = field(default_factory=dict)
    due: deque[FrameRecord] = field(default_factory=deque)
    changes: set[Future[None]] = field(default_factory=set)
    arrived: int = 0
    next_frame: int = 0
    pending: int = 1  # it is opening
    is_passing: bool = False


@dataclass(eq=False)
class _InFlight:
    """A tick from its start until its frames are finished.

    Attributes:
      tick: what runs.
      states: the streams that were to take part; of those that do, their chunks come out of the ticket in this order.
      ticket: to wait for; None while it is handed over, and if it failed.
      error: why it failed.
      is_new: whether that ended any stream. If not, it failed with the tick before it.
    """

    tick: Tick
    states: list[_StreamState]
    ticket: Ticket | None = None
    error: Exception | None = None
    is_new: bool = False

    @property
    def name(self) -> str:
        """What it is called in reports."""
        return f"tick {self.tick.number} (stream {', '.join(str(part.stream) for part in self.tick.parts)})"


@dataclass(frozen=True)
class _Ask:
    """A message whose sender waits for what it returns."""

    function: Callable[[], Any]
    answer: Future[Any]

    def __call__(self) -> None:
        try:
            self.answer.set_result(self.function())
        except BaseException as e:
            self.answer.set_exception(e)


class LiveLoop:
    """Runs live streams on an engine. Use it as a context manager."""

    def __init__(
        self,
        engine: Engine,
        policy: PolicyConfig | None = None,
        config: LoopConfig | None = None,
        metrics: Metrics | None = None,
        observers: Sequence[Callable[[Event], None]] = (),
        on_hang: Callable[[HangReport], None] = exit_on_hang,
        clock: Clock | None = None,
        ids: Iterator[StreamId] | None = None,
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
          ids: gives the numbers of streams, ascending; None counts from 0. Loops that share metrics share one.
        """
        self.metrics = metrics or Metrics()
        self.error: BaseException | None = None
        """What ended the loop itself, if anything did."""
        self.observer_errors: list[BaseException] = []
        self.lost_events = 0
        self._engine, self._on_hang = engine, on_hang
        self._config, self._clock = config or LoopConfig(), clock or MonotonicClock()
        self._inbox: Mailbox[Message] = Mailbox(self._clock)
        self._events: Mailbox[Event] = Mailbox(self._clock)
        self._observers = list(observers)
        self._scheduler = Scheduler(policy or PolicyConfig(), engine.batch_sizes, self._take_event, ids)
        self._driver = Driver(
            self._scheduler,
            self._inbox,
            self._clock.now_ns,
            self._start_tick,
            self._pass_all_on,
            self._look_for_hangs,
        )
        self._sinkers: set[Worker] = set()
        self._states: dict[StreamId, _StreamState] = {}
        self._failed_ticks = 0
        self._is_stopping = self._has_hung = False
        self._thread: threading.Thread | None = None
        self._observer_thread: threading.Thread | None = None
        self._device: Worker
        self._reader: Worker
        self._encoder: Worker

    # --- for any thread

    def start(self) -> None:
        """Starts the threads."""
        if self._thread is not None:
            raise SessionError("the loop was started already; make a new one")
        self._device, self._reader, self._encoder = (
            Worker(name, self._inbox, self._clock) for name in ("device", "reader", "encoder")
        )
        self._thread = threading.Thread(target=self._run, name="svd2-loop", daemon=True)
        self._observer_thread = threading.Thread(target=self._observe, name="svd2-report", daemon=True)
        self._thread.start()
        self._observer_thread.start()

    def stop(self) -> tuple[str, ...]:
        """Closes all streams and ends all threads; waits for them for at most `stop_s` in all.

        Returns:
          The names of the threads that did not end: they are stuck in a sink, an observer or the device.
        """
        if self._thread is None:
            return ()
        deadline = time.monotonic() + self._config.stop_s
        self._inbox.put(self._end_all)
        self._thread.join(self._config.stop_s)
        self._inbox.close()  # what is stuck by now is given up
        workers = [self._device, self._reader, self._encoder, *self._sinkers]
        for worker in workers:
            worker.close(drop=worker in self._sinkers)
        threads = [self._thread, *(worker.thread for worker in workers)]
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._events.close()
        assert self._observer_thread is not None
        self._observer_thread.join(max(deadline - time.monotonic(), 0.2))
        return tuple(thread.name for thread in [*threads, self._observer_thread] if thread.is_alive())

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The streams that are not over."""
        return tuple(state.stream for state in tuple(self._states.values()))

    @property
    def is_running(self) -> bool:
        """Whether it was started, and neither stopped nor failed."""
        return self._thread is not None and self.error is None and not self._inbox.is_closed

    def warm_up(self, samples: Iterable[LatencySample]) -> None:
        """Tells the scheduler what ticks take, see `measure.measure`; without, it finds out with the first frames.

        Where a tick may take longer than `hang_s`, the loop needs it to tell a slow device from one that hangs.
        """
        samples = list(samples)
        self._ask(lambda: [self._scheduler.warm_up(sample) for sample in samples])

    def open(
        self,
        spec: SessionSpec,
        settings: StreamSettings,
        sink: Sink,
        name: str | None = None,
        steps: Iterable[int] = (),
    ) -> Stream:
        """Lets a stream join. Waits: compiles what it needs, if nobody did.

        Args:
          spec: what to compute. Its steps are those of the settings.
          settings: what it asks for; sizes of groups and the shape are taken from the spec, see `settings_for`.
          sink: takes the finished frames. Once the stream is over, it is called no more.
          name: what to call it in reports.
          steps: numbers of denoising steps that `Stream.update` may ask for, besides those of the settings.

        Raises:
          Refused: the device cannot take it on.
          ConfigError: such a stream cannot run live.
          EngineError: the loop does not run.
        """
        spec = self._engine.resolved(spec)
        settings = settings_for(spec, settings)
        spec = with_steps(spec, settings.steps)
        prepared = {*steps, *range(settings.floor_steps, settings.steps + 1)}
        state = self._ask(functools.partial(self._admit, spec, settings, sink, prepared))
        session = None
        try:
            self._engine.prepare(spec, sorted(prepared))
            session = self._engine.open(spec)
            self.metrics.opened(state.stream.id, settings, name, spec.prompt)
            self._ask(functools.partial(self._begin, state, session))
        except BaseException as e:
            if session is not None:
                session.close()
            self._inbox.put(functools.partial(self._opened, state, e))
            raise
        return state.stream

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until every stream is over; returns whether that is so.

        Raises:
          EngineError: the loop itself failed.
        """
        left = wait_futures([stream.ended for stream in self.streams], timeout_s).not_done
        if self.error is not None:
            raise EngineError(str(self.error)) from self.error
        return not left

    def _ask(self, function: Callable[[], T]) -> T:
        """Has a function called on the loop's thread and returns its result."""
        ask = _Ask(function, Future())
        if self._thread is None or not self._inbox.put(ask):
            raise self._not_running()
        return ask.answer.result()

    def _not_running(self) -> EngineError:
        why = str(self.error) if self.error else "stopped" if self._thread else "not started"
        return EngineError(f"the loop does not run: {why}")

    # --- the loop's thread, and what only it calls

    def _run(self) -> None:
        try:
            self._driver.run()
        except BaseException as e:
            error = EngineError(f"the loop's thread failed: {type(e).__name__}: {e}")
            error.__cause__ = e
            self._fail(error)
        finally:
            self._inbox.close()
            for message in self._inbox.take() or ():
                if isinstance(message, _Ask):
                    message.answer.set_exception(self._not_running())
            for worker in (self._device, self._reader, self._encoder):
                worker.close()

    def _admit(
        self, spec: SessionSpec, settings: StreamSettings, sink: Sink, steps: set[int]
    ) -> _StreamState:
        if self._is_stopping:
            raise self._not_running()
        stream = Stream(self, self._scheduler.open(settings, self._driver.now_ns), spec, settings, steps)
        self._sinkers = {sinker for sinker in self._sinkers if sinker.thread.is_alive()}
        sinker = Worker(f"sink-{stream.id}", self._inbox, self._clock)
        self._sinkers.add(sinker)
        state = _StreamState(stream, sink, sinker, settings)
        self._states[stream.id] = state
        return state

    def _begin(self, state: _StreamState, session: Session) -> None:
        """Gives an admitted stream its device side."""
        if state.stream.life is Life.CLOSED:
            raise SessionError(f"stream {state.stream.id} was closed while it opened")
        state.session, state.stream.life = session, Life.LIVE
        state.pending -= 1

    def _opened(self, state: _StreamState, error: BaseException) -> None:
        """Takes note of a stream that could not be opened."""
        state.pending -= 1
        self._close(state, error)
        self._forget_if_over(state)

    def _arrive(self, stream: StreamId, pixels: np.ndarray, timestamp_ns: int | None) -> None:
        state = self._states.get(stream)
        if state is None or state.stream.life is not Life.LIVE:
            return  # it ended while the frame was on its way here
        number = state.arrived
        state.inputs[number] = pixels  # before the scheduler knows of it, as it may report its fate at once
        state.arrived += 1
        self.metrics.arrived(stream, number)
        self._scheduler.arrive(stream, self._driver.now_ns, timestamp_ns)

    def _end(self, stream: Stream) -> None:
        if stream.life is Life.LIVE:
            stream.life = Life.DRAINING
            self._scheduler.end(stream.id, self._driver.now_ns)

    def _close_stream(self, stream: Stream, error: BaseException | None) -> None:
        if (state := self._states.get(stream.id)) is not None:
            self._close(state, error)

    def _close(self, state: _StreamState, error: BaseException | None = None) -> None:
        """Ends a stream at once; what is due already is still passed on. A second time changes nothing."""
        stream = state.stream
        if stream.life is Life.CLOSED:
            return
        stream.error = stream.error or error
        self._scheduler.close(stream.id, self._driver.now_ns)
        self._shut(state)

    def _change(
        self,
        stream: StreamId,
        settings: StreamSettings,
        prompt: str | None,
        blend_chunks: int,
        noise_scale: float | None,
        done: Future[None],
    ) -> None:
        """Changes a stream: encodes its prompt, changes its session between two ticks, and says when it is done."""
        state = self._states.get(stream)
        if state is None or state.stream.life is Life.CLOSED:
            _settle(done, SessionError(f"stream {stream} ended before the change"))
            return
        state.changes.add(done)
        if settings != state.settings:
            state.settings = settings
            self._scheduler.update(stream, settings, self._driver.now_ns)

        def change(session: Session) -> None:
            if prompt is not None:
                session.set_prompt(prompt, blend_chunks)
            if noise_scale is not None:
                session.set_noise_scale(noise_scale)

        def encoded(_: object, error: Exception | None) -> None:
            if error is not None:
                changed(0, None, error)
                return
            if state.session is None:
                return  # the stream ends, and this change is told so with it
            then = functools.partial(changed, state.next_frame)
            what = f"a change of stream {stream}"
            self._call(self._device, functools.partial(change, state.session), then, what)

        def changed(frame: int, _: object, error: Exception | None) -> None:
            if error is not None:
                self._close(state, error)
            elif prompt is not None:
                self._report(PromptRecord(stream, self._driver.now_ns, prompt, frame))
            if done in state.changes:  # else the stream is over, and it was told so
                state.changes.remove(done)
                _settle(done, error)

        if prompt is None:
            encoded(None, None)
        else:
            self._encoder.do(functools.partial(self._engine.prepare_prompt, prompt), encoded)

    def _start_tick(self, tick: Tick) -> None:
        """Hands a tick to the device's thread."""
        flight = _InFlight(tick, [self._states[part.stream] for part in tick.parts])
        work = []
        for state, part in zip(flight.states, tick.parts, strict=True):
            assert state.session is not None, f"stream {part.stream} has frames before its session is open"
            state.pending += 1
            if part.frames:
                state.flight.append(part.frames)
                state.next_frame = part.frames[-1] + 1
            frames = [state.inputs.pop(number) for number in part.frames]
            work.append((state.session, part, frames))
        hand_over = functools.partial(self._hand_over, work)
        self._call(self._device, hand_over, functools.partial(self._handed, flight), flight.name, tick)

    def _hand_over(
        self, work: Sequence[tuple[Session, Part, list[np.ndarray]]]
    ) -> tuple[Ticket | None, list[Exception | None]]:
        """Device thread: changes steps and hands the tick to the engine; returns also why parts could not take part."""
        taken, problems = [], []
        for session, part, frames in work:
            try:
                if session.steps != part.steps:
                    session.set_steps(part.steps)
                taken.append(Work(session, _stacked(frames, part.fill)))
                problems.append(None)
            except Exception as e:
                problems.append(e)
        return self._engine.tick(taken) if taken else None, problems

    def _handed(
        self,
        flight: _InFlight,
        handed: tuple[Ticket | None, list[Exception | None]] | None,
        error: Exception | None,
    ) -> None:
        """Has the reader wait for the tick's stages."""
        if handed is None:
            self._fail_tick(flight, error)
        else:
            flight.ticket, problems = handed
            for state, problem in zip(tuple(flight.states), problems, strict=True):
                if problem is not None:
                    flight.states.remove(state)
                    state.pending -= 1
                    self._close(state, problem)
        wait = _nothing if flight.ticket is None else flight.ticket.wait_stages
        self._call(self._reader, wait, functools.partial(self._passed, flight), flight.name, flight.tick)

    def _passed(self, flight: _InFlight, _: object, error: Exception | None) -> None:
        """Lets the next tick start, and has the reader wait for this one's frames."""
        self._fail_tick(flight, error)
        self._scheduler.free(self._driver.now_ns)
        wait = _nothing if flight.ticket is None else flight.ticket.wait
        what = f"finishing the frames of {flight.name}"
        self._call(self._reader, wait, functools.partial(self._finished, flight), what, flight.tick)

    def _finished(self, flight: _InFlight, _: object, error: Exception | None) -> None:
        """Tells the scheduler which chunks are finished, and has their pixels read."""
        self._fail_tick(flight, error)
        finished: dict[StreamId, int] = {}
        done = flight.ticket.chunks if flight.ticket is not None else [()] * len(flight.states)
        for state, chunks in zip(flight.states, done, strict=True):
            if state.stream.life is Life.CLOSED:
                continue  # if a tick of it failed, nobody knows whose frames these are
            finished[state.stream.id] = len(chunks)
            for chunk in chunks:
                numbers = state.flight.popleft()
                state.finished.update(dict.fromkeys(numbers))
                then = functools.partial(self._read, state, numbers)
                self._call(self._reader, chunk.frames, then, f"reading frames (stream {state.stream.id})")
        # Their pixels follow within the time of a copy.
        self._scheduler.done(finished, self._driver.now_ns)
        for state in flight.states:
            state.pending -= 1
            self._forget_if_over(state)
        if flight.error is None:
            self._failed_ticks = 0
        elif flight.is_new:
            self._failed_ticks += 1
            if self._failed_ticks >= self._config.failed_ticks:
                last = EngineError(f"{self._failed_ticks} ticks failed one after another: {flight.error}")
                last.__cause__ = flight.error
                self._fail(last)

    def _fail_tick(self, flight: _InFlight, error: Exception | None) -> None:
        """Ends the streams of a tick that failed, if it did."""
        if error is None:
            return
        flight.ticket, flight.error = None, error
        for state in flight.states:
            if state.stream.life is not Life.CLOSED:
                flight.is_new = True
                self._close(state, error)

    def _read(
        self,
        state: _StreamState,
        numbers: tuple[int, ...],
        pixels: np.ndarray | None,
        error: Exception | None,
    ) -> None:
        """Takes the pixels of a chunk; what only fills it is left out."""
        if pixels is None:
            self._drop_due(state, Reason.CLOSED)
            self._close(state, error)
            self._forget_if_over(state)
            return
        for i, number in enumerate(numbers):
            if number in state.finished:  # else it was dropped meanwhile
                state.finished[number] = pixels[i].copy()  # so each can be freed by itself
        self._pass_on(state)

    def _pass_all_on(self, _: Sequence[Show]) -> None:
        """Passes on what has become due, and shuts the streams that the scheduler is through with."""
        for state in tuple(self._states.values()):
            if state.due:
                self._pass_on(state)
            if state.stream.life is not Life.CLOSED and self._scheduler.is_over(state.stream.id):
                self._shut(state)

    def _pass_on(self, state: _StreamState) -> None:
        """Gives the sink its next frame, if it is due and the sink has none; deals with a sink that is slow."""
        pixels = state.finished.get(state.due[0].number) if state.due else None
        if not state.is_passing and pixels is not None:
            record = state.due.popleft()
            del state.finished[record.number]
            now_ns = self._driver.now_ns
            fate = shown_fate(now_ns, record.deadline_ns)
            record = dataclasses.replace(record, shown_ns=now_ns, fate=fate)
            self._report(record)
            state.is_passing = True
            state.pending += 1
            take = functools.partial(state.sink, pixels, record)
            state.sinker.do(take, functools.partial(self._sunk, state))
        if (excess := len(state.due) - self._config.sink_frames) <= 0:
            return
        if getattr(state.sink, "when_slow", WhenSlow.END) is WhenSlow.DROP_OLDEST:
            self._drop_due(state, Reason.SINK, excess)
        else:
            self._drop_due(state, Reason.SINK)
            state.pending -= state.is_passing  # nobody waits for a sink that is stuck
            state.sinker.close(drop=True)
            slow = SessionError(f"the sink is too slow: {self._config.sink_frames} frames wait for it")
            self._close(state, slow)
            self._forget_if_over(state)

    def _drop_due(self, state: _StreamState, reason: Reason, count: int | None = None) -> None:
        """Drops the oldest frames that were to be passed on, or all of them."""
        for _ in range(len(state.due) if count is None else count):
            record = state.due.popleft()
            state.finished.pop(record.number, None)
            self._report(dataclasses.replace(record, shown_ns=None, fate=Fate.DROPPED, reason=reason))

    def _sunk(self, state: _StreamState, _: object, error: Exception | None) -> None:
        """Takes note that the sink came back."""
        if state.stream.ended.done():
            return  # it was given up
        state.is_passing = False
        state.pending -= 1
        if error is not None:
            self._drop_due(state, Reason.CLOSED)
            self._close(state, error)
        self._pass_on(state)
        self._forget_if_over(state)

    def _shut(self, state: _StreamState) -> None:
        """Closes the device side of a stream that the scheduler is through with."""
        state.stream.life = Life.CLOSED
        state.inputs.clear()
        due = {record.number for record in state.due}
        state.finished = {number: pixels for number, pixels in state.finished.items() if number in due}
        if state.session is not None:
            session, state.session = state.session, None
            state.pending += 1
            closed = functools.partial(self._session_closed, state)
            self._call(self._device, session.close, closed, f"closing a session (stream {state.stream.id})")
        self._forget_if_over(state)

    def _session_closed(self, state: _StreamState, _: object, error: Exception | None) -> None:
        state.pending -= 1
        state.stream.error = state.stream.error or error
        self._forget_if_over(state)

    def _forget_if_over(self, state: _StreamState) -> None:
        """Ends a stream of which nothing is left."""
        stream = state.stream
        if stream.life is Life.CLOSED and not state.due and state.pending == 0:
            self._forget(state)

    def _forget(self, state: _StreamState) -> None:
        stream = state.stream
        if self._states.pop(stream.id, None) is None:
            return
        state.sinker.close(drop=True)
        for change in state.changes:
            _settle(change, SessionError(f"stream {stream.id} ended before the change"))
        if stream.error is not None:
            traceback.clear_frames(stream.error.__traceback__)  # they hold pictures
        _settle(stream.ended, stream.error)
        if self._is_stopping and not self._states:
            self._inbox.close()

    def _end_all(self, error: BaseException | None = None) -> None:
        """Closes every stream, and the loop with the last of them."""
        self._is_stopping = True
        for state in tuple(self._states.values()):
            self._close(state, error)
        if not self._states:
            self._inbox.close()

    def _fail(self, error: BaseException) -> None:
        """Ends every stream, and the loop, with the reason."""
        if self.error is None:
            self.error = error
        for state in tuple(self._states.values()):
            with suppress(Exception):  # the scheduler may be what is broken
                self._close(state, self.error)
            state.stream.error, state.stream.life = state.stream.error or self.error, Life.CLOSED
            self._drop_due(state, Reason.CLOSED)
            if state.session is not None:
                self._device.do(state.session.close, _ignore)
                state.session = None
            self._forget(state)
        self._end_all(self.error)

    def _take_event(self, event: Event) -> None:
        """Is given every event, most of them by the scheduler within calls of it."""
        if isinstance(event, FrameRecord) and (state := self._states.get(event.stream)) is not None:
            if event.fate is not Fate.DROPPED:
                state.due.append(event)  # its fate is known when the sink has it
                return
            state.inputs.pop(event.number, None)
            state.finished.pop(event.number, None)
        self._report(event)

    def _report(self, event: Event) -> None:
        self.metrics(event)
        if self._observers and not self._events.put(event, self._config.waiting_events):
            self.lost_events += 1

    def _call(
        self, worker: Worker, function: Callable[[], object], then: Then, what: str, tick: Tick | None = None
    ) -> None:
        """Has a worker call something of the device, for as long as that may take."""
        predicted_ns = tick.predicted_ns if tick is not None else 0
        limit_ns = max(round(self._config.hang_s * SECOND), round(self._config.hang_factor * predicted_ns))
        worker.do(function, then, what, limit_ns)

    def _look_for_hangs(self) -> int | None:
        """Looks for a call of the device that does not come back; returns when to look again."""
        calls = [call for call in (self._device.current, self._reader.current) if call is not None]
        if not calls or self._has_hung:
            return None
        call, end_ns = min(calls, key=lambda call: call[1])
        if self._driver.now_ns <= end_ns:
            return end_ns + 1
        self._has_hung = True
        seconds = (self._driver.now_ns - end_ns + call.limit_ns) / SECOND
        report = HangReport(call.what, seconds, call.limit_ns / SECOND)
        self._on_hang(report)
        self._fail(EngineError(str(report)))
        return None

    # --- the report thread

    def _observe(self) -> None:
        """Hands events to the observers."""
        while (events := self._events.take()) is not None:
            for event, observer in itertools.product(events, tuple(self._observers)):
                if observer in self._observers:
                    try:
                        observer(event)
                    except Exception as e:
                        self._observers.remove(observer)
                        self.observer_errors.append(e)
            events = event = None


def _nothing() -> None:
    pass


def _ignore(_: object, error: Exception | None) -> None:
    pass


def _settle(future: Future[None], error: BaseException | None) -> None:
    """Ends a future, unless somebody cancelled it."""
    if future.set_running_or_notify_cancel():
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


def _checked_frame(frame: np.ndarray, cfg: StreamConfig) -> np.ndarray:
    """Returns a copy of a frame; raises SessionError if it is not one of this stream's."""
    expected = (cfg.height, cfg.width, 3)
    if not isinstance(frame, np.ndarray):
        raise SessionError(f"a frame must be a numpy array {expected}, got {type(frame).__name__}")
    if frame.shape != expected or frame.dtype != np.uint8:
        raise SessionError(f"a frame must be uint8 {expected}, got {frame.dtype} {frame.shape}")
    return np.array(frame, order="C")


def _stacked(frames: Sequence[np.ndarray], fill: int) -> np.ndarray | None:
    """Returns frames as one array, the last one repeated `fill` times; None if there are none."""
    return np.stack([*frames, *[frames[-1]] * fill]) if frames else None
