"""The live loop: frames of several streams in, through one device, and out at their time.

One thread owns the scheduler, the streams and the time. It waits for messages in its inbox, and everybody else only
puts messages there:

    loop           decides, keeps the books, and notices a device that hangs
    device         hands ticks and changes of sessions to the engine, in order
    reader         waits for ticks, in order: until the stages are through, and then for the pixels
    encoder        encodes prompts
    sink, for each stream    calls the stream's sink, so that a slow one stalls nobody else
    report         calls the observers of events, so that a slow disk stalls nobody

So there is no lock but those inside mailboxes. Methods may be called from any thread, also from asyncio's: none but
`LiveLoop.open`, `LiveLoop.wait`, `LiveLoop.stop` and `Stream.result` waits for anything.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_futures
from contextlib import suppress
from typing import Any, Self, TypeVar

import numpy as np

from svd2_jax.api import Engine, Session, SessionSpec
from svd2_jax.errors import EngineError, SessionError
from svd2_jax.runtime import overload
from svd2_jax.runtime.clock import Clock, MonotonicClock
from svd2_jax.runtime.device_calls import hand_over, see_through
from svd2_jax.runtime.driver import Driver
from svd2_jax.runtime.latency import LatencySample
from svd2_jax.runtime.loop_config import HangReport, LoopConfig, exit_on_hang
from svd2_jax.runtime.loop_stream import LoopStream
from svd2_jax.runtime.mailbox import Mailbox, Message, Worker, attempt
from svd2_jax.runtime.measure import settings_for, with_steps
from svd2_jax.runtime.metrics import Metrics
from svd2_jax.runtime.observers import Observers
from svd2_jax.runtime.scheduler import PolicyConfig, Scheduler
from svd2_jax.runtime.stream import Life, Sink, Stream, WhenSlow
from svd2_jax.runtime.types import (
    MS,
    SECOND,
    Event,
    Fate,
    FrameRecord,
    PromptRecord,
    Reason,
    StreamId,
    StreamSettings,
    Tick,
    shown_fate,
)

T = TypeVar("T")

GRACE_S = 0.2  # how long `stop` waits at least for the loop to give up what is stuck, and for the observers


class LiveLoop(Driver):
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
            given nothing more; see `Observers.errors`.
          on_hang: is called once when the device hangs. Should it return, the loop ends with an EngineError.
          clock: where time comes from.
          ids: gives the numbers of streams, ascending; None counts from 0. Loops that share metrics share one.
        """
        self.metrics = metrics or Metrics()
        self.error: BaseException | None = None
        """What ended the loop itself, if anything did."""
        self._engine, self._on_hang = engine, on_hang
        self._config, self._clock = config or LoopConfig(), clock or MonotonicClock()
        self.inbox: Mailbox[Message] = Mailbox(self._clock)
        self.observers = Observers(observers, self._config.waiting_events, self.inbox, self._clock)
        self._scheduler = Scheduler(policy or PolicyConfig(), engine.batch_sizes, self._take_event, ids)
        super().__init__(self._scheduler, self.inbox, self._clock.now_ns)
        self._states: dict[StreamId, LoopStream] = {}
        self._failed_ticks = 0
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="svd2-loop", daemon=True)
        names = ("device", "reader", "encoder")
        self._device, self._reader, self._encoder = (Worker(name, self.inbox, self._clock) for name in names)
        self._workers = [self._device, self._reader, self._encoder, self.observers.thread]

    # --- for any thread

    def start(self) -> None:
        """Starts the threads."""
        for thread in (self._thread, *self._workers):
            thread.start()

    def stop(self) -> tuple[str, ...]:
        """Closes all streams and ends all threads; waits for them for at most `stop_s` in all.

        Returns:
          The names of the threads that did not end: they are stuck in a sink, an observer or the device.
        """
        if self._thread.ident is None:
            return ()
        deadline = time.monotonic() + self._config.stop_s
        self.inbox.put(self._end_all)
        self._thread.join(self._config.stop_s)
        self.inbox.close()  # what is stuck by now is given up
        self._thread.join(GRACE_S)
        for worker in self._workers:
            worker.jobs.close()
        self.observers.thread.join(max(GRACE_S, deadline - time.monotonic()))
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        return tuple(thread.name for thread in (self._thread, *self._workers) if thread.is_alive())

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
        return self._thread.ident is not None and self.error is None and not self.inbox.is_closed

    def not_running(self) -> EngineError:
        """Returns the error of a call that the loop cannot take."""
        why = str(self.error) if self.error else "not started" if self._thread.ident is None else "stopped"
        return EngineError(f"the loop does not run: {why}")

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
        prepared = {*steps, *range(settings.min_steps, settings.steps + 1)}
        stream = self._ask(functools.partial(self._admit, spec, settings, sink, prepared))
        session = None
        try:
            self._engine.prepare(spec, sorted(prepared))
            session = self._engine.open(spec)
            self.metrics.opened(stream.id, settings, name, spec.prompt)
            self._ask(functools.partial(self._begin, stream, session))
        except BaseException as e:
            if session is not None:
                session.close()
            stream.close(e)
            raise
        return stream

    def least_budget_ms(self, spec: SessionSpec, settings: StreamSettings) -> float:
        """Returns the shortest latency budget that can be promised to such a stream alone, by the times known now."""
        settings = settings_for(self._engine.resolved(spec), settings)
        scheduler = self._scheduler
        return self._ask(
            lambda: overload.least_budget_ns(settings, scheduler.model.times, scheduler.config) / MS
        )

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
        answer: Future[T] = Future()
        if self._thread.ident is None or not self.inbox.put(functools.partial(attempt, function, answer)):
            raise self.not_running()
        return answer.result()

    # --- messages of streams; only the loop's thread calls these, and all that follows

    def take_frame(self, stream: Stream, pixels: np.ndarray, timestamp_ns: int | None) -> None:
        """Takes a frame that was offered."""
        if stream.life is not Life.LIVE:
            return  # it ended while the frame was on its way here
        state = self._states[stream.id]
        # Before the scheduler knows of it, as it may report its fate at once.
        state.pixels[state.arrived] = pixels
        self.metrics.arrived(stream.id, state.arrived)
        state.arrived += 1
        self._scheduler.arrive(stream.id, self.now_ns, timestamp_ns)

    def take_change(
        self,
        stream: Stream,
        settings: StreamSettings | None,
        prompt: str | None,
        change: Callable[[Session], None],
        done: Future[None],
    ) -> None:
        """Gives a stream new settings, encodes its prompt, changes its session between two ticks, and says when."""
        if stream.life is not Life.LIVE:
            done.set_exception(SessionError(f"stream {stream.id} is {stream.life.name.lower()}: not changed"))
            return
        state = self._states[stream.id]
        state.changes.add(done)

        def prepare() -> None:
            if prompt is not None:
                self._engine.prepare_prompt(prompt)

        def encoded(outcome: Future[None]) -> None:
            if outcome.exception() is not None:
                changed(outcome)
            elif state.session is not None:  # else the stream ends, and this change is told so with it
                then = functools.partial(changed, frame=state.next_frame)
                self._device.do(functools.partial(change, state.session), then)

        def changed(outcome: Future[None], frame: int = 0) -> None:
            error = outcome.exception()
            if error is not None:
                self.take_close(stream, error)
            elif prompt is not None:
                self._report(PromptRecord(stream.id, self.now_ns, prompt, frame))
            if done in state.changes:  # else the stream is over, and it was told so
                state.changes.remove(done)
                done.set_exception(error)

        if settings is not None:
            update = functools.partial(self._scheduler.update, stream.id, settings, self.now_ns)
            if (refused := attempt(update)).exception() is not None:
                changed(refused)
                return
        self._encoder.do(prepare, encoded)

    def take_end(self, stream: Stream) -> None:
        """Takes note that no more frames come."""
        if stream.life is not Life.CLOSED:
            stream.life = Life.DRAINING
            self._scheduler.end(stream.id, self.now_ns)

    def take_close(self, stream: Stream, error: BaseException | None = None) -> None:
        """Ends a stream at once; what is due already is still passed on. A second time changes nothing."""
        if stream.life is not Life.CLOSED:
            stream.life, stream.error = Life.CLOSED, stream.error or error
            self._scheduler.close(stream.id, self.now_ns)

    # --- the beginning and the end of the loop, and of a stream

    def _run(self) -> None:
        try:
            self._drive()
        except BaseException as e:
            self.error = e
            if not isinstance(e, EngineError):
                self.error = EngineError(f"the loop's thread failed: {type(e).__name__}: {e}")
                self.error.__cause__ = e
        self._is_stopping = True
        self.inbox.close()
        for state in tuple(self._states.values()):
            state.stream.error = state.stream.error or self.error
            with suppress(Exception):  # the scheduler may be what is broken
                self.take_close(state.stream)
            self._drop_due(state, Reason.CLOSED)
            self._wind_up(state, at_once=True)
        for message in self.inbox.take() or ():
            with suppress(Exception):
                message()  # finds the loop ended, and tells those who wait for an answer
        for worker in self._workers:
            worker.jobs.close()

    def _end_all(self) -> None:
        """Closes every stream; the loop ends with the last of them."""
        self._is_stopping = True
        for state in self._states.values():
            self.take_close(state.stream)

    def _admit(self, spec: SessionSpec, settings: StreamSettings, sink: Sink, steps: set[int]) -> Stream:
        if self._is_stopping:
            raise self.not_running()
        stream = Stream(self, self._scheduler.open(settings, self.now_ns), spec, settings, steps)
        sinker = Worker(f"sink-{stream.id}", self.inbox, self._clock)
        sinker.start()
        self._workers = [*(worker for worker in self._workers if worker.is_alive()), sinker]
        self._states[stream.id] = LoopStream(stream, sink, sinker)
        return stream

    def _begin(self, stream: Stream, session: Session) -> None:
        """Gives an admitted stream its device side."""
        if stream.life is not Life.OPENING:
            raise SessionError(f"stream {stream.id} was closed while it opened")
        self._states[stream.id].session, stream.life = session, Life.LIVE

    def _wind_up(self, state: LoopStream, at_once: bool = False) -> None:
        """Closes the device side of a stream that the scheduler is through with; forgets it when nothing is left.

        With `at_once`, neither the device nor the sink is waited for.
        """
        stream, session = state.stream, state.session
        stream.life, state.session = Life.CLOSED, None
        state.pixels.clear()
        if session is not None:
            what = f"closing a session (stream {stream.id})"
            state.closing = self._reader.do(session.close, what=what)  # which is through with its ticks then
        is_closing = state.closing is not None and not state.closing.done()
        if not at_once and (is_closing or state.due or state.sinker.calls):
            return
        del self._states[stream.id]
        state.sinker.give_up()
        for change in state.changes:
            change.set_exception(SessionError(f"stream {stream.id} ended before the change"))
        state.changes.clear()
        if state.closing is not None and not is_closing:
            stream.error = stream.error or state.closing.exception()
        if stream.error is not None:
            traceback.clear_frames(stream.error.__traceback__)  # they hold pictures
        stream.ended.set_exception(stream.error)  # or with None, as it should

    # --- ticks

    def _start(self, tick: Tick) -> None:
        """Hands a tick to the device's thread, and has the reader see it through."""
        states, inputs = [self._states[entry.stream] for entry in tick.entries], []
        for state, entry in zip(states, tick.entries, strict=True):
            assert state.session is not None, f"stream {entry.stream} has frames before its session is open"
            if entry.frames:
                state.flight.append(entry.frames)
                state.next_frame = entry.frames[-1] + 1
            inputs.append((state.session, entry, [state.pixels.pop(number) for number in entry.frames]))
        name = f"tick {tick.number} (stream {', '.join(str(entry.stream) for entry in tick.entries)})"
        handed = self._device.do(functools.partial(hand_over, self._engine, inputs))
        see = functools.partial(see_through, handed, lambda: self.inbox.put(self._free))
        self._reader.do(see, functools.partial(self._finished, states), name, tick.predicted_ns)

    def _free(self) -> None:
        self._scheduler.free(self.now_ns)

    def _finished(self, states: Sequence[LoopStream], outcome: Future[list[Future[Any]]]) -> None:
        """Takes the frames of the oldest tick. Streams whose part failed end."""
        has_failed = outcome.exception() is not None
        results: list[Future[Any]] = [outcome] * len(states) if has_failed else outcome.result()
        finished: dict[StreamId, int] = {}
        error = None
        for state, result in zip(states, results, strict=True):
            if state.stream.life is Life.CLOSED:
                continue  # if a tick of it failed, nobody knows whose frames these are
            if result.exception() is not None:
                error = result.exception()
                self.take_close(state.stream, error)
                continue
            finished[state.stream.id] = len(result.result())
            for frames in result.result():
                # Before the scheduler knows of them. What only fills a chunk is left out.
                numbers = state.flight.popleft()
                state.pixels.update(zip(numbers, frames[: len(numbers)], strict=True))
        self._scheduler.done(finished, self.now_ns)
        self._failed_ticks = 0 if finished else self._failed_ticks + (error is not None)
        if self._failed_ticks >= self._config.failed_ticks:
            raise EngineError(f"{self._failed_ticks} ticks failed one after another: {error}") from error

    def _after_step(self) -> int | None:
        """Passes on what is due, winds up streams that are over, and watches the device; returns when to look again."""
        for state in tuple(self._states.values()):
            self._pass_on(state)
            if self._scheduler.is_over(state.stream.id):
                self._wind_up(state)
        if self._is_stopping and not self._states:
            self.inbox.close()
        return self._check_device()

    def _check_device(self) -> int | None:
        """Looks for a call of the device that does not come back; returns when to look again."""
        if not self._reader.calls:
            return None
        what, expected_ns = self._reader.calls[0]
        limit_ns = max(round(self._config.hang_s * SECOND), round(self._config.hang_factor * expected_ns))
        took_ns = self.now_ns - self._reader.since_ns
        if took_ns <= limit_ns:
            return self._reader.since_ns + limit_ns + 1
        report = HangReport(what, took_ns / SECOND, limit_ns / SECOND)
        self._on_hang(report)
        raise EngineError(str(report))

    # --- frames and events on their way out

    def _pass_on(self, state: LoopStream) -> None:
        """Gives the sink its next frame, if it has none; deals with a sink that is slow."""
        if state.due and not state.sinker.calls:
            pixels, record = state.due.popleft()
            fate = shown_fate(self.now_ns, record.deadline_ns)
            record = dataclasses.replace(record, shown_ns=self.now_ns, fate=fate)
            self._report(record)
            state.sinker.do(
                functools.partial(state.sink, pixels, record), functools.partial(self._sunk, state)
            )
        excess = len(state.due) - self._config.sink_frames
        if excess > 0 and getattr(state.sink, "when_slow", WhenSlow.END) is WhenSlow.DROP_OLDEST:
            self._drop_due(state, Reason.SINK, excess)
        elif excess > 0:
            self._drop_due(state, Reason.SINK)
            state.sinker.give_up()  # nobody waits for a sink that is stuck
            slow = SessionError(f"the sink is too slow: {self._config.sink_frames} frames wait for it")
            self.take_close(state.stream, slow)

    def _drop_due(self, state: LoopStream, reason: Reason, count: int | None = None) -> None:
        """Drops the oldest frames that were to be passed on, or all of them."""
        for _ in range(len(state.due) if count is None else count):
            _, record = state.due.popleft()
            self._report(dataclasses.replace(record, shown_ns=None, fate=Fate.DROPPED, reason=reason))

    def _sunk(self, state: LoopStream, outcome: Future[object]) -> None:
        """Ends a stream whose sink raised."""
        if (error := outcome.exception()) is not None:
            self._drop_due(state, Reason.CLOSED)
            state.stream.error = state.stream.error or error  # also that of the last frame
            self.take_close(state.stream)

    def _take_event(self, event: Event) -> None:
        """Is given every event, most of them by the scheduler within calls of it."""
        if isinstance(event, FrameRecord) and (state := self._states.get(event.stream)) is not None:
            pixels = state.pixels.pop(event.number, None)
            if event.fate is not Fate.DROPPED:
                assert pixels is not None
                state.due.append((pixels, event))  # its fate is known when the sink has it
                return
        self._report(event)

    def _report(self, event: Event) -> None:
        self.metrics(event)
        self.observers(event)
