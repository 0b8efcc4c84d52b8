"""What drives a policy: the body of the live loop and of the simulation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from svd2_jax.runtime.latency import LatencySample
from svd2_jax.runtime.mailbox import Message
from svd2_jax.runtime.work import Show, StreamId, StreamSettings, Tick, Wait


class Policy(Protocol):
    """What decides: `runtime.scheduler.Scheduler`, or a baseline of the simulation."""

    def warm_up(self, sample: LatencySample) -> None:
        """Learns from a device time measured before the streams open."""
        ...

    def open(self, settings: StreamSettings, now_ns: int) -> StreamId:
        """Admits a stream; raises SessionError to refuse it."""
        ...

    def arrive(self, stream: StreamId, now_ns: int, timestamp_ns: int | None = None) -> int:
        """Takes a frame; returns its number."""
        ...

    def end(self, stream: StreamId, now_ns: int) -> None:
        """Notes that no more frames come."""
        ...

    def close(self, stream: StreamId, now_ns: int) -> None:
        """Drops a stream with all that is not shown."""
        ...

    def next(self, now_ns: int) -> Tick | Wait:
        """Returns what the device does next; a Wait while it is not free."""
        ...

    def free(self, now_ns: int) -> None:
        """Notes that the stages are through with the running tick: another one may start."""
        ...

    def done(self, finished: Mapping[StreamId, int], now_ns: int) -> None:
        """Notes that the oldest tick in flight is finished, and how many chunks it finished."""
        ...

    def shows(self, now_ns: int) -> tuple[list[Show], int | None]:
        """Returns the frames to show now, and when to ask again."""
        ...

    def is_over(self, stream: StreamId) -> bool:
        """Returns whether nothing of a stream is left."""
        ...


class Inbox(Protocol):
    """Where messages come from: a `Mailbox` that threads put into, or a heap of simulated events."""

    def take(self, until_ns: int | None = None) -> Sequence[Message] | None:
        """Waits for messages, at most until a time, and returns all of them; None at the end."""
        ...


class Driver:
    """Handles messages in order of time; after each batch of them, starts what can start and shows what is due.

    It has no thread and no clock of its own: live, messages come from threads; in a simulation, from a heap of events.
    """

    def __init__(
        self,
        policy: Policy,
        inbox: Inbox,
        now_ns: Callable[[], int],
        start: Callable[[Tick], None],
        show: Callable[[list[Show]], None],
        check: Callable[[], int | None] = lambda: None,
    ):
        """Creates a driver.

        Args:
          policy: decides.
          inbox: where messages come from.
          now_ns: the clock.
          start: hands a tick to the device. When its stages are through, `policy.free` is called, and when its
            frames are finished, `policy.done`.
          show: is given the frames that are due.
          check: is called after each step; returns when it wants the next one, if nothing happens before.
        """
        self.now_ns = 0  # the time of the messages at hand; never goes back
        self._policy, self._inbox, self._clock_ns = policy, inbox, now_ns
        self._start, self._show, self._check = start, show, check

    def run(self) -> None:
        """Runs until the inbox has ended."""
        wake_ns = None
        while (messages := self._inbox.take(wake_ns)) is not None:
            self.now_ns = max(self.now_ns, self._clock_ns())
            for message in messages:
                message()
            messages = message = None  # nothing is held while this waits
            wake_ns = self._step()

    def _step(self) -> int | None:
        """Starts what can start and shows what is due; returns when to come again."""
        wakes: list[int | None] = []
        decision = self._policy.next(self.now_ns)
        if isinstance(decision, Tick):
            self._start(decision)
        else:
            wakes.append(decision.until_ns)
        shows, again_ns = self._policy.shows(self.now_ns)
        self._show(shows)
        wakes += [again_ns, self._check()]
        return min((wake for wake in wakes if wake is not None), default=None)
