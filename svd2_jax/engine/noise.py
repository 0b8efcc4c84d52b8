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
"""The Gaussian for the new chunk's latents [F, h, w, C], and S - 1 draws of that shape that re-noise a chunk to the
steps 1 to S - 1: in a stream batch draw s is for the chunk that enters row s, in sequential mode and in the first
group all are for the new chunk."""

LATENT_STEP = 0  # draw of a chunk's latents; the re-noising to denoising step s is draw s


class NoiseSource(Protocol):
    """Gives the Gaussians of a stream in order, float32."""

    def first(self) -> ChunkNoise:
        """Returns the draws of the first group."""
        ...

    def chunk(self, fresh: bool) -> ChunkNoise:
        """Returns the draws of the next tick; without a fresh chunk its latents' draw is not looked at."""
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
    cfg: StreamConfig, channels: int, stages: int, key: jax.Array, chunk: jax.Array
) -> tuple[ChunkNoise, jax.Array]:
    """Draws for the tick of chunk `chunk` (int32 [], from 1 on) and returns the next chunk's number as well."""
    shape = (cfg.frames_per_block, *cfg.latent_size, channels)
    again = tuple(draw(key, chunk - lag, s, shape) for s, lag in enumerate(_lags(cfg, stages), start=1))
    return (draw(key, chunk, LATENT_STEP, shape), again), chunk + 1


def _lags(cfg: StreamConfig, stages: int) -> list[int]:
    """Returns for the steps 1 to S - 1 how many ticks ago the chunk entered that is re-noised to the step."""
    return [s * stages if cfg.mode == "stream" else 0 for s in range(1, cfg.steps)]


class SeededNoise:
    """Gaussians drawn on a device from (seed, chunk, step), by compiled `draw_first` and `draw_chunk`."""

    def __init__(self, draw_first: Callable, draw_chunk: Callable, seed: int, device: Device):
        self._draw_first, self._draw_chunk = draw_first, draw_chunk
        self._key = jax.device_put(jax.random.key(seed), device)
        self._chunk = jax.device_put(jnp.ones((), jnp.int32), device)

    def first(self) -> ChunkNoise:
        return self._draw_first(self._key)

    def chunk(self, fresh: bool) -> ChunkNoise:
        draws, self._chunk = self._draw_chunk(self._key, self._chunk)
        return draws


class RecordedNoise:
    """Replays Gaussians that were recorded elsewhere, channels last.

    They come in the order in which one stage needs them: for the first group and for each chunk its latents' draw
    and S - 1 more; in a stream batch draw s of a chunk's S - 1 re-noises the chunk that has just taken step s - 1.
    """

    def __init__(
        self, cfg: StreamConfig, draws: Sequence[np.ndarray], stages: int = 1, device: Device | None = None
    ):
        self._lags = _lags(cfg, stages)
        self._stream = cfg.mode == "stream"
        self._device = device
        self._groups = [draws[i : i + cfg.steps] for i in range(0, len(draws) - cfg.steps + 1, cfg.steps)]
        self._next = 0

    def first(self) -> ChunkNoise:
        latents, *again = self._take(fresh=True)
        return self._put(latents), tuple(self._put(x) for x in again)

    def chunk(self, fresh: bool) -> ChunkNoise:
        number = self._next
        latents = self._take(fresh)[0]
        again = []
        for s, lag in enumerate(self._lags, start=1):
            recorded = number - lag + (s - 1 if self._stream else 0)
            # A row without a chunk takes any numbers; so does one that the recorded stream never came to.
            there = 0 < recorded < len(self._groups)
            again.append(self._put(self._groups[recorded][s] if there else np.zeros_like(latents)))
        return self._put(latents), tuple(again)

    def _take(self, fresh: bool) -> Sequence[np.ndarray]:
        self._next += 1
        if self._next > len(self._groups):
            if fresh:
                raise SessionError("the recorded noise is used up; record one draw more per chunk and step")
            return [np.zeros_like(x) for x in self._groups[-1]]
        return self._groups[self._next - 1]

    def _put(self, x: np.ndarray) -> jax.Array:
        return jax.device_put(np.asarray(x, np.float32), self._device)
