"""The live service: engines, their loops, and the streams that run on them. No printing, no signals, no exits.

Command line, servers and Python programs share it.

```
with svd2_jax.LiveService(svd2_jax.load("tiny")) as service:
    service.warm_up(spec)
    stream = service.open(spec, StreamSettings(rate_hz=8, budget_ms=1500), sink=show)
    stream.offer(frame)
    stream.update(prompt="a pencil sketch")
    stream.end()
    stream.result()
```
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Self

from svd2_jax.api import Engine, SessionSpec, check_prompt
from svd2_jax.config import check_seconds, check_several
from svd2_jax.errors import ConfigError, EngineError
from svd2_jax.runtime.clock import Clock, MonotonicClock
from svd2_jax.runtime.latency import LatencySample
from svd2_jax.runtime.loop import LiveLoop
from svd2_jax.runtime.loop_config import HangReport, LoopConfig, exit_on_hang
from svd2_jax.runtime.measure import measure
from svd2_jax.runtime.metrics import Metrics
from svd2_jax.runtime.scheduler import PolicyConfig, Refused
from svd2_jax.runtime.stream import Sink, Source, Stream, feed
from svd2_jax.runtime.types import Event, StreamSettings

SOURCE_S = 0.2  # how long `stop` waits at least for a source to give up


class LiveService:
    """Runs live streams on one engine, or on several that are equal. Use it as a context manager.

    Methods may be called from any thread. `open`, `warm_up`, `wait`, `drain` and `stop` wait for what they do; from
    asyncio, call them in a thread (`asyncio.to_thread`).
    """

    def __init__(
        self,
        engines: Engine | Sequence[Engine],
        policy: PolicyConfig | None = None,
        config: LoopConfig | None = None,
        metrics: Metrics | None = None,
        observers: Sequence[Callable[[Event], None]] = (),
        on_hang: Callable[[HangReport], None] = exit_on_hang,
        clock: Clock | None = None,
    ):
        """Creates the service; entering it, or `start`, starts its threads.

        Args:
          engines: the device side. With several, each has a loop of its own, and a stream runs on one of them.
          policy: settings of the schedulers.
          config: settings of the loops.
          metrics: is given every event as it happens; None makes one.
          observers: are given every event too, each in threads of the loops, see `LiveLoop`.
          on_hang: is called once when a device hangs.
          clock: where time comes from.

        Raises:
          ConfigError: there is no engine, or something else in its place.
        """
        self._engines = tuple(engines) if isinstance(engines, Sequence) else (engines,)
        for engine in self._engines:
            if not isinstance(engine, Engine):
                raise ConfigError(
                    f"a live service takes engines, as svd2_jax.load() makes them, got {engine!r}"
                )
        if not self._engines:
            raise ConfigError("a live service needs at least one engine")
        self.metrics = metrics or Metrics()
        self._clock = clock or MonotonicClock()
        ids = itertools.count()
        self.loops = tuple(
            LiveLoop(engine, policy, config, self.metrics, observers, on_hang, self._clock, ids)
            for engine in self._engines
        )
        self._stop_s = (config or LoopConfig()).stop_s
        self._feeders: list[threading.Thread] = []
        self.splits: tuple[Sequence[int] | None, ...] = ()
        """Blocks on each stage of each engine, by what `warm_up` measured; None where it measured none."""

    def start(self) -> None:
        """Starts the threads."""
        for loop in self.loops:
            loop.start()

    def stop(self) -> tuple[str, ...]:
        """Closes all streams and ends all threads, within a stated time (`LoopConfig.stop_s` for each loop).

        Returns:
          The names of the threads that did not end: they are stuck in a source, a sink, an observer or a device.
        """
        deadline = time.monotonic() + self._stop_s
        stuck = [name for loop in self.loops for name in loop.stop()]
        for feeder in self._feeders:
            feeder.join(max(SOURCE_S, deadline - time.monotonic()))
        return (*stuck, *(feeder.name for feeder in self._feeders if feeder.is_alive()))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The streams that are not over."""
        return tuple(stream for loop in self.loops for stream in loop.streams)

    @property
    def is_healthy(self) -> bool:
        """Whether every loop runs, so that all devices take streams."""
        return all(loop.is_running for loop in self.loops)

    @property
    def error(self) -> BaseException | None:
        """What ended a loop itself, if anything did."""
        return next((loop.error for loop in self.loops if loop.error is not None), None)

    @property
    def lost_events(self) -> int:
        """Events that the observers were too slow for."""
        return sum(loop.observers.lost for loop in self.loops)

    @property
    def observer_errors(self) -> list[BaseException]:
        """What observers raised; one that did is given nothing more."""
        return [error for loop in self.loops for error in loop.observers.errors]

    def warm_up(self, spec: SessionSpec, steps: Iterable[int] | None = None) -> list[LatencySample]:
        """Compiles what streams like this need, measures what their ticks take, and tells the schedulers.

        Engines with several stages measure them first, and choose how many blocks each has (`splits`). Without a
        warm-up the first stream compiles, and schedulers learn from the first frames.

        Args:
          spec: what streams will compute.
          steps: numbers of denoising steps that they may take; None: from 1 to the spec's.

        Returns:
          What was measured, of all engines.
        """
        self.splits = tuple(engine.measure_split(spec) for engine in self._engines)
        samples = []
        for engine, loop in zip(self._engines, self.loops, strict=True):
            resolved = engine.resolved(spec)
            wanted = range(1, resolved.config.steps + 1) if steps is None else sorted(set(steps))
            taken = measure(engine, resolved, wanted, now_ns=self._clock.now_ns)
            loop.warm_up(taken)
            samples += taken
        return samples

    def least_budget_ms(self, spec: SessionSpec, settings: StreamSettings) -> float:
        """Returns the shortest latency budget, in ms, that a stream like this can be promised after `warm_up`."""
        return min(loop.least_budget_ms(spec, settings) for loop in self.loops)

    def prepare_prompts(self, prompts: Iterable[str]) -> None:
        """Encodes prompts, so that no stream waits for them when it opens."""
        check_several("prompts", prompts, 'texts, as in ["a sketch", "a comic"]')
        prompts = tuple(prompts)
        for prompt in prompts:
            check_prompt(prompt)
        for prompt in dict.fromkeys(prompts):
            for engine in self._engines:
                engine.prepare_prompt(prompt)

    def open(
        self,
        spec: SessionSpec,
        settings: StreamSettings,
        sink: Sink,
        source: Source | None = None,
        name: str | None = None,
        steps: Iterable[int] = (),
    ) -> Stream:
        """Lets a stream join, on the engine with the fewest streams that has room for it.

        Args:
          spec: what to compute. Its steps are those of the settings.
          settings: rate, latency budget and steps; the rest follows from the spec.
          sink: takes the finished frames when they are due, in a thread of its own. One that is slow ends its stream,
            or loses its oldest frames, as its `when_slow` says.
          source: gives the frames, from a thread of its own; None: they come through `Stream.offer`.
          name: what to call it in reports.
          steps: numbers of denoising steps that `Stream.update` may ask for, besides those of the settings.

        Raises:
          Refused: no engine has room for it, or its budget cannot be met.
          ConfigError: such a stream cannot run live.
          EngineError: no loop runs.
        """
        if not isinstance(settings, StreamSettings):
            raise ConfigError(
                f"settings must be StreamSettings, got {type(settings).__name__}; "
                "as in StreamSettings(rate_hz=8, budget_ms=1500)"
            )
        if not callable(sink):
            raise ConfigError(f"sink must be a function that takes a frame and its record, got {sink!r}")
        if source is not None:
            check_several("the frames of a source", source, "pairs (timestamp in ns or None, frame)")
        check_several("steps", steps, "numbers, as in (1, 2)")
        refused: Exception | None = None
        for loop in sorted(self.loops, key=lambda loop: len(loop.streams)):
            try:
                stream = loop.open(spec, settings, sink, name, steps)
            except (Refused, EngineError) as e:
                refused = e if refused is None or isinstance(e, Refused) else refused
                continue
            if source is not None:
                self._feeders = [feeder for feeder in self._feeders if feeder.is_alive()]
                name = f"svd2-source-{stream.id}"
                feeder = threading.Thread(target=feed, args=(stream, source), name=name, daemon=True)
                self._feeders.append(feeder)
                feeder.start()
            return stream
        assert refused is not None
        raise refused

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until every stream is over; returns whether that is so.

        Raises:
          ConfigError: the time is no number.
          EngineError: a loop failed.
        """
        check_seconds("timeout_s", timeout_s)
        end = None if timeout_s is None else time.monotonic() + timeout_s
        is_over = True
        for loop in self.loops:  # all of them, as a loop that failed says so here
            is_over &= loop.wait(None if end is None else max(0.0, end - time.monotonic()))
        return is_over

    def drain(self, timeout_s: float) -> bool:
        """Ends every stream: what is there is finished and shown. After `timeout_s`, the rest is dropped.

        Returns:
          Whether all of it was shown in that time.

        Raises:
          ConfigError: the time is no number.
        """
        check_seconds("timeout_s", timeout_s)
        for stream in self.streams:
            stream.end()
        in_time = self.wait(timeout_s)
        for stream in self.streams:
            stream.close()
        return in_time
