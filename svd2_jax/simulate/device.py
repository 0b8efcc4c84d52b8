"""A device that exists only as times and rows: how long ticks take, and which chunks they finish."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

from svd2_jax.runtime.work import Part, StreamId, StreamSettings, Tick
from svd2_jax.simulate.trace import DeviceTrace


@dataclass
class _Row:
    """A chunk under way: its frames and how many ticks of its stream it has been in."""

    frames: tuple[int, ...]
    ticks: int = 0


class SimulatedDevice:
    """Runs one tick at a time and keeps the rows of every stream.

    A chunk is finished by the tick in which it is at least the (steps * stages)-th of its stream's, with the steps
    that the stream has then: fewer steps let out what has taken as many, more keep back what has not.
    """

    def __init__(self, trace: DeviceTrace, seed: int):
        self._trace = trace
        self._random = random.Random(f"{seed} device")
        self._rows: dict[StreamId, deque[_Row]] = {}
        self._settings: dict[StreamId, StreamSettings] = {}
        self._running: Tick | None = None
        self.done_ns: int | None = None
        self.busy_ns = 0

    def open(self, stream: StreamId, settings: StreamSettings) -> None:
        """Makes room for a stream."""
        self._rows[stream] = deque()
        self._settings[stream] = settings

    def under_way(self, stream: StreamId) -> int:
        """Returns how many chunks of a stream are in its rows."""
        return len(self._rows[stream])

    def drop_rows(self, stream: StreamId) -> None:
        """Forgets what is under way, as a change between stream batch and sequential does in the reference."""
        self._rows[stream].clear()

    def start(self, tick: Tick, now_ns: int) -> None:
        """Starts a tick; `done_ns` says when it will be through."""
        assert self._running is None, "a tick runs already"
        work_ms = self._sample_ms(self.work_ms(tick))
        self._running, self.done_ns = tick, self._trace.end_ns(now_ns, work_ms)
        self.busy_ns += self.done_ns - now_ns

    def finish(self) -> dict[StreamId, list[tuple[int, ...]]]:
        """Ends the running tick; returns the frames of the chunks that it finished, for each stream in order."""
        assert self._running is not None, "no tick runs"
        tick, self._running, self.done_ns = self._running, None, None
        return {part.stream: self._advance(part) for part in tick.parts}

    def work_ms(self, tick: Tick) -> float:
        """Returns what a tick takes at full speed and without noise."""
        part = tick.parts[0]
        if not tick.first:
            return self._trace.tick_ms(len(tick.parts), tick.steps)
        settings = self._settings[part.stream]
        rows = -(-(len(part.frames) + part.fill) // settings.chunk_frames)
        return self._trace.sequential_ms(tick.steps * settings.stages, rows)

    def sample_ms(self, settings: StreamSettings, batch: int, steps: int, first: bool) -> float:
        """Returns one measured time of a kind of tick, as a warm-up would see it."""
        if first:
            rows = -(-settings.first_frames // settings.chunk_frames)
            return self._sample_ms(self._trace.sequential_ms(steps * settings.stages, rows))
        return self._sample_ms(self._trace.tick_ms(batch, steps))

    def _advance(self, part: Part) -> list[tuple[int, ...]]:
        rows = self._rows[part.stream]
        if part.first:
            return [part.frames]
        if part.frames:
            rows.append(_Row(part.frames))
        for row in rows:
            row.ticks += 1
        needed = part.steps * self._settings[part.stream].stages
        finished = []
        while rows and rows[0].ticks >= needed:
            finished.append(rows.popleft().frames)
        return finished

    def _sample_ms(self, work_ms: float) -> float:
        trace, draw = self._trace, self._random
        outlier = trace.outlier_factor if draw.random() < trace.outlier_share else 1.0
        return work_ms * outlier * max(0.5, 1 + trace.noise * draw.gauss(0, 1))
