"""When finished frames are shown: evenly, at the source's own rhythm, though they finish four at a time.

A frame is shown at its media time (when it was taken, see ingest.py) plus the stream's *playout delay*. That is what
its last chunks needed, but for the slowest two of 32, and at least what it needs on a free device. It grows at once.
It shrinks by showing frames 5 % faster, which nobody sees.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

WINDOW = 32  # chunks that the playout delay is chosen from
LEFT_OUT = 2  # of a full window: one slow tick can delay two chunks; that is no reason to delay all
CATCH_UP = 20  # a delay that is too long loses a 20th of the time that passes


@dataclass(frozen=True)
class Playout:
    """How a stream is being shown.

    Attributes:
      delay_ns: from media time to display.
      last_ns: when the newest frame with a time is shown; None before the first.
      changed_ns: when the delay was last looked at.
      needed_ns: delays that the last chunks needed, the newest last.
    """

    delay_ns: int
    last_ns: int | None = None
    changed_ns: int = 0
    needed_ns: tuple[int, ...] = ()


def chunk_finished(playout: Playout, nominal_ns: int, media_ns: int, done_ns: int, most_ns: int) -> Playout:
    """Returns the playout after a chunk is finished.

    Args:
      playout: so far.
      nominal_ns: delay on a free device.
      media_ns: media time of the chunk's first frame.
      done_ns: when the chunk was finished.
      most_ns: longest delay that is of use, the latency budget.
    """
    needed = (*playout.needed_ns[1 - WINDOW :], done_ns - media_ns)
    enough = sorted(needed)[-1 - len(needed) * LEFT_OUT // WINDOW]
    shrunk = playout.delay_ns - max(done_ns - playout.changed_ns, 0) // CATCH_UP
    delay = min(max(enough, nominal_ns, shrunk), most_ns)
    if playout.last_ns is None:  # the first group takes all its steps at once, and says nothing of the others
        needed = ()
    return Playout(delay, playout.last_ns, done_ns, needed)


def show_time(
    playout: Playout, media_ns: int, done_ns: int, deadline_ns: int, interval_ns: int, guard_ns: int
) -> tuple[Playout, int]:
    """Returns the playout with one frame more, and when that frame is shown.

    At media time plus delay, but at least half an interval after the frame before, so that a chunk that comes late
    does not come at once; not after its deadline less `guard_ns`, and never before it is finished or before the
    frame before it.
    """
    due = media_ns + playout.delay_ns
    earliest = done_ns
    if playout.last_ns is not None:
        due = max(due, playout.last_ns + interval_ns // 2)
        earliest = max(earliest, playout.last_ns)
    due = max(min(due, deadline_ns - guard_ns), earliest)
    return replace(playout, last_ns=due), due
