"""The command line of the evaluation, for `svd2 eval`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from svd2_jax import files, progress
from svd2_jax.api import Engine, SessionSpec
from svd2_jax.config import StreamConfig
from svd2_jax.errors import ConfigError

if TYPE_CHECKING:
    from svd2_jax.evaluate.run import Rebuild

DEFAULT_RATE_HZ = 16.0  # that Wan2.1 was trained at

EXAMPLES = """\
examples:
  python scripts/make_eval_clips.py --out clips --split held_out --clips 8 --frames 49
  svd2 eval --checkpoint ckpt --clips clips --height 96 --width 160 --json eval.json --chart eval.png
  svd2 eval --checkpoint ckpt --clips clips --style sepia --style comic --minutes 10 --json eval.json

  # videos of your own, without targets
  svd2 eval --checkpoint ckpt --clips videos --prompt "a pencil sketch" --prompt "an oil painting" --frames 81
  svd2 eval --checkpoint ckpt --clips videos --prompt "a pencil sketch" --clip clip-vit-base-patch32

A folder of clips holds video files, which are re-drawn to each --prompt; or, with a file prompts.json
({"STYLE": ["phrasing", ...]}), folders NAME with input.mp4 and STYLE.mp4, what the style should make of it.
Each clip is given one phrasing of each style, in turn. docs/evaluation.md defines every number.
Needs pip install "svd2-jax[eval]".
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the evaluation's own options to a parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument("--clips", required=True, type=Path, metavar="FOLDER", help="clips to re-draw")
    parser.add_argument(
        "--prompt", action="append", default=[],
        help="what to re-draw clips without targets to; given several times, every clip is re-drawn once to each",
    )  # fmt: skip
    parser.add_argument(
        "--style", action="append", default=[], metavar="NAME",
        help="of clips with targets, take only this style; may be given several times",
    )  # fmt: skip
    parser.add_argument("--frames", type=int, metavar="N", help="frames to take of each clip (default: all)")
    parser.add_argument(
        "--minutes", type=int, default=0, metavar="N",
        help="also play the first clip forwards and backwards for N minutes, and tell what drifts (default: no)",
    )  # fmt: skip
    parser.add_argument(
        "--fps", type=float, default=DEFAULT_RATE_HZ, metavar="X",
        help="rate at which minutes and delays are told (default %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--clip", type=Path, metavar="FOLDER",
        help="CLIP exported to ONNX, which judges how frames fit their prompt (default: none does)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--chart", type=Path, metavar="FILE.png", help="draw samples and numbers there")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")


def run(args: argparse.Namespace, cfg: StreamConfig, open_model: Callable[[], tuple[Engine, Rebuild]]) -> int:
    """Evaluates as the parsed options say and returns the exit code; raises Svd2Error on bad input.

    Args:
      args: the parsed options.
      cfg: what the streams compute.
      open_model: loads the model; returns it, and what its VAE alone makes of a clip.
    """
    from svd2_jax.evaluate import clips
    from svd2_jax.evaluate.clip_model import ClipModel
    from svd2_jax.evaluate.report import Report, Settings, table
    from svd2_jax.evaluate.run import EvaluationPlan, check_clips, evaluate

    if args.json:
        files.check_target(args.json)
    if args.chart:
        files.check_chart(args.chart)
    if args.frames is not None and args.frames < 2:
        raise ConfigError(f"--frames must be at least 2, got {args.frames}")
    if args.minutes < 0:
        raise ConfigError(f"--minutes must be at least 0, got {args.minutes}")
    if not 0 < args.fps < math.inf:
        raise ConfigError(f"--fps must be above 0, got {args.fps:g}")
    folder = clips.read_folder(args.clips, args.prompt, args.style)
    read = [("the clip", path) for clip in folder.clips for path in (clip.input, *clip.targets)]
    files.check_apart([("--json", args.json), ("--chart", args.chart)], [("--config", args.config), *read])
    spec = SessionSpec(folder.styles[0].phrasing(0), cfg, args.noise_scale, args.seed)
    judge = ClipModel(args.clip) if args.clip else None
    plan = EvaluationPlan(folder, spec, args.fps, args.frames, args.minutes, judge)
    total = check_clips(plan)
    engine, rebuild = open_model()
    with progress.shown("getting ready", lambda text: print(text, file=sys.stderr, flush=True)):
        engine.open(spec).close()
    with tqdm(
        total=total, unit="frame", desc="evaluating", dynamic_ncols=True, disable=args.no_progress, file=sys.stderr
    ) as bar:  # fmt: skip
        found = evaluate(engine, rebuild, plan, bar.update)
    settings = Settings(
        args.checkpoint, str(args.clips), cfg.to_dict(), args.noise_scale, args.seed, args.fps
    )
    styles = tuple(style.name for style in folder.styles if style.name is not None)
    report = Report(settings, styles, found.streams, found.rebuilt, found.changes, found.long)
    print(table(report))
    if args.json:
        files.write_json(args.json, report.to_dict(), allow_nan=False)
    if args.chart:
        from svd2_jax.evaluate.chart import draw

        draw(args.chart, report, found.samples)
    return 0
