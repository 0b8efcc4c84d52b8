"""What the scheduler is compared with: first in first out, the same with a bound, and the reference's automatic mode.

All serve one stream per tick, keep the number of steps and show frames as soon as they are done. First in first out and
the reference have no bound on what queues and know no deadline.

The reference (StreamDiffusionV2; the wheel streamdiffusionv2 0.1.1 has the argument for the queue wait but ignores
it, its web demo has the switch) runs one worker for one viewer. The worker looks every 0.1 s whether a chunk of frames
is there, and takes the oldest. The *queue wait* is the age of the chunk's oldest frame, or the time that the worker
stood idle for it, whichever is longer. Below 0.5 s the chunk enters the stream batch, as ours; from 0.5 s on it is
taken through all steps at once, one pass after another. Going there leaves behind the chunks that are in the stream
batch's rows: they never come out. Coming back starts with empty rows. When the source ends, rows are not flushed.
On several devices it always batches. Here several viewers take turns, one tick each; that is kinder than several
workers on one device would be.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from svd2_jax.runtime.latency import LatencySample
from svd2_jax.runtime.types import (
    MS,
    Event,
    Fate,
    FrameRecord,
    Reason,
    StreamId,
    StreamSettings,
    Tick,
    TickEntry,
    TickRecord,
    Wait,
    shown_fate,
)

POLL_NS = 100 * MS  # the reference's, between two looks at its queue
SWITCH_NS = 500 * MS  # the reference's default; queue wait from which a chunk is not batched


@dataclass
class _Stream:
    """A stream's queue and rows.

    Attributes:
      settings: as opened.
      free_ns: when its last tick was through.
      served: number of its last tick.
      arrived: frames so far.
      queue: frames that wait, none decided yet.
      rows: chunks under way, the oldest first.
      begun: whether the first group was taken.
      ended_ns: when its source ended.
      over: closed, or its last frame is accounted for.
    """

    settings: StreamSettings
    free_ns: int
    served: int = -1
    arrived: int = 0
    queue: deque[FrameRecord] = field(default_factory=deque)
    rows: deque[list[FrameRecord]] = field(default_factory=deque)
    begun: bool = False
    ended_ns: int | None = None
    over: bool = False

    @property
    def whole(self) -> int:
        """Frames that the next chunk takes."""
        return self.settings.chunk_frames if self.begun else self.settings.first_frames


class Fifo:
    """Chunks in the order in which they became complete, each with a tick of its own; nothing is dropped."""

    restarts = False

    def __init__(self, batch_sizes: Sequence[int], report: Callable[[Event], None]):
        del batch_sizes  # always 1
        self._report = report
        self._streams: dict[StreamId, _Stream] = {}
        self._running: tuple[Tick, int] | None = None
        self._ticks = 0
        self._shows: list[FrameRecord] = []

    def warm_up(self, sample: LatencySample) -> None:
        """Learns nothing."""

    def open(self, settings: StreamSettings, now_ns: int) -> StreamId:
        """Admits every stream."""
        stream = len(self._streams)
        self._streams[stream] = _Stream(settings, now_ns)
        return stream

    def arrive(self, stream: StreamId, now_ns: int, timestamp_ns: int | None = None) -> int:
        """Queues a frame, whatever its timestamp says."""
        state = self._streams[stream]
        deadline_ns = now_ns + state.settings.budget_ns
        # Its fate is known later; until then it stands as dropped with the stream.
        state.queue.append(
            FrameRecord(
                stream, state.arrived, timestamp_ns, now_ns, deadline_ns, Fate.DROPPED, reason=Reason.CLOSED
            )
        )
        state.arrived += 1
        return state.arrived - 1

    def end(self, stream: StreamId, now_ns: int) -> None:
        """Lets what is there come out."""
        state = self._streams[stream]
        state.ended_ns = now_ns
        self._settle(state)

    def close(self, stream: StreamId, now_ns: int) -> None:
        """Drops what is there."""
        self._drop(self._streams[stream])

    def next(self, now_ns: int) -> Tick | Wait:
        """Returns a tick for the stream whose turn it is."""
        if self._running is not None:
            return Wait()
        ready = {s: at for s, state in self._streams.items() if (at := self._ready_ns(state)) is not None}
        now_ready = [s for s, at in ready.items() if at <= now_ns]
        if not now_ready:
            return Wait(min(ready.values(), default=None))
        stream = min(now_ready, key=lambda s: self._turn(self._streams[s], ready[s]))
        entry = self._take(stream, self._streams[stream], ready[stream], now_ns)
        tick = Tick(self._ticks, (entry,), 0)
        self._streams[stream].served = self._ticks
        self._ticks += 1
        self._running = tick, now_ns
        return tick

    def free(self, now_ns: int) -> None:
        """Waits for the rest of the tick: nothing overlaps."""

    def done(self, finished: Mapping[StreamId, int], now_ns: int) -> None:
        """Lets the chunks that are finished be shown."""
        assert self._running is not None
        tick, started_ns = self._running
        self._running = None
        self._report(TickRecord(tick, started_ns, now_ns, sum(len(s.queue) for s in self._streams.values())))
        for stream, count in finished.items():
            state = self._streams[stream]
            state.free_ns = now_ns
            for _ in range(0 if state.over else count):
                for frame in state.rows.popleft():
                    self._shows.append(
                        replace(
                            frame, done_ns=now_ns, shown_ns=now_ns, steps=state.settings.steps, reason=None
                        )
                    )

    def show(self, now_ns: int) -> int | None:
        """Reports what was finished just now as shown."""
        frames, self._shows = self._shows, []
        for frame in frames:
            self._report(replace(frame, fate=shown_fate(now_ns, frame.deadline_ns)))
        for stream in {frame.stream for frame in frames}:
            self._settle(self._streams[stream])
        return None

    def is_over(self, stream: StreamId) -> bool:
        """Returns whether nothing of a stream is left."""
        return self._streams[stream].over

    def _ready_ns(self, state: _Stream) -> int | None:
        """Returns from when on the stream's next part can run; None if that is not known."""
        if state.over:
            return None
        if len(state.queue) >= state.whole:
            return state.queue[state.whole - 1].arrival_ns
        return state.ended_ns if state.queue or state.rows else None

    def _turn(self, state: _Stream, ready_ns: int) -> tuple[int, int]:
        return ready_ns, state.served

    def _take(self, stream: StreamId, state: _Stream, ready_ns: int, now_ns: int) -> TickEntry:
        count = min(state.whole, len(state.queue))
        frames = [replace(state.queue.popleft(), started_ns=now_ns) for _ in range(count)]
        fill = state.whole - count if count else 0
        first, state.begun = not state.begun, True
        if frames:
            state.rows.append(frames)
        return TickEntry(stream, tuple(f.number for f in frames), fill, state.settings.steps, first)

    def _settle(self, state: _Stream) -> None:
        """Takes note of a stream of which nothing is left."""
        if state.ended_ns is not None and not (state.queue or state.rows):
            state.over = True

    def _drop(self, state: _Stream) -> None:
        """Accounts for all that a stream has and marks it as over."""
        for frame in [*(f for row in state.rows for f in row), *state.queue]:
            self._report(frame)
        state.rows.clear()
        state.queue.clear()
        state.over = True


