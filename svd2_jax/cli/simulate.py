"""`svd2 simulate`: try the scheduler on recorded loads, without a model.

examples:
  svd2 simulate traces/steady_16.json
  svd2 simulate traces/*.json --policy all --json simulate.json --chart simulate.png
  svd2 simulate traces/hour.json --policy fifo

Runs the scheduler of live streams under a virtual clock: no model, no device, an hour in seconds, and the same numbers
every time. A trace says how frames come and how fast the device is. `python scripts/make_traces.py` writes those in
traces/, docs/scheduling.md explains them. Policies: deadline is ours; fifo has an unbounded queue and
bounded a short one; reference is the automatic mode of StreamDiffusionV2's demo. Exit code 1 if the
deadline policy misses a goal.

columns:
  load         the most frames demanded at any time, as a share of what the device can do at the fewest steps allowed
  impossible   frames that no policy could show in time: alone on the device, at the fewest steps, they come too late;
               shown, late, dropped, latencies, misses, steps and recovery are those of the others
  misses       late frames as a share of those shown
  p50 p95 p99  ms from a frame's arrival until it is shown; `budget` is the most that was asked for
  bound        ms that a chunk takes to fill and then on a device that does nothing else; p50/bound and p99/bound are
               those of the stream where they are largest (goal where a tick per chunk takes less than half of the time:
               at most 1.10 and 1.25)
  ratio        p99 to that of the deadline policy
  jitter       ms by which the time between two frames shown differs from that in the source, mean
  FPS          frames shown per second, mean of the streams; `busy`: share of the time that the device ran (its stages,
               where a trace has `tail_ms` behind them)
  of capacity  frames finished under overload, as a share of what the device could do then, where whole chunks can
               be in time at all
  recovery     from an overload's end until a whole second of frames has all its steps and is in time
  goals        those of the deadline policy that were missed, or ok
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from svd2_jax import files
from svd2_jax.cli.options import OptionGroup, check_reports, option
from svd2_jax.command import EXIT_FAILED

if TYPE_CHECKING:
    from svd2_jax.simulate.report import Row
    from svd2_jax.simulate.simulator import MakePolicy, SimulationResult
    from svd2_jax.simulate.trace import Trace

Policy = Literal["deadline", "bounded", "fifo", "reference"]
OURS: Policy = "deadline"


@dataclass(frozen=True, kw_only=True)
class Options(OptionGroup):
    """What `svd2 simulate` takes."""

    traces: tuple[Path, ...] = option(
        "JSON files, as in traces/", names=["traces"], action="store", nargs="+", metavar="TRACE"
    )
    policy: Literal[Policy, "all"] = option("what schedules (default %(default)s)", OURS)
    json: Path | None = option("write all numbers there as well")
    chart: Path | None = option("draw latencies over time there", metavar="FILE.png")
    no_progress: bool = option("show no progress bar", False)


def run(options: Options) -> int:
    """Simulates and prints a table; fails if our policy misses a goal."""
    from svd2_jax.simulate.report import summarise, table
    from svd2_jax.simulate.trace import read_trace

    check_reports(options.json, options.chart, [("the trace", path) for path in options.traces])
    traces = [read_trace(path) for path in options.traces]  # all of them, before anything takes time
    names = get_args(Policy) if options.policy == "all" else [options.policy]
    rows: list[Row] = []
    drawn: list[Any] = []
    for trace in traces:
        for name in names:
            outcome = _simulate(trace, name, not options.no_progress)
            rows.append(summarise(outcome))
            if options.chart:
                from svd2_jax.simulate.chart import summed_up

                drawn.append(summed_up(outcome))
    if options.json:
        files.write_json(options.json, [row.to_dict() for row in rows])
    if options.chart:
        from svd2_jax.simulate.chart import draw

        draw(options.chart, drawn)
    print(table(rows, OURS))
    for path in filter(None, (options.json, options.chart)):
        print(f"{path}: written")
    ours = [row for row in rows if row.policy == OURS]
    return EXIT_FAILED if any(row.missed_goals for row in ours) else 0


def _simulate(trace: Trace, name: str, progress: bool) -> SimulationResult:
    """Runs one trace, with a bar that counts the seconds simulated."""
    from tqdm import tqdm

    from svd2_jax.simulate.simulator import simulate

    with tqdm(
        total=round(trace.duration_s), desc=f"{trace.name}, {name}", unit=" s", disable=not progress, leave=False,
        file=sys.stderr,
    ) as bar:  # fmt: skip

        def show(at_s: float) -> None:
            if at_s >= bar.n + 1:
                bar.update(min(int(at_s), bar.total) - bar.n)

        return simulate(trace, name, _maker(name), show)


def _maker(name: str) -> MakePolicy:
    """Returns what makes a policy of this name."""
    from svd2_jax.runtime.scheduler import PolicyConfig, Scheduler
    from svd2_jax.simulate import baselines

    if name == OURS:
        return lambda sizes, report: Scheduler(PolicyConfig(), sizes, report)
    return {"bounded": baselines.Bounded, "fifo": baselines.Fifo, "reference": baselines.ReferencePolicy}[
        name
    ]
