"""Motion-aware noise: fast motion keeps more of the input (StreamDiffusionV2, section 4.3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from svd2_jax.nn.row_shards import RowShards, mean_over

MOTION_SCALE = 0.2  # root mean square frame difference, in [-1, 1] pixels, that counts as full motion
SMOOTHING = 0.1  # weight of the previous noise scale
STEP_MARGIN = 100  # the first denoising timestep lies this far below 1000 * noise scale
ROUNDING = 1e-4  # float32 spacing near 1000; keeps an exact 0.8 from truncating to timestep 699


def pixels_from_uint8(frames: jax.Array) -> jax.Array:
    """Maps uint8 to float32 in [-1, 1]."""
    return frames.astype(jnp.float32) / 127.5 - 1.0


def motion(previous_HWC: jax.Array, frames_THWC: jax.Array, shards: RowShards | None = None) -> jax.Array:
    """Returns the motion of a chunk in [0, 1]: its largest frame difference, root mean square over pixels.

    Args:
      previous_HWC: the frame before the chunk, float32 in [-1, 1].
      frames_THWC: the chunk, float32 in [-1, 1].
      shards: how the rows of both are cut over devices.
    """
    before = jnp.concatenate([previous_HWC[None], frames_THWC[:-1]])
    difference = mean_over(jnp.square(frames_THWC - before).mean(axis=(1, 2, 3)), shards)
    return jnp.clip(jnp.sqrt(difference).max() / MOTION_SCALE, 0.0, 1.0)


def next_noise_scale(
    motion_level: jax.Array, initial: jax.Array, current: jax.Array, motion_range: float
) -> jax.Array:
    """Returns the noise scale of the next chunk, float32.

    Args:
      motion_level: of the chunk, in [0, 1].
      initial: the session's noise scale.
      current: the last chunk's.
      motion_range: how much full motion lowers it.
    """
    return (initial - motion_range * motion_level) * (1 - SMOOTHING) + current * SMOOTHING


def first_timestep(noise_scale: jax.Array) -> jax.Array:
    """Returns the first denoising timestep, int32 in [0, 1000], that fits a noise scale."""
    step = jnp.floor(1000.0 * noise_scale + ROUNDING).astype(jnp.int32) - STEP_MARGIN
    return jnp.clip(step, 0, 1000)


def mix(latents: jax.Array, noise: jax.Array, noise_scale: jax.Array) -> jax.Array:
    """Returns noise_scale * noise + (1 - noise_scale) * latents."""
    return noise_scale * noise + (1 - noise_scale) * latents
