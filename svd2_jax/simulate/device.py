"""A device that exists only as times and rows: how long ticks take, and which chunks they finish."""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from dataclasses import dataclass

from svd2_jax.rows import Rows
from svd2_jax.runtime.types import StreamId, StreamSettings, Tick, TickEntry
from svd2_jax.simulate.trace import DeviceTrace


@dataclass
class _InFlight:
    """A tick in flight: when it is through the stages, and when its frames are finished.

    `chunks`, those that it finishes by stream, is None while it is in the stages.
    """

    tick: Tick
    free_ns: int
    done_ns: int
    chunks: dict[StreamId, list[tuple[int, ...]]] | None = None


class SimulatedDevice:
    """Runs one tick at a time, finishes the frames of the one before meanwhile, and keeps the rows of every stream.

    Which tick finishes a chunk, also after a change of the steps, is what `Rows` says.
    """

    def __init__(self, trace: DeviceTrace, seed: int):
        self._trace = trace
        self._random = random.Random(f"{seed} device")
        self._rows: dict[StreamId, Rows[tuple[int, ...]]] = {}  # chunks as the numbers of their frames
        self._settings: dict[StreamId, StreamSettings] = {}
        self._flight: deque[_InFlight] = deque()  # oldest first
        self.busy_ns = 0

    @property
    def free_ns(self) -> int | None:
        """When the tick in the stages is through them; None if there is none."""
        return self._flight[-1].free_ns if self._flight and self._flight[-1].chunks is None else None

    @property
    def done_ns(self) -> int | None:
        """When the frames of the oldest tick in flight are finished; None if there is none."""
        return self._flight[0].done_ns if self._flight else None

    def open(self, stream: StreamId, settings: StreamSettings) -> None:
        """Makes room for a stream."""
        self._rows[stream] = Rows(settings.steps, settings.stages)
        self._settings[stream] = settings

    def under_way(self, stream: StreamId) -> int:
        """Returns how many chunks of a stream are in its rows."""
        return len(self._rows[stream])

    def drop_rows(self, stream: StreamId) -> None:
        """Forgets what is under way, as a change between stream batch and sequential does in the reference."""
        self._rows[stream] = dataclasses.replace(self._rows[stream], chunks=())

    def start(self, tick: Tick, now_ns: int) -> tuple[int, int]:
        """Starts a tick; returns when it will be through the stages, and when its frames will be finished."""
        assert self.free_ns is None, "a tick runs already"
        assert len(self._flight) < 2, "two ticks are in flight already"
        trace = self._trace
        free_ns = trace.end_ns(now_ns, self._sample_ms(self.work_ms(tick)))
        done_ns = trace.end_ns(free_ns, trace.tail_ms) if trace.tail_ms else free_ns
        self._flight.append(_InFlight(tick, free_ns, done_ns))
        self.busy_ns += free_ns - now_ns
        return free_ns, done_ns

    def pass_on(self) -> None:
        """Takes the running tick out of the stages."""
        assert self.free_ns is not None, "no tick runs"
        flight = self._flight[-1]
        flight.chunks = {entry.stream: self._advance(entry) for entry in flight.tick.entries}

    def finish(self) -> dict[StreamId, list[tuple[int, ...]]]:
        """Ends the oldest tick; returns the frames of the chunks that it finished, for each stream in order."""
        chunks = self._flight[0].chunks
        assert chunks is not None, "a tick is still in the stages"
        self._flight.popleft()
        return chunks

    def work_ms(self, tick: Tick) -> float:
        """Returns what a tick takes at full speed and without noise."""
        entry = tick.entries[0]
        if not tick.first:
            alone = all(self._entered(entry).lone is not None for entry in tick.entries)
            return self._trace.tick_ms(len(tick.entries), 1 if alone else tick.steps)
        settings = self._settings[entry.stream]
        rows = -(-(len(entry.frames) + entry.fill) // settings.chunk_frames)
        return self._trace.sequential_ms(tick.steps * settings.stages, rows)

    def sample_ms(
        self, settings: StreamSettings, batch: int, steps: int, first: bool, lone: bool = False
    ) -> float:
        """Returns one measured time of a kind of tick, as a warm-up would see it."""
        if first:
            rows = -(-settings.first_frames // settings.chunk_frames)
            return self._sample_ms(self._trace.sequential_ms(steps * settings.stages, rows))
        return self._sample_ms(self._trace.tick_ms(batch, 1 if lone else steps))

    def _advance(self, entry: TickEntry) -> list[tuple[int, ...]]:
        self._rows[entry.stream], finished = self._entered(entry).leave()
        return [held.chunk for held in finished]

    def _entered(self, entry: TickEntry) -> Rows[tuple[int, ...]]:
        """Returns a stream's rows in the tick that it takes this part in."""
        return self._rows[entry.stream].with_steps(entry.steps).enter(entry.frames or None, whole=entry.first)

    def _sample_ms(self, work_ms: float) -> float:
        trace, draw = self._trace, self._random
        outlier = trace.outlier_factor if draw.random() < trace.outlier_share else 1.0
        return work_ms * outlier * max(0.5, 1 + trace.noise * draw.gauss(0, 1))
