"""Measures what each stage of a pipeline takes for a chunk, before streams open.

In a usual tick all stages are equally late, as each waits for another's hand-over, and nothing could be told apart. So
what is measured has no hand-over (`DeviceSession.parts_apart`), and a thread for each device waits for its results.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import jax
import numpy as np

from svd2_jax.engine.session import DeviceSession

SAMPLES = (
    9  # of each part; with 10 % noise their medians give 98.8 % of the best split's throughput on average
)


def measure_stages(session: DeviceSession) -> list[np.ndarray]:
    """Returns for each stage of this process what a chunk takes there; the session is of no use afterwards.

    Results are float32 [2, SAMPLES], seconds of the stage's blocks and of the rest (encode, decode).
    """
    cfg, pipeline = session.spec.config, session.pipeline
    stages, draws = pipeline.mesh.local_stages, np.random.default_rng(0)

    def noise(count: int) -> np.ndarray | None:
        size = count, cfg.height, cfg.width, 3
        return draws.integers(0, 256, size, np.uint8) if cfg.task == "v2v" else None

    held, count = [], cfg.first_frames
    for _ in range(
        1 + pipeline.depth + cfg.cache_frames // cfg.frames_per_block
    ):  # until ring and caches are full
        frames = noise(count)
        done, count = session.advance() if frames is None else session.push(frames), cfg.chunk_frames
        for chunk in held:
            chunk.wait()
        held = done
    laps: dict[tuple[int, bool], list[tuple[int, Future[int]]]] = defaultdict(list)
    with ExitStack() as at_end:
        threads = {stage: at_end.enter_context(ThreadPoolExecutor(1)) for stage in stages}
        for stage, is_blocks, given_ns, result in session.parts_apart(noise(count), SAMPLES):
            laps[stage, is_blocks].append((given_ns, threads[stage].submit(_ready_ns, result)))

    def seconds(stage: int, is_blocks: bool) -> list[float]:
        """A part begins when the one before is over, or when it was handed over if the device had nothing to do."""
        pairs = itertools.pairwise(laps[stage, is_blocks])
        took = [(b.result() - max(a.result(), given_ns)) / 1e9 for (_, a), (given_ns, b) in pairs]
        return took[:: 2 if is_blocks else 1] or [0.0] * SAMPLES  # every other tick is one with the hand-over

    return [np.array([seconds(stage, True), seconds(stage, False)], np.float32) for stage in stages]


def _ready_ns(result: Any) -> int:
    jax.block_until_ready(result)
    return time.monotonic_ns()
