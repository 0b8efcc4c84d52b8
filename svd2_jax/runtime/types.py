"""Words that the scheduler shares with whoever drives it: streams, ticks and what became of each frame.

Times are integer nanoseconds of one monotonic clock. Frames of a stream are numbered from 0 as they arrive.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from svd2_jax.config import check_whole, is_number
from svd2_jax.errors import ConfigError

StreamId: TypeAlias = int

MS = 1_000_000
SECOND = 1_000_000_000
NEVER_NS = 1 << 62  # later than any deadline, longer than any call


@dataclass(frozen=True)
class StreamSettings:
    """What one live stream asks of the scheduler.

    Attributes:
      rate_hz: frames per second that the source promises, above 0.
      budget_ms: longest time from a frame's arrival until it is shown.
      steps: denoising steps when there is time enough.
      min_steps: steps that overload may bring it down to, 1 to `steps`.
      first_frames: frames of the first group.
      chunk_frames: frames of every later chunk.
      stages: devices of its pipeline; a chunk is finished by the (steps * stages)-th tick that the stream takes
        part in, counting the one that it enters with.
      batch_key: streams whose shapes are equal may share a tick.
    """

    rate_hz: float
    budget_ms: float
    steps: int = 2
    min_steps: int = 1
    first_frames: int = 5
    chunk_frames: int = 4
    stages: int = 1
    batch_key: Hashable = None

    def __post_init__(self):
        for name in ("rate_hz", "budget_ms"):
            value = getattr(self, name)
            if not (is_number(value) and math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be a number above 0, got {value!r}")
        for name in ("steps", "min_steps", "first_frames", "chunk_frames", "stages"):
            check_whole(name, getattr(self, name), 1)
        if self.min_steps > self.steps:
            raise ConfigError(f"min_steps must be 1 to steps={self.steps}, got {self.min_steps}")

    @property
    def interval_ns(self) -> int:
        """Time between two frames."""
        return round(SECOND / self.rate_hz)

    @property
    def budget_ns(self) -> int:
        return round(self.budget_ms * MS)


@dataclass(frozen=True)
class TickEntry:
    """One stream's part of a tick.

    Attributes:
      stream: whose.
      frames: numbers of the input frames that enter, in order; empty: nothing enters, and what is under way is
        pushed on.
      fill: how often the last of them is repeated to make a whole chunk; what comes out for these is not shown.
      steps: denoising steps of the stream from this tick on.
      first: whether the frames are the stream's first group. Such an entry has its tick for itself, in which all
        steps are taken one after another, and its frames are finished with it.
    """

    stream: StreamId
    frames: tuple[int, ...]
    fill: int = 0
    steps: int = 1
    first: bool = False


@dataclass(frozen=True)
class Tick:
    """What the device is to do next. All entries have the same batch key and the same number of steps.

    Attributes:
      number: counts ticks from 0.
      entries: at least one, each of another stream.
      predicted_ns: how long it is expected to take, from when it is handed over until its frames are finished.
      lone: whether no stage has chunks in several rows of a stream, so that one row of each is computed.
    """

    number: int
    entries: tuple[TickEntry, ...]
    predicted_ns: int
    lone: bool = False

    @property
    def steps(self) -> int:
        return self.entries[0].steps

    @property
    def first(self) -> bool:
        return self.entries[0].first


@dataclass(frozen=True)
class Wait:
    """Nothing to do before `until_ns`, or, where that is None, before something else happens."""

    until_ns: int | None = None


class Fate(Enum):
    """What became of an input frame."""

    SHOWN = "shown"  # by its deadline
    LATE = "late"  # shown, but behind its deadline
    DROPPED = "dropped"


def shown_fate(shown_ns: int, deadline_ns: int) -> Fate:
    """Returns what a frame that is shown at a time is: in time, or late."""
    return Fate.SHOWN if shown_ns <= deadline_ns else Fate.LATE


class Reason(Enum):
    """Why a frame was dropped."""

    OVERLOAD = "overload"  # the device is too slow for all frames; newer ones were kept
    EXPIRED = "expired"  # it could not have been shown in time
    DUPLICATE = "duplicate"  # its timestamp was there already
    DISORDER = "disorder"  # its timestamp is older than one that was taken
    STALE = "stale"  # it came longer behind its timestamp than the budget
    CLOSED = "closed"  # its stream was closed or failed first
    SINK = "sink"  # it was finished in time, and its sink was too slow to take it


@dataclass(frozen=True)
class FrameRecord:
    """The life of one input frame.

    Attributes:
      stream: whose.
      number: from 0 in order of arrival.
      timestamp_ns: by the source's clock; None where it gave none.
      arrival_ns: when it came.
      deadline_ns: when it was to be shown at the latest: arrival plus budget.
      started_ns: start of the tick that it entered with.
      done_ns: when the device was through with it.
      shown_ns: when it was handed to the viewer.
      steps: denoising steps that its chunk took.
      fate: what became of it.
      reason: why it was dropped.
      media_ns: when it was made, by our clock, see ingest.py; 0 where that was not asked.
    """

    stream: StreamId
    number: int
    timestamp_ns: int | None
    arrival_ns: int
    deadline_ns: int
    fate: Fate
    started_ns: int | None = None
    done_ns: int | None = None
    shown_ns: int | None = None
    steps: int | None = None
    reason: Reason | None = None
    media_ns: int = 0

    @property
    def at_ns(self) -> int:
        """When its fate was known."""
        return self.shown_ns or self.done_ns or self.arrival_ns


@dataclass(frozen=True)
class TickRecord:
    """What one tick was and how long it took.

    Attributes:
      tick: what was done.
      started_ns: when it was handed to the device, where the tick before it may not be through yet.
      done_ns: when its frames were finished.
      queued: input frames that waited, over all streams, when it started.
    """

    tick: Tick
    started_ns: int
    done_ns: int
    queued: int

    @property
    def at_ns(self) -> int:
        """When it was over."""
        return self.done_ns


@dataclass(frozen=True)
class StepChange:
    """A stream was given another number of denoising steps."""

    stream: StreamId
    at_ns: int
    before: int
    after: int


@dataclass(frozen=True)
class PromptRecord:
    """A stream was given another prompt.

    Attributes:
      stream: whose.
      at_ns: when.
      prompt: the new one.
      frame: number of the first input frame that it holds for.
    """

    stream: StreamId
    at_ns: int
    prompt: str
    frame: int


Event: TypeAlias = FrameRecord | TickRecord | StepChange | PromptRecord
"""What a scheduler and the live loop around it report, once each, in order of time."""
