"""What came of a simulated run, as numbers, as goals reached or missed, and as a table."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from svd2_jax.runtime.work import MS, SECOND, Fate, FrameRecord, Reason
from svd2_jax.simulate.simulator import Outcome

OWN_DROPS = (Reason.OVERLOAD, Reason.HOPELESS)  # the scheduler's doing; others are the source's
MOST_MISSED = 0.001  # share of shown frames, where the device can do all that is demanded
MOST_MISSED_OVERLOADED = 0.01
LEAST_THROUGHPUT = 0.95  # of the capacity
LONGEST_RECOVERY_S = 2.0
LONGEST_GAP_S = 2.0  # without a frame of a stream, under overload
SETTLED_NS = SECOND  # so long everything has to be well for a recovery


@dataclass(frozen=True)
class Row:
    """One trace under one policy.

    Attributes:
      trace: name.
      policy: name.
      load: the most that is demanded at any time, as a share of the capacity at floor steps.
      streams: admitted.
      refused: streams that were not.
      frames: that came in.
      shown: in time.
      late: shown behind their deadline.
      dropped: by reason.
      latency_ms: from arrival to display of all frames shown: p50, p95, p99.
      budget_ms: (least, most) of the streams.
      of_budget: p99 as a share of the budget, of the stream where that is largest.
      fps: frames shown in a second of a stream's time, mean of the streams.
      busy: share of the time that the device ran.
      throughput: frames finished under overload, as a share of what the device could do then; None without overload.
      mean_steps: of the frames shown.
      recovery_s: from an overload's end until a whole second of frames has all its steps and comes in time; the
        longest; None if there is nothing to recover from, infinity if it never does.
      gap_s: the longest time without a frame of a stream under overload; None without overload.
    """

    trace: str
    policy: str
    load: float
    streams: int
    refused: int
    frames: int
    shown: int
    late: int
    dropped: dict[str, int]
    latency_ms: tuple[float, float, float]
    budget_ms: tuple[float, float]
    of_budget: float
    fps: float
    busy: float
    throughput: float | None
    mean_steps: float
    recovery_s: float | None
    gap_s: float | None

    @property
    def miss_rate(self) -> float:
        """Late frames as a share of those shown."""
        return self.late / max(1, self.shown + self.late)

    @property
    def missed_goals(self) -> tuple[str, ...]:
        """The goals that were missed, in words."""
        overloaded = self.throughput is not None
        most = MOST_MISSED_OVERLOADED if overloaded else MOST_MISSED
        checks = {
            "misses": self.miss_rate < most,
            "latency": self.of_budget <= 1,
            "drops": overloaded or not any(self.dropped.get(reason.value) for reason in OWN_DROPS),
            "refusals": overloaded or not self.refused,
            "throughput": self.throughput is None or self.throughput >= LEAST_THROUGHPUT,
            "starvation": self.gap_s is None or self.gap_s <= LONGEST_GAP_S,
            "recovery": self.recovery_s is None or self.recovery_s <= LONGEST_RECOVERY_S,
        }
        return tuple(goal for goal, reached in checks.items() if not reached)

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as plain values, for JSON; an infinite time becomes "never"."""
        values = {**vars(self), "miss_rate": self.miss_rate, "missed_goals": self.missed_goals}
        return {k: "never" if v == float("inf") else v for k, v in values.items()}


def summarise(outcome: Outcome) -> Row:
    """Returns the row of a run."""
    trace, frames = outcome.trace, outcome.frames
    by_stream: dict[int, list[FrameRecord]] = collections.defaultdict(list)
    for frame in frames:
        by_stream[frame.stream].append(frame)
    shown = [f for f in frames if f.shown_ns is not None]
    drops = collections.Counter(f.reason.value for f in frames if f.fate is Fate.DROPPED and f.reason)
    times_s = sum((trace.end_s(s) - s.start_s) for s in trace.sources)
    overloads = trace.overloads
    budgets = [source.budget_ms for source in trace.sources]
    return Row(
        trace=trace.name,
        policy=outcome.policy,
        load=trace.peak_load,
        streams=len(trace.sources) - len(outcome.refused),
        refused=len(outcome.refused),
        frames=len(frames),
        shown=sum(f.fate is Fate.SHOWN for f in frames),
        late=sum(f.fate is Fate.LATE for f in frames),
        dropped=dict(sorted(drops.items())),
        latency_ms=_percentiles([latency_ms(f) for f in shown]),
        budget_ms=(min(budgets), max(budgets)),
        of_budget=max((_worst_share(fs) for fs in by_stream.values()), default=0.0),
        fps=len(shown) / times_s,
        busy=outcome.busy_s / max(outcome.ended_s, 1e-9),
        throughput=_throughput(outcome) if overloads else None,
        mean_steps=sum(f.steps or 0 for f in shown) / max(1, len(shown)),
        recovery_s=_recovery_s(outcome),
        gap_s=max(_gap_s(fs, span) for fs in by_stream.values() for span in overloads) if overloads else None,
    )


