"""What passes between threads: mailboxes, and workers that run calls which take long."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from svd2_jax.runtime.clock import Clock
from svd2_jax.runtime.work import NEVER_NS

T = TypeVar("T")

Message: TypeAlias = Callable[[], object]
"""What the loop's thread is to do next."""


class Mailbox(Generic[T]):
    """Items for one thread, in order. Any thread may put; only the owner takes."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: T, limit: int | None = None) -> bool:
        """Adds an item; returns False if the box is closed, or holds `limit` items already."""
        with self._changed:
            if self._closed or (limit is not None and len(self._items) >= limit):
                return False
            self._items.append(item)
            self._changed.notify()
            return True

    def take(self, until_ns: int | None = None) -> list[T] | None:
        """Waits for items and returns all of them.

        Returns an empty list when the time has come, and None when the box is closed and empty.
        """
        with self._changed:
            self._wait(until_ns)
            items = list(self._items)
            self._items.clear()
            return items or (None if self._closed else [])

    def take_one(self) -> T | None:
        """Waits for an item; returns None when the box is closed and empty."""
        with self._changed:
            self._wait(None)
            return self._items.popleft() if self._items else None

    def close(self, drop: bool = False) -> None:
        """Accepts nothing more. What is inside is still taken, unless it is dropped."""
        with self._changed:
            self._closed = True
            if drop:
                self._items.clear()
            self._changed.notify()

    @property
    def is_closed(self) -> bool:
        """Whether it accepts nothing more."""
        return self._closed

    def __len__(self) -> int:
        return len(self._items)

    def _wait(self, until_ns: int | None) -> None:
        while not (self._items or self._closed):
            if until_ns is not None and self._clock.now_ns() >= until_ns:
                return
            self._clock.wait(self._changed, until_ns)


Then: TypeAlias = Callable[[Any, Exception | None], None]
"""Takes on the loop's thread what a call returned, or what it raised."""


@dataclass(slots=True)
class Call:
    """A call that a worker has not finished.

    Attributes:
      what: for reports.
      limit_ns: longest time it may take.
      started_ns: when its turn came; None while others are before it.
    """

    what: str
    limit_ns: int
    started_ns: int | None = None


class Worker:
    """A thread that runs one call after another, and gives each outcome back to the loop's thread.

    Everything but the thread's own body belongs to the loop's thread.
    """

    def __init__(self, name: str, inbox: Mailbox[Message], clock: Clock):
        """Starts the thread."""
        self._inbox, self._clock = inbox, clock
        self._jobs: Mailbox[tuple[Callable[[], Any], Then]] = Mailbox(clock)
        self._calls: deque[Call] = deque()  # oldest first
        self.thread = threading.Thread(target=self._run, name=f"svd2-{name}", daemon=True)
        self.thread.start()

    def do(self, function: Callable[[], Any], then: Then, what: str = "", limit_ns: int = NEVER_NS) -> None:
        """Has a function called in the thread, and then `then` in the loop's."""
        self._calls.append(Call(what, limit_ns))
        self._begin_next()
        self._jobs.put((function, then))

    def close(self, drop: bool = False) -> None:
        """Ends the thread after the calls that wait, or without them."""
        self._jobs.close(drop)

    @property
    def current(self) -> tuple[Call, int] | None:
        """The call whose turn it is, and when it will have taken too long; None: there is none."""
        if not self._calls:
            return None
        call = self._calls[0]
        return call, (call.started_ns or 0) + call.limit_ns

    def _begin_next(self) -> None:
        if self._calls and self._calls[0].started_ns is None:
            self._calls[0].started_ns = self._clock.now_ns()

    def _back(self, then: Then, result: Any, error: Exception | None) -> None:
        self._calls.popleft()
        self._begin_next()
        then(result, error)

    def _run(self) -> None:
        while self._run_one():  # a function, so that nothing is held while the thread waits
            pass

    def _run_one(self) -> bool:
        job = self._jobs.take_one()
        if job is None:
            return False
        function, then = job
        result = error = None
        try:
            result = function()
        except Exception as e:
            error = e
        self._inbox.put(functools.partial(self._back, then, result, error))
        return True
