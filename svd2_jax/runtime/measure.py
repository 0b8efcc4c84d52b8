"""What live streams of a spec are to the scheduler: who may share a tick, and what ticks take."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np

from svd2_jax.api import Engine, Session, SessionSpec, Work
from svd2_jax.config import StreamConfig
from svd2_jax.errors import ConfigError
from svd2_jax.runtime.latency import LatencySample
from svd2_jax.runtime.work import StreamSettings


def shape_of(stream: StreamConfig) -> StreamConfig:
    """Returns what streams that may share a tick have in common: all of their configuration but the steps."""
    return stream.with_steps(1)


def settings_for(spec: SessionSpec, settings: StreamSettings) -> StreamSettings:
    """Returns the settings with what follows from the spec: sizes of groups, and who may share a tick.

    Raises:
      ConfigError: such a stream cannot run live.
    """
    stream = spec.stream
    if stream.task != "v2v" or stream.mode != "stream":
        raise ConfigError(
            f"live streams need task 'v2v' and mode 'stream', got {stream.task!r} and {stream.mode!r}"
        )
    return dataclasses.replace(
        settings,
        first_frames=stream.first_frames,
        chunk_frames=stream.chunk_frames,
        shape=shape_of(stream) if settings.shape is None else settings.shape,
    )


def with_steps(spec: SessionSpec, steps: int) -> SessionSpec:
    """Returns the spec with another number of denoising steps."""
    return dataclasses.replace(spec, stream=spec.stream.with_steps(steps))


def measure(
    engine: Engine,
    spec: SessionSpec,
    steps: Sequence[int],
    batch_sizes: Sequence[int] | None = None,
    rounds: int = 3,
    now_ns: Callable[[], int] = time.monotonic_ns,
) -> list[LatencySample]:
    """Returns device times of every kind of tick, for `LiveLoop.warm_up`; also shows that all of them run.

    Opens as many temporary sessions as the largest batch takes. Where fewer fit, larger batches are left out.

    Args:
      engine: the device.
      spec: what the streams will be like.
      steps: numbers of denoising steps they may be given.
      batch_sizes: how many streams share a tick; None takes all that the engine allows.
      rounds: ticks measured of each kind, behind one that is not.
      now_ns: the clock.
    """
    engine.prepare(spec, steps)
    sizes = sorted(batch_sizes or engine.batch_sizes)
    cfg, samples = spec.stream, []
    shape = shape_of(cfg)
    first, chunk = (
        np.zeros((count, cfg.height, cfg.width, 3), np.uint8)
        for count in (cfg.first_frames, cfg.chunk_frames)
    )

    def timed(work: Sequence[Work]) -> int:
        started_ns = now_ns()
        engine.tick(work).wait()
        return now_ns() - started_ns

    for count in steps:
        sessions: list[Session] = []
        try:
            for _ in range(sizes[-1]):
                try:
                    sessions.append(engine.open(with_steps(spec, count)))
                except ConfigError:
                    if not sessions:
                        raise
                    break
            firsts = [timed([Work(session, first)]) for session in sessions]
            kinds = [(1, True, firsts)]
            for size in (size for size in sizes if size <= len(sessions)):
                work = [Work(session, chunk) for session in sessions[:size]]
                kinds.append((size, False, [timed(work) for _ in range(rounds + 1)]))
            while sessions:
                sessions.pop().close()
            sessions.append(engine.open(with_steps(spec, count)))
            firsts.append(timed([Work(sessions[0], first)]))
            samples += [
                LatencySample(shape, size, count, max(1, took), is_first)
                for size, is_first, several in kinds
                for took in several[1:]  # whatever runs for the first time takes longer
            ]
        finally:
            for session in sessions:
                session.close()
    return samples
