"""Changes of frame rate and size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from svd2_jax.nn.row_shards import RowShards, with_halo


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


# Of a 3-tap kernel over pixels that are all doubled, the taps that fall on the same pixel: [of the first and the second
# of its two results, pixel that is seen, tap].
_SEEN = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)


def upsampled_conv(x_BTHWC: jax.Array, kernel: jax.Array, shards: RowShards | None = None) -> jax.Array:
    """Returns the convolution, padded with zeros to the same size, of frames with every pixel doubled both ways.

    A kernel of 3x3 sees only 2x2 different pixels there, so that four kernels of 2x2, which all see the frames as
    they are, give the four results of each pixel: 4 / 9 of the arithmetic, and nothing is doubled in memory.

    Args:
      x_BTHWC: frames of the kernel's dtype.
      kernel: [3, 3, in, out] (HWIO); its taps are summed in float32.
      shards: how the rows are cut over devices.

    Returns:
      Frames [B, T, 2H, 2W, out].
    """
    batch, frames, height, width, channels = x_BTHWC.shape
    features = kernel.shape[-1]
    sums = jnp.einsum(
        "aru,bsv,uvio->rsiabo", _SEEN, _SEEN, kernel.astype(jnp.float32), precision=lax.Precision.HIGHEST
    )
    kernels = sums.reshape(2, 2, channels, 4 * features).astype(kernel.dtype)
    x, rows = with_halo(x_BTHWC.reshape(batch * frames, height, width, channels), 1, 1, shards)
    y = lax.conv_general_dilated(
        x, kernels, (1, 1), (rows, (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    ).reshape(batch * frames, height + 1, width + 1, 2, 2, features)
    # The first of two results sees the pixel before and this one, the second this one and the next.
    doubled = [
        jnp.stack([y[:, a : a + height, b : b + width, a, b] for b in range(2)], axis=3) for a in range(2)
    ]
    return jnp.stack(doubled, axis=2).reshape(batch, frames, 2 * height, 2 * width, features)


class UpsampledConv(nn.Module):
    """Parameters of one 3x3 convolution; calling it is `upsampled_conv` in the parameters' dtype.

    Attributes:
      features: output channels.
      use_bias: whether it adds one.
    """

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x_BTHWC: jax.Array, shards: RowShards | None = None) -> jax.Array:
        shape = (3, 3, x_BTHWC.shape[-1], self.features)
        y = upsampled_conv(x_BTHWC, self.param("kernel", nn.initializers.lecun_normal(), shape), shards)
        if not self.use_bias:
            return y
        return y + self.param("bias", nn.initializers.zeros_init(), (self.features,)).reshape(1, 1, 1, 1, -1)
