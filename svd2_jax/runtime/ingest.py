"""Takes or refuses input frames by their timestamps, and says when each was taken: arithmetic without a clock.

Sources differ: a camera stamps its frames by its own clock, a file by its position, some not at all; networks
repeat, swap and delay frames. The *media time* of a frame is when it was taken, in our clock: its timestamp plus
the source clock's offset, the smallest distance from timestamp to arrival that was seen, slowly forgotten. A frame
without a timestamp has its arrival, smoothed to the source's rate. Media time is never behind the arrival.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from svd2_jax.runtime.types import SECOND, Reason

FORGETTING = (
    0.002  # of the offset: 2 ms a second, more than clocks drift apart and less than a network's moods
)
SMOOTHING = 1 / 16  # of the mean distance between frames, and of media times without timestamps
REMEMBERED = 32  # timestamps, to tell a repeated frame from a late one
PATIENCE_NS = SECOND  # when all frames were refused for so long, the source's clock was set: begin again


@dataclass(frozen=True)
class SourceClock:
    """What is known about a source's clock. Begin with `SourceClock(gap_ns=...)`.

    Attributes:
      gap_ns: mean time between frames, by media time.
      media_ns: of the newest frame taken; None before the first.
      arrival_ns: of the newest frame taken.
      offset_ns: from timestamps to our clock.
      timestamps: the newest ones taken, oldest first.
      refused_ns: when the first frame of an unbroken row of refused ones came; None if the last one was taken.
    """

    gap_ns: float
    media_ns: int | None = None
    arrival_ns: int = 0
    offset_ns: int | None = None
    timestamps: tuple[int, ...] = ()
    refused_ns: int | None = None


def take(
    clock: SourceClock, arrival_ns: int, timestamp_ns: int | None, interval_ns: int, budget_ns: int
) -> tuple[SourceClock, int | Reason]:
    """Returns the clock after a frame came, and the frame's media time or why it is refused.

    DUPLICATE: its timestamp is among the last taken. DISORDER: older than the newest taken. STALE: it came more than
    the budget behind its media time. Where nothing was taken for a second, the source must have set its clock: the
    frame is taken, and the clock begins anew from there.

    Args:
      clock: what is known so far.
      arrival_ns: when it came, not before the frame before.
      timestamp_ns: by the source's clock, if it has one.
      interval_ns: time between frames that the source promised.
      budget_ns: longest time from arrival to display.
    """
    if timestamp_ns is None:
        media = _smoothed(clock, arrival_ns, interval_ns)
        return _taken(clock, media, arrival_ns, interval_ns, clock.offset_ns, clock.timestamps), media
    distance = arrival_ns - timestamp_ns
    if clock.offset_ns is None:
        offset = distance
    else:
        elapsed = arrival_ns - clock.arrival_ns
        offset = min(distance, clock.offset_ns + round(FORGETTING * elapsed))
    reason = None
    if timestamp_ns in clock.timestamps:
        reason = Reason.DUPLICATE
    elif clock.timestamps and timestamp_ns < clock.timestamps[-1]:
        reason = Reason.DISORDER
    elif distance - offset > budget_ns:
        reason = Reason.STALE
    if reason is not None:
        refused_ns = arrival_ns if clock.refused_ns is None else clock.refused_ns
        if reason is Reason.DUPLICATE or arrival_ns - refused_ns < PATIENCE_NS:
            return replace(clock, refused_ns=refused_ns), reason
        clock, offset = replace(clock, timestamps=(), media_ns=None), distance
    media = timestamp_ns + offset
    if clock.media_ns is not None:
        media = min(max(media, clock.media_ns), arrival_ns)
    timestamps = (*clock.timestamps[1 - REMEMBERED :], timestamp_ns)
    return _taken(clock, media, arrival_ns, interval_ns, offset, timestamps), media


def _taken(
    clock: SourceClock,
    media_ns: int,
    arrival_ns: int,
    interval_ns: int,
    offset_ns: int | None,
    timestamps: tuple[int, ...],
) -> SourceClock:
    gap = clock.gap_ns
    if clock.media_ns is not None:
        # A pause is not a rate: it counts as a few frames left out.
        gap += SMOOTHING * (min(media_ns - clock.media_ns, 4 * interval_ns) - gap)
    return SourceClock(gap, media_ns, arrival_ns, offset_ns, timestamps)


def _smoothed(clock: SourceClock, arrival_ns: int, interval_ns: int) -> int:
    """Media time of a frame without a timestamp: an interval after the last one, drawn slowly to its arrival."""
    if clock.media_ns is None:
        return arrival_ns
    expected = clock.media_ns + interval_ns
    if arrival_ns - expected > 4 * interval_ns:  # the source paused
        return arrival_ns
    return max(clock.media_ns, min(arrival_ns, expected + round(SMOOTHING * (arrival_ns - expected))))
