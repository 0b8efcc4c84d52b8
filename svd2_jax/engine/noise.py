"""Where a stream's Gaussians come from: the one place that draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from svd2_jax.config import StreamConfig
from svd2_jax.errors import SessionError

ChunkNoise = tuple[jax.Array, tuple[jax.Array, ...]]
"""The Gaussian for the new chunk's latents [F, h, w, C], and S - 1 re-noising draws of that shape: in stream mode
draw r is for the chunk in row r, in sequential mode and in the first group all are for the new chunk."""

LATENT_STEP = 0  # draw of a chunk's latents; the re-noising to denoising step s is draw s


class NoiseSource(Protocol):
    """Gives the Gaussians of a stream in order, float32."""

    def first(self) -> ChunkNoise:
        """Returns the draws of the first group."""
        ...

    def chunk(self) -> ChunkNoise:
        """Returns the draws of the next tick."""
        ...


def draw(key: jax.Array, chunk: jax.Array, step: int, shape: tuple[int, ...]) -> jax.Array:
    """Returns the Gaussian of (seed, chunk, step): the same in any batch, order or pipeline."""
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, chunk), step), shape, jnp.float32)


def draw_first(cfg: StreamConfig, channels: int, key: jax.Array) -> ChunkNoise:
    """Draws for the first group, which is chunk 0."""
    shape = (cfg.first_latents, *cfg.latent_size, channels)
    zero = jnp.zeros((), jnp.int32)
    again = tuple(draw(key, zero, s, shape) for s in range(1, cfg.steps))
    return draw(key, zero, LATENT_STEP, shape), again


def draw_chunk(
    cfg: StreamConfig, channels: int, key: jax.Array, chunk: jax.Array
) -> tuple[ChunkNoise, jax.Array]:
    """Draws for chunk `chunk` (int32 [], from 1 on) and returns the next chunk's number as well."""
    shape = (cfg.frames_per_block, *cfg.latent_size, channels)
    # In stream mode row r holds the chunk that entered r ticks ago.
    of = [chunk - r if cfg.mode == "stream" else chunk for r in range(cfg.steps - 1)]
    again = tuple(draw(key, c, s, shape) for s, c in enumerate(of, start=1))
    return (draw(key, chunk, LATENT_STEP, shape), again), chunk + 1


class RecordedNoise:
    """Replays Gaussians that were recorded elsewhere, channels last, in the order they are needed."""

    def __init__(self, cfg: StreamConfig, draws: Sequence[np.ndarray]):
        self._cfg = cfg
        self._draws = iter(draws)

    def first(self) -> ChunkNoise:
        return self._take()

    def chunk(self) -> ChunkNoise:
        return self._take()

    def _take(self) -> ChunkNoise:
        try:
            latents = next(self._draws)
            again = tuple(jnp.asarray(next(self._draws)) for _ in range(self._cfg.steps - 1))
        except StopIteration:
            raise SessionError(
                "the recorded noise is used up; record one draw more per chunk and step"
            ) from None
        return jnp.asarray(latents), again
