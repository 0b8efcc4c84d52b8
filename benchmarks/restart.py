"""How much sooner the first frame is there when an earlier run has kept its programs.

python benchmarks/restart.py                     # rounds of cold start and restart, each in a new process
python benchmarks/restart.py --before FOLDER     # and of the same two in another checkout, for comparison

Starts take turns, so that other work on the machine hits all of them; the ratios are worked out round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parents[1]
COMMAND = "import sys; from svd2_jax.cli import main; sys.exit(main())"
CASES = {
    "tiny": ["--checkpoint", "tiny"],
    "golden": ["--checkpoint", "random:golden", "--height", "96", "--width", "160"],
    "1.3B, 2 blocks": [
        *("--checkpoint", "random:wan-1.3b", "--blocks", "2", "--height", "64", "--width", "96"),
        *("--dtype", "bfloat16"),
    ],
}


def start(checkout: Path, options: list[str], cache: Path, restart: bool) -> dict[str, float]:
    """Returns the seconds of each phase from the start of a process to its first frames."""
    report = cache / "report.json"
    subprocess.run(
        [sys.executable, "-c", COMMAND, "bench", "--part", "first-frame", "--json", report, *options]
        + ["--restart"] * restart,
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout), "SVD2_CACHE": str(cache)},
        check=True,
        capture_output=True,
    )
    return json.loads(report.read_text())["first_frame"]


def line(name: str, seconds: list[float], ratios: list[float] | None = None) -> str:
    """Returns median, least and most of seconds, and of how many times as fast they are as the first kind's."""
    text = f"  {name:17}{statistics.median(seconds):7.2f} s  ({min(seconds):.2f} to {max(seconds):.2f})"
    if ratios:
        text += f"   {statistics.median(ratios):5.1f} times as fast ({min(ratios):.1f} to {max(ratios):.1f})"
    return text


def main() -> None:
    """Prints the times and ratios of each case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", action="append", choices=CASES, help="(default: all)")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="another checkout of this repository")
    args = parser.parse_args()
    checkouts = {"": HERE} if args.before is None else {"before, ": args.before, "": HERE}
    for case in args.case or CASES:
        print(case)
        with tempfile.TemporaryDirectory() as scratch:
            folders = {name: Path(scratch) / str(i) for i, name in enumerate(checkouts)}
            for name, checkout in checkouts.items():
                folders[name].mkdir()
                start(checkout, CASES[case], folders[name], restart=True)  # fills the folder; not counted
            phases = {f"{name}{kind}": [] for name in checkouts for kind in ("cold start", "restart")}
            for _ in range(args.rounds):
                for kind, starts in phases.items():
                    name = "before, " if kind.startswith("before") else ""
                    starts.append(
                        start(checkouts[name], CASES[case], folders[name], kind.endswith("restart"))
                    )
        seconds = {kind: [sum(phase.values()) for phase in starts] for kind, starts in phases.items()}
        cold = next(iter(seconds.values()))
        for kind, times in seconds.items():
            ratios = [a / b for a, b in zip(cold, times, strict=True)]
            print(line(kind, times, None if times is cold else ratios))
        for kind, starts in phases.items():
            least = min(starts, key=lambda phase: sum(phase.values()))
            print(f"  quickest {kind}: " + ", ".join(f"{name} {s:.2f}" for name, s in least.items()))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
