"""The scheduler: keeps the streams' frames, runs the policy, and reports what became of every frame.

It has no clock and no thread: whoever drives it, the live loop or a simulation, hands in the time with every call,
and the time never goes back. One driver's cycle:

    scheduler.arrive(stream, now)          when a frame comes; its pixels are kept by (stream, number)
    work = scheduler.next(now)             when the device is free: a Tick to run, or a Wait
    scheduler.free(now)                    when the tick's stages can take the next one
    scheduler.done(finished, now)          when its frames are finished, too
    again = scheduler.show(now)            reports what is shown now, and says when to ask again

and after any of these, `next` and `show` may have something new. Between `free` and `done` of a tick the next one
may start, so at most two are in flight: one whose frames are being finished, and one in the stages. A driver that has
no use for that leaves `free` out. What to do is decided in deadline.py (the next tick), overload.py (denoising steps,
admission), pacing.py (when to show) and ingest.py (what input to take).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from svd2_jax.errors import SessionError
from svd2_jax.rows import InFlight, Rows
from svd2_jax.runtime import ingest, overload, pacing
from svd2_jax.runtime.deadline import Moment, PolicyConfig, ScheduledStream, edf_schedule, jobs_of
from svd2_jax.runtime.latency import LatencyModel, LatencySample
from svd2_jax.runtime.types import (
    MS,
    Event,
    Fate,
    FrameRecord,
    Reason,
    StepChange,
    StreamId,
    StreamSettings,
    Tick,
    TickEntry,
    TickRecord,
    Wait,
    shown_fate,
)

CONTROL_EVERY_NS = 50 * MS  # steps are looked at no more often than this
# So long after a frame expired the device counts as overloaded. Otherwise streams could go on for ever with frames so
# old that each chunk needs ticks of its own to be in time, on a device that is fast enough for new ones.
LOSSY_NS = 500 * MS
# So long after its last tick a device that is believed too slow for any frame is tried again.
PROBE_NS = 500 * MS
MOST_QUEUED = 256  # input frames of one stream; fewer where its budget holds fewer


class Refused(SessionError):
    """A stream was not let in: its budget cannot be met, or the device is full."""


@dataclass(slots=True)
class _Running:
    """A tick in flight.

    Attributes:
      tick: what runs.
      batch_key: of its streams.
      started_ns: when it was handed over.
      queued: input frames that waited then.
      begins_ns: when the stages turn to it; while the tick before it is being finished, when they should.
      expected_ns: what it should add to the tick before it.
      bound_ns: what it hardly exceeds.
      tail_ns: how much longer its frames should take.
      passed: whether the stages are through with it.
    """

    tick: Tick
    batch_key: Hashable
    started_ns: int
    queued: int
    begins_ns: int
    expected_ns: int
    bound_ns: int
    tail_ns: int
    passed: bool = False


class Scheduler:
    """Decides what the device does for several live streams, and when their finished frames are shown."""

    def __init__(
        self,
        config: PolicyConfig,
        batch_sizes: Sequence[int],
        report: Callable[[Event], None],
        ids: Iterator[StreamId] | None = None,
    ):
        """Creates a scheduler without streams.

        Args:
          config: the policy's settings.
          batch_sizes: how many streams a tick can take, beginning with 1.
          report: is given every event as it happens; must not call the scheduler.
          ids: gives the numbers of streams, ascending; None counts from 0. Schedulers side by side share one.

        Raises:
          ValueError: a batch size below 1, or no 1 among them.
        """
        if 1 not in batch_sizes or min(batch_sizes) < 1:
            raise ValueError(f"expected batch sizes from 1 on, got {list(batch_sizes)}")
        self.config = config
        self.model = LatencyModel(batch_sizes, config.latency)
        self._report = report
        self._streams: dict[StreamId, ScheduledStream] = {}
        self._ids = ids or itertools.count()
        self._ticks = 0
        self._running: deque[_Running] = deque()  # in flight, oldest first
        self._due: list[tuple[int, StreamId, int]] = []  # heap of (when, stream, number)
        self._control = overload.Control()
        self._controls_ns = 0  # when steps are looked at again
        self._ran_ns = 0  # when the last tick was through
        self._expired_ns = -LOSSY_NS  # when a frame expired last

    def warm_up(self, sample: LatencySample) -> None:
        """Learns from a device time measured before the streams open."""
        self.model.observe(sample)

    def open(self, settings: StreamSettings, now_ns: int) -> StreamId:
        """Lets a stream in and returns its number.

        Raises:
          Refused: its budget cannot be met even at its floor steps, or the device is full.
        """
        self._doubt_if_stuck(now_ns)
        others = [s.settings for s in self._streams.values() if not s.ended]
        if problem := overload.refusal(settings, others, self.model.times, self.config):
            raise Refused(problem)
        stream = next(self._ids)
        self._streams[stream] = ScheduledStream(
            id=stream,
            settings=settings,
            steps=overload.steps_at(settings, self._control.level),
            clock=ingest.SourceClock(gap_ns=settings.interval_ns),
            playout=pacing.Playout(0, changed_ns=now_ns),
            rows=Rows(settings.steps, settings.stages),
            served_ns=now_ns,
        )
        self._controls_ns = now_ns
        return stream

    def arrive(self, stream: StreamId, now_ns: int, timestamp_ns: int | None = None) -> int:
        """Takes note of an input frame and returns its number.

        Raises:
          SessionError: the stream has ended, or there is none of that number.
        """
        s = self._get(stream)
        number, asked = s.arrived, s.settings
        s.arrived += 1
        s.clock, media = ingest.take(s.clock, now_ns, timestamp_ns, asked.interval_ns, asked.budget_ns)
        due_ns = now_ns + asked.budget_ns
        # Its fate is known later; until then it stands as dropped.
        frame = FrameRecord(stream, number, timestamp_ns, now_ns, due_ns, Fate.DROPPED)
        if isinstance(media, Reason):
            self._drop(frame, media)
            return number
        s.queue.append(replace(frame, media_ns=media))
        in_budget = math.ceil(asked.budget_ns / asked.interval_ns) + asked.first_frames + asked.chunk_frames
        if len(s.queue) > min(MOST_QUEUED, in_budget):
            self._drop(s.queue.popleft(), Reason.OVERLOAD)
        return number

    def update(self, stream: StreamId, settings: StreamSettings, now_ns: int) -> None:
        """Gives a stream other steps and minimum steps; all else stays.

        The steps of chunks in flight follow; they are not changed before all of these can still be in time.

        Raises:
          SessionError: the stream has ended, or there is none of that number.
          Refused: its budget cannot be met even at the new minimum steps.
        """
        s = self._get(stream)
        new = replace(s.settings, steps=settings.steps, min_steps=settings.min_steps)
        if problem := overload.refusal(new, [], self.model.times, self.config):
            raise Refused(problem)
        s.settings, self._controls_ns = new, now_ns

    def end(self, stream: StreamId, now_ns: int) -> None:
        """Notes that no more frames come; what is there is still finished and shown."""
        if s := self._streams.get(stream):
            s.ended, self._controls_ns = True, now_ns
            self._forget_if_over(s)

    def close(self, stream: StreamId, now_ns: int) -> None:
        """Ends a stream at once: frames that are not shown are dropped. Safe while a tick runs."""
        if s := self._streams.pop(stream, None):
            in_flight = [frame for chunk in (*s.leaving, *s.rows.chunks) for frame in chunk.chunk]
            for frame in (*s.finished.values(), *in_flight, *s.queue):
                self._drop(frame, Reason.CLOSED)
            self._controls_ns = now_ns

    def next(self, now_ns: int) -> Tick | Wait:
        """Returns the tick to run now, which counts as started, or how long to wait.

        Never a tick while another one is in the stages, or two are in flight. While one is being finished, the next is
        not chosen before it would have to wait no longer than the guard time: what is chosen later knows more.
        """
        # When the stages should take what is chosen now, and when they do so at the latest.
        begins_ns = start_ns = now_ns
        if self._running:
            last = self._running[-1]
            begins_ns = max(now_ns, last.begins_ns + last.expected_ns)
            start_ns = max(now_ns, last.begins_ns + last.bound_ns)
            if not last.passed or len(self._running) > 1:
                return Wait(None)
            if now_ns < begins_ns - self.config.guard_ns:
                return Wait(begins_ns - self.config.guard_ns)
        self._doubt_if_stuck(now_ns)
        self._set_steps(now_ns, start_ns)
        streams = list(self._streams.values())
        overloaded = self._control.utilisation > 1 or now_ns < self._expired_ns + LOSSY_NS
        decision = Moment(start_ns, streams, self.model.times, self.config, overloaded).decide()
        if decision.expired and now_ns < start_ns:
            return Wait(start_ns)  # these may still be in time, should the stages be free before
        queued = sum(len(s.queue) for s in streams)
        for stream, count in decision.expired.items():
            s, self._expired_ns = self._streams[stream], now_ns
            for _ in range(count):
                self._drop(s.queue.popleft(), Reason.EXPIRED)
            self._forget_if_over(s)
        if not decision.entries:
            return Wait(decision.until_ns)
        is_lone = all([self._enter(entry, now_ns) for entry in decision.entries])
        batch_key, size = self._streams[decision.entries[0].stream].settings.batch_key, len(decision.entries)
        times = self.model.times(batch_key, decision.entries[0].steps)
        took, bound, tail = times.of_tick(size, decision.entries[0].first, is_lone)
        tick = Tick(self._ticks, decision.entries, begins_ns - now_ns + took + tail, is_lone)
        self._ticks += 1
        self._running.append(_Running(tick, batch_key, now_ns, queued, begins_ns, took, bound, tail))
        return tick

    def free(self, now_ns: int) -> None:
        """Notes that the stages are through with the tick that they have, and can take the next one.

        Raises:
          SessionError: they have none.
        """
        if not self._running or self._running[-1].passed:
            raise SessionError("no tick is running; `next` starts one")
        self._running[-1].passed = True

    def done(self, finished: Mapping[StreamId, int], now_ns: int) -> None:
        """Notes that the frames of the oldest tick in flight are finished, and so are its stages with it.

        Args:
          finished: how many chunks it finished, for each stream that took part.
          now_ns: the time.

        Raises:
          SessionError: no tick runs.
        """
        if not self._running:
            raise SessionError("no tick is running; `next` starts one")
        running = self._running.popleft()
        tick, self._ran_ns = running.tick, now_ns
        self._report(TickRecord(tick, running.started_ns, now_ns, running.queued))
        # The stages were through a tail ago, and turned to the tick behind.
        ended_ns = now_ns - running.tail_ns
        for behind in self._running:
            behind.begins_ns = max(behind.started_ns, ended_ns)
        took_ns = ended_ns - running.begins_ns
        kind = running.batch_key, len(tick.entries), tick.steps
        self.model.observe(LatencySample(*kind, took_ns, tick.first, lone=tick.lone))
        for entry in tick.entries:
            if s := self._streams.get(entry.stream):  # else closed meanwhile
                for _ in range(min(finished.get(entry.stream, 0), len(s.leaving))):
                    self._finish(s, s.leaving.popleft(), now_ns)
                self._forget_if_over(s)

    def show(self, now_ns: int) -> int | None:
        """Reports the frames that are shown now; returns when to ask again (None: when something happens)."""
        while self._due and (self._due[0][0] <= now_ns or self._due[0][1] not in self._streams):
            _, stream, number = heapq.heappop(self._due)
            if s := self._streams.get(stream):
                frame = s.finished.pop(number)
                self._report(replace(frame, fate=shown_fate(now_ns, frame.deadline_ns), shown_ns=now_ns))
                self._forget_if_over(s)
        return self._due[0][0] if self._due else None

    def is_over(self, stream: StreamId) -> bool:
        """Whether a stream has ended or was closed, and nothing of it is left to show or report."""
        return stream not in self._streams

    def _get(self, stream: StreamId) -> ScheduledStream:
        s = self._streams.get(stream)
        if s is None or s.ended:
            raise SessionError(f"stream {stream} has ended, or there is none of that number")
        return s

    def _doubt_if_stuck(self, now_ns: int) -> None:
        """Takes the device to be as fast as ever where all frames expire, so that nothing could show that it is."""
        if not self._running and self._ran_ns <= min(self._expired_ns, now_ns - PROBE_NS):
            self.model.doubt()

    def _set_steps(self, now_ns: int, start_ns: int) -> None:
        """Brings the streams' steps up to date, unless chunks in flight would be late then."""
        if now_ns < self._controls_ns:
            return
        streams = list(self._streams.values())
        asked = [s.settings for s in streams]
        control = overload.control(self._control, asked, self.model.times, self.config, now_ns)
        before, slack_ns = [s.steps for s in streams], self._slack_ns(start_ns)
        for s in streams:
            s.steps = overload.steps_at(s.settings, control.level)
        # Other steps may need more ticks, or lose the company in their batches.
        if self._slack_ns(start_ns) >= min(slack_ns, self.config.guard_ns):
            self._control, self._controls_ns = control, now_ns + CONTROL_EVERY_NS
            return
        for s, steps in zip(streams, before, strict=True):
            s.steps = steps

    def _slack_ns(self, start_ns: int) -> int:
        """Returns the slack of the chunks in flight, on a device that is free at `start_ns`."""
        jobs = jobs_of(self._streams.values(), self.model.times)
        return edf_schedule(jobs, start_ns, self.model.times).slack_ns

    def _enter(self, entry: TickEntry, now_ns: int) -> bool:
        """Moves an entry's frames from the queue into the device; older ones that are left out are dropped.

        Returns:
          Whether the tick can compute one row of the stream only.
        """
        s, frames = self._streams[entry.stream], []
        if s.rows.steps != s.steps:
            self._report(StepChange(s.id, now_ns, s.rows.steps, s.steps))
            s.rows = s.rows.with_steps(s.steps)
        while len(frames) < len(entry.frames):
            frame = s.queue.popleft()
            if frame.number in entry.frames:
                frames.append(replace(frame, started_ns=now_ns))
            else:
                self._drop(frame, Reason.OVERLOAD)
        entered = s.rows.enter(frames or None, whole=entry.first)
        s.rows, leaving = entered.leave()
        s.leaving.extend(leaving)
        if frames:
            s.started, s.served_ns = True, now_ns
        return s.steps > 1 and not entry.first and entered.lone is not None

    def _finish(self, s: ScheduledStream, chunk: InFlight[list[FrameRecord]], now_ns: int) -> None:
        """Gives the frames of a finished chunk the times at which they are shown.

        Of those that are late already only the newest is shown: the others would hold it up.
        """
        asked, guard = s.settings, self.config.guard_ns
        frames = [replace(frame, done_ns=now_ns, steps=chunk.steps) for frame in chunk.chunk]
        nominal = overload.nominal_ns(asked, self.model.times)
        s.playout = pacing.chunk_finished(s.playout, nominal, frames[0].media_ns, now_ns, asked.budget_ns)
        given_up = max(0, sum(frame.deadline_ns < now_ns for frame in frames) - 1)  # the oldest are late
        for frame in frames[:given_up]:
            self._drop(frame, Reason.EXPIRED)
        for frame in frames[given_up:]:
            s.playout, due = pacing.show_time(
                s.playout, frame.media_ns, now_ns, frame.deadline_ns, asked.interval_ns, guard
            )
            s.finished[frame.number] = frame
            heapq.heappush(self._due, (due, s.id, frame.number))

    def _drop(self, frame: FrameRecord, reason: Reason) -> None:
        self._report(replace(frame, reason=reason))

    def _forget_if_over(self, s: ScheduledStream) -> None:
        if s.ended and not (s.queue or s.rows or s.leaving or s.finished):
            self._streams.pop(s.id, None)
            self._controls_ns = 0
