"""Where a part's time goes, kernel by kernel, as JAX's profiler saw it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

RUNS = 3  # of a part, while the profiler looks on
_NUMBER = re.compile(r"([._]\d+)+$")  # by which the compiler tells apart kernels of one kind
_WAITING = re.compile(r"::|^end: |^Thunk")  # what a CPU's threads note beside the operations


@dataclass(frozen=True)
class Kernel:
    """All kernels of one kind in one time of a part.

    Attributes:
      name: as the compiler or the library calls it, without its number.
      calls: how often it runs.
      seconds: in all; kernels of several queues or threads may overlap.
    """

    name: str
    calls: float
    seconds: float


def kernels(run: Callable[[], Any], folder: Path, times: int = 1) -> tuple[Kernel, ...]:
    """Runs a part under the profiler and returns its kernels, the most costly first.

    Args:
      run: the part; it does its work `times` times.
      folder: where the profiler leaves its files, for Perfetto or XProf.
      times: see `run`.
    """
    with jax.profiler.trace(str(folder)):
        for _ in range(RUNS):
            jax.block_until_ready(run())
    file = max(folder.glob("**/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    found: dict[str, tuple[int, float]] = {}
    for name, nanoseconds in _events(jax.profiler.ProfileData.from_file(str(file))):
        calls, seconds = found.get(kind := _NUMBER.sub("", name), (0, 0.0))
        found[kind] = calls + 1, seconds + nanoseconds * 1e-9
    once = RUNS * times
    made = [Kernel(name, calls / once, seconds / once) for name, (calls, seconds) in found.items()]
    return tuple(sorted(made, key=lambda kernel: -kernel.seconds))


def _events(profile: Any) -> Iterator[tuple[str, float]]:
    """Yields name and nanoseconds of what ran on an accelerator, or else on the CPU's threads."""
    planes = list(profile.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    start = "Stream" if devices else "tf_XLA"
    for plane in devices or planes:
        for line in plane.lines:
            if not line.name.startswith(start):
                continue
            for event in line.events:
                if event.duration_ns and not _WAITING.search(event.name):
                    yield event.name, event.duration_ns
