"""How the live loop is configured, and what it does about a device that hangs."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

HANG_EXIT_CODE = 3


@dataclass(frozen=True)
class LoopConfig:
    """How the loop behaves around the policy.

    Attributes:
      hang_s: a call of the device that takes longer than this, and than `hang_factor` times what was predicted, hangs.
      hang_factor: see `hang_s`.
      sink_frames: due frames that may wait for a stream's sink; for more, see `WhenSlow`.
      waiting_events: events that may wait for the observers; beyond, they are lost to them (and counted).
      failed_ticks: so many ticks that fail one after another end the loop, not only their streams.
      stop_s: how long `stop` waits for the threads.
    """

    hang_s: float = 10.0
    hang_factor: float = 20.0
    sink_frames: int = 48
    waiting_events: int = 100_000
    failed_ticks: int = 3
    stop_s: float = 10.0


@dataclass(frozen=True)
class HangReport:
    """A call of the device that does not come back.

    Attributes:
      what: "tick 17 (stream 0, 2)", or another call.
      seconds: since it began.
      limit_s: what it was allowed.
    """

    what: str
    seconds: float
    limit_s: float

    def __str__(self) -> str:
        return f"the device hangs: {self.what} takes {self.seconds:.1f} s already, allowed are {self.limit_s:.1f} s"


def exit_on_hang(report: HangReport) -> None:
    """Says so on stderr and ends the process with code 3: nothing can interrupt a call of the device."""
    sys.stderr.write(f"error: {report}; giving up\n")
    sys.stderr.flush()
    os._exit(HANG_EXIT_CODE)
