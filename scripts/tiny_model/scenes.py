"""Endless clips of moving scenes, made from a seed: photographs under a moving camera, and procedural ones.

Photographs come with scikit-image and scikit-learn (`pip install "svd2-jax[train]"`); see `PHOTOGRAPHS` for what is
in them and their licences. Scenes of the split "held_out" share no photograph with those of "train", and no seed.
"""

from __future__ import annotations

import functools
import importlib
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from svd2_jax.errors import ConfigError
from tiny_model import Split

PHOTOGRAPHS: dict[Split, tuple[str, ...]] = {
    # As scikit-image's docstrings say: public domain (astronaut, rocket, hubble_deep_field), CC0 (brick, grass, gravel,
    # retina), no known copyright restrictions (coins, immunohistochemistry); nothing is said of moon and
    # motorcycle_left (Middlebury 2014) beyond the package's BSD licence. scikit-learn's two are CC BY 2.0.
    "train": (
        "astronaut", "rocket", "moon", "hubble_deep_field", "brick", "grass", "gravel", "retina",
        "motorcycle_left", "coins", "immunohistochemistry", "china.jpg", "flower.jpg",
    ),
    "held_out": ("chelsea", "coffee", "camera"),  # all three CC0
}  # fmt: skip
PHOTOGRAPH_SHARE = 0.6  # of all scenes
TEXTURE_SIZE = 512  # pixels of a procedural background in both directions
NOMINAL_HEIGHT = 96.0  # of a picture, in pixels, at which a zoom of 1 shows a texture's pixels one to one
HELD_OUT_OFFSET = 1 << 40  # added to the seeds of held-out scenes


@dataclass(frozen=True)
class Sine:
    """A smooth motion without an end: mean + swing * sin(rate * t + phase), t in frames."""

    mean: float
    swing: float
    rate: float
    phase: float

    def at(self, t: float) -> float:
        return self.mean + self.swing * math.sin(self.rate * t + self.phase)


@dataclass(frozen=True)
class _Shape:
    """A flat or striped figure that moves over the background; sizes and places in pixels of the texture."""

    kind: Literal["ellipse", "box", "polygon"]
    x: Sine
    y: Sine
    size: Sine
    aspect: float
    angle: Sine
    corners: int
    colour: tuple[int, int, int]
    stripe: tuple[int, int, int] | None


@dataclass(frozen=True)
class Scene:
    """A picture larger than what is seen of it, a camera that moves over it, and figures in front.

    Attributes:
      levels: the background, uint8 RGB, and its halves, quarters, ... for smooth shrinking.
      x: where the camera looks, as a share of the background's width.
      y: the same of its height.
      zoom: background pixels per picture pixel at the nominal height.
      angle: of the camera, radians.
      shapes: figures, back to front.
    """

    levels: tuple[Image.Image, ...]
    x: Sine
    y: Sine
    zoom: Sine
    angle: Sine
    shapes: tuple[_Shape, ...]

    def frame(self, number: float, height: int, width: int) -> np.ndarray:
        """Returns frame `number` (0, 1, ..., or between two of them) of any size, uint8 [H, W, 3].

        Args:
          number: of the frame; motions have no end.
          height: pixels.
          width: pixels.
        """
        zoom = self.zoom.at(number) * NOMINAL_HEIGHT / height
        level = min(max(0, math.floor(math.log2(max(zoom, 1.0)))), len(self.levels) - 1)
        full_w, full_h = self.levels[0].size
        centre = np.array([self.x.at(number) * full_w, self.y.at(number) * full_h])
        turn = self.angle.at(number)
        axes = zoom * np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        # Stay inside the background where it is large enough for that.
        reach = np.abs(axes) @ np.array([width / 2, height / 2])
        inside = np.minimum(reach, np.array([full_w, full_h]) / 2)
        centre = np.clip(centre, inside, np.array([full_w, full_h]) - inside)
        shrink = 2.0**-level
        offset = centre - axes @ np.array([width / 2, height / 2])
        rows = np.concatenate([axes, offset[:, None]], axis=1) * shrink
        picture = self.levels[level].transform(
            (width, height), Image.Transform.AFFINE, tuple(rows.reshape(-1)), Image.Resampling.BILINEAR
        )
        if self.shapes:
            picture = self._with_shapes(picture, number, np.linalg.inv(axes), centre)
        return np.asarray(picture)

    def _with_shapes(self, picture: Image.Image, number: float, to_pixels: np.ndarray, centre: np.ndarray):
        width, height = picture.size
        large = picture.resize((2 * width, 2 * height), Image.Resampling.BILINEAR)  # smooth edges
        draw = ImageDraw.Draw(large)
        middle = np.array([width / 2, height / 2])
        for shape in self.shapes:
            outline = _outline(shape, number)
            points = 2 * ((outline - centre) @ to_pixels.T + middle)
            draw.polygon([(float(x), float(y)) for x, y in points], fill=shape.colour)
            if shape.stripe:
                own = points.mean(axis=0)
                inner = own + 0.55 * (points - own)
                draw.polygon([(float(x), float(y)) for x, y in inner], fill=shape.stripe)
        return large.resize((width, height), Image.Resampling.BOX)


