"""Where the live loop's time comes from."""

from __future__ import annotations

import threading
import time
from typing import Protocol

from svd2_jax.runtime.types import SECOND


class Clock(Protocol):
    """Where time comes from. A test's clock goes on when it is told to."""

    def now_ns(self) -> int:
        """Returns the time; it never goes back."""
        ...

    def wait(self, condition: threading.Condition, until_ns: int | None) -> None:
        """Waits, with the condition held, until it is notified or the time has come; may return earlier."""
        ...


class MonotonicClock:
    """The time since the machine started."""

    def now_ns(self) -> int:
        """Returns the time."""
        return time.monotonic_ns()

    def wait(self, condition: threading.Condition, until_ns: int | None) -> None:
        """Waits until the condition is notified or the time has come."""
        condition.wait(None if until_ns is None else max(0, until_ns - self.now_ns()) / SECOND)
