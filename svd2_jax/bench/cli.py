"""The command line of the benchmarks, for `svd2 bench`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tqdm import tqdm

from svd2_jax import files, progress
from svd2_jax.config import StreamConfig
from svd2_jax.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from svd2_jax.bench.benchmarks import Bench
    from svd2_jax.bench.reference import ReferenceProcess
    from svd2_jax.bench.report import Measured, Report
    from svd2_jax.config import ModelConfig
    from svd2_jax.engine.engine import DeviceEngine

PART_NAMES = ("text", "encode", "tick", "decode-wan", "decode-taehv", "stream", "dispatch")
FIRST_FRAME = "first-frame"

EXAMPLES = """\
examples:
  svd2 bench --checkpoint random:wan-1.3b --dtype bfloat16 --json bench.json --chart bench.png
  svd2 bench --checkpoint ckpt --height 512 --width 512 --steps 4 --part tick --part stream

  svd2 bench --checkpoint random:golden --part tick --trace profile

  # four blocks of the 1.3B model: its real width on a machine with little memory
  svd2 bench --checkpoint random:wan-1.3b --blocks 4 --height 240 --width 416 --repeats 5

  # the PyTorch implementation on the same weights, inputs and threads, in turn with ours
  bash scripts/reference_venv.sh reference
  svd2 bench --checkpoint random:golden --height 96 --width 160 --against reference --reference reference

parts: text (a prompt), encode (frames of a chunk to latents), tick (the transformer, all rows), decode-wan,
decode-taehv, stream (a chunk through a session, end to end), dispatch (a tick of the same structure with next to no
arithmetic), first-frame (from the start of the process). Every part runs the programs that a session runs.

`of ceiling` is the least time that this device allows, by a large matrix product and a large copy measured in the
same run, as a share of the time taken. Arithmetic and memory traffic are counted from the programs' traces
(matrix products and convolutions, each operand once); the JSON also has the compiler's own counts.
"""


class Model(Protocol):
    """The model that the options name."""

    def load(self, converted: Path | None = None) -> DeviceEngine:
        """Opens it, or a checkpoint in its place."""
        ...

    def random_sizes(self) -> ModelConfig:
        """Returns its sizes; raises ConfigError unless its weights are random."""
        ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmarks' own options to a parser."""
    parser.add_argument(
        "--part", action="append", default=[], choices=(*PART_NAMES, FIRST_FRAME),
        help="measure only this part; may be given several times (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=int, default=10, metavar="N",
        help="samples of each part, behind a warm-up (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--blocks", type=int, metavar="N", help="take only the transformer's first N blocks (default: all)"
    )
    parser.add_argument(
        "--restart", action="store_true",
        help="use compiled programs that an earlier run kept, as other commands do (default: start cold)",
    )  # fmt: skip
    parser.add_argument(
        "--against", choices=("reference",),
        help="also run the PyTorch implementation on the same random weights, inputs and threads, in turn with ours",
    )  # fmt: skip
    parser.add_argument(
        "--reference", type=Path, metavar="FOLDER",
        help="its virtual environment, made by scripts/reference_venv.sh",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all numbers there, each sample included"
    )
    parser.add_argument("--chart", type=Path, metavar="FILE.png", help="draw there where the time goes")
    parser.add_argument(
        "--trace", type=Path, metavar="FOLDER",
        help="also profile a few runs of each part: its costliest kernels are listed; the profiler's files stay there",
    )  # fmt: skip


def run(
    args: argparse.Namespace,
    cfg: StreamConfig,
    model: Model,
    say: Callable[[str], None],
) -> int:
    """Measures as the parsed options say and returns the exit code; raises Svd2Error on bad input.

    Args:
      args: the parsed options.
      cfg: what the stream computes.
      model: what is measured.
      say: tells how far it is.
    """
    if args.json:
        files.check_target(args.json)
    if args.chart:
        files.check_chart(args.chart)
    files.check_apart([("--json", args.json), ("--chart", args.chart)], [("--config", args.config)])
    if args.trace:
        try:
            args.trace.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(f"{args.trace}: cannot be made a folder for profiles ({e.strerror})") from e
    if (args.against is None) != (args.reference is None):
        raise ConfigError("--against reference needs --reference FOLDER, and the other way round")
    if args.repeats < 1:
        raise ConfigError(f"--repeats must be at least 1, got {args.repeats}")
    from svd2_jax.bench.report import text

    report = _measure(args, cfg, model, say)
    print(text(report))
    if args.json:
        files.write_json(args.json, report.to_dict(), allow_nan=False)
    if args.chart:
        from svd2_jax.bench.chart import draw

        draw(args.chart, report)
    return 0


def _measure(args: argparse.Namespace, cfg: StreamConfig, model: Model, say: Callable[[str], None]) -> Report:
    from svd2_jax.bench.benchmarks import first_frame

    def timed(load: Callable[[], DeviceEngine]) -> tuple[Bench, dict[str, float]]:
        with progress.shown("getting ready", say):
            return first_frame(load, cfg, say)

    if args.against is None:
        bench, phases = timed(model.load)
        return _report(args, bench, phases, say)
    from svd2_jax.bench.reference import ReferenceProcess

    sizes = model.random_sizes()
    with ReferenceProcess(args.reference) as reference:
        say("the reference makes random weights")
        converted = reference.make_checkpoint(sizes, args.dtype or "float32")
        bench, phases = timed(lambda: model.load(converted))
        return _report(args, bench, phases, say, reference)


def _report(
    args: argparse.Namespace,
    bench: Bench,
    phases: dict[str, float],
    say: Callable[[str], None],
    reference: ReferenceProcess | None = None,
) -> Report:
    from svd2_jax.bench.ceiling import measured
    from svd2_jax.bench.report import Report
    from svd2_jax.bench.run import cpu_threads, measure, settings

    engine = bench.engine
    device = engine.mesh.home
    against = None
    if reference is not None:
        say("the reference loads them")
        against = f"reference, {reference.load(bench, cpu_threads())}"
    say("measuring the ceiling")
    ceiling = measured(device, engine.dtype)
    parts: list[Measured] = []
    for name in PART_NAMES:
        if args.part and name not in args.part:
            continue
        with ExitStack() as line:
            line.enter_context(progress.shown(f"getting {name} ready", say))

            def started(rounds: int, name: str = name, line: ExitStack = line) -> Callable[[], object]:
                line.close()
                bar = tqdm(desc=name, total=rounds, unit="run", dynamic_ncols=True)
                return line.enter_context(bar).update

            try:
                parts.append(measure(bench, name, args.repeats, started, reference, args.trace))
            except CheckpointError as e:
                if args.part:
                    raise
                say(f"note: {name} is left out: {e}")
    ceiling = measured(device, engine.dtype, ceiling)
    wanted = not args.part or FIRST_FRAME in args.part
    where = settings(bench, args.checkpoint, args.attention, against)
    return Report(where, ceiling, tuple(parts), phases if wanted else {})
