"""Flow matching: the shifted noise schedule of Wan2.1, clean prediction and re-noising."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from svd2_jax.config import TRAIN_TIMESTEPS

SHIFT = 8.0


@functools.cache
def schedule() -> tuple[np.ndarray, np.ndarray]:
    """Returns (sigmas, timesteps), float32 [1000]: sigma from 1 towards 0, shifted; timestep = 1000 sigma."""
    linear = np.linspace(1.0, 0.0, TRAIN_TIMESTEPS + 1)[:-1]
    sigmas = SHIFT * linear / (1 + (SHIFT - 1) * linear)
    return sigmas.astype(np.float32), (sigmas * TRAIN_TIMESTEPS).astype(np.float32)


@functools.cache
def _sigma_of_timestep() -> np.ndarray:
    sigmas, timesteps = schedule()
    wanted = np.arange(TRAIN_TIMESTEPS + 1, dtype=np.float32)
    return sigmas[np.abs(timesteps[None] - wanted[:, None]).argmin(axis=1)]


def sigma_at(timestep_B: jax.Array) -> jax.Array:
    """Returns sigma, float32 [B], of the schedule's entry nearest to each int32 timestep in [0, 1000]."""
    return jnp.asarray(_sigma_of_timestep())[timestep_B]


def clean_prediction(x_BFHWC: jax.Array, velocity_BFHWC: jax.Array, timestep_B: jax.Array) -> jax.Array:
    """Returns x0 = x_t - sigma(t) * v, all float32 [B, F, h, w, C]."""
    return x_BFHWC - _over_rows(sigma_at(timestep_B)) * velocity_BFHWC


def add_noise(x0_BFHWC: jax.Array, noise_BFHWC: jax.Array, timestep_B: jax.Array) -> jax.Array:
    """Returns x_t = (1 - sigma(t)) * x0 + sigma(t) * noise, all float32 [B, F, h, w, C]."""
    sigma = _over_rows(sigma_at(timestep_B))
    return (1 - sigma) * x0_BFHWC + sigma * noise_BFHWC


def _over_rows(sigma_B: jax.Array) -> jax.Array:
    return sigma_B[:, None, None, None, None]
