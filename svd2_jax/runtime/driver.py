"""What drives a policy: the body of the live loop and of the simulation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Protocol

from svd2_jax.runtime.mailbox import Message
from svd2_jax.runtime.types import Tick, Wait


class Policy(Protocol):
    """What decides: `runtime.scheduler.Scheduler`, or a baseline of the simulation."""

    def next(self, now_ns: int) -> Tick | Wait:
        """Returns what the device does next; a Wait while it is not free."""
        ...

    def show(self, now_ns: int) -> int | None:
        """Reports the frames that are shown now; returns when to ask again."""
        ...


class Inbox(Protocol):
    """Where messages come from: a `Mailbox` that threads put into, or a heap of simulated events."""

    def take(self, until_ns: int | None = None) -> Iterable[Message] | None:
        """Waits for messages, at most until a time, and returns all of them; None at the end."""
        ...


class Driver(ABC):
    """Handles messages in order of time; after each batch of them, starts what can start and shows what is due.

    It has no thread and no clock of its own: live, messages come from threads; in a simulation, from a heap of events.
    A subclass says what starting a tick is.

    Attributes:
      now_ns: the time of the messages at hand; never goes back.
    """

    def __init__(self, policy: Policy, inbox: Inbox, clock_ns: Callable[[], int]):
        """Takes what decides, where messages come from, and what time it is."""
        self.now_ns = 0
        self._policy, self._inbox, self._clock_ns = policy, inbox, clock_ns

    def _drive(self) -> None:
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
        decision = self._policy.next(self.now_ns)
        if isinstance(decision, Tick):
            self._start(decision)
        again_ns = self._policy.show(self.now_ns)
        until_ns = decision.until_ns if isinstance(decision, Wait) else None
        wakes = (until_ns, again_ns, self._after_step())
        return min((wake for wake in wakes if wake is not None), default=None)

    @abstractmethod
    def _start(self, tick: Tick) -> None:
        """Hands a tick to the device, to call `free` when its stages are through, and `done` with its frames."""

    def _after_step(self) -> int | None:
        """Is called after each step; returns when it wants the next one, if nothing happens before."""
        return None
