"""Runs a policy on a trace: the live loop's body, with a heap of events instead of threads and a clock."""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from svd2_jax.errors import SessionError
from svd2_jax.runtime.driver import Driver
from svd2_jax.runtime.latency import LatencySample
from svd2_jax.runtime.mailbox import Message
from svd2_jax.runtime.scheduler import Scheduler
from svd2_jax.runtime.types import (
    MS,
    SECOND,
    Event,
    Fate,
    FrameRecord,
    StepChange,
    StreamId,
    StreamSettings,
    Tick,
    TickRecord,
)
from svd2_jax.simulate.baselines import Fifo
from svd2_jax.simulate.device import SimulatedDevice
from svd2_jax.simulate.trace import FrameArrival, StreamTrace, Trace, earliest_ns, merged

WARM_UP_TICKS = 5  # of each kind, measured before the streams open
MOST_CALLS_AT_ONCE = 10_000  # at one moment; more is a policy that never waits


class PolicyFault(AssertionError):
    """A policy did what no device could run or no viewer could see."""


MakePolicy = Callable[[Sequence[int], Callable[[Event], None]], Scheduler | Fifo]
"""Takes the device's batch sizes and where to report; returns a policy."""


@dataclass
class SimulationResult:
    """All that a policy reported of a trace.

    Attributes:
      trace: what was run.
      policy: by which policy.
      events: in order.
      refused: why each source that was not admitted was not, by its index.
      streams: the source of each stream that was admitted.
      ended_s: when the last frame was accounted for.
      busy_s: how long the device ran.
    """

    trace: Trace
    policy: str
    events: list[Event] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)
    streams: dict[StreamId, StreamTrace] = field(default_factory=dict)
    ended_s: float = 0.0
    busy_s: float = 0.0

    @property
    def admitted(self) -> Trace:
        """The trace without the sources that were not admitted; all of it where none was."""
        sources = tuple(s for i, s in enumerate(self.trace.sources) if i not in self.refused)
        return dataclasses.replace(self.trace, streams=sources) if sources else self.trace

    @property
    def frames(self) -> list[FrameRecord]:
        """What became of each frame."""
        return [e for e in self.events if isinstance(e, FrameRecord)]

    def is_possible(self, frame: FrameRecord) -> bool:
        """Returns whether any policy could have shown a frame in time, see `earliest_ns`."""
        source = self.streams[frame.stream]
        return earliest_ns(self.trace.device, source, frame.arrival_ns) <= frame.deadline_ns

    @property
    def ticks(self) -> list[TickRecord]:
        """What the device did."""
        return [e for e in self.events if isinstance(e, TickRecord)]

    @property
    def changes(self) -> list[StepChange]:
        """Changes of steps."""
        return [e for e in self.events if isinstance(e, StepChange)]


class VirtualInbox:
    """Messages in order of their times; the time goes on from one to the next."""

    def __init__(self, inputs: Iterator[tuple[int, Message]], progress: Callable[[float], None]):
        """Takes what comes from outside, in order of time, and who is told the second that was reached."""
        self.now_ns = 0
        self._inputs, self._upcoming = inputs, next(inputs, None)
        self._events: list[
            tuple[int, int, Message]
        ] = []  # a heap; at one moment, what was put first goes first
        self._put = self._calls = 0
        self._progress = progress

    def at(self, time_ns: int, message: Message) -> None:
        """Puts a message that comes at a time; at the same time as an input, before it."""
        self._put += 1
        heapq.heappush(self._events, (time_ns, self._put, message))

    def take(self, until_ns: int | None = None) -> list[Message] | None:
        """Goes on to the next time at which something happens, at most to `until_ns`, and returns its messages.

        Raises:
          PolicyFault: the time does not go on any more.
        """
        times = (self._upcoming and self._upcoming[0], self._events[0][0] if self._events else None, until_ns)
        at_ns = min((t for t in times if t is not None), default=None)
        if at_ns is None:
            return None
        self._calls = self._calls + 1 if at_ns <= self.now_ns else 0
        if self._calls > MOST_CALLS_AT_ONCE:
            raise PolicyFault(f"at {self.now_ns / SECOND:.3f} s the policy wants to be asked again and again")
        self.now_ns = max(self.now_ns, at_ns)
        self._progress(self.now_ns / SECOND)
        messages = []
        while self._events and self._events[0][0] <= self.now_ns:
            messages.append(heapq.heappop(self._events)[2])
        while self._upcoming is not None and self._upcoming[0] <= self.now_ns:
            messages.append(self._upcoming[1])
            self._upcoming = next(self._inputs, None)
        return messages


