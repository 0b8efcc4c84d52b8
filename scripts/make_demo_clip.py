"""Makes the clip that `svd2 demo` re-draws: a camera over a photograph of a cat (scikit-image's `chelsea`, CC0).

python scripts/make_demo_clip.py --out svd2_jax/assets/demo.mp4
"""

import argparse
import math
from pathlib import Path

from PIL import Image

from svd2_jax import media
from tiny_model import scenes
from tiny_model.scenes import Scene, Sine

FRAMES, FPS, HEIGHT, WIDTH = 96, 16.0, 192, 320


def main() -> None:
    """Writes it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("svd2_jax/assets/demo.mp4"))
    args = parser.parse_args()
    turn = 2 * math.pi / FRAMES
    scene = Scene(
        levels=scenes.pyramid(Image.fromarray(scenes.photograph("chelsea"))),
        x=Sine(0.5, 0.12, turn, -math.pi / 2),
        y=Sine(0.46, 0.06, 2 * turn, 0.0),
        zoom=Sine(2.1, 0.45, turn, math.pi / 2),
        angle=Sine(0.0, 0.05, turn, 0.0),
        shapes=(),
    )
    with media.VideoWriter(args.out, FPS, HEIGHT, WIDTH) as writer:
        for number in range(FRAMES):
            writer.write(scene.frame(number, HEIGHT, WIDTH)[None])
    print(f"{args.out}: {FRAMES} frames, {args.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
