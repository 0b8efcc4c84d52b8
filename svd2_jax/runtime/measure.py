"""What live streams of a spec are to the scheduler: who may share a tick, and what ticks take."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import numpy as np

from svd2_jax.api import Engine, Session, SessionSpec, Ticket, TickInput
from svd2_jax.config import StreamConfig
from svd2_jax.errors import ConfigError
from svd2_jax.progress import working
from svd2_jax.runtime import overload
from svd2_jax.runtime.latency import LatencySample
from svd2_jax.runtime.types import MS, StreamSettings
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
    found = dataclasses.replace(
        settings,
        first_frames=stream.first_frames,
        chunk_frames=stream.chunk_frames,
        batch_key=batch_key_of(stream) if settings.batch_key is None else settings.batch_key,
    )
    fill_ms = overload.fill_ns(found) / MS
    if settings.budget_ms <= fill_ms:
        raise ConfigError(
            f"a latency budget of {settings.budget_ms:g} ms is too short: {stream.chunk_frames} frames are "
            f"drawn together and take {fill_ms:.0f} ms at {settings.rate_hz:g} FPS; give milliseconds, for example 1500"
        )
    return found


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
    batch_key, samples = batch_key_of(spec.config), []
    for count in steps:
        with working(f"measuring ticks of {counted(count, 'step')}"):
            kinds = _measure_kinds(engine, with_steps(spec, count), sizes, rounds, now_ns)
        for kind in kinds:
            times = kind.in_a_row or kind.alone
            tail = max(0, round(statistics.median(kind.alone) - statistics.median(times)))
            samples += [
                LatencySample(batch_key, kind.batch, count, max(1, took), kind.first, tail, kind.lone)
                for took in times
            ]
    return samples


class _Kind(NamedTuple):
    """One kind of tick, and its times in ns: alone, and so that the device always has the next one."""

    batch: int
    first: bool
    lone: bool
    alone: Sequence[int]
    in_a_row: Sequence[int]


def _measure_kinds(
    engine: Engine, spec: SessionSpec, sizes: Sequence[int], rounds: int, now_ns: Callable[[], int]
) -> list[_Kind]:
    """Runs ticks of every kind at the spec's steps. Whatever runs for the first time takes longer and is left out."""
    cfg, kinds = spec.config, []
    first, chunk = (
        np.zeros((n, cfg.height, cfg.width, 3), np.uint8) for n in (cfg.first_frames, cfg.chunk_frames)
    )
    with _opened(engine, spec, sizes[-1]) as sessions:
        firsts = [_alone(engine, [TickInput(session, first)], now_ns) for session in sessions]
        inputs = [
            [TickInput(session, chunk) for session in sessions[:n]] for n in sizes if n <= len(sessions)
        ]
        for work in inputs if cfg.steps > 1 else ():
            pushes = [TickInput(entry.session) for entry in work]
            alone = _pushed(engine, work, pushes, now_ns)
            in_a_row = _in_a_row(engine, [work, *[pushes] * (len(alone) - 1)] * 2, now_ns)
            kinds.append(_Kind(len(work), False, True, alone, in_a_row))
        for work in inputs:
            alone = [_alone(engine, work, now_ns) for _ in range(rounds + 1)]
            in_a_row = _in_a_row(engine, [work] * (rounds + 1), now_ns)
            kinds.append(_Kind(len(work), False, False, alone[1:], in_a_row))
    with _opened(engine, spec, min(rounds + 2, sizes[-1])) as sessions:
        firsts.append(_alone(engine, [TickInput(sessions[0], first)], now_ns))
        in_a_row = _in_a_row(engine, [[TickInput(session, first)] for session in sessions[1:]], now_ns)
    return [_Kind(1, True, False, firsts[1:], in_a_row), *kinds]


@contextmanager
def _opened(engine: Engine, spec: SessionSpec, most: int) -> Iterator[list[Session]]:
    """Opens temporary sessions, as many as fit, at least one."""
    with ExitStack() as at_end:
        sessions: list[Session] = []
        while len(sessions) < most:
            try:
                sessions.append(engine.open(spec))
            except ConfigError:
                if not sessions:
                    raise
                break
            at_end.callback(sessions[-1].close)
        yield sessions


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