def latency_ms(frame: FrameRecord) -> float:
    """Returns the time from a shown frame's arrival until it was shown."""
    assert frame.shown_ns is not None
    return (frame.shown_ns - frame.arrival_ns) / MS


def _percentiles(values: Iterable[float]) -> tuple[float, float, float]:
    ordered = sorted(values)
    if not ordered:
        return 0.0, 0.0, 0.0
    p50, p95, p99 = (ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.5, 0.95, 0.99))
    return p50, p95, p99


def _worst_share(frames: Sequence[FrameRecord]) -> float:
    """Returns a stream's p99 latency as a share of its budget."""
    shown = [f for f in frames if f.shown_ns is not None]
    budget_ms = (frames[0].deadline_ns - frames[0].arrival_ns) / MS
    return _percentiles([latency_ms(f) for f in shown])[2] / budget_ms


def _throughput(outcome: Outcome) -> float:
    """Returns the frames finished under overload as a share of what the device can finish at best."""
    possible = sum((s.end_s - s.begin_s) * s.capacity_hz for s in outcome.trace.segments if s.load > 1)
    spans = [(round(a * SECOND), round(b * SECOND)) for a, b in outcome.trace.overloads]
    done = [f.done_ns for f in outcome.frames if f.done_ns is not None]
    return sum(any(a <= at < b for a, b in spans) for at in done) / possible


def _gap_s(frames: Sequence[FrameRecord], span: tuple[float, float]) -> float:
    """Returns the longest time in a span of seconds in which no frame of a stream was shown."""
    begin, end = (round(at * SECOND) for at in span)
    begin = max(begin, frames[0].deadline_ns)  # the first one may take its time
    times = sorted(f.shown_ns for f in frames if f.shown_ns is not None and begin <= f.shown_ns <= end)
    cuts = [begin, *times, end]
    return max((b - a for a, b in zip(cuts, cuts[1:], strict=False)), default=0) / SECOND


def _recovery_s(outcome: Outcome) -> float | None:
    """Returns how long after an overload's end all is as it should be, for the longest; None if none ends."""
    trace = outcome.trace
    ends = [end for _, end in trace.overloads if end < trace.duration_s]
    if not ends:
        return None
    steps = {f.stream: f.steps for f in outcome.frames if f.steps is not None}  # those at the very end
    preferred = {
        stream: max((f.steps for f in outcome.frames if f.stream == stream and f.steps), default=0)
        for stream in steps
    }
    frames = sorted(outcome.frames, key=lambda f: f.arrival_ns)
    longest = 0.0
    for end_s in ends:
        end_ns = well_ns = round(end_s * SECOND)
        for frame in frames:
            if frame.arrival_ns < end_ns:
                continue
            if frame.arrival_ns > well_ns + SETTLED_NS:
                break
            if frame.fate is not Fate.SHOWN or (frame.steps or 0) < preferred.get(frame.stream, 0):
                well_ns = frame.arrival_ns
        else:
            return float("inf")
        longest = max(longest, (well_ns - end_ns) / SECOND)
    return longest


# --- the table


COLUMNS = (
    "trace", "policy", "load", "frames", "shown", "late", "dropped", "misses", "p50", "p95", "p99", "budget",
    "FPS", "busy", "of capacity", "steps", "recovery", "goals",
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as aligned text, one line each, and under it what the columns mean and the ratios."""
    lines = [COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    left = {0, 1, 6, 17}
    text = [
        "  ".join(
            c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in text)


def _cells(row: Row) -> tuple[str, ...]:
    def percent(value: float | None, digits: int = 0) -> str:
        return "" if value is None else f"{100 * value:.{digits}f} %"

    least, most = row.budget_ms
    recovery = "" if row.recovery_s is None else f"{row.recovery_s:.1f} s"
    return (
        row.trace,
        row.policy,
        f"{row.load:.2f}",
        str(row.frames),
        str(row.shown),
        str(row.late),
        ", ".join(f"{count} {reason}" for reason, count in row.dropped.items()) or "0",
        percent(row.miss_rate, 2),
        *(f"{value:.0f}" for value in row.latency_ms),
        f"{least:.0f}" if least == most else f"{least:.0f}-{most:.0f}",
        f"{row.fps:.1f}",
        percent(row.busy),
        percent(row.throughput),
        f"{row.mean_steps:.2f}",
        "never" if recovery.startswith("inf") else recovery,
        ", ".join(row.missed_goals) or "ok",
    )


def ratios(rows: Sequence[Row], policy: str) -> str:
    """Returns, for each trace, how much higher the other policies' p99 latencies are and what they miss; or ""."""
    lines = []
    ours = {row.trace: row for row in rows if row.policy == policy}
    for row in rows:
        if row.policy == policy or row.trace not in ours:
            continue
        own = ours[row.trace]
        lines.append(
            f"{row.trace}: {row.policy} has {row.latency_ms[2] / max(own.latency_ms[2], 1e-9):.1f} times the p99 "
            f"latency, {100 * row.miss_rate:.2f} % late frames against {100 * own.miss_rate:.2f} %, "
            f"{row.shown / max(own.shown, 1):.2f} times the frames in time"
        )
    return "\n".join(lines)
