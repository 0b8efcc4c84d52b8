"""Clips and latents to train on, made once from a seed and kept in files."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from svd2_jax.errors import ConfigError
from tiny_model import scenes
from tiny_model.styles import STYLES, apply_style

Array = np.ndarray
FARTHEST_FRAME = 1000  # clips start anywhere up to here: motions are periodic and do not get dull


def window_pool(file: Path, scenes_: int, windows: int, frames: int, size: int, seed: int) -> Array:
    """Returns clips of square windows, uint8 [scenes * windows, T, size, size, 3], half of them in a style.

    Args:
      file: where they are kept; read if it is there.
      scenes_: number of scenes.
      windows: clips of each.
      frames: T.
      size: pixels.
      seed: of the first scene.
    """
    jobs = [(seed + i, windows, frames, size) for i in range(scenes_)]
    return _kept(file, (scenes_ * windows, frames, size, size, 3), _windows, jobs)


def latent_pool(
    file: Path,
    encode: Callable[[Array], Array],
    scenes_: int,
    latents: tuple[int, ...],
    frames: int,
    size: tuple[int, int],
    seed: int,
) -> Array:
    """Returns the latents of scenes in all styles, float16 [scenes, styles, N, h, w, C]; kept in a file.

    Args:
      file: where they are kept; read if it is there.
      encode: clips, uint8 [styles, T, H, W, 3] -> latents [styles, N, h, w, C].
      scenes_: number of scenes.
      latents: shape (N, h, w, C) of one clip's.
      frames: T.
      size: (H, W).
      seed: of the first scene.
    """
    jobs = [(seed + i, frames, *size) for i in range(scenes_)]
    shape = (scenes_, len(STYLES), *latents)
    return _kept(file, shape, _all_styles, jobs, np.float16, lambda piece: encode(piece[0])[None])


def _windows(job: tuple[int, int, int, int]) -> Array:
    seed, windows, frames, size = job
    rng, scene, names, clips = np.random.default_rng([seed, 1]), scenes.make_scene(seed), list(STYLES), []
    for number in range(windows):
        clip = scenes.clip(scene, frames, size, size, int(rng.integers(FARTHEST_FRAME)))
        style = names[int(rng.integers(1, len(names)))] if number % 2 else "unchanged"
        clips.append(apply_style(style, clip))
    return np.stack(clips)


def _all_styles(job: tuple[int, int, int, int]) -> Array:
    seed, frames, height, width = job
    first = int(np.random.default_rng([seed, 2]).integers(FARTHEST_FRAME))
    clip = scenes.clip(scenes.make_scene(seed), frames, height, width, first)
    return np.stack([apply_style(name, clip) for name in STYLES])[None]


def _kept(
    file: Path,
    shape: tuple[int, ...],
    make: Callable[..., Array],
    jobs: list,
    dtype: type = np.uint8,
    then: Callable[[Array], Array] = lambda piece: piece,
) -> Array:
    """Returns the file's array, made first by all processors where it is not there, each job a piece of it."""
    if not file.is_file():
        part = file.with_suffix(".part.npy")
        filled = np.lib.format.open_memmap(part, mode="w+", dtype=dtype, shape=shape)
        each = shape[0] // len(jobs)
        # Not forked: JAX has threads by now.
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), spawn) as pool:
            made = tqdm(pool.map(make, jobs, chunksize=2), total=len(jobs), desc=file.stem, unit="scene")
            for number, piece in enumerate(made):
                filled[number * each : (number + 1) * each] = then(piece)
        filled.flush()
        part.replace(file)
    kept = np.load(file, mmap_mode="r")
    if (kept.shape, kept.dtype) != (shape, np.dtype(dtype)):
        raise ConfigError(
            f"{file}: holds {kept.dtype} {kept.shape}, expected {shape}; it is of another run, remove it"
        )
    return kept
