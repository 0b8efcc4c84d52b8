"""What scheduling costs: CPU time in the scheduler for each tick, with 64 streams on a simulated device.

python benchmarks/scheduler.py
"""

from __future__ import annotations

import heapq
import statistics
import time

from svd2_jax.runtime.deadline import PolicyConfig
from svd2_jax.runtime.latency import LatencySample
from svd2_jax.runtime.scheduler import Scheduler
from svd2_jax.runtime.types import MS, SECOND, FrameRecord, StreamSettings, Tick

STREAMS, SECONDS = 64, 20
START_S = 4  # 64 first groups at once; not counted
RUNS = 3  # of each case; the quickest is printed, as other work on the machine only adds
SIZES = (1, 2, 4)


def run(settings: StreamSettings, fixed_ms: float, row_ms: float) -> tuple[list[float], int, int]:
    """Returns the seconds spent in the scheduler for each tick, the frames that came, and those dropped."""
    reported = {"frames": 0, "dropped": 0}

    def report(event) -> None:
        if isinstance(event, FrameRecord) and event.arrival_ns > START_S * SECOND:
            reported["frames"] += 1
            reported["dropped"] += event.reason is not None

    scheduler = Scheduler(PolicyConfig(admit_below=None), SIZES, report)
    takes_ns = {
        (size, steps): round((fixed_ms + row_ms * size * steps) * MS)
        for size in SIZES
        for steps in range(settings.min_steps, settings.steps + 1)
    }
    for (size, steps), took in takes_ns.items():
        scheduler.warm_up(LatencySample(settings.shape, size, steps, took))
    streams = [scheduler.open(settings, 0) for _ in range(STREAMS)]
    interval = settings.interval_ns
    arrivals = [(interval * i // STREAMS, stream) for i, stream in enumerate(streams)]
    heapq.heapify(arrivals)
    rows = {stream: [] for stream in streams}
    running = wake = again = None
    costs, spent, now = [], 0.0, 0
    while now < SECONDS * SECOND:
        times = [arrivals[0][0], running[0] if running else wake, again]
        now = max(now, min(at for at in times if at is not None))
        done = running[1] if running and running[0] <= now else None
        came = []
        while arrivals[0][0] <= now:
            at, stream = arrivals[0]
            heapq.heapreplace(arrivals, (at + interval, stream))
            came.append((at, stream))

        begin = time.thread_time()
        for at, stream in came:
            scheduler.arrive(stream, now, at)
        if done is not None:
            scheduler.done(done, now)
            running = None
        work = None if running else scheduler.next(now)
        again = scheduler.show(now)
        spent += time.thread_time() - begin

        if isinstance(work, Tick):
            if now > START_S * SECOND:
                costs.append(spent)
            spent, finished = 0.0, {}
            for part in work.parts:
                entered = rows[part.stream]
                if part.frames:
                    entered.append(0)
                entered[:] = [ticks + 1 for ticks in entered]
                finished[part.stream] = len(entered) if part.first else sum(t >= part.steps for t in entered)
                del entered[: finished[part.stream]]
            took = (
                work.steps * takes_ns[1, work.steps] if work.first else takes_ns[len(work.parts), work.steps]
            )
            running, wake = (now + took, finished), None
        elif work is not None:
            wake = work.until_ns
    return costs, reported["frames"], reported["dropped"]


def main() -> None:
    """Prints a line for each case."""
    print(f"{STREAMS} streams, batches of {SIZES}; CPU time in arrive + next + done + show, ms per tick")
    cases = {
        "16 FPS, 2 steps": (StreamSettings(16, 900), 4, 1),
        "16 FPS, 4 steps": (StreamSettings(16, 1800, steps=4, min_steps=4), 4, 0.5),
        "16 FPS, 1 step of 2, overloaded twice": (StreamSettings(16, 900), 8, 5.8),
        "16 FPS, 3 steps, overloaded twice": (StreamSettings(16, 2500, steps=3, min_steps=3), 8, 1.9),
    }
    for name, case in cases.items():
        runs = [run(*case) for _ in range(RUNS)]
        costs, frames, dropped = min(runs, key=lambda outcome: statistics.mean(outcome[0]))
        ordered = sorted(costs)
        print(
            f"{name:38s} mean {1000 * statistics.mean(costs):.2f}  median {1000 * statistics.median(costs):.2f}  "
            f"p99 {1000 * ordered[int(0.99 * len(ordered))]:.2f}  ({len(costs)} ticks, {frames} frames, "
            f"{dropped / max(frames, 1):.0%} dropped)"
        )


if __name__ == "__main__":
    main()
