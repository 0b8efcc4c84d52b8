"""What came of a simulated run, as numbers, as goals reached or missed, and as a table."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from svd2_jax.runtime.metrics import Metrics
from svd2_jax.runtime.types import SECOND, Fate, FrameRecord, Reason
from svd2_jax.simulate.simulator import SimulationResult
from svd2_jax.simulate.trace import bound_ms, first_bound_ms
from svd2_jax.text import aligned

OWN_DROPS = (Reason.OVERLOAD, Reason.EXPIRED)  # the scheduler's doing; others are the source's
MOST_MISSED = 0.001  # share of shown frames, where the device can do all that is demanded
MOST_MISSED_OVERLOADED = 0.01
LEAST_THROUGHPUT = 0.95  # of the capacity
LONGEST_RECOVERY_S = 2.0
LONGEST_GAP_S = 2.0  # without a frame of a stream, under overload
LONG = 1000  # frames of a stream; in fewer, its first group is more than one in a hundred
QUIET = 0.5  # share of the time for a tick per chunk below which latencies have to be near their bound
MOST_OF_BOUND = (1.10, 1.25)  # p50 and p99 of every stream as multiples of its bound, on a quiet device
SETTLED_NS = SECOND  # so long everything has to be well for a recovery


@dataclass(frozen=True)
class Row:
    """One trace under one policy.

    Frames that no policy could show in time (see `SimulationResult.is_possible`) are counted apart. Shown, late and
    dropped frames, latencies, misses, steps and recovery are of the others.

    Attributes:
      trace: name.
      policy: name.
      load: the most that is demanded at any time, as a share of the capacity at floor steps.
      streams: admitted.
      refused: streams that were not.
      frames: that came in; `shown + late + dropped + impossible`.
      impossible: frames that no policy could show in time.
      impossible_shown: those of them that were shown, late as they were.
      shown: in time.
      late: shown behind their deadline.
      dropped: by reason.
      latency_ms: from arrival to display of all frames shown: p50, p95, p99.
      budget_ms: (least, most) of the streams.
      jitter_ms: by how much the time between two frames shown differs from that in the source, mean.
      miss_rate: late frames as a share of those shown.
      worst_miss_rate: the same of the stream where it is largest.
      fps: frames shown per second, mean of the streams.
      busy: share of the time that the device ran.
      throughput: frames finished under overload, as a share of what the device could do then; None without an overload
        in which whole chunks can be in time.
      mean_steps: of the frames shown.
      recovery_s: from an overload's end until a whole second of frames has all its steps and comes in time; the
        longest; None if there is nothing to recover from, infinity if it never does.
      gap_s: the longest time without a frame of a stream under overload; None without overload.
      bound_ms: (least, most) of the streams: what latency a chunk would have if the device did nothing else.
      of_bound: p50 and p99 latency as multiples of the stream's bound, of the stream where each is largest.
      quiet: whether less than half of the time is enough for a tick per chunk, all the time.
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
    jitter_ms: float
    miss_rate: float
    worst_miss_rate: float
    fps: float
    busy: float
    throughput: float | None
    mean_steps: float
    recovery_s: float | None
    gap_s: float | None
    impossible: int = 0
    impossible_shown: int = 0
    bound_ms: tuple[float, float] = (0.0, 0.0)
    of_bound: tuple[float, float] = (0.0, 0.0)
    quiet: bool = False

    @property
    def missed_goals(self) -> tuple[str, ...]:
        """The goals that were missed, in words."""
        overloaded = self.gap_s is not None
        most = MOST_MISSED_OVERLOADED if overloaded else MOST_MISSED
        checks = {
            "misses": self.miss_rate < most,
            "latency": self.worst_miss_rate <= 0.01,  # that is, its p99 is within the budget
            "bound": not self.quiet or all(a <= b for a, b in zip(self.of_bound, MOST_OF_BOUND, strict=True)),
            "drops": overloaded or not any(self.dropped.get(reason.value) for reason in OWN_DROPS),
            "refusals": overloaded or not self.refused,
            "throughput": self.throughput is None or self.throughput >= LEAST_THROUGHPUT,
            "starvation": self.gap_s is None or self.gap_s <= LONGEST_GAP_S,
            "recovery": self.recovery_s is None or self.recovery_s <= LONGEST_RECOVERY_S,
        }
        return tuple(goal for goal, reached in checks.items() if not reached)

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as plain values, for JSON; an infinite time becomes "never"."""
        values = {**vars(self), "missed_goals": self.missed_goals}
        return {k: "never" if v == float("inf") else v for k, v in values.items()}


def summarise(outcome: SimulationResult) -> Row:
    """Returns the row of a run."""
    trace = outcome.admitted
    overloads = trace.overloads
    metrics = Metrics(stored_streams=len(trace.sources))
    impossible: list[FrameRecord] = []
    for event in outcome.events:
        if isinstance(event, FrameRecord) and not outcome.is_possible(event):
            impossible.append(event)
        else:
            metrics(event)
    total, streams = metrics.summary(), [metrics.summary(stream) for stream in metrics.streams]
    budgets = [source.budget_ms for source in trace.sources]
    bounds = [bound_ms(trace.device, source) for source in trace.sources]
    multiples = []
    for stream, one in zip(metrics.streams, streams, strict=True):
        source = outcome.streams[stream]
        bound = longest = bound_ms(trace.device, source)
        if one.frames_in < LONG:
            longest = max(bound, first_bound_ms(trace.device, source))
        multiples.append(((one.latency_p50_ms or 0.0) / bound, (one.latency_p99_ms or 0.0) / longest))
    return Row(
        trace=trace.name,
        policy=outcome.policy,
        load=outcome.trace.peak_load,
        streams=len(outcome.trace.sources) - len(outcome.refused),
        refused=len(outcome.refused),
        frames=len(outcome.frames),
        shown=total.shown,
        late=total.late,
        dropped=dict(total.dropped),
        latency_ms=(total.latency_p50_ms or 0.0, total.latency_p95_ms or 0.0, total.latency_p99_ms or 0.0),
        budget_ms=(min(budgets), max(budgets)),
        jitter_ms=total.jitter_ms or 0.0,
        miss_rate=total.miss_rate,
        worst_miss_rate=max((s.miss_rate for s in streams), default=0.0),
        fps=sum(s.fps_shown for s in streams) / max(1, len(streams)),
        busy=outcome.busy_s / max(outcome.ended_s, 1e-9),
        throughput=_throughput(outcome),
        mean_steps=total.steps_mean,
        recovery_s=_recovery_s(outcome),
        gap_s=_gap_s(outcome) if overloads else None,
        impossible=len(impossible),
        impossible_shown=sum(frame.shown_ns is not None for frame in impossible),
        bound_ms=(min(bounds), max(bounds)),
        of_bound=(max((m[0] for m in multiples), default=0.0), max((m[1] for m in multiples), default=0.0)),
        quiet=trace.peak_busy < QUIET,
    )


def _throughput(outcome: SimulationResult) -> float | None:
    """Returns the frames finished under overload as a share of what the device can finish at best.

    Only where whole chunks can be in time: the best is reached with whole chunks. None where that is never.
    """
    overloads = [s for s in outcome.admitted.segments if s.load > 1 and s.takes_chunks]
    if not overloads:
        return None
    best = sum((s.end_s - s.begin_s) * s.capacity_hz for s in overloads)
    spans = [(round(s.begin_s * SECOND), round(s.end_s * SECOND)) for s in overloads]
    done = [f.done_ns for f in outcome.frames if f.done_ns is not None]
    return sum(any(a <= at < b for a, b in spans) for at in done) / best


def _gap_s(outcome: SimulationResult) -> float:
    """Returns the longest time under overload in which a stream that takes part shows no frame."""
    by_stream: dict[int, list[FrameRecord]] = collections.defaultdict(list)
    for frame in outcome.frames:
        by_stream[frame.stream].append(frame)
    longest_ns = 0
    for frames, (begin_s, end_s) in itertools.product(by_stream.values(), outcome.admitted.overloads):
        first_ns = min(f.arrival_ns for f in frames)
        last_ns = max(f.arrival_ns for f in frames)
        begin_ns = max(
            round(begin_s * SECOND), min(f.deadline_ns for f in frames if f.arrival_ns == first_ns)
        )
        end_ns = min(round(end_s * SECOND), last_ns)
        shown = sorted(f.shown_ns for f in frames if f.shown_ns and begin_ns <= f.shown_ns <= end_ns)
        longest_ns = max([longest_ns, *(b - a for a, b in itertools.pairwise([begin_ns, *shown, end_ns]))])
    return longest_ns / SECOND


def _recovery_s(outcome: SimulationResult) -> float | None:
    """Returns how long after an overload's end all is as it should be, for the longest; None if none ends."""
    trace = outcome.admitted
    ends = [end for _, end in trace.overloads if end < trace.duration_s]
    if not ends:
        return None
    preferred: dict[int, int] = collections.defaultdict(int)  # steps by stream
    for frame in outcome.frames:
        preferred[frame.stream] = max(preferred[frame.stream], frame.steps or 0)
    own = [f for f in outcome.frames if f.fate is not Fate.DROPPED or f.reason in OWN_DROPS]
    judged = filter(outcome.is_possible, own)
    frames = sorted(judged, key=lambda f: f.arrival_ns)
    longest = 0.0
    for end_s in ends:
        end_ns = well_ns = round(end_s * SECOND)
        for frame in frames:
            if frame.arrival_ns < end_ns:
                continue
            if frame.arrival_ns > well_ns + SETTLED_NS:
                break
            if frame.fate is not Fate.SHOWN or (frame.steps or 0) < preferred[frame.stream]:
                well_ns = frame.arrival_ns
        else:
            return float("inf")
        longest = max(longest, (well_ns - end_ns) / SECOND)
    return longest


