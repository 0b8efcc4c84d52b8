"""What live streams of a spec are to the scheduler: who may share a tick, and what ticks take."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import numpy as np

from svd2_jax.api import Engine, Session, SessionSpec, Ticket, TickInput
from svd2_jax.config import StreamConfig
from svd2_jax.errors import ConfigError
from svd2_jax.progress import working
from svd2_jax.runtime.latency import LatencySample
from svd2_jax.runtime.types import StreamSettings
from svd2_jax.text import counted


def batch_key_of(stream: StreamConfig) -> StreamConfig:
    """Returns what streams that may share a tick have in common: all of their configuration but the steps."""
    return stream.with_steps(1)


def settings_for(spec: SessionSpec, settings: StreamSettings) -> StreamSettings:
    """Returns the settings with what follows from the spec: sizes of groups, and who may share a tick.

    Raises:
      ConfigError: such a stream cannot run live.
    """
    stream = spec.config
    if stream.task != "v2v" or stream.mode != "stream":
        raise ConfigError(
            f"live streams need task 'v2v' and mode 'stream', got {stream.task!r} and {stream.mode!r}"
        )
    return dataclasses.replace(
        settings,
        first_frames=stream.first_frames,
        chunk_frames=stream.chunk_frames,
        batch_key=batch_key_of(stream) if settings.batch_key is None else settings.batch_key,
    )


def with_steps(spec: SessionSpec, steps: int) -> SessionSpec:
    """Returns the spec with another number of denoising steps."""
    return dataclasses.replace(spec, stream=spec.config.with_steps(steps))


def measure(
    engine: Engine,
    spec: SessionSpec,
    steps: Sequence[int],
    batch_sizes: Sequence[int] | None = None,
    rounds: int = 3,
    now_ns: Callable[[], int] = time.monotonic_ns,
) -> list[LatencySample]:
    """Returns device times of every kind of tick, for `LiveLoop.warm_up`; also shows that all of them run.

    Each kind is run alone, and then so that each tick is handed over while the one before it is being finished, as
    live: what it takes then is its time, and what it takes longer alone is its tail. Kinds are first groups, chunks
    that are pushed on alone to their end (in ticks that compute one row), and chunks that enter tick by tick.

    Opens as many temporary sessions as the largest batch takes. Where fewer fit, larger batches are left out.

    Args:
      engine: the device.
      spec: what the streams will be like.
      steps: numbers of denoising steps they may be given.
      batch_sizes: how many streams share a tick; None takes all that the engine allows.
      rounds: ticks measured of each kind, either way, behind one that is not.
      now_ns: the clock.
    """
    spec = engine.resolved(spec)
    engine.prepare(spec, steps)
    sizes = sorted(batch_sizes or engine.batch_sizes)
    cfg, samples = spec.config, []
    batch_key = batch_key_of(cfg)
    first, chunk = (
        np.zeros((count, cfg.height, cfg.width, 3), np.uint8)
        for count in (cfg.first_frames, cfg.chunk_frames)
    )
    sessions: list[Session] = []

    def reopen(steps: int, most: int) -> None:
        """Opens new sessions, as many as fit."""
        close()
        for _ in range(most):
            try:
                sessions.append(engine.open(with_steps(spec, steps)))
            except ConfigError:
                if not sessions:
                    raise
                break

    def close() -> None:
        while sessions:
            sessions.pop().close()

    for count in steps:
        with working(f"measuring ticks of {counted(count, 'step')}"), ExitStack() as at_end:
            at_end.callback(close)
            reopen(count, sizes[-1])
            firsts = [_alone(engine, [TickInput(session, first)], now_ns) for session in sessions]
            kinds = []
            works = [
                [TickInput(session, chunk) for session in sessions[:n]] for n in sizes if n <= len(sessions)
            ]
            for work in works if count > 1 else ():
                pushes = [TickInput(part.session) for part in work]
                alone = _pushed(engine, work, pushes, now_ns)
                in_a_row = _in_a_row(engine, [work, *[pushes] * (len(alone) - 1)] * 2, now_ns)
                kinds.append((len(work), False, True, alone, in_a_row))
            for work in works:
                alone = [_alone(engine, work, now_ns) for _ in range(rounds + 1)]
                in_a_row = _in_a_row(engine, [work] * (rounds + 1), now_ns)
                kinds.append((len(work), False, False, alone[1:], in_a_row))
            reopen(count, min(rounds + 2, sizes[-1]))
            firsts.append(_alone(engine, [TickInput(sessions[0], first)], now_ns))
            in_a_row = _in_a_row(engine, [[TickInput(session, first)] for session in sessions[1:]], now_ns)
            kinds.insert(
                0, (1, True, False, firsts[1:], in_a_row)
            )  # whatever runs for the first time takes longer
        for size, is_first, is_lone, alone, in_a_row in kinds:
            times = in_a_row or alone
            tail = max(0, round(statistics.median(alone) - statistics.median(times)))
            samples += [
                LatencySample(batch_key, size, count, max(1, took), is_first, tail, is_lone) for took in times
            ]
    return samples


def _alone(engine: Engine, work: Sequence[TickInput], now_ns: Callable[[], int]) -> int:
    """Returns the time from the start of a tick to its end, on an idle device."""
    started_ns = now_ns()
    engine.tick(work).wait()
    return now_ns() - started_ns


def _pushed(
    engine: Engine, work: Sequence[TickInput], pushes: Sequence[TickInput], now_ns: Callable[[], int]
) -> list[int]:
    """Returns the times of the ticks that take chunks from their entry to their end, with nothing else in flight."""
    times, is_finished = [], False
    while not is_finished:
        started_ns = now_ns()
        ticket = engine.tick(pushes if times else work)
        ticket.wait()
        times.append(now_ns() - started_ns)
        is_finished = any(ticket.chunks)
    return times


def _in_a_row(engine: Engine, works: Iterable[Sequence[TickInput]], now_ns: Callable[[], int]) -> list[int]:
    """Returns the time from the end of the tick before to its own end, for each tick but the first."""
    in_flight: deque[Ticket] = deque()
    ends_ns: list[int] = []

    def finish() -> None:
        in_flight.popleft().wait()
        ends_ns.append(now_ns())

    for work in works:
        in_flight.append(engine.tick(work))
        if len(in_flight) > 1:
            finish()
        in_flight[-1].wait_stages()
    if in_flight:
        finish()
    return [end - before for before, end in itertools.pairwise(ends_ns)]
