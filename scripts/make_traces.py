"""Writes the traces of `svd2 simulate`; the same bytes every time.

python scripts/make_traces.py            # into traces/
python scripts/make_traces.py FOLDER
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import sys
from pathlib import Path

from svd2_jax.simulate.trace import DeviceTrace, StreamTrace, Trace, trace_to_dict

FOLDER = Path(__file__).parents[1] / "traces"
SEED = 2511  # of what is drawn here, and of every trace

# Times like those of a model that keeps one to eight live streams busy. Ticks wobble by 1 %, and one in a thousand
# takes three times as long.
OUTLIERS = 0.001
FOR_ONE = DeviceTrace(fixed_ms=60, row_ms=20, knee_rows=1, outlier_share=OUTLIERS)
FOR_SEVERAL = DeviceTrace(fixed_ms=30, row_ms=20, knee_rows=1, outlier_share=OUTLIERS)
FOR_MANY = DeviceTrace(fixed_ms=30, row_ms=10, knee_rows=2, batch_sizes=(1, 2, 4, 8), outlier_share=OUTLIERS)


def traces() -> list[Trace]:
    """Returns all traces, each with what it demands and grants filled in."""
    camera = StreamTrace(rate_hz=16, budget_ms=700, jitter_ms=2)
    fast = StreamTrace(rate_hz=30, budget_ms=500, jitter_ms=2)
    found = [
        Trace(
            "steady_16", "One camera at 16 frames a second for five minutes.", 300, FOR_ONE, (camera,),
        ),
        Trace(
            "steady_30", "One camera at 30 frames a second for five minutes.", 300, FOR_ONE, (fast,),
        ),
        Trace(
            "light_30", "One camera at 30 frames a second for five minutes, on a device that has little to do.", 300,
            dataclasses.replace(FOR_ONE, fixed_ms=40, row_ms=13), (fast,),
        ),
        Trace(
            "eight", "Eight cameras, one a little behind the other; half of what the device can do at two steps.", 180,
            FOR_MANY,
            (
                dataclasses.replace(
                    camera, rate_hz=11.75, count=8, stagger_s=0.13, min_steps=2, budget_ms=1200
                ),
            ),
        ),
        Trace(
            "jitter", "Two cameras behind a network that holds frames up, 15 ms on average and up to 75 ms.", 300,
            FOR_SEVERAL,
            (
                dataclasses.replace(camera, jitter_ms=15, budget_ms=800),
                dataclasses.replace(fast, jitter_ms=15, budget_ms=600, start_s=0.5),
            ),
        ),
        Trace(
            "bursts", "A network that hands over the frames of half a second together, and one of a quarter.", 300,
            FOR_SEVERAL,
            (
                dataclasses.replace(camera, burst_ms=500, budget_ms=1200),
                dataclasses.replace(fast, burst_ms=250, budget_ms=900, start_s=1.1),
            ),
        ),
        Trace(
            "stalls", "A camera that stops: for a third of a second, one, three and ten seconds, in turn.", 180,
            FOR_ONE, (dataclasses.replace(camera, stalls=stalls()),),
        ),
        Trace(
            "faults", "Sources whose timestamps are missing, repeated, swapped or much too old; clocks are far off.",
            180, FOR_MANY,
            (
                dataclasses.replace(camera, clock_s=5e5, missing_share=0.05, duplicate_share=0.02),
                dataclasses.replace(fast, clock_s=-40, stale_share=0.01, stale_ms=900, start_s=0.3),
                dataclasses.replace(camera, jitter_ms=30, reorder=True, drift_ppm=200, start_s=0.6),
                dataclasses.replace(camera, timestamps=False, start_s=0.9),
            ),
        ),
        Trace(
            "device_half",
            "Two cameras at 30; for a minute the device runs at half speed: too slow for two steps, not for one.", 180,
            dataclasses.replace(FOR_SEVERAL, speed=((60.0, 0.5), (120.0, 1.0))),
            (dataclasses.replace(fast, count=2, stagger_s=0.4, budget_ms=700),),
        ),
        Trace(
            "pipeline",
            "Two cameras at 30 with four steps, two at least, on two stages; for 50 s the device is too slow for four.",
            150, dataclasses.replace(FOR_MANY, speed=((50.0, 0.6), (100.0, 1.0))),
            (
                dataclasses.replace(
                    fast, count=2, stagger_s=0.2, steps=4, min_steps=2, stages=2, budget_ms=1600
                ),
            ),
        ),
        Trace(
            "overlap",
            "One camera at 30 on two stages, three quarters busy; decoding behind them takes two fifths of a tick.",
            120, DeviceTrace(fixed_ms=100, row_ms=0, outlier_share=OUTLIERS, tail_ms=40),
            (dataclasses.replace(fast, min_steps=2, stages=2, budget_ms=900),),
        ),
        Trace(
            "come_and_go", "One to eight streams join and leave; most end, some are closed with frames under way.",
            300, FOR_MANY, guests(),
        ),
        Trace(
            "overload_one", "One camera at 30; for a minute the device can do half of that at one step.", 110,
            dataclasses.replace(FOR_ONE, speed=((20.0, 0.225), (80.0, 1.0))),
            (dataclasses.replace(fast, budget_ms=1200),),
        ),
        Trace(
            "overload_four", "Four cameras at 16; for a minute the device can do half of that at one step.", 110,
            dataclasses.replace(FOR_SEVERAL, speed=((20.0, 0.18), (80.0, 1.0))),
            (dataclasses.replace(camera, count=4, stagger_s=0.3, budget_ms=2000),),
        ),
        Trace(
            "overload_endless", "One camera at 60 on a device that can do 30 at one step, and never more.", 120,
            DeviceTrace(fixed_ms=1000 / 7.5, row_ms=40, knee_rows=1, outlier_share=OUTLIERS),
            (dataclasses.replace(fast, rate_hz=60, budget_ms=900),),
        ),
        Trace(
            "overload_hopeless",
            "One camera at 16; for 20 s the device is too slow for a chunk within its budget, later for any frame.", 90,
            dataclasses.replace(
                FOR_SEVERAL, fixed_ms=40, row_ms=10, speed=((20.0, 0.15), (40.0, 1.0), (60.0, 0.1), (80.0, 1.0))
            ),
            (dataclasses.replace(camera, min_steps=2),),
        ),
        Trace(
            "hour", "One camera at 30 for an hour; its clock runs 100 ppm fast, a third of a second in all.", 3600,
            FOR_ONE, (dataclasses.replace(fast, clock_s=1e6, drift_ppm=100),),
        ),
    ]  # fmt: skip
    return [
        dataclasses.replace(trace, seed=SEED, load=round(trace.peak_load, 3), budgets=budgets(trace))
        for trace in found
    ]


def stalls() -> tuple[tuple[float, float], ...]:
    """Returns when the camera stops, and for how long."""
    draw, at, found = random.Random(SEED), 5.0, []
    while at < 160:
        length = (1 / 3, 1.0, 3.0, 10.0)[len(found) % 4]
        found.append((round(at, 2), round(length, 2)))
        at += length + draw.uniform(4, 10)
    return tuple(found)


def guests() -> tuple[StreamTrace, ...]:
    """Returns eight streams of different rates whose times overlap."""
    draw = random.Random(SEED)
    found = []
    for index, rate in enumerate((16, 16, 24, 12, 16, 30, 10, 16)):
        stay_from = round(index * 15 + draw.uniform(0, 8), 2) if index else 0.0
        stay_to = round(300 - index * 12 - draw.uniform(0, 8), 2) if index else None
        found.append(
            StreamTrace(
                rate_hz=rate,
                budget_ms=900,
                jitter_ms=3,
                start_s=stay_from,
                end_s=stay_to,
                leaves="closes" if index % 3 == 2 else "ends",
            )
        )
    return tuple(found)


def budgets(trace: Trace) -> str:
    """Returns what frames are given, in words."""
    values = sorted({(s.rate_hz, s.budget_ms) for s in trace.streams})
    return ", ".join(f"{budget:g} ms at {rate:g} frames/s" for rate, budget in values)


def main() -> None:
    """Writes one file for each trace."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for trace in traces():
        path = folder / f"{trace.name}.json"
        text = json.dumps(trace_to_dict(trace), indent=1)
        text = re.sub(r"\[\s+(-?[\d.]+),\s+(-?[\d.]+)\s+\]", r"[\1, \2]", text)  # pairs on one line
        path.write_text(text + "\n")
        print(f"{path}: demands at most {trace.load:.2f} of the capacity")


if __name__ == "__main__":
    main()