# --- the table


COLUMNS = (
    "trace", "policy", "load", "frames", "impossible", "shown", "late", "dropped", "misses", "p50", "p95", "p99",
    "bound", "p50/bound", "p99/bound", "budget", "ratio", "jitter", "FPS", "busy", "of capacity", "steps",
    "recovery", "goals",
)  # fmt: skip


def table(rows: Sequence[Row], policy: str) -> str:
    """Returns the rows as aligned text, one line each; ratios are to the rows of this policy."""
    p99_ms = {row.trace: row.latency_ms[2] for row in rows if row.policy == policy}
    lines = [COLUMNS, *(_cells(row, p99_ms.get(row.trace)) for row in rows)]
    return "\n".join(aligned(lines, left={0, 1, COLUMNS.index("dropped"), len(COLUMNS) - 1}))


def _cells(row: Row, p99_ms: float | None) -> tuple[str, ...]:
    def percent(value: float | None, digits: int = 0) -> str:
        return "" if value is None else f"{100 * value:.{digits}f} %"

    recovery = "" if row.recovery_s is None else f"{row.recovery_s:.1f} s"
    return (
        row.trace,
        row.policy,
        f"{row.load:.2f}",
        str(row.frames),
        f"{row.impossible} ({row.impossible_shown} shown)" if row.impossible else "0",
        str(row.shown),
        str(row.late),
        ", ".join(f"{count} {reason}" for reason, count in row.dropped.items()) or "0",
        percent(row.miss_rate, 2),
        *(f"{value:.0f}" for value in row.latency_ms),
        _range(row.bound_ms),
        *(f"{value:.2f}" for value in row.of_bound),
        _range(row.budget_ms),
        f"{row.latency_ms[2] / p99_ms:.1f}" if p99_ms else "",
        f"{row.jitter_ms:.1f}",
        f"{row.fps:.1f}",
        percent(row.busy),
        percent(row.throughput),
        f"{row.mean_steps:.2f}",
        "never" if recovery.startswith("inf") else recovery,
        ", ".join(row.missed_goals) or "ok",
    )


def _range(values: tuple[float, float]) -> str:
    least, most = (f"{value:.0f}" for value in values)
    return least if least == most else f"{least}-{most}"
