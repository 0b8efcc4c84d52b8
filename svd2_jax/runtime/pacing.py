"""When finished frames are shown: evenly, at the source's own rhythm, though they finish four at a time.

A frame is shown at its media time (when it was taken, see ingest.py) plus a *playout delay* that the stream keeps.
The delay starts at what the stream needs in normal running. It grows at once when a frame is finished later than
that, and shrinks back over a minute, so that changes in load or steps do not show as jumps.
"""

from __future__ import annotations

from dataclasses import dataclass

from svd2_jax.runtime.work import SECOND

SHRINK_NS = 60 * SECOND  # time in which a delay that is too long loses about two thirds of the excess


@dataclass(frozen=True)
class Playout:
    """How a stream is being shown.

    Attributes:
      delay_ns: from media time to display.
      last_ns: when the newest frame with a time is shown; None before the first.
      changed_ns: when the delay was last looked at.
    """

    delay_ns: int
    last_ns: int | None = None
    changed_ns: int = 0


def chunk_finished(playout: Playout, nominal_ns: int, media_ns: int, done_ns: int, most_ns: int) -> Playout:
    """Returns the playout after a chunk is finished, with the delay it needs.

    Args:
      playout: so far.
      nominal_ns: delay in normal running.
      media_ns: media time of the chunk's first frame.
      done_ns: when the chunk was finished.
      most_ns: longest delay that is of use, the latency budget.
    """
    floor = min(nominal_ns, most_ns)
    excess = playout.delay_ns - floor
    if excess > 0:
        elapsed = min(max(done_ns - playout.changed_ns, 0), SHRINK_NS)
        delay = playout.delay_ns - excess * elapsed // SHRINK_NS
    else:
        delay = floor
    delay = min(max(delay, done_ns - media_ns), most_ns)
    return Playout(delay, playout.last_ns, done_ns)


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
    return Playout(playout.delay_ns, due, playout.changed_ns), due