class ReferencePolicy(Fifo):
    """The reference's automatic mode: stream batch, or sequential where frames wait 0.5 s and more."""

    restarts = True

    def next(self, now_ns: int) -> Tick | Wait:
        """Returns a tick for the stream that was served longest ago."""
        if self._running is None:
            for state in self._streams.values():
                if state.ended_ns is not None and not state.over and len(state.queue) < state.whole:
                    self._drop(state)  # what stays behind in the rows and in the queue
        return super().next(now_ns)

    def _ready_ns(self, state: _Stream) -> int | None:
        if state.over or len(state.queue) < state.whole:
            return None
        looks = max(0, -(-(state.queue[state.whole - 1].arrival_ns - state.free_ns) // POLL_NS))
        return state.free_ns + looks * POLL_NS

    def _turn(self, state: _Stream, ready_ns: int) -> tuple[int, int]:
        return state.served, ready_ns

    def _take(self, stream: StreamId, state: _Stream, ready_ns: int, now_ns: int) -> TickEntry:
        waited_ns = max(ready_ns - state.free_ns, now_ns - state.queue[0].arrival_ns)
        sequential = state.begun and waited_ns >= SWITCH_NS and state.settings.stages == 1
        if sequential:
            for frame in (f for row in state.rows for f in row):
                self._report(replace(frame, reason=Reason.OVERLOAD))
            state.rows.clear()
        entry = super()._take(stream, state, ready_ns, now_ns)
        return replace(entry, first=True) if sequential else entry


class Bounded(Fifo):
    """The most urgent chunk first, and in between what is in the rows is pushed on; the queue has a bound.

    Of each stream, two chunks are queued at most, and the oldest frames make room. Frames that could not be in time on
    a free device are dropped before they enter. It has no test that all stays in time, no batches and no fewer steps.
    """

    def __init__(self, batch_sizes: Sequence[int], report: Callable[[Event], None]):
        super().__init__(batch_sizes, report)
        self._tick_ns: dict[tuple[Hashable, int], int] = {}  # longest measured, by shape and steps

    def warm_up(self, sample: LatencySample) -> None:
        """Takes the longest time of each kind of tick for what it takes."""
        if sample.batch == 1 and not sample.first:
            kind = sample.batch_key, sample.steps
            took_ns = sample.duration_ns + (sample.tail_ns or 0)
            self._tick_ns[kind] = max(took_ns, self._tick_ns.get(kind, 0))

    def arrive(self, stream: StreamId, now_ns: int, timestamp_ns: int | None = None) -> int:
        """Queues a frame; the oldest one makes room for it."""
        number = super().arrive(stream, now_ns, timestamp_ns)
        state = self._streams[stream]
        if len(state.queue) > 2 * state.whole:
            self._report(replace(state.queue.popleft(), reason=Reason.OVERLOAD))
        return number

    def next(self, now_ns: int) -> Tick | Wait:
        """Returns a tick for the most urgent chunk, or one that pushes on."""
        for state in self._streams.values() if self._running is None else ():
            asked = state.settings
            takes_ns = asked.steps * asked.stages * self._tick_ns[asked.batch_key, asked.steps]
            while state.queue and state.queue[0].deadline_ns < now_ns + takes_ns:
                self._report(replace(state.queue.popleft(), reason=Reason.EXPIRED))
            self._settle(state)
        return super().next(now_ns)

    def _ready_ns(self, state: _Stream) -> int | None:
        ready_ns = super()._ready_ns(state)
        return state.free_ns if ready_ns is None and state.rows and not state.over else ready_ns

    def _turn(self, state: _Stream, ready_ns: int) -> tuple[int, int]:
        pushes = len(state.queue) < state.whole and state.ended_ns is None
        waiting = state.rows[0] if pushes or not state.queue else state.queue
        return int(pushes), waiting[0].deadline_ns

    def _take(self, stream: StreamId, state: _Stream, ready_ns: int, now_ns: int) -> TickEntry:
        if len(state.queue) >= state.whole or state.ended_ns is not None:
            return super()._take(stream, state, ready_ns, now_ns)
        return TickEntry(stream, (), 0, state.settings.steps)
