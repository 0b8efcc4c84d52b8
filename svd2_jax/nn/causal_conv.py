"""Convolution that is causal in time, with the frames it has to remember as an argument and a result."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from svd2_jax.nn.row_shards import RowShards, with_halo

Formulation = Literal["auto", "stacked", "taps", "conv3d"]

# Up to so many input channels "stacked" is 1.5 to 2 times as fast as "taps" on XLA:CPU; for more, its copy of the
# input, once for every tap, weighs as much as the convolution.
MOST_STACKED_CHANNELS = 32


def causal_conv3d(
    x_BTHWC: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    tail: jax.Array | None = None,
    *,
    time_stride: int = 1,
    formulation: Formulation = "auto",
    shards: RowShards | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (convolved frames, new tail); a frame sees itself and earlier ones, the tail comes first.

    In space the size is kept (zero padding). In time nothing is padded but the tail, so that a stream cut
    into pieces gives the frames of the uncut one.

    Args:
      x_BTHWC: input [B, T, H, W, C] of the kernel's dtype; T is a multiple of `time_stride` and may be 0.
      kernel: [time taps, height, width, in, out] (DHWIO), odd height and width.
      bias: [out].
      tail: the last `time taps - time_stride` input frames of what came before; None at the start of a stream
        means zeros.
      time_stride: input frames per output frame.
      formulation: "taps" sums one 2-D convolution per time tap; "stacked" is one 2-D convolution over the taps' frames
        one behind the other as channels; "conv3d" is one 3-D convolution, slow on XLA:CPU, and on a GPU XLA turns it
        to channels first. All are equal but for rounding. "auto" takes "stacked" for few channels, else "taps".
      shards: how the rows are cut over devices; the tail is cut likewise, without neighbours' rows.

    Returns:
      ([B, T // time_stride, H, W, out], [B, time taps - time_stride, H, W, C]), both in the input's dtype.
    """
    batch, frames, height, width, channels = x_BTHWC.shape
    taps, kernel_h, kernel_w, _, features = kernel.shape
    keep = taps - time_stride
    if frames % time_stride:
        raise ValueError(f"{frames=} must be a multiple of {time_stride=}")
    before = jnp.zeros((batch, keep, height, width, channels), x_BTHWC.dtype) if tail is None else tail
    if frames == 0:
        return jnp.zeros((batch, 0, height, width, features), x_BTHWC.dtype), before
    padded = jnp.concatenate([before, x_BTHWC], axis=1) if keep else x_BTHWC
    between, rows = with_halo(padded, kernel_h // 2, kernel_h // 2, shards)
    space = (rows, (kernel_w // 2, kernel_w // 2))
    if formulation == "conv3d":
        y = lax.conv_general_dilated(
            between,
            kernel,
            window_strides=(time_stride, 1, 1),
            padding=((0, 0), *space),
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        )
    else:
        frames_out = frames // time_stride
        ends = [tap + (frames_out - 1) * time_stride + 1 for tap in range(taps)]
        # Taps that see nothing but the zeros before a stream are left out: a picture costs one 2-D convolution.
        used = [tap for tap in range(taps) if tail is not None or ends[tap] > keep]
        seen = [between[:, tap : ends[tap] : time_stride] for tap in used]
        kernels = [kernel[tap] for tap in used]
        if formulation == "auto":
            formulation = "stacked" if channels <= MOST_STACKED_CHANNELS else "taps"
        if formulation == "stacked":
            seen, kernels = [jnp.concatenate(seen, axis=-1)], [jnp.concatenate(kernels, axis=2)]
        parts = [
            _convolve(x.reshape(batch * frames_out, *x.shape[2:]), k, space)
            for x, k in zip(seen, kernels, strict=True)
        ]
        y = functools.reduce(jnp.add, parts).reshape(batch, frames_out, height, width, features)
    return y + bias.reshape(1, 1, 1, 1, features), padded[:, padded.shape[1] - keep :]


def _convolve(x_NHWC: jax.Array, kernel: jax.Array, space: Sequence[tuple[int, int]]) -> jax.Array:
    """Returns the 2-D convolution of frames with a kernel [height, width, in, out]."""
    if kernel.shape[:2] == (1, 1):
        return x_NHWC @ kernel[0, 0]
    return lax.conv_general_dilated(x_NHWC, kernel, (1, 1), space, dimension_numbers=("NHWC", "HWIO", "NHWC"))


class CausalConv(nn.Module):
    """Parameters of one causal convolution; calling it is `causal_conv3d` in the parameters' dtype.

    Attributes:
      features: output channels.
      kernel_size: (time taps, height, width).
      time_stride: input frames per output frame.
    """

    features: int
    kernel_size: tuple[int, int, int] = (3, 3, 3)
    time_stride: int = 1

    @nn.compact
    def __call__(
        self, x_BTHWC: jax.Array, tail: jax.Array | None, shards: RowShards | None = None
    ) -> tuple[jax.Array, jax.Array]:
        shape = (*self.kernel_size, x_BTHWC.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return causal_conv3d(x_BTHWC, kernel, bias, tail, time_stride=self.time_stride, shards=shards)
