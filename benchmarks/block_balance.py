"""Compares our splits with the reference's and with the best ones under noise; see block_balance.md.

PYTHONPATH=.:tests/engine python benchmarks/block_balance.py
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import test_balance as simulated

from svd2_jax.engine.balance import best_split, bottleneck, measured_split
from svd2_jax.engine.stage_times import SAMPLES

GOLDEN = Path(__file__).parent.parent / "tests" / "goldens" / "block_balance.json"
SEEDS = 40


def compare(alike: bool) -> None:
    """Prints how much more throughput our splits have than the reference's, in percent."""
    gains = []
    for case in json.loads(GOLDEN.read_text()):
        costs, overheads, slowness, theirs = simulated.read_golden(case, alike)
        ours = best_split(costs, overheads, slowness)
        ratio = bottleneck(theirs, costs, overheads, slowness) / bottleneck(ours, costs, overheads, slowness)
        gains.append(100 * (ratio - 1))
    print(
        f"{'devices alike' if alike else 'devices as measured':20}"
        f"mean +{statistics.mean(gains):.1f} %, median +{statistics.median(gains):.1f} %, "
        f"least {min(gains):+.1f} %, most {max(gains):+.1f} %, faster in {sum(g > 1e-9 for g in gains)} of {len(gains)}"
    )


def decide(noise: float, outliers: float) -> None:
    """Prints the throughput of simulated pipelines on the split that is chosen by a warm-up's measurements."""
    before, after = [], []
    for seed in range(SEEDS):
        devices = simulated.some_devices(seed, noise=noise, outliers=outliers)
        counts = simulated.even(devices)
        before.append(devices.throughput(counts))
        times = [devices.draw(counts) for _ in range(SAMPLES)]
        after.append(devices.throughput(measured_split(counts, times)))
    print(
        f"noise {noise:.0%}, outliers {outliers:.0%}, after {SAMPLES} measurements: throughput of the best "
        f"split's at least {min(after):.1%}, mean {statistics.mean(after):.1%}; even split: at "
        f"least {min(before):.1%}, mean {statistics.mean(before):.1%}"
    )


def main() -> None:
    """Prints everything."""
    compare(alike=True)
    compare(alike=False)
    runs_ms = []
    for _ in range(50):
        start = time.perf_counter()
        best_split([1.0] * 40, [3.0, *[0.0] * 6, 8.0], [1.0, 1.1, 0.9, 1.3, 1.0, 2.0, 0.8, 1.2])
        runs_ms.append(1e3 * (time.perf_counter() - start))
    print(
        f"best_split of 40 blocks over 8 stages: {min(runs_ms):.1f} ms, median {statistics.median(runs_ms):.1f} ms"
    )
    for noise, outliers in ((0.01, 0.0), (0.1, 0.0), (0.1, 0.1), (0.2, 0.0)):
        decide(noise, outliers)


if __name__ == "__main__":
    main()
