"""What passes between threads: mailboxes, and workers that run calls which take long."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeAlias, TypeVar

from svd2_jax.runtime.clock import Clock

T = TypeVar("T")

Message: TypeAlias = Callable[[], object]
"""What a thread is to do next."""


def attempt(function: Callable[[], T], outcome: Future[T] | None = None) -> Future[T]:
    """Calls a function; returns a future, or ends the given one, with what it returned or raised."""
    outcome = outcome or Future()
    try:
        outcome.set_result(function())
    except Exception as e:
        outcome.set_exception(e)
    return outcome


class Mailbox(Generic[T]):
    """Items for one thread, in order. Any thread may put; only the owner takes."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self.is_closed = False

    def put(self, item: T, limit: int | None = None) -> bool:
        """Adds an item; returns False if the box is closed, or holds `limit` items already."""
        with self._changed:
            if self.is_closed or (limit is not None and len(self._items) >= limit):
                return False
            self._items.append(item)
            self._changed.notify()
            return True

    def take(self, until_ns: int | None = None) -> deque[T] | None:
        """Waits for items and returns all of them.

        Returns an empty queue when the time has come, and None when the box is closed and empty.
        """
        with self._changed:
            while not (self._items or self.is_closed):
                if until_ns is not None and self._clock.now_ns() >= until_ns:
                    break
                self._clock.wait(self._changed, until_ns)
            items, self._items = self._items, deque()
            return items if items or not self.is_closed else None

    def close(self) -> None:
        """Accepts nothing more. What is inside is still taken."""
        with self._changed:
            self.is_closed = True
            self._changed.notify()

    def __len__(self) -> int:
        return len(self._items)


class Worker(threading.Thread):
    """A thread that runs one call after another, and gives each outcome back to the loop's thread.

    Everything but `run` is for the loop's thread.

    Attributes:
      calls: that have not come back, the oldest first: what each one is, and how long it is expected to take.
      since_ns: when the oldest one's turn came.
      jobs: what the thread runs; closing them ends it.
    """

    def __init__(self, name: str, inbox: Mailbox[Message], clock: Clock):
        """Creates the thread; `inbox` is the loop's."""
        super().__init__(name=f"svd2-{name}", daemon=True)
        self.calls: deque[tuple[str, int]] = deque()
        self.since_ns = 0
        self._inbox, self._clock = inbox, clock
        self.jobs: Mailbox[Message] = Mailbox(clock)

    def do(
        self,
        function: Callable[[], T],
        then: Callable[[Future[T]], object] = lambda _: None,
        what: str = "",
        expected_ns: int = 0,
    ) -> Future[T]:
        """Has a function called in the thread, and then `then` in the loop's.

        Returns:
          What comes of it, for another worker to wait for. `then` is given the same.
        """
        if not self.calls:
            self.since_ns = self._clock.now_ns()
        self.calls.append((what, expected_ns))
        outcome: Future[T] = Future()
        self.jobs.put(functools.partial(self._do, function, then, outcome))
        return outcome

    def give_up(self) -> None:
        """Ends the thread; what its calls come to is not heard any more."""
        self.calls.clear()
        self.jobs.close()

    def run(self) -> None:
        """The thread's body."""
        while (jobs := self.jobs.take()) is not None:
            while jobs:
                jobs.popleft()()  # nothing of it is held while the thread waits

    def _do(self, function: Callable[[], T], then: Callable[[Future[T]], object], outcome: Future[T]) -> None:
        self._inbox.put(functools.partial(self._back, then, attempt(function, outcome)))

    def _back(self, then: Callable[[Future[Any]], object], outcome: Future[Any]) -> None:
        """Is called in the loop's thread."""
        if self.calls:  # else it was given up
            self.calls.popleft()
            self.since_ns = self._clock.now_ns()
            then(outcome)
