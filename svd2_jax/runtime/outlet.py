"""The way out of one stream: its sink is called in a thread of its own, so that a slow one stalls nobody else."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np

from svd2_jax.runtime.clock import Clock
from svd2_jax.runtime.work import FrameRecord

Sink: TypeAlias = Callable[[np.ndarray, FrameRecord], None]
"""Takes a frame, uint8 [H, W, 3], when it is due, and its record. Called in a thread of the stream's own."""


class Outlet:
    """Hands a stream's due frames to its sink, in order, from a thread of its own."""

    def __init__(self, sink: Sink, limit: int, clock: Clock):
        self._sink, self._limit, self._clock = sink, limit, clock
        self._changed = threading.Condition()
        self._due: deque[FrameRecord] = deque()
        self._pixels: dict[int, np.ndarray] = {}
        self._ended = False

    def show(self, record: FrameRecord) -> bool:
        """Takes a frame that is due, whose pixels are there or will be soon; False if too many wait already."""
        with self._changed:
            if len(self._due) >= self._limit:
                return False
            self._due.append(record)
            self._changed.notify()
            return True

    def fill(self, pixels: Mapping[int, np.ndarray]) -> None:
        """Takes finished frames by their numbers."""
        with self._changed:
            wanted = {record.number for record in self._due} if self._ended else pixels
            self._pixels.update((number, frame) for number, frame in pixels.items() if number in wanted)
            self._changed.notify()

    def forget(self, number: int) -> None:
        """Frees a frame that will not be shown."""
        with self._changed:
            self._pixels.pop(number, None)

    def end(self, at_once: bool = False) -> None:
        """Says that no more frames become due; those that are due are still handed over, unless `at_once`."""
        with self._changed:
            self._ended = True
            if at_once:
                self._due.clear()
            due = {record.number for record in self._due}
            self._pixels = {number: frame for number, frame in self._pixels.items() if number in due}
            self._changed.notify()

    def run(self) -> None:
        """Calls the sink until the end; raises what it raises."""
        while (item := self._next()) is not None:
            self._sink(*item)

    def _next(self) -> tuple[np.ndarray, FrameRecord] | None:
        with self._changed:
            while not (self._due and self._due[0].number in self._pixels):
                if self._ended and not self._due:
                    return None
                self._clock.wait(self._changed, None)
            record = self._due.popleft()
            return self._pixels.pop(record.number), record