def make_scene(seed: int, split: Split = "train") -> Scene:
    """Returns the scene of a seed; the same for the same seed and split.

    Raises:
      ConfigError: scikit-image or scikit-learn, whose photographs are used, is not installed.
    """
    if split not in PHOTOGRAPHS:
        raise ConfigError(f"split must be one of {', '.join(PHOTOGRAPHS)}, got {split!r}")
    rng = np.random.default_rng(seed + (HELD_OUT_OFFSET if split == "held_out" else 0))
    if rng.random() < PHOTOGRAPH_SHARE:
        background = _photograph_background(rng, split)
        shapes = int(rng.integers(1, 4)) if rng.random() < 0.3 else 0
    else:
        background = _procedural_background(rng)
        shapes = int(rng.integers(1, 7))
    width, height = background.size
    # From a close look to nearly all of it; slow and fast cameras.
    widest = min(width / 160.0, height / NOMINAL_HEIGHT)
    zoom = float(np.exp(rng.uniform(np.log(0.5), np.log(max(0.6, 0.9 * widest)))))
    speed = float(np.exp(rng.uniform(np.log(0.004), np.log(0.08))))

    def sine(mean: float, swing: float) -> Sine:
        return Sine(mean, swing, speed * float(rng.uniform(0.6, 1.6)), float(rng.uniform(0, 2 * np.pi)))

    return Scene(
        levels=pyramid(background),
        x=sine(float(rng.uniform(0.35, 0.65)), float(rng.uniform(0.05, 0.35))),
        y=sine(float(rng.uniform(0.35, 0.65)), float(rng.uniform(0.02, 0.25))),
        zoom=sine(zoom, zoom * float(rng.uniform(0.0, 0.25))),
        angle=sine(0.0, float(rng.uniform(0.0, 0.12))),
        shapes=tuple(_random_shape(rng, width, height, zoom) for _ in range(shapes)),
    )


def pyramid(picture: Image.Image) -> tuple[Image.Image, ...]:
    """Returns a picture and its halves, quarters, ... down to a side of less than 64 pixels."""
    levels = [picture]
    while min(levels[-1].size) >= 64:
        levels.append(levels[-1].reduce(2))
    return tuple(levels)


def clip(scene: Scene, frames: int, height: int, width: int, first: int = 0) -> np.ndarray:
    """Returns so many frames of a scene, uint8 [T, H, W, 3], from frame `first` on."""
    return np.stack([scene.frame(first + t, height, width) for t in range(frames)])


@functools.cache
def photograph(name: str) -> np.ndarray:
    """Returns a photograph of `PHOTOGRAPHS`, uint8 [H, W, 3]; raises ConfigError if its package is not installed."""
    try:
        if "." in name:
            picture = importlib.import_module("sklearn.datasets").load_sample_image(name)
        else:
            data = importlib.import_module("skimage.data")
            picture = data.stereo_motorcycle()[0] if name == "motorcycle_left" else getattr(data, name)()
    except ImportError:
        raise ConfigError(
            'scenes are made of photographs that other packages carry; install them: pip install "svd2-jax[train]"'
        ) from None
    if picture.ndim == 2:
        picture = np.repeat(picture[:, :, None], 3, axis=2)
    return np.ascontiguousarray(picture[:, :, :3])


