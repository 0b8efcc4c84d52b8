"""Repeats calls and keeps their times; several are taken in turn, so that noise hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One call.

    Attributes:
      handed_s: seconds until the call returned; on a device that is the time to hand the work over.
      total_s: seconds until its result was there.
    """

    handed_s: float
    total_s: float


@dataclass(frozen=True)
class Spread:
    """Several times in seconds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Returns the spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


def timed(call: Callable[[], Any], wait: Callable[[Any], Any], each: int = 1) -> Sample:
    """Times a call, and `wait` on what it returns; of a call that does something `each` times, one of them."""
    started = time.perf_counter()
    result = call()
    handed = time.perf_counter()
    wait(result)
    return Sample((handed - started) / each, (time.perf_counter() - started) / each)


def in_turn(
    sides: Sequence[Callable[[], Sample]],
    repeats: int,
    warm_up: int,
    progress: Callable[[], object] = lambda: None,
) -> list[list[Sample]]:
    """Returns `repeats` samples of each side, taken A B A B ..., behind `warm_up` rounds that do not count.

    Args:
      sides: each takes one sample of itself.
      repeats: samples of each.
      warm_up: rounds before.
      progress: called after each round.
    """
    samples: list[list[Sample]] = [[] for _ in sides]
    for count in range(-warm_up, repeats):
        for side, kept in zip(sides, samples, strict=True):
            sample = side()
            if count >= 0:
                kept.append(sample)
        progress()
    return samples
