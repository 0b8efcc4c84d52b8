"""Images made here: a test clip, two frames side by side, contact sheets."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from svd2_jax import files
from svd2_jax.config import check_whole
from svd2_jax.text import shortened

CAPTION_HEIGHT = 32  # pixels of a caption below a frame


def synthetic_clip(frames: int, height: int, width: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Returns `frames` uint8 frames [H, W, 3] of a small moving scene, the same for the same arguments.

    A colour gradient and soft stripes pan slowly behind a few discs and boxes that drift, turn back at the
    borders and keep their colour: slow motion, fast motion, edges and flat areas, for demos and tests.

    Args:
      frames: length T.
      height: pixels.
      width: pixels.
      seed: chooses colours, shapes and paths.

    Raises:
      ConfigError: one of them is no whole number, or negative.
    """
    for name, value, least in (
        ("frames", frames, 0),
        ("height", height, 1),
        ("width", width, 1),
        ("seed", seed, 0),
    ):
        check_whole(name, value, least)
    return _scene(frames, height, width, seed)


def _scene(frames: int, height: int, width: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = 5
    corners = rng.uniform(40, 215, (2, 2, 3)).astype(np.float32)  # colours of the gradient's corners
    colours = rng.uniform(0, 255, (shapes, 3)).astype(np.float32)
    radii = (rng.uniform(0.07, 0.16, shapes) * min(height, width)).astype(np.float32)
    starts = rng.uniform(0, 2, (shapes, 2))
    speeds = rng.uniform(0.01, 0.04, (shapes, 2)) * rng.choice([-1, 1], (shapes, 2))
    pan = float(rng.uniform(0.004, 0.01))
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    v, u = (y / max(height - 1, 1))[..., None], (x / max(width - 1, 1))[..., None]

    for t in range(frames):
        across = 0.5 - 0.5 * np.cos(np.pi * (u + pan * t))  # periodic, so the camera can pan for ever
        stripes = 18 * np.sin(2 * np.pi * (4 * (u + 2 * pan * t) + 2 * v))
        top = corners[0, 0] * (1 - across) + corners[0, 1] * across
        bottom = corners[1, 0] * (1 - across) + corners[1, 1] * across
        picture = top * (1 - v) + bottom * v + stripes
        for i in range(shapes):
            phase = starts[i] + speeds[i] * t
            bounce = (1 - np.abs(phase % 2 - 1)).astype(np.float32)  # there and back again in [0, 1]
            dy, dx = y - bounce[0] * height, x - bounce[1] * width
            distance = np.hypot(dy, dx) if i % 2 == 0 else np.maximum(np.abs(dy), np.abs(dx))
            inside = np.clip(radii[i] - distance + 0.5, 0, 1)[..., None]  # one pixel of soft edge
            picture = picture * (1 - inside) + colours[i] * inside
        yield np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def side_by_side(left: np.ndarray, right: np.ndarray, caption: str, scale: int) -> np.ndarray:
    """Returns two frames of one size beside each other, each pixel `scale` wide, and a line of text below.

    Args:
      left: uint8 [H, W, 3].
      right: uint8 [H, W, 3].
      caption: cut where it is too long.
      scale: pixels for each pixel, smoothly.

    Returns:
      uint8 [H * scale + CAPTION_HEIGHT, 2 * W * scale, 3].
    """
    height, width = left.shape[:2]
    picture = Image.fromarray(np.concatenate([left, right], axis=1))
    picture = picture.resize((2 * width * scale, height * scale), Image.Resampling.BICUBIC)
    whole = Image.new("RGB", (picture.width, picture.height + CAPTION_HEIGHT), "black")
    whole.paste(picture, (0, 0))
    font = ImageFont.load_default(CAPTION_HEIGHT * 0.6)
    draw = ImageDraw.Draw(whole)
    caption = shortened(caption, whole.width, lambda text: draw.textlength(text, font))
    draw.text((whole.width // 2, whole.height - CAPTION_HEIGHT // 2), caption, "white", font, "mm")
    return np.asarray(whole)


def contact_sheet(
    path: str | os.PathLike[str],
    inputs: Sequence[np.ndarray],
    outputs: Sequence[np.ndarray],
    prompts: Mapping[int, str],
    columns: int = 6,
) -> None:
    """Writes a PNG of evenly spaced frames: input above output, the prompt in force as caption.

    Args:
      path: file to write.
      inputs: uint8 frames [H, W, 3].
      outputs: as many frames of the same size.
      prompts: prompt by the frame from which it holds; frame 0 must be there.
      columns: frames shown at most.

    Raises:
      MediaError: the file cannot be written.
    """
    height, width = outputs[0].shape[:2]
    count = min(columns, len(outputs))
    shown = [round(i * (len(outputs) - 1) / max(count - 1, 1)) for i in range(count)]
    gap, caption = 6, 18
    sheet = Image.new("RGB", (count * (width + gap) + gap, 2 * (height + gap) + gap + caption), "white")
    draw = ImageDraw.Draw(sheet)
    for column, frame in enumerate(shown):
        left = gap + column * (width + gap)
        sheet.paste(Image.fromarray(inputs[frame]), (left, gap))
        sheet.paste(Image.fromarray(outputs[frame]), (left, 2 * gap + height))
        prompt = prompts[max(at for at in prompts if at <= frame)]
        text = shortened(f"{frame}: {prompt}", width, draw.textlength)
        draw.text((left, 2 * (gap + height) + gap // 2), text, fill="black")
    files.write_whole(Path(path), sheet.save)
