"""`svd2 eval`: measure the quality of the pictures on a folder of clips.

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

from __future__ import annotations

import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from svd2_jax import files, progress
from svd2_jax.cli import device
from svd2_jax.cli.options import (
    EngineOptions,
    NoiseOptions,
    OptionGroup,
    StreamOptions,
    check_reports,
    option,
    say,
)
from svd2_jax.config import StreamConfig
from svd2_jax.errors import ConfigError

DEFAULT_RATE_HZ = 16.0  # that Wan2.1 was trained at


@dataclass(frozen=True, kw_only=True)
class Options(OptionGroup):
    """What `svd2 eval` takes."""

    engine: EngineOptions
    clips: Path = option("clips to re-draw", required=True, metavar="FOLDER")
    prompt: tuple[str, ...] = option(
        "what to re-draw clips without targets to; given several times, every clip is re-drawn once to each"
    )
    style: tuple[str, ...] = option(
        "of clips with targets, take only this style; may be given several times", metavar="NAME"
    )
    frames: int | None = option("frames to take of each clip (default: all)")
    minutes: int = option(
        "also play the first clip forwards and backwards for N minutes, and tell what drifts (default: no)",
        0,
    )
    fps: float = option("rate at which minutes and delays are told (default %(default)g)", DEFAULT_RATE_HZ)
    clip: Path | None = option(
        "CLIP exported to ONNX, which judges how frames fit their prompt (default: none does)",
        metavar="FOLDER",
    )
    json: Path | None = option("write all numbers there")
    chart: Path | None = option("draw samples and numbers there", metavar="FILE.png")
    no_progress: bool = option("show no progress bar", False)
    noise: NoiseOptions
    stream: StreamOptions


def run(options: Options) -> int:
    """Evaluates and prints a report."""
    cfg = options.stream.stream(options.engine.sizes)
    options.engine.note_untrained(options.noise.noise_scale, options.prompt)
    return device.device_errors(_evaluate, options, cfg)


def _evaluate(options: Options, cfg: StreamConfig) -> int:
    from tqdm import tqdm

    from svd2_jax.engine.autoencode import rebuild
    from svd2_jax.evaluate import clips
    from svd2_jax.evaluate.clip_model import ClipModel
    from svd2_jax.evaluate.report import Report, Settings, table
    from svd2_jax.evaluate.run import EvaluationPlan, check_clips, evaluate

    _check(options)
    folder = clips.read_folder(options.clips, options.prompt, options.style)
    read = [("the clip", path) for clip in folder.clips for path in (clip.input, *clip.targets)]
    check_reports(options.json, options.chart, [("--config", options.stream.config), *read])
    spec = options.noise.spec(folder.styles[0].phrasing(0), cfg)
    judge = ClipModel(options.clip) if options.clip else None
    plan = EvaluationPlan(folder, spec, options.fps, options.frames, options.minutes, judge)
    total = check_clips(plan)
    engine = device.load_engine(options.engine, device.meshes()[0])
    with progress.shown("getting ready", say):
        engine.open(spec).close()
    with tqdm(
        total=total, unit="frame", desc="evaluating", dynamic_ncols=True, disable=options.no_progress,
        file=sys.stderr,
    ) as bar:  # fmt: skip
        found = evaluate(engine, functools.partial(rebuild, engine, cfg), plan, bar.update)
    settings = Settings(
        options.engine.checkpoint, str(options.clips), cfg.to_dict(), spec.noise_scale, spec.seed, options.fps
    )
    styles = tuple(style.name for style in folder.styles if style.name is not None)
    report = Report(settings, styles, found.streams, found.rebuilt, found.changes, found.long)
    print(table(report))
    if options.json:
        files.write_json(options.json, report.to_dict(), allow_nan=False)
    if options.chart:
        from svd2_jax.evaluate.chart import draw

        draw(options.chart, report, found.samples)
    return 0


def _check(options: Options) -> None:
    """Raises an error for what is out of its range."""
    if options.frames is not None and options.frames < 2:
        raise ConfigError(f"--frames must be at least 2, got {options.frames}")
    if options.minutes < 0:
        raise ConfigError(f"--minutes must be at least 0, got {options.minutes}")
    if not 0 < options.fps < math.inf:
        raise ConfigError(f"--fps must be above 0, got {options.fps:g}")
