"""Observers of events, called in a thread of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from svd2_jax.runtime.clock import Clock
from svd2_jax.runtime.mailbox import Mailbox, Message, Worker
from svd2_jax.runtime.types import Event


class Observers:
    """Hands events to observers, so that a slow one stalls nobody else.

    Attributes:
      thread: calls them, one after another.
      errors: what observers raised; one that did is given nothing more.
      lost: events that were not handed over, as too many waited.
    """

    def __init__(
        self,
        observers: Sequence[Callable[[Event], None]],
        limit: int,
        inbox: Mailbox[Message],
        clock: Clock,
    ):
        """Creates the thread; `limit` is how many events may wait."""
        self.thread = Worker("report", inbox, clock)
        self.errors: list[BaseException] = []
        self.lost = 0
        self._observers, self._limit = list(observers), limit

    def __call__(self, event: Event) -> None:
        """Hands over an event; does not wait."""
        if self._observers and not self.thread.jobs.put(functools.partial(self._call, event), self._limit):
            self.lost += 1

    def _call(self, event: Event) -> None:
        for observer in tuple(self._observers):
            try:
                observer(event)
            except Exception as e:
                self._observers.remove(observer)
                self.errors.append(e)
