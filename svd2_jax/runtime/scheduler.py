"""The scheduler: keeps the streams' frames, runs the policy, and reports what became of every frame.

It has no clock and no thread: whoever drives it, the live loop or a simulation, hands in the time with every call,
and the time never goes back. One driver's cycle:

    scheduler.arrive(stream, now)          when a frame comes; its pixels are kept by (stream, number)
    work = scheduler.next(now)             when the device is free: a Tick to run, or a Wait
    scheduler.free(now)                    when the tick's stages can take the next one
    scheduler.done(finished, now)          when its frames are finished, too
    shows, again = scheduler.shows(now)    to show what is due

and after any of these, `next` and `shows` may have something new. Between `free` and `done` of a tick the next one
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
from dataclasses import dataclass, field, replace

from svd2_jax.errors import SessionError
from svd2_jax.rows import InFlight, Rows
from svd2_jax.runtime import ingest, overload, pacing
from svd2_jax.runtime.deadline import (
    Choice,
    Decision,
    Drop,
    Flight,
    Group,
    Job,
    Load,
    PolicyConfig,
    View,
    decide,
    rescue,
)
from svd2_jax.runtime.latency import LatencyModel, LatencySample
from svd2_jax.runtime.overload import Control, Demand
from svd2_jax.runtime.work import (
    MS,
    Event,
    Fate,
    FrameRecord,
    Part,
    Reason,
    Show,
    StepChange,
    StreamId,
    StreamSettings,
    Tick,
    TickRecord,
    Wait,
    shown_fate,
)

__all__ = ["LatencySample", "PolicyConfig", "Refused", "Scheduler"]

CONTROL_EVERY_NS = 50 * MS  # steps are looked at no more often than this
# So long after a frame expired the device counts as overloaded. Otherwise streams could go on for ever with frames so
# old that each chunk needs ticks of its own to be in time, on a device that is fast enough for new ones.
LOSSY_NS = 500 * MS
# So long after its last tick a device that is believed too slow for any frame is tried again, with one frame.
PROBE_NS = 500 * MS


class Refused(SessionError):
    """A stream was not let in: its budget cannot be met, or the device is full."""


@dataclass(slots=True)
class _Frame:
    """An input frame on its way."""

    number: int
    timestamp_ns: int | None
    arrival_ns: int
    media_ns: int
    deadline_ns: int
    started_ns: int | None = None
    done_ns: int | None = None
    steps: int | None = None


@dataclass(slots=True)
class _Stream:
    """All that is known of one stream."""

    id: StreamId
    settings: StreamSettings
    steps: int  # wanted from its next tick on
    clock: ingest.SourceClock
    playout: pacing.Playout
    rows: Rows[list[_Frame]]  # chunks in flight that need more ticks, besides those in flight
    served_ns: int  # when its last chunk entered
    interval_ns: int
    budget_ns: int
    most_queued: int
    chunks_per_ns: float  # as promised
    frames: int = 0  # arrived so far
    queue: deque[_Frame] = field(default_factory=deque)
    leaving: deque[InFlight[list[_Frame]]] = field(default_factory=deque)  # that a tick in flight finishes
    finished: dict[int, _Frame] = field(default_factory=dict)  # waiting to be shown, by number
    started: bool = False  # whether its first group has entered
    ended: bool = False
    view: View | None = None  # None: to be made anew
    update: StreamSettings | None = None  # that its next chunk brings

    @property
    def need(self) -> int:
        return self.settings.chunk_frames if self.started else self.settings.first_frames

    @property
    def in_flight(self) -> list[_Frame]:
        """Frames on the device, oldest first."""
        return [frame for chunk in (*self.leaving, *self.rows.chunks) for frame in chunk.chunk]

    @property
    def over(self) -> bool:
        return self.ended and not (self.queue or self.rows or self.leaving or self.finished)


@dataclass(slots=True)
class _Running:
    """A tick in flight.

    Attributes:
      tick: what runs.
      shape: of its streams.
      started_ns: when it was handed over.
      queued: input frames that waited then.
      expected_ns: what it should add to the tick before it.
      bound_ns: what it hardly exceeds.
      tail_ns: how much longer its frames should take.
      begun_ns: when the stages turned to it; while the tick before it is being finished, when they should.
      passed: whether the stages are through with it.
    """

    tick: Tick
    shape: Hashable
    started_ns: int
    queued: int
    expected_ns: int
    bound_ns: int
    tail_ns: int
    begun_ns: int
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
        self._streams: dict[StreamId, _Stream] = {}
        self._ids = ids or itertools.count()
        self._ticks = 0
        self._running: deque[_Running] = deque()  # in flight, oldest first
        self._due: list[tuple[int, StreamId, int]] = []  # heap of (when, stream, number)
        self._control = Control()
        self._controlled_ns: int | None = None  # None: at the next decision
        self._load = Load.ROOMY
        self._lossy_until_ns = 0
        self._ran_ns = 0  # when the last tick was through
        self._lost = False  # whether frames were hopeless since
        self._waiting: Wait | None = None  # the last answer of `next`, as long as it holds

    @property
    def utilisation(self) -> float:
        """Share of time for which the device is busy at the present steps, as predicted; above 1 in overload."""
        return self._control.utilisation

    def warm_up(self, sample: LatencySample) -> None:
        """Learns from a device time measured before the streams open."""
        self.model.observe(sample)

    def open(self, settings: StreamSettings, now_ns: int) -> StreamId:
        """Lets a stream in and returns its number.

        Raises:
          Refused: its budget cannot be met even at its floor steps, or the device is full.
        """
        others = [self._demand(s) for s in self._streams.values() if not s.ended]
        problem = overload.refusal(settings, others, self.model.costs, self.config)
        if problem and not self._streams and now_ns - self._ran_ns >= PROBE_NS:
            self.model.doubt()
            problem = overload.refusal(settings, others, self.model.costs, self.config)
        if problem:
            raise Refused(problem)
        stream = next(self._ids)
        self._streams[stream] = _Stream(
            id=stream,
            settings=settings,
            steps=settings.steps,
            clock=ingest.SourceClock(gap_ns=settings.interval_ns),
            playout=pacing.Playout(0, changed_ns=now_ns),
            rows=Rows(settings.steps, settings.stages),
            served_ns=now_ns,
            interval_ns=settings.interval_ns,
            budget_ns=settings.budget_ns,
            most_queued=self._most_queued(settings),
            chunks_per_ns=overload.chunk_rate(settings, settings.interval_ns),
        )
        self._controlled_ns = None
        return stream

    def arrive(self, stream: StreamId, now_ns: int, timestamp_ns: int | None = None) -> int:
        """Takes note of an input frame and returns its number.

        Raises:
          SessionError: the stream has ended, or there is none of that number.
        """
        s = self._streams.get(stream)
        if s is None or s.ended:
            raise SessionError(f"stream {stream} takes no more frames: it has ended")
        number = s.frames
        s.frames += 1
        s.clock, media = ingest.take(s.clock, now_ns, timestamp_ns, s.interval_ns, s.budget_ns)
        refused = isinstance(media, Reason)
        deadline = now_ns + s.budget_ns
        frame = _Frame(number, timestamp_ns, now_ns, now_ns if refused else media, deadline)
        if refused:
            self._drop(s, frame, media)
            return number
        s.queue.append(frame)
        s.view = None
        if len(s.queue) == 1 or len(s.queue) >= s.need:  # the others only make what is expected come true
            self._waiting = None
        if len(s.queue) > s.most_queued:
            self._drop(s, s.queue.popleft(), Reason.OVERLOAD)
        return number

    def update(self, stream: StreamId, settings: StreamSettings, now_ns: int) -> None:
        """Gives a stream other steps and minimum steps, from its next chunk on; all else stays.

        The steps of chunks in flight follow; they are not changed before all of these can still be in time.

        Raises:
          SessionError: the stream has ended, or there is none of that number.
          Refused: its budget cannot be met even at the new minimum steps.
        """
        s = self._streams.get(stream)
        if s is None or s.ended:
            raise SessionError(f"stream {stream} takes no new settings: it has ended")
        settings = replace(s.settings, steps=settings.steps, floor_steps=settings.floor_steps)
        if problem := overload.refusal(settings, [], self.model.costs, self.config):
            raise Refused(problem)
        s.update, self._waiting = settings, None

    def end(self, stream: StreamId, now_ns: int) -> None:
        """Notes that no more frames come; what is there is still finished and shown."""
        s = self._streams.get(stream)
        if s is None or s.ended:
            return
        s.ended, s.view = True, None
        self._controlled_ns = self._waiting = None
        self._forget_if_over(s)

    def close(self, stream: StreamId, now_ns: int) -> None:
        """Ends a stream at once: frames that are not shown are dropped. Safe while a tick runs."""
        s = self._streams.pop(stream, None)
        if s is None:
            return
        frames = [*s.finished.values(), *s.in_flight, *s.queue]
        for frame in frames:
            self._drop(s, frame, Reason.CLOSED)
        self._controlled_ns = self._waiting = None

    def next(self, now_ns: int) -> Tick | Wait:
        """Returns the tick to run now, which counts as started, or how long to wait.

        Never a tick while another one is in the stages, or two are in flight. While one is being finished, the next is
        not chosen before it would have to wait no longer than the guard time: what is chosen later knows more.
        """
        guard = self.config.guard_ns
        # When the stages should take what is chosen now, and when they do so at the latest.
        expected_ns = start_ns = now_ns
        if self._running:
            last = self._running[-1]
            if not last.passed or len(self._running) > 1:
                return Wait(None)
            free_ns = last.begun_ns + last.expected_ns
            if now_ns < free_ns - guard:
                return Wait(free_ns - guard)
            expected_ns, start_ns = max(now_ns, free_ns), max(now_ns, last.begun_ns + last.bound_ns)
        if self._waiting is not None:  # nothing happened since that could change the answer
            until_ns = self._waiting.until_ns
            if until_ns is None or now_ns < until_ns:
                return self._waiting
        self._take_updates(start_ns)
        self._adapt(now_ns, start_ns)
        views = [s.view or self._view(s) for s in self._streams.values()]
        costs = {group: self.model.costs(*group) for group in {view.group for view in views}}
        load = Load.OVER if now_ns < self._lossy_until_ns else self._load
        decision = decide(start_ns, views, costs, self.config, load)
        if now_ns < start_ns and any(drop.reason is Reason.HOPELESS for drop in decision.drops):
            return Wait(start_ns)  # these may still be in time, should the stages be free before
        if self._is_stuck(decision, now_ns):
            decision = self._probe(decision, views, now_ns)
        entering = {part.stream: self._frames_at(part.stream, part.enter) for part in decision.parts}
        self._drop_all(decision.drops, now_ns)
        if not decision.parts:
            return self._wait(decision.until_ns)
        queued = sum(len(s.queue) for s in self._streams.values())
        parts = tuple(self._enter(part, entering[part.stream], now_ns) for part in decision.parts)
        shape, size = self._streams[parts[0].stream].settings.shape, len(parts)
        cost = self.model.costs(shape, parts[0].steps)
        took, bound, tail = (
            (cost.first_expected_ns, cost.first_bound_ns, cost.first_tail_ns)
            if parts[0].first
            else (cost.expected_ns[size], cost.bound_ns[size], cost.tails_ns[size])
        )
        tick = Tick(self._ticks, parts, expected_ns - now_ns + took + tail)
        self._ticks += 1
        self._running.append(_Running(tick, shape, now_ns, queued, took, bound, tail, expected_ns))
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
        running, self._waiting = self._running.popleft(), None
        ended_ns = (
            now_ns - running.tail_ns
        )  # the stages were through so long ago, and turned to the tick behind
        for behind in self._running:
            behind.begun_ns = max(behind.started_ns, ended_ns)
        self._ran_ns, self._lost = now_ns, False
        tick = running.tick
        self._report(TickRecord(tick, running.started_ns, now_ns, running.queued))
        took = ended_ns - running.begun_ns
        self.model.observe(LatencySample(running.shape, len(tick.parts), tick.steps, took, tick.first))
        if self.model.knows_tails:  # which the views' deadlines hold
            for s in self._streams.values():
                s.view = None
        for part in tick.parts:
            s = self._streams.get(part.stream)
            if s is None:  # closed meanwhile
                continue
            s.view = None
            for _ in range(min(finished.get(part.stream, 0), len(s.leaving))):
                chunk = s.leaving.popleft()
                self._finish(s, chunk.chunk, chunk.steps, now_ns)
            self._forget_if_over(s)

    def shows(self, now_ns: int) -> tuple[list[Show], int | None]:
        """Returns the frames to show now, and when to ask again (None: not before something else happens)."""
        shows = []
        while self._due and self._due[0][0] <= now_ns:
            due, stream, number = heapq.heappop(self._due)
            s = self._streams.get(stream)
            if s is None:
                continue
            frame = s.finished.pop(number)
            self._record(s, frame, shown_fate(now_ns, frame.deadline_ns), shown_ns=now_ns)
            shows.append(Show(stream, number, due))
            self._forget_if_over(s)
        while self._due and self._due[0][1] not in self._streams:
            heapq.heappop(self._due)
        return shows, self._due[0][0] if self._due else None

    def is_over(self, stream: StreamId) -> bool:
        """Whether a stream has ended or was closed, and nothing of it is left to show or report."""
        return stream not in self._streams

    def _is_stuck(self, decision: Decision, now_ns: int) -> bool:
        """Whether frames are given up as hopeless and nothing runs that could show that the device is fast again."""
        hopeless = any(drop.reason is Reason.HOPELESS for drop in decision.drops)
        idle = not (
            decision.parts or self._running or any(s.rows or s.leaving for s in self._streams.values())
        )
        return self._lost and hopeless and idle and now_ns - self._ran_ns >= PROBE_NS

    def _probe(self, decision: Decision, views: Sequence[View], now_ns: int) -> Decision:
        """Returns the decision with a try: the newest frame of the stream that waited longest, alone in its chunk.

        Of all frames that one has the best chance to be in time, and no other is late with it.
        """
        alive = [view for view in views if view.queue or (now_ns < view.overdue_ns and not view.ended)]
        view = min(alive, key=lambda view: view.served_ns)
        if not view.queue:
            return decision
        newest = len(view.queue) - 1
        self.model.doubt()
        drops = [drop for drop in decision.drops if drop.stream != view.stream]
        if newest:
            drops.append(Drop(view.stream, tuple(range(newest)), Reason.HOPELESS))
        return Decision(tuple(drops), (Choice(view.stream, (newest,), view.first),), None)

    def _adapt(self, now_ns: int, start_ns: int) -> None:
        """Brings the streams' steps and the device's load up to date."""
        if self._controlled_ns is not None and now_ns - self._controlled_ns < CONTROL_EVERY_NS:
            return
        self._controlled_ns = now_ns
        demands = [self._demand(s) for s in self._streams.values()]
        self._control, steps = overload.control(self._control, demands, self.model.costs, self.config, now_ns)
        if not self._set_steps(steps, start_ns):
            self._controlled_ns = None  # ask again at the next decision
        steps = {s.id: s.steps for s in self._streams.values()}
        if overload.need(demands, steps, self.model.costs) > 1:
            self._load = Load.OVER
        else:
            pushes = overload.push_need(demands, steps, self.model.costs)
            self._load = Load.ROOMY if pushes <= self.config.push_below else Load.BUSY

    def _set_steps(self, steps: Mapping[StreamId, int], start_ns: int) -> bool:
        """Sets steps from the next tick on, unless chunks in flight would be late then; returns whether it did."""
        changed = [s for s in self._streams.values() if s.steps != steps.get(s.id, s.steps)]
        if not changed:
            return True
        before, spare = [s.steps for s in changed], self._spare_ns(start_ns)
        for s in changed:
            s.steps, s.view = steps[s.id], None
        # These may need more ticks, or lose the company in their batches.
        if self._spare_ns(start_ns) >= min(spare, self.config.guard_ns):
            return True
        for s, count in zip(changed, before, strict=True):
            s.steps, s.view = count, None
        return False

    def _take_updates(self, start_ns: int) -> None:
        """Gives streams the new settings whose next chunk is whole, or which have nothing in flight."""
        for s in self._streams.values():
            if s.update is None or (s.rows and len(s.queue) < s.need and not s.ended):
                continue
            new = s.update
            steps = (
                new.steps if s.steps == s.settings.steps else min(max(s.steps, new.floor_steps), new.steps)
            )
            if self._set_steps({s.id: steps}, start_ns):
                s.settings, s.update, s.view = new, None, None
                self._controlled_ns = None

    def _spare_ns(self, start_ns: int) -> int:
        """Returns the time to spare for the chunks under way, on a device that is free at `start_ns`."""
        views = [self._view(s) for s in self._streams.values() if s.rows]
        costs = {view.group: self.model.costs(*view.group) for view in views}
        return rescue((Job(view.stream, view.group, view.flight) for view in views), start_ns, costs).spare_ns

    def _demand(self, s: _Stream) -> Demand:
        rate, gap = s.chunks_per_ns, s.clock.gap_ns
        if gap < 0.9 * s.interval_ns:
            rate = overload.chunk_rate(s.settings, gap)
        return Demand(s.id, s.settings, s.steps, rate)

    def _most_queued(self, settings: StreamSettings) -> int:
        in_budget = math.ceil(settings.budget_ns / settings.interval_ns)
        return min(self.config.most_queued, in_budget + settings.first_frames + settings.chunk_frames)

    def _view(self, s: _Stream) -> View:
        if s.view is None:
            settings, gap = s.settings, round(s.clock.gap_ns)
            gap = max(gap, s.interval_ns // 2)
            missing = max(0, s.need - len(s.queue))
            rows = s.rows.with_steps(s.steps) if s.rows.steps != s.steps else s.rows
            # What a tick adds is what the policy counts with, so all has to be through by a tail before its deadline.
            tail = self.model.costs(settings.shape, s.steps).tail_bound_ns
            s.view = View(
                s.id,
                Group(settings.shape, s.steps),
                tuple([frame.deadline_ns - tail for frame in s.queue]),
                s.need,
                not s.started,
                s.steps * settings.stages,
                tuple(
                    [  # what fewer steps have finished takes a tick to leave, too
                        Flight(chunk.chunk[0].deadline_ns - tail, max(1, left))
                        for chunk, left in zip(rows.chunks, rows.ticks_left, strict=True)
                    ]
                ),
                next_ns=s.clock.arrival_ns + missing * gap,
                overdue_ns=s.clock.arrival_ns + round(self.config.stall_intervals * max(gap, s.interval_ns)),
                period_ns=settings.chunk_frames * gap,
                ended=s.ended,
                served_ns=s.served_ns,
            )
        return s.view

    def _frames_at(self, stream: StreamId, positions: Sequence[int]) -> list[_Frame]:
        queue = self._streams[stream].queue
        return [queue[i] for i in positions]

    def _wait(self, until_ns: int | None) -> Wait:
        self._waiting = Wait(until_ns)
        return self._waiting

    def _drop_all(self, drops: Sequence[Drop], now_ns: int) -> None:
        gone: dict[StreamId, dict[int, Reason]] = {}
        for drop in drops:
            if drop.reason is Reason.HOPELESS:
                self._lost = True
                self._lossy_until_ns = now_ns + LOSSY_NS
            gone.setdefault(drop.stream, {}).update(dict.fromkeys(drop.positions, drop.reason))
        for stream, reasons in gone.items():
            s = self._streams[stream]
            for i, frame in enumerate(s.queue):
                if i in reasons:
                    self._drop(s, frame, reasons[i])
            s.queue = deque(frame for i, frame in enumerate(s.queue) if i not in reasons)
            s.view = None
            self._forget_if_over(s)

    def _enter(self, choice: Choice, frames: list[_Frame], now_ns: int) -> Part:
        """Moves frames from the queue into the device, and returns the stream's part of the tick."""
        s = self._streams[choice.stream]
        s.view = None
        if s.rows.steps != s.steps:
            self._report(StepChange(s.id, now_ns, s.rows.steps, s.steps))
            s.rows = s.rows.with_steps(s.steps)
        s.rows, leaving = s.rows.enter(frames or None, whole=choice.first).leave()
        s.leaving.extend(leaving)
        fill = 0
        if frames:
            fill = s.need - len(frames)
            entered = {frame.number for frame in frames}
            s.queue = deque(frame for frame in s.queue if frame.number not in entered)
            for frame in frames:
                frame.started_ns = now_ns
            s.started = True
            s.served_ns = now_ns
        return Part(s.id, tuple(frame.number for frame in frames), fill, s.steps, choice.first)

    def _finish(self, s: _Stream, frames: Sequence[_Frame], steps: int, now_ns: int) -> None:
        """Gives the frames of a finished chunk the times at which they are shown.

        Of those that are late already only the newest is shown: the others would hold it up.
        """
        nominal = overload.nominal_ns(s.settings, self.model.costs)
        s.playout = pacing.chunk_finished(s.playout, nominal, frames[0].media_ns, now_ns, s.budget_ns)
        late = sum(frame.deadline_ns < now_ns for frame in frames)  # the oldest are
        for i, frame in enumerate(frames):
            frame.done_ns, frame.steps = now_ns, steps
            if i < late - 1:
                self._drop(s, frame, Reason.HOPELESS)
                continue
            s.playout, due = pacing.show_time(
                s.playout, frame.media_ns, now_ns, frame.deadline_ns, s.interval_ns, self.config.guard_ns
            )
            s.finished[frame.number] = frame
            heapq.heappush(self._due, (due, s.id, frame.number))

    def _drop(self, s: _Stream, frame: _Frame, reason: Reason) -> None:
        self._record(s, frame, Fate.DROPPED, reason=reason)

    def _record(
        self,
        s: _Stream,
        frame: _Frame,
        fate: Fate,
        shown_ns: int | None = None,
        reason: Reason | None = None,
    ) -> None:
        self._report(
            FrameRecord(
                stream=s.id,
                number=frame.number,
                timestamp_ns=frame.timestamp_ns,
                arrival_ns=frame.arrival_ns,
                deadline_ns=frame.deadline_ns,
                fate=fate,
                started_ns=frame.started_ns,
                done_ns=frame.done_ns,
                shown_ns=shown_ns,
                steps=frame.steps,
                reason=reason,
            )
        )

    def _forget_if_over(self, s: _Stream) -> None:
        if s.over:
            self._streams.pop(s.id, None)
            self._controlled_ns = None
