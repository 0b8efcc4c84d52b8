"""Writes clips with targets for `svd2 eval`: moving scenes, what each style makes of them, and prompts.

python scripts/make_eval_clips.py --out clips                # 8 clips of 49 frames, of scenes not trained on
python scripts/make_eval_clips.py --out clips --clips 2 --frames 25 --style sepia --style comic

The same options give the same frames. Videos are FFV1 in Matroska files, which keep every pixel as it was. Needs
pip install "svd2-jax[train]".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.video.stream import VideoStream
from tqdm import tqdm

from svd2_jax import files
from svd2_jax.command import exit_code
from svd2_jax.errors import ConfigError, MediaError
from svd2_jax.evaluate.clips import INPUT, PROMPTS
from tiny_model import phrasings, scenes
from tiny_model.styles import STYLES, apply_style

RATE_HZ = 16  # that Wan2.1 was trained at
PHRASINGS = 24  # of each style
SUFFIX = ".mkv"


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the folder and returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FOLDER", help="folder to write; new or empty"
    )
    parser.add_argument("--split", choices=("held_out", "train"), default="held_out",
                        help="of scenes and phrasings (default %(default)s)")  # fmt: skip
    parser.add_argument("--clips", type=int, default=8, metavar="N", help="scenes (default %(default)s)")
    parser.add_argument(
        "--frames", type=int, default=49, metavar="N", help="of each clip (default %(default)s)"
    )
    parser.add_argument("--height", type=int, default=96, help="pixels (default %(default)s)")
    parser.add_argument("--width", type=int, default=160, help="pixels (default %(default)s)")
    parser.add_argument("--style", action="append", default=[], metavar="NAME",
                        help=f"may be given several times (default: all of {', '.join(STYLES)})")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the first scene (default %(default)s)")
    args = parser.parse_args(argv)
    return exit_code(lambda: write(args), "interrupted; the folder is not complete")


def write(args: argparse.Namespace) -> None:
    """Writes the folder; raises Svd2Error on bad input."""
    for name, least in (("clips", 1), ("frames", 2), ("seed", 0)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if min(args.height, args.width) < 16 or args.height % 16 or args.width % 16:
        raise ConfigError(f"height and width must be multiples of 16, got {args.height}x{args.width}")
    # What changes nothing comes last: the first style is what a long stream is re-drawn to.
    styles = list(dict.fromkeys(args.style)) or sorted(STYLES, key=lambda name: name == "unchanged")
    for style in styles:
        if style not in STYLES:
            raise ConfigError(f"unknown style {style!r}; known: {', '.join(STYLES)}")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ConfigError(f"{args.out}: is there and not empty; name a new folder")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise MediaError(f"{args.out}: cannot be made ({e.strerror})") from e
    rng = np.random.default_rng(args.seed)
    prompts = {
        style: list(dict.fromkeys(phrasings.sample(style, args.split, rng) for _ in range(PHRASINGS)))
        for style in styles
    }
    for number in tqdm(range(args.clips), unit="clip", file=sys.stderr):
        seed = args.seed + number
        clip = scenes.clip(scenes.make_scene(seed, args.split), args.frames, args.height, args.width)
        folder = args.out / f"scene_{seed:03d}"
        folder.mkdir()
        write_video(folder / f"{INPUT}{SUFFIX}", clip)
        for style in styles:
            write_video(folder / f"{style}{SUFFIX}", apply_style(style, clip))
    text = json.dumps(prompts, indent=1) + "\n"
    files.write_whole(args.out / PROMPTS, lambda path: path.write_text(text))  # last: now it is complete
    print(f"{args.out}: {args.clips} clips of {args.frames} frames, {len(styles)} styles")


def write_video(path: Path, frames: np.ndarray) -> None:
    """Writes uint8 frames [T, H, W, 3] so that they are read back exactly as they are."""

    def encode(part: Path) -> None:
        with av.open(str(part), "w") as container:
            stream = cast(VideoStream, container.add_stream("ffv1", rate=Fraction(RATE_HZ)))
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "bgr0"  # RGB, not turned into luma and colour differences
            for number, frame in enumerate(frames):
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="bgr0")
                picture.pts, picture.time_base = number, Fraction(1, RATE_HZ)
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))

    files.write_whole(path, encode)


if __name__ == "__main__":
    sys.exit(main())
