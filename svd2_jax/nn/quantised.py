"""Arrays in 8 bits: values, and a scale for each group of them."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from svd2_jax.config import Storage

DTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
LEAST_SCALE = 1e-30  # so that zeros divide by something


@register_dataclass
@dataclass(frozen=True)
class Quantised:
    """An array that stands for `values * scales`.

    Attributes:
      values: int8 or float8_e4m3fn.
      scales: float32, of length 1 along the axis that shares a scale, else as long as `values`.
    """

    values: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that this one stands for."""
        return self.values.shape


MaybeQuantised = jax.Array | Quantised


def quantise(x: jax.Array, storage: Storage, axis: int) -> MaybeQuantised:
    """Returns an array as it is to be stored; as it is for "compute".

    Symmetric: the largest of the values that share a scale becomes the largest that the type has. The error is half a
    step of 1/127 of that value at most in int8, and 1/16 of each value (less for the smallest) in fp8.

    Args:
      x: any array.
      storage: see `StreamConfig.cache_dtype`.
      axis: along which values share a scale.
    """
    if storage == "compute":
        return x
    dtype, x = DTYPES[storage], x.astype(jnp.float32)
    is_whole = jnp.issubdtype(dtype, jnp.integer)
    limit = jnp.iinfo(dtype).max if is_whole else float(jnp.finfo(dtype).max)
    scales = jnp.maximum(jnp.abs(x).max(axis=axis, keepdims=True) / limit, LEAST_SCALE)
    values = x / scales
    return Quantised((jnp.round(values) if is_whole else values).astype(dtype), scales)


def dequantise(x: MaybeQuantised, dtype: jnp.dtype) -> jax.Array:
    """Returns the array that is meant, in a dtype."""
    if isinstance(x, Quantised):
        return (x.values.astype(jnp.float32) * x.scales).astype(dtype)
    return x.astype(dtype)
