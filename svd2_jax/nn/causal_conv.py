"""Convolution that is causal in time, with the frames it has to remember as an argument and a result."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence
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
# The Wan decoder's chunk at 512x512 on an H200: 23.3 ms with "conv3d", 25.5 with "stacked" and 27.8 with "taps", whose
# sums all go through memory. Channels have to stay last (`engine.policy.XLA_OPTIONS`): 34.8 ms otherwise.
GPU_FORMULATION: Formulation = "conv3d"


_with_onednn = contextvars.ContextVar("_with_onednn", default=False)


@contextlib.contextmanager
def convolving_with_onednn() -> Iterator[None]:
    """Has "auto" take what is fastest on a CPU in programs that are traced meanwhile, and compiled for oneDNN.

    That is "conv3d", which without `engine.policy.ONEDNN` would be the slowest.
    """
    before = _with_onednn.set(True)
    try:
        yield
    finally:
        _with_onednn.reset(before)


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
        to channels first unless `--xla_gpu_force_conv_nhwc` is set. All are equal but for rounding. "auto" takes
        `GPU_FORMULATION` on an NVIDIA GPU, elsewhere "stacked" for few channels, else "taps"; see
        `convolving_with_onednn`.
      shards: how the rows are cut over devices; the tail is cut likewise, without neighbours' rows.

    Returns:
      ([B, T // time_stride, H, W, out], [B, time taps - time_stride, H, W, C]), both in the input's dtype.
    """
    batch, frames, height, width, channels = x_BTHWC.shape
    taps, features = kernel.shape[0], kernel.shape[-1]
    keep = taps - time_stride
    if frames % time_stride:
        raise ValueError(f"{frames=} must be a multiple of {time_stride=}")
    before = jnp.zeros((batch, keep, height, width, channels), x_BTHWC.dtype) if tail is None else tail
    if frames == 0:
        return jnp.zeros((batch, 0, height, width, features), x_BTHWC.dtype), before
    padded = jnp.concatenate([before, x_BTHWC], axis=1) if keep else x_BTHWC
    between, rows = with_halo(padded, kernel.shape[1] // 2, kernel.shape[1] // 2, shards)
    convolve = functools.partial(_convolve_behind, time_stride, tail is None, rows)
    if formulation == "auto":
        elsewhere: Formulation = "stacked" if channels <= MOST_STACKED_CHANNELS else "taps"
        if _with_onednn.get():
            elsewhere = "conv3d"
        y, new_tail = lax.platform_dependent(
            padded,
            between,
            x_BTHWC,
            kernel,
            cuda=functools.partial(convolve, GPU_FORMULATION),
            default=functools.partial(convolve, elsewhere),
        )
    else:
        y, new_tail = convolve(formulation, padded, between, x_BTHWC, kernel)
    return y + bias.reshape(1, 1, 1, 1, features), new_tail


def _convolve_behind(
    time_stride: int,
    is_start: bool,
    rows: tuple[int, int],
    formulation: Formulation,
    padded: jax.Array,
    between: jax.Array,
    x_BTHWC: jax.Array,
    kernel: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns frames convolved with the kernel, and the new tail.

    `padded` are the frames behind the old tail, `between` the same between the neighbours' rows, to which `rows` more
    of zeros come.
    """
    batch, frames, height, width, _ = x_BTHWC.shape
    taps, kernel_h, kernel_w, _, features = kernel.shape
    keep = taps - time_stride
    space = (rows, (kernel_w // 2, kernel_w // 2))
    if formulation == "conv3d":
        between, tail = _then_tail(between, x_BTHWC, padded[:, frames:])
        y = lax.conv_general_dilated(
            between,
            kernel,
            window_strides=(time_stride, 1, 1),
            padding=((0, 0), *space),
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        )
        return y, tail
    frames_out = frames // time_stride
    ends = [tap + (frames_out - 1) * time_stride + 1 for tap in range(taps)]
    # Taps that see nothing but the zeros before a stream are left out: a picture costs one 2-D convolution.
    first = next(tap for tap in range(taps) if not is_start or ends[tap] > keep)
    seen = [between[:, tap : ends[tap] : time_stride] for tap in range(first, taps)]
    tail = padded[:, frames:]
    if formulation == "stacked":
        stacked, tail = _then_tail(jnp.concatenate(seen, axis=-1), x_BTHWC, tail)
        in_order = kernel[first:].transpose(1, 2, 0, 3, 4)
        seen, kernels = [stacked], [in_order.reshape(kernel_h, kernel_w, -1, features)]
    else:
        kernels = [kernel[tap] for tap in range(first, taps)]
    parts = [
        _convolve(x.reshape(batch * frames_out, *x.shape[2:]), k, space)
        for x, k in zip(seen, kernels, strict=True)
    ]
    y = functools.reduce(jnp.add, parts).reshape(batch, frames_out, height, width, features)
    return y, tail


def _then_tail(operand: jax.Array, x_BTHWC: jax.Array, tail: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the operand of a convolution and the new tail, which is made when nobody reads the old one any more.

    So it takes the old one's memory without a copy, where it is made of new frames alone.
    """
    keep = tail.shape[1]
    if keep > x_BTHWC.shape[1]:
        return operand, tail
    operand, x_BTHWC = lax.optimization_barrier((operand, x_BTHWC))
    return operand, x_BTHWC[:, x_BTHWC.shape[1] - keep :]


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
