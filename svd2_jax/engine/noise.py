"""Where a stream's Gaussians come from: the one place that draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from svd2_jax.config import StreamConfig
from svd2_jax.errors import SessionError
from svd2_jax.types import Device

ChunkNoise = tuple[jax.Array, tuple[jax.Array, ...]]
"""The Gaussian for the new chunk's latents [F, h, w, C], and S - 1 draws of that shape: draw s re-noises to denoising
step s. In a stream batch it is for the chunk that enters row s, in sequential mode and in the first group for the new
one."""

LATENT_STEP = 0  # draw of a chunk's latents; the re-noising to denoising step s is draw s


class NoiseSource(Protocol):
    """Gives the Gaussians of a stream, float32."""

    def first(self) -> ChunkNoise:
        """Returns the draws of the first group."""
        ...

    def chunk(self, chunks: Sequence[int | None]) -> ChunkNoise:
        """Returns the draws of a tick that takes chunk `chunks[s]`, from 1 on, to step s; None: to be ignored."""
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


def draw_chunk(cfg: StreamConfig, channels: int, key: jax.Array, chunks_S: jax.Array) -> ChunkNoise:
    """Draws for a tick that takes chunk `chunks_S[s]` (int32 [S]) to step s."""
    shape = (cfg.frames_per_block, *cfg.latent_size, channels)
    latents, *again = (draw(key, chunks_S[s], s, shape) for s in range(cfg.steps))
    return latents, tuple(again)


class SeededNoise:
    """Gaussians drawn on a device from (seed, chunk, step)."""

    def __init__(
        self, draw_first: Callable, draw_chunk: Callable[[int], Callable], seed: int, device: Device
    ):
        """Takes the compiled `draw_first`, and a function that gives `draw_chunk` compiled for so many steps."""
        self._draw_first, self._draw_chunk, self._device = draw_first, draw_chunk, device
        self._key = jax.device_put(jax.random.key(seed), device)

    def first(self) -> ChunkNoise:
        return self._draw_first(self._key)

    def chunk(self, chunks: Sequence[int | None]) -> ChunkNoise:
        numbers = jax.device_put(np.array([c or 0 for c in chunks], np.int32), self._device)
        return self._draw_chunk(len(chunks))(self._key, numbers)


class RecordedNoise:
    """Replays Gaussians that were recorded elsewhere, channels last.

    They come in the order in which one stage needs them: for the first group and for each chunk its latents' draw
    and S - 1 more; in a stream batch draw s of a chunk's S - 1 re-noises the chunk that has just taken step s - 1.
    """

    def __init__(self, cfg: StreamConfig, draws: Sequence[np.ndarray], device: Device | None = None):
        self._is_batch = cfg.mode == "stream"
        self._device = device
        self._groups = [draws[i : i + cfg.steps] for i in range(0, len(draws) - cfg.steps + 1, cfg.steps)]

    def first(self) -> ChunkNoise:
        latents, *again = self._groups[0]
        return self._put(latents), tuple(self._put(x) for x in again)

    def chunk(self, chunks: Sequence[int | None]) -> ChunkNoise:
        new = chunks[0]
        if new is not None and new >= len(self._groups):
            raise SessionError("the recorded noise is used up; record one draw more per chunk and step")
        latents, *again = (self._of(chunk, s) for s, chunk in enumerate(chunks))
        return latents, tuple(again)

    def _of(self, chunk: int | None, s: int) -> jax.Array:
        recorded = (chunk or 0) + (s - 1 if self._is_batch and s else 0)
        # A row without a chunk takes any numbers; so does one that the recorded stream never came to.
        there = chunk is not None and recorded < len(self._groups)
        return self._put(self._groups[recorded][s] if there else np.zeros_like(self._groups[-1][0]))

    def _put(self, x: np.ndarray) -> jax.Array:
        return jax.device_put(np.asarray(x, np.float32), self._device)
