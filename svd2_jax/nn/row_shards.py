"""Images whose rows are cut over the devices of a mesh axis: what a device sees beyond its own rows.

To be used under `shard_map`. Every function takes None for images that are whole, and is then nothing at all: one
network serves both.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax


@dataclass(frozen=True)
class RowShards:
    """How rows are cut: each device has as many, the first device the uppermost; static.

    Attributes:
      axis: name of the mesh axis.
      devices: devices along it.
    """

    axis: str
    devices: int


def with_halo(
    x: jax.Array, above: int, below: int, shards: RowShards | None
) -> tuple[jax.Array, tuple[int, int]]:
    """Returns images between their neighbours' nearest rows, and the padding with zeros that is still to be done.

    At the upper and the lower edge of the picture, where there is no neighbour, the rows are zeros: a convolution
    over the result that pads no further gives the rows that one over the whole picture with this padding gives.

    Args:
      x: [..., H, W, C].
      above: rows of padding above the picture, at most H.
      below: rows of padding below it, likewise.
      shards: how the rows are cut.

    Returns:
      ([..., above + H + below, W, C], (0, 0)), or `x` itself and (above, below) where images are whole.
    """
    if shards is None:
        return x, (above, below)
    height = x.shape[-3]
    # A device that nobody sends to gets zeros.
    downwards = [(i, i + 1) for i in range(shards.devices - 1)]
    upwards = [(i + 1, i) for i in range(shards.devices - 1)]
    parts = [x]
    if above:
        parts.insert(0, lax.ppermute(x[..., height - above :, :, :], shards.axis, downwards))
    if below:
        parts.append(lax.ppermute(x[..., :below, :, :], shards.axis, upwards))
    return jnp.concatenate(parts, axis=-3), (0, 0)


def gather(x: jax.Array, axis: int, shards: RowShards | None) -> jax.Array:
    """Returns what all devices have, the first one's first along an array axis, on every device."""
    return x if shards is None else lax.all_gather(x, shards.axis, axis=axis, tiled=True)


def mean_over(x: jax.Array, shards: RowShards | None) -> jax.Array:
    """Returns the mean over the devices of their own means, the same on every device."""
    return x if shards is None else lax.pmean(x, shards.axis)


def take_own(x: jax.Array, axis: int, shards: RowShards | None) -> jax.Array:
    """Returns each device's part, along an array axis, of the sum over the devices.

    Where one device has an array and all others have zeros, it is cut over all of them.
    """
    if shards is None:
        return x
    return lax.psum_scatter(x, shards.axis, scatter_dimension=axis, tiled=True)


def most_shards(rows: int, devices: int) -> int:
    """Returns the largest number of devices, at most `devices`, over which so many rows can be cut evenly."""
    return max(count for count in range(1, devices + 1) if rows % count == 0)
