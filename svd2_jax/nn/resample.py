"""Changes of frame rate and size without parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def unfold_frames(x_BTHWC: jax.Array, times: int) -> jax.Array:
    """Returns `times` frames for each one, cut from its channels in order.

    Args:
      x_BTHWC: frames [B, T, H, W, times * C].
      times: frames to make of one.

    Returns:
      Frames [B, T * times, H, W, C].
    """
    batch, frames, height, width, channels = x_BTHWC.shape
    x = x_BTHWC.reshape(batch, frames, height, width, times, channels // times)
    return jnp.moveaxis(x, 4, 2).reshape(batch, frames * times, height, width, channels // times)


def upsample_space(x_BTHWC: jax.Array) -> jax.Array:
    """Returns the frames [B, T, 2H, 2W, C] with every pixel doubled both ways (nearest neighbour)."""
    batch, frames, height, width, channels = x_BTHWC.shape
    x = x_BTHWC.reshape(batch, frames, height, 1, width, 1, channels)
    x = jnp.broadcast_to(x, (batch, frames, height, 2, width, 2, channels))
    return x.reshape(batch, frames, 2 * height, 2 * width, channels)