@dataclass
class _Stream:
    """What the simulator knows of a stream, to check the policy's word against.

    Attributes:
      settings: as opened.
      arrived: frames so far.
      entered: the highest frame that entered a tick.
      finished: frames that the device is through with and that were not shown.
      shown: the highest frame shown.
      reported: frames accounted for.
      begun: whether the first group is through.
      gone: closed.
    """

    settings: StreamSettings
    arrived: int = 0
    entered: int = -1
    finished: set[int] = field(default_factory=set)
    shown: int = -1
    reported: set[int] = field(default_factory=set)
    begun: bool = False
    gone: bool = False


def simulate(
    trace: Trace,
    name: str,
    make_policy: MakePolicy,
    progress: Callable[[float], None] = lambda _: None,
) -> SimulationResult:
    """Runs a trace to its end and returns all that the policy reported.

    Args:
      trace: what happens.
      name: of the policy, for the outcome.
      make_policy: makes it.
      progress: is given the second that was reached.

    Raises:
      PolicyFault: the policy broke a rule: it asked for a tick that cannot be, showed what was not there, or lost a
        frame.
    """
    return _Run(trace, name, make_policy, progress).run()


class _Run(Driver):
    def __init__(self, trace: Trace, name: str, make_policy: MakePolicy, progress: Callable[[float], None]):
        self.trace, self.outcome = trace, SimulationResult(trace, name)
        self.device = SimulatedDevice(trace.device, trace.seed)
        self.policy = make_policy(trace.device.batch_sizes, self._report)
        # A policy that may give a stream that runs already a first group again; its rows are lost then.
        self.restarts = getattr(self.policy, "restarts", False)
        self.streams: dict[StreamId, _Stream] = {}
        self.ids: dict[int, StreamId] = {}  # by source; a refused one has none
        self.ticks = 0
        self.events = VirtualInbox(self._inputs(), progress)
        super().__init__(self.policy, self.events, lambda: self.events.now_ns)

    def run(self) -> SimulationResult:
        """Plays all events in order of time."""
        self._warm_up()
        self._drive()
        self._check_end()
        self.outcome.ended_s = self.events.now_ns / SECOND
        self.outcome.busy_s = self.device.busy_ns / SECOND
        return self.outcome

    def _inputs(self) -> Iterator[tuple[int, Message]]:
        for at_ns, *what in merged(self.trace):
            yield at_ns, functools.partial(self._input, *what)

    def _warm_up(self) -> None:
        sizes, tail_ns = self.trace.device.batch_sizes, round(self.trace.device.tail_ms * MS)
        kinds = {(s.batch_key, s.stages, s.first_frames, s.chunk_frames): s for s in self.trace.sources}
        for source in kinds.values():
            settings = source.settings()
            steps = range(1, max(s.steps for s in self.trace.sources) + 1)
            cells = [(1, s, True, False) for s in steps]
            cells += [
                (b, s, False, lone)
                for lone in (False, True)
                for b in sizes
                for s in steps
                if s > 1 or not lone
            ]
            for batch, count, first, lone in cells:
                for _ in range(WARM_UP_TICKS):
                    took_ns = round(self.device.sample_ms(settings, batch, count, first, lone) * MS)
                    sample = LatencySample(settings.batch_key, batch, count, took_ns, first, tail_ns, lone)
                    self.policy.warm_up(sample)

    def _input(self, rank: int, source: int, arrival: FrameArrival | None) -> None:
        now_ns = self.now_ns
        if rank == 0:
            settings = self.trace.sources[source].settings()
            try:
                stream = self.policy.open(settings, now_ns)
            except SessionError as e:
                self.outcome.refused[source] = str(e)
                return
            self.ids[source] = stream
            self.outcome.streams[stream] = self.trace.sources[source]
            self.streams[stream] = _Stream(settings)
            self.device.open(stream, settings)
        elif source in self.ids:
            stream = self.ids[source]
            if arrival is not None:
                number = self.policy.arrive(stream, now_ns, arrival.timestamp_ns)
                self._require(number == self.streams[stream].arrived, f"frame numbered {number}")
                self.streams[stream].arrived += 1
            elif self.trace.sources[source].leaves == "closes":
                self.policy.close(stream, now_ns)
                self.streams[stream].gone = True
            else:
                self.policy.end(stream, now_ns)

    def _start(self, tick: Tick) -> None:
        self._check_tick(tick)
        self.ticks += 1
        free_ns, done_ns = self.device.start(tick, self.now_ns)
        self.events.at(free_ns, self._free)
        self.events.at(done_ns, self._done)

    def _free(self) -> None:
        self.device.pass_on()
        self.policy.free(self.now_ns)

    def _done(self) -> None:
        finished = self.device.finish()
        for stream, chunks in finished.items():
            if not self.streams[stream].gone:
                self.streams[stream].finished.update(n for chunk in chunks for n in chunk)
        self.policy.done({stream: len(chunks) for stream, chunks in finished.items()}, self.now_ns)

    def _report(self, event: Event) -> None:
        self.outcome.events.append(event)
        if isinstance(event, FrameRecord):
            stream = self.streams[event.stream]
            self._require(event.number not in stream.reported, f"reports frame {event.number} twice")
            stream.reported.add(event.number)
            if event.fate is not Fate.DROPPED:
                number = event.number
                self._require(number in stream.finished, f"shows frame {number}, which is not finished")
                self._require(number > stream.shown, f"shows frame {number} behind {stream.shown}")
                stream.finished.remove(number)
                stream.shown = number

    def _check_tick(self, tick: Tick) -> None:
        sizes, entries = self.trace.device.batch_sizes, tick.entries
        self._require(tick.number == self.ticks, f"tick numbered {tick.number}, not {self.ticks}")
        self._require(len(entries) in sizes, f"{len(entries)} streams in a tick; the device takes {sizes}")
        self._require(len({p.stream for p in entries}) == len(entries), "a stream twice in a tick")
        self._require(len({p.steps for p in entries}) == 1, "different steps in a tick")
        self._require(
            len({self.streams[p.stream].settings.batch_key for p in entries}) == 1, "different shapes"
        )
        for entry in entries:
            stream, settings = self.streams[entry.stream], self.streams[entry.stream].settings
            self._require(not stream.gone, "a closed stream in a tick")
            self._require(settings.min_steps <= entry.steps <= settings.steps, f"{entry.steps} steps")
            frames = entry.frames
            ordered = all(a < b for a, b in itertools.pairwise((stream.entered, *frames)))
            self._require(ordered and all(n < stream.arrived for n in frames), f"takes frames {frames}")
            self._require(not any(n in stream.reported for n in frames), "takes frames that it dropped")
            if entry.first:
                self._require(len(entries) == 1 and bool(frames), "a first group that shares its tick")
                self._require(self.restarts or not stream.begun, "a second first group")
                self.device.drop_rows(entry.stream)
            else:
                self._require(stream.begun, "a chunk before the first group")
                self._require(
                    bool(frames or self.device.under_way(entry.stream)), "an entry that does nothing"
                )
            whole = settings.chunk_frames if stream.begun else settings.first_frames
            self._require(
                not frames or len(frames) + entry.fill == whole, f"a chunk of {frames}+{entry.fill}"
            )
            stream.begun = True
            stream.entered = max(stream.entered, *frames) if frames else stream.entered

    def _check_end(self) -> None:
        for stream, state in self.streams.items():
            missing = sorted(set(range(state.arrived)) - state.reported)
            self._require(not missing, f"never reports frames {missing[:5]} of stream {stream}")
            self._require(self.policy.is_over(stream), f"stream {stream} is never over")

    def _require(self, true: bool, fault: str) -> None:
        if not true:
            raise PolicyFault(f"{self.outcome.policy}, tick {self.ticks}: {fault}")
