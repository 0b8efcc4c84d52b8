"""How much sooner the first frame is there when an earlier run has kept its programs.

python benchmarks/restart.py                     # rounds of cold start and restart, each in a new process
python benchmarks/restart.py --before FOLDER     # and of the same two in another checkout, for comparison

Starts take turns, so that other work on the machine hits all of them; the ratios are worked out round by round.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from svd2_jax.config import preset
from svd2_jax.engine.checkpoint import TOKENIZER, CheckpointWriter, Manifest
from svd2_jax.engine.params import abstract_items, random_items, with_random_text
from svd2_jax.shipped import ASSETS, TINY

HERE = Path(__file__).parents[1]
COMMAND = "import sys; from svd2_jax.cli import main; sys.exit(main())"
WIDE_BLOCKS = 4
SMALL = ["--height", "96", "--width", "160"]


def write_wide(folder: Path) -> Path:
    """Writes a checkpoint in the widths of 1.3B, as `svd2 convert` does; returns it."""
    model, tiny = with_random_text(preset("wan-1.3b")), preset("tiny")  # whose tokenizer is at hand
    model = dataclasses.replace(
        model,
        dit=dataclasses.replace(model.dit, num_layers=WIDE_BLOCKS),
        text=dataclasses.replace(model.text, vocab=tiny.text.vocab),
    )
    items = [item for item in abstract_items(model) if not item.startswith("taehv")]
    read_item = random_items(model, 0, np.dtype(ml_dtypes.bfloat16))
    with CheckpointWriter(folder / "wide") as writer:
        for item in items:
            writer.write_item(item, read_item(item, jax.devices()[0]))
        writer.add_tokenizer({file.name: file for file in (ASSETS / TINY / TOKENIZER).iterdir()})
        writer.finish(Manifest(model, "bfloat16", tuple(items)))
    return folder / "wide"


CASES: dict[str, Callable[[Path], list[str | Path]]] = {
    "tiny": lambda _: ["--checkpoint", "tiny"],
    "golden": lambda _: ["--checkpoint", "random:golden", *SMALL],
    f"1.3B, {WIDE_BLOCKS} blocks": lambda folder: [
        "--checkpoint",
        write_wide(folder),
        *SMALL,
        "--dtype",
        "float32",
    ],
}


def start(checkout: Path, options: list[str | Path], cache: Path, restart: bool) -> dict[str, float]:
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
            options = CASES[case](Path(scratch))
            folders = {name: Path(scratch) / str(i) for i, name in enumerate(checkouts)}
            for name, checkout in checkouts.items():
                folders[name].mkdir()
                start(checkout, options, folders[name], restart=True)  # fills the folder; not counted
            phases = {f"{name}{kind}": [] for name in checkouts for kind in ("cold start", "restart")}
            for _ in range(args.rounds):
                for kind, starts in phases.items():
                    name = "before, " if kind.startswith("before") else ""
                    starts.append(start(checkouts[name], options, folders[name], kind.endswith("restart")))
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
