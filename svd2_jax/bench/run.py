"""Measures the parts of a stream one after another, alone or in turn with another implementation."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from svd2_jax.bench.benchmarks import BENCHMARKS, Bench
from svd2_jax.bench.report import Against, Compiled, Measured, Settings
from svd2_jax.bench.timing import Sample, in_turn, timed
from svd2_jax.bench.trace import Kernel, kernels

Progress = Callable[[int], Callable[[], object]]
"""Takes the number of rounds; returns what is called after each."""


class Rival(Protocol):
    """Another implementation with the same weights, settings and inputs."""

    parts: Sequence[str]

    def prepare(self, name: str, times: int) -> None:
        """Gets a part ready to be sampled, so often in a run."""
        ...

    def sample(self) -> Sample:
        """Runs the part and tells of one time."""
        ...

    def result(self) -> np.ndarray | None:
        """Returns what the part gave last, laid out like ours; None where it cannot be compared."""
        ...


def measure(
    bench: Bench,
    name: str,
    repeats: int,
    started: Progress,
    rival: Rival | None = None,
    trace: Path | None = None,
) -> Measured:
    """Returns what was measured of a part, and frees its memory.

    Args:
      bench: the model and the stream.
      name: of `BENCHMARKS`.
      repeats: samples.
      started: shows how far it is.
      rival: sampled in turn with ours, where it has the part.
      trace: folder for what the profiler notes of a few runs more; None: no profile.

    Raises:
      CheckpointError: the checkpoint lacks what the part needs.
    """
    part = BENCHMARKS[name](bench)
    sides = [lambda: timed(part.run, jax.block_until_ready, part.times)]
    try:
        rival = rival if rival and name in rival.parts else None
        if rival is not None:
            rival.prepare(name, part.times)
            sides.append(rival.sample)
        ours, *others = in_turn(sides, repeats, part.warm_up, started(part.warm_up + repeats))
        against = None
        if rival is not None:
            seconds = tuple(sample.total_s for sample in others[0])
            against = Against(seconds, _difference(part.results(), rival.result()))
        seen: tuple[Kernel, ...] = () if trace is None else kernels(part.run, trace / name, part.times)
    finally:
        part.close()
    return Measured(
        name, tuple(ours), part.work, part.frames, _compiled(part.program), against, part.note, seen
    )


def settings(bench: Bench, checkpoint: str, attention: str = "auto", against: str | None = None) -> Settings:
    """Returns what is measured where, for a report.

    Args:
      bench: the model and the stream.
      checkpoint: its name.
      attention: as it was asked for.
      against: the other implementation.
    """
    engine = bench.engine
    device = engine.mesh.home
    return Settings(
        checkpoint=checkpoint,
        blocks=engine.model.dit.num_layers,
        stream=bench.cfg.to_dict(),
        dtype=engine.dtype.name,
        attention=attention,
        platform=device.platform,
        device=device.device_kind,
        threads=cpu_threads(),
        jax=jax.__version__,
        xla_flags=os.environ.get("XLA_FLAGS", ""),
        against=against,
        weight_dtype=engine.model.dit.weight_dtype,
    )


def cpu_threads() -> int:
    """Returns how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _difference(ours: Any, theirs: np.ndarray | None) -> float | None:
    """Returns the largest difference as a share of the largest magnitude."""
    if ours is None or theirs is None:
        return None
    ours = np.asarray(ours, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"expected a result of shape {ours.shape}, got {theirs.shape}")
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def _compiled(program: Any) -> Compiled | None:
    """Returns the compiler's counts of an executable, where it gives any."""
    if program is None:
        return None
    counts, memory = program.cost_analysis() or {}, program.memory_analysis()
    return Compiled(
        counts.get("flops", 0.0), counts.get("bytes accessed", 0.0),
        memory.temp_size_in_bytes, memory.alias_size_in_bytes,
    )  # fmt: skip
