"""The command line of the benchmarks, for `svd2 bench`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from svd2_jax import files
from svd2_jax.config import StreamConfig
from svd2_jax.errors import CheckpointError, ConfigError, MediaError

if TYPE_CHECKING:
    from svd2_jax.bench.report import Measured, Report
    from svd2_jax.engine.engine import DeviceEngine

PART_NAMES = ("text", "encode", "tick", "decode-wan", "decode-taehv", "stream", "dispatch")
FIRST_FRAME = "first-frame"

EXAMPLES = """\
examples:
  svd2 bench --checkpoint random:wan-1.3b --dtype bfloat16 --json bench.json --picture bench.png
  svd2 bench --checkpoint ckpt --height 512 --width 512 --steps 4 --part tick --part stream

  # four blocks of the 1.3B model: its real width on a machine with little memory
  svd2 bench --checkpoint random:wan-1.3b --blocks 4 --height 240 --width 416 --repeats 5

parts: text (a prompt), encode (frames of a chunk to latents), tick (the transformer, all rows), decode-wan,
decode-taehv, stream (a chunk through a session, end to end), dispatch (a tick of the same structure with next to no
arithmetic), first-frame (from the start of the process). Every part runs the programs that a session runs.

`of ceiling` is the least time that this device allows, by a large matrix product and a large copy measured in the
same run, as a share of the time taken. Arithmetic and memory traffic are counted from the programs' traces
(matrix products and convolutions, each operand once); the JSON also has the compiler's own counts.
"""


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
        "--blocks", type=int, metavar="N", help="take only so many of the transformer's blocks (default: all)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all numbers there, each sample included"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw there where the time goes")


def run(
    args: argparse.Namespace,
    cfg: StreamConfig,
    load: Callable[[], DeviceEngine],
    say: Callable[[str], None],
) -> int:
    """Measures as the parsed options say and returns the exit code; raises Svd2Error on bad input.

    Args:
      args: the parsed options.
      cfg: what the stream computes.
      load: opens the model.
      say: tells how far it is.
    """
    for path in filter(None, (args.json, args.picture)):
        files.check_target(path)
    if args.picture and args.picture.suffix.lower() != ".png":
        raise MediaError(f"{args.picture}: a picture's name ends in .png")
    if args.repeats < 1:
        raise ConfigError(f"--repeats must be at least 1, got {args.repeats}")
    from svd2_jax.bench.report import text

    report = _measure(args, cfg, load, say)
    print(text(report))
    if args.json:
        line = json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n"
        files.write_whole(args.json, lambda path: path.write_text(line))
    if args.picture:
        from svd2_jax.bench.picture import draw

        files.write_whole(args.picture, lambda path: draw(path, report))
    return 0


def _measure(
    args: argparse.Namespace, cfg: StreamConfig, load: Callable[[], DeviceEngine], say: Callable[[str], None]
) -> Report:
    import jax

    from svd2_jax.bench.ceiling import measured
    from svd2_jax.bench.parts import first_frame
    from svd2_jax.bench.report import Report, Settings

    names = [name for name in PART_NAMES if name in args.part or not args.part]
    bench, phases = first_frame(load, cfg, say)
    engine = bench.engine
    device = engine.meshes[0].home
    say("measuring the ceiling")
    ceiling = measured(device, engine.dtype)
    parts: list[Measured] = []
    for name in names:
        try:
            parts += _with_bar(bench, name, args.repeats)
        except CheckpointError as e:
            if args.part:
                raise
            say(f"note: {name} is left out: {e}")
    ceiling = measured(device, engine.dtype, ceiling)
    settings = Settings(
        checkpoint=args.checkpoint,
        model=engine.model.name,
        blocks=engine.model.dit.num_layers,
        stream=cfg.to_dict(),
        dtype=engine.dtype.name,
        attention=args.attention,
        platform=device.platform,
        device=device.device_kind,
        threads=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        jax=jax.__version__,
        xla_flags=os.environ.get("XLA_FLAGS", ""),
    )
    wanted = not args.part or FIRST_FRAME in args.part
    return Report(settings, ceiling, tuple(parts), phases if wanted else {})


def _with_bar(bench, name: str, repeats: int) -> list[Measured]:
    from svd2_jax.bench.run import measure

    with tqdm(desc=name, unit="run", dynamic_ncols=True) as bar:

        def progress(_: str, rounds: int) -> Callable[[], object]:
            bar.reset(total=rounds)
            return bar.update

        return list(measure(bench, [name], repeats, progress))
