"""3-D rotary position embedding (time, height, width), Wan2.1 layout."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

THETA = 10000.0


def split_head_dim(head_dim: int) -> tuple[int, int, int]:
    """Returns how many of the head's channels encode time, height and width."""
    space = 2 * (head_dim // 6)
    return head_dim - 2 * space, space, space


@functools.cache
def axis_angles(length: int, channels: int) -> np.ndarray:
    """Returns the angles [length, channels // 2] of positions 0..length-1, computed in float64."""
    frequencies = THETA ** -(np.arange(0, channels, 2, dtype=np.float64) / channels)
    return np.outer(np.arange(length, dtype=np.float64), frequencies)


def rope_tables(
    head_dim: int, start_B: jax.Array, frames: int, height: int, width: int, max_frame: int
) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines, float32 [B, Q, head_dim // 2], of a chunk's tokens in (frame, row, column) order.

    Args:
      head_dim: channels of a head.
      start_B: int32 time index of each row's first latent frame.
      frames: latent frames in the chunk.
      height: tokens per column of a frame.
      width: tokens per row of a frame.
      max_frame: first time index that never occurs.
    """
    time_dim, height_dim, width_dim = split_head_dim(head_dim)
    index_BF = start_B[:, None] + jnp.arange(frames, dtype=jnp.int32)[None, :]

    def table(function):
        time_BF = jnp.asarray(function(axis_angles(max_frame, time_dim)), jnp.float32)[index_BF]
        rows_H = jnp.asarray(function(axis_angles(height, height_dim)), jnp.float32)
        cols_W = jnp.asarray(function(axis_angles(width, width_dim)), jnp.float32)
        shape = (start_B.shape[0], frames, height, width)
        parts = [
            jnp.broadcast_to(time_BF[:, :, None, None, :], (*shape, time_dim // 2)),
            jnp.broadcast_to(rows_H[None, None, :, None, :], (*shape, height_dim // 2)),
            jnp.broadcast_to(cols_W[None, None, None, :, :], (*shape, width_dim // 2)),
        ]
        return jnp.concatenate(parts, axis=-1).reshape(shape[0], frames * height * width, head_dim // 2)

    return table(np.cos), table(np.sin)


def apply_rope(x_BQND: jax.Array, cos_BQR: jax.Array, sin_BQR: jax.Array) -> jax.Array:
    """Rotates neighbouring channel pairs (2i, 2i+1) by their angle in float32; returns x's dtype."""
    pairs = x_BQND.astype(jnp.float32).reshape(*x_BQND.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos_BQR[:, :, None, :], sin_BQR[:, :, None, :]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x_BQND.shape).astype(x_BQND.dtype)