def _photograph_background(rng: np.random.Generator, split: Split) -> Image.Image:
    names = PHOTOGRAPHS[split]
    picture = photograph(names[int(rng.integers(len(names)))]).astype(np.float32) / 255.0
    if rng.random() < 0.5:
        picture = picture[:, ::-1]
    if rng.random() < 0.2:
        picture = picture[:, :, rng.permutation(3)]
    gain = rng.uniform(0.75, 1.25) * rng.uniform(0.85, 1.15, 3)
    picture = np.clip(picture, 0, 1) ** rng.uniform(0.7, 1.4) * gain
    grey = picture.mean(axis=2, keepdims=True)
    picture = grey + (picture - grey) * rng.uniform(0.6, 1.5)
    return Image.fromarray(np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8))


def _procedural_background(rng: np.random.Generator) -> Image.Image:
    """A sky-to-ground gradient, or clouds of two to four colours, with texture."""
    colours = rng.uniform(0, 1, (int(rng.integers(2, 5)), 3)).astype(np.float32)
    roughness = float(rng.uniform(0.3, 0.8))
    height = _fractal(rng, roughness)
    if rng.random() < 0.5:
        ramp = np.linspace(0, 1, TEXTURE_SIZE, dtype=np.float32)
        height = 0.75 * (ramp[:, None] if rng.random() < 0.7 else ramp[None, :]) + 0.25 * height
    where = height * (len(colours) - 1)
    lower = np.clip(where.astype(int), 0, len(colours) - 2)
    mix = np.clip(where - lower, 0, 1)[..., None]
    sharpness = float(rng.choice([1.0, 4.0]))  # smooth, or nearly flat areas with edges between them
    mix = np.clip((mix - 0.5) * sharpness + 0.5, 0, 1)
    picture = colours[lower] * (1 - mix) + colours[lower + 1] * mix
    picture += (_fractal(rng, 0.9)[..., None] - 0.5) * float(rng.uniform(0, 0.35))
    return Image.fromarray(np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8))


def _fractal(rng: np.random.Generator, roughness: float) -> np.ndarray:
    """Noise of all sizes, float32 [S, S] in [0, 1]; each half as large structure is `roughness` times as strong."""
    total = np.zeros((TEXTURE_SIZE, TEXTURE_SIZE), np.float32)
    cells, strength = 4, 1.0
    while cells <= TEXTURE_SIZE // 2:
        grid = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
        total += strength * np.asarray(grid.resize((TEXTURE_SIZE, TEXTURE_SIZE), Image.Resampling.BICUBIC))
        cells, strength = cells * 2, strength * roughness
    low, high = np.quantile(total, [0.01, 0.99])
    return np.clip((total - low) / (high - low), 0, 1)


def _random_shape(rng: np.random.Generator, width: int, height: int, zoom: float) -> _Shape:
    def sine(mean: float, swing: float) -> Sine:
        rate = float(np.exp(rng.uniform(np.log(0.01), np.log(0.12))))
        return Sine(mean, swing, rate, float(rng.uniform(0, 2 * np.pi)))

    def colour() -> tuple[int, int, int]:
        r, g, b = rng.integers(0, 256, 3)
        return int(r), int(g), int(b)

    size = zoom * float(rng.uniform(8, 40))
    kinds: tuple[Literal["ellipse", "box", "polygon"], ...] = ("ellipse", "box", "polygon")
    return _Shape(
        kind=kinds[int(rng.integers(3))],
        x=sine(width * float(rng.uniform(0.3, 0.7)), zoom * float(rng.uniform(5, 70))),
        y=sine(height * float(rng.uniform(0.3, 0.7)), zoom * float(rng.uniform(5, 50))),
        size=sine(size, size * float(rng.uniform(0, 0.3))),
        aspect=float(rng.uniform(0.4, 1.0)),
        angle=Sine(float(rng.uniform(0, 6.3)), float(rng.uniform(0, 3)), float(rng.uniform(0, 0.05)), 0.0),
        corners=int(rng.integers(3, 8)),
        colour=colour(),
        stripe=colour() if rng.random() < 0.5 else None,
    )


def _outline(shape: _Shape, number: float) -> np.ndarray:
    """Returns the corners [N, 2] of a shape in the texture's pixels."""
    if shape.kind == "box":
        unit = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], np.float64)
    else:
        corners = 32 if shape.kind == "ellipse" else shape.corners
        around = np.linspace(0, 2 * np.pi, corners, endpoint=False)
        unit = np.stack([np.cos(around), np.sin(around)], axis=1)
    unit = unit * np.array([1.0, shape.aspect]) * shape.size.at(number)
    turn = shape.angle.at(number)
    turned = unit @ np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    return turned + np.array([shape.x.at(number), shape.y.at(number)])
