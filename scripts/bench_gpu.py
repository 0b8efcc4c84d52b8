"""Measures the published sizes on one GPU, a part at a time, and tells of it in one JSON and one Markdown table.

What is in the JSON already is not measured again, so that a run may be cut off at any time:

  python scripts/bench_gpu.py --out bench_gpu --budget 540
  python scripts/bench_gpu.py --out bench_gpu/traced --model wan-1.3b --size 512x512 --steps 2 --trace
  python scripts/bench_gpu.py --out bench_gpu --table
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svd2_jax import files
from svd2_jax.bench.benchmarks import Bench
from svd2_jax.bench.ceiling import measured
from svd2_jax.bench.report import Report, text
from svd2_jax.bench.run import measure, settings
from svd2_jax.command import exit_code
from svd2_jax.config import StreamConfig, preset
from svd2_jax.engine.engine import DeviceEngine
from svd2_jax.engine.kept_programs import keep_programs
from svd2_jax.errors import ConfigError
from svd2_jax.text import si

MODELS = ("wan-1.3b", "wan-14b")
SIZES = ("512x512", "480x832")  # height x width
STEPS = (2, 1, 4)
OF_EVERY_STEP = ("tick", "stream", "stream-taehv")
OF_ONE_SIZE = ("encode", "decode-wan", "decode-taehv")  # the same for all models and numbers of steps
OF_ONE_MODEL = ("dispatch",)
REPEATS = 20


@dataclass(frozen=True)
class Job:
    """One part of one stream.

    Attributes:
      model: preset.
      height: pixels.
      width: pixels.
      steps: denoising steps.
      part: of `bench.benchmarks.BENCHMARKS`, or "stream-taehv", a stream with the small decoder.
    """

    model: str
    height: int
    width: int
    steps: int
    part: str

    @property
    def key(self) -> str:
        """What its result is found by."""
        return f"{self.model} {self.height}x{self.width} {self.steps} {self.part}"

    @property
    def cfg(self) -> StreamConfig:
        """What the stream computes."""
        decoder = "taehv" if self.part == "stream-taehv" else "wan"
        return StreamConfig.for_task(
            "v2v", height=self.height, width=self.width, steps=self.steps, decoder=decoder
        )


def main() -> int:
    """Measures what is not there yet, and returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of results.json and results.md")
    parser.add_argument("--model", action="append", choices=MODELS, help="default: all")
    parser.add_argument("--size", action="append", choices=SIZES, help="height x width (default: all)")
    parser.add_argument("--steps", action="append", type=int, choices=STEPS, help="default: all")
    parser.add_argument("--part", action="append", help="default: all")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), metavar="S", help="start nothing after so long"
    )
    parser.add_argument("--trace", action="store_true", help="also list the costliest kernels of each part")
    parser.add_argument("--table", action="store_true", help="only write the table again")
    parser.add_argument("--blocks", type=int, metavar="N", help="take only so many blocks, to try it out")
    args = parser.parse_args()
    return exit_code(lambda: _run(args), "interrupted; the same command goes on with what is left")


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """Yields what is asked for, what matters most first."""
    models, sizes, steps = args.model or MODELS, args.size or SIZES, args.steps or STEPS
    for model, size, (i, count) in itertools.product(models, sizes, enumerate(steps)):
        parts = OF_EVERY_STEP
        if i == 0:
            parts += OF_ONE_SIZE if model == models[0] else ()
            parts += OF_ONE_MODEL if size == sizes[0] else ()
        height, width = map(int, size.split("x"))
        for part in parts:
            if not args.part or part in args.part:
                yield Job(model, height, width, count, part)


def _run(args: argparse.Namespace) -> None:
    started, file = time.monotonic(), args.out / "results.json"
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if args.part and (unknown := set(args.part) - {*OF_EVERY_STEP, *OF_ONE_SIZE, *OF_ONE_MODEL}):
        raise ConfigError(f"--part: there is no {', '.join(sorted(unknown))}")
    keep_programs()

    def is_measured(job: Job) -> bool:
        if (found := results.get(job.key)) is None:
            return False
        same = found["settings"]["blocks"] == preset(job.model).with_blocks(args.blocks).dit.num_layers
        return same and (not args.trace or bool(found["parts"][0]["kernels"]))

    left = [] if args.table else [job for job in jobs(args) if not is_measured(job)]
    for model, of_model in itertools.groupby(left, key=lambda job: job.model):
        engine = DeviceEngine.random(preset(model).with_blocks(args.blocks), dtype="bfloat16")
        ceiling = None
        for _, group in itertools.groupby(of_model, key=lambda job: (job.height, job.width)):
            of_size = list(group)
            if time.monotonic() - started > args.budget:
                break
            say(f"{model} {of_size[0].height}x{of_size[0].width}: compiling")
            began = time.monotonic()
            engine.prepare(Bench.of(engine, of_size[0].cfg).spec, [job.steps for job in of_size])
            engine.params(of_size[0].cfg)
            say(f"compiled after {time.monotonic() - began:.1f} s")
            ceiling = measured(engine.mesh.home, engine.dtype, ceiling)
            for job in of_size:
                if time.monotonic() - started > args.budget:
                    break
                trace = args.out / "trace" / job.key.replace(" ", "_") if args.trace else None
                name = "stream" if job.part == "stream-taehv" else job.part
                bench = Bench.of(engine, job.cfg)
                part = measure(bench, name, REPEATS, lambda rounds: lambda: None, None, trace)
                report = Report(settings(bench, f"random:{model}"), ceiling, (part,))
                say(text(report))
                results[job.key] = report.to_dict()
                files.write_json(file, results)
                (args.out / "results.md").write_text(table(results))
    (args.out / "results.md").write_text(table(results))
    say(f"{args.out / 'results.md'}: {len(results)} parts")


def table(results: dict[str, Any]) -> str:
    """Returns all results as one Markdown table."""
    lines = [
        "| model | size | steps | part | ms | from | to | handed over ms | frames/s | FLOP/s | of ceiling |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, report in results.items():
        model, size, steps, name = key.split()
        part = report["parts"][0]
        total, ms = part["total_s"], lambda seconds: f"{1e3 * seconds:.2f}"
        share = f"{100 * part['share_of_ceiling']:.0f} %" if "share_of_ceiling" in part else ""
        rate = f"{si(part['work']['flops'] / total['median'])}" if part["work"] else ""
        speed = f"{part['frames'] / total['median']:.1f}" if part["frames"] else ""
        times = (ms(total["median"]), ms(total["least"]), ms(total["most"]), ms(part["handed_s"]["median"]))
        lines.append(f"| {' | '.join((model, size, steps, name, *times, speed, rate, share))} |")
    if results:
        last = list(results.values())[-1]
        s, ceiling = last["settings"], last["ceiling"]
        lines += [
            "",
            f"{s['device']}, {s['dtype']}, jax {s['jax']}, `XLA_FLAGS={s['xla_flags']}`; ceiling "
            f"{si(ceiling['flops'])}FLOP/s (matrix product), {si(ceiling['memory_bandwidth'])}B/s (copy)",
        ]
    return "\n".join(lines) + "\n"


def say(line: str) -> None:
    """Tells how far it is."""
    print(line, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
