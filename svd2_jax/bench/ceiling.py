"""What this device can do at most: a large matrix product and a large copy, as XLA runs them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from svd2_jax.bench.timing import in_turn, timed
from svd2_jax.engine.policy import matmul_precision
from svd2_jax.hardware import Hardware
from svd2_jax.types import Device

LONG_ENOUGH_S = 0.03  # of a product, so that handing it over does not count
SMALLEST, LARGEST = 1024, 16384  # rows and columns of the product
COPIED_BYTES = {"cpu": 1 << 28}  # far more than the caches hold
COPIED_BYTES_ELSEWHERE = 1 << 30
REPEATS = 5


def measured(device: Device, dtype: jnp.dtype, earlier: Hardware | None = None) -> Hardware:
    """Returns the device's matrix and memory ceilings; each is the best of several tries.

    Args:
      device: to be measured.
      dtype: of the product's operands; the sum is as precise as the model's products are.
      earlier: what was measured before; the better one counts, as other work on the machine only slows down.
    """
    flops, bandwidth = _product(device, dtype), _copy(device)
    if earlier is not None:
        flops, bandwidth = max(flops, earlier.flops_32bit), max(bandwidth, earlier.memory_bandwidth)
    # Measured in one dtype only, so there is nothing to tell 16 from 32 bits.
    return Hardware(device.device_kind, 0, bandwidth, flops, flops, 0.0, "measured in the same run")


def _product(device: Device, dtype: jnp.dtype) -> float:
    """Returns FLOP/s."""
    size = SMALLEST
    while True:
        x = jax.device_put(jnp.ones((size, size), dtype), device)
        with jax.default_matmul_precision(matmul_precision(dtype)):
            run = jax.jit(jnp.matmul).lower(x, x).compile()
        seconds = _best(functools.partial(run, x, x))
        if seconds >= LONG_ENOUGH_S or size == LARGEST:
            return 2 * size**3 / seconds
        size *= 2


def _copy(device: Device) -> float:
    """Returns bytes/s, read and written together."""
    count = COPIED_BYTES.get(device.platform, COPIED_BYTES_ELSEWHERE)
    x = jax.device_put(jnp.ones((count // 4,), jnp.float32), device)
    # In place, as a plain copy of memory that was never used would measure the operating system's page faults.
    run = jax.jit(jnp.negative, donate_argnums=0).lower(x).compile()

    def step() -> jax.Array:
        nonlocal x
        x = run(x)
        return x

    return 2 * count / _best(step)


def _best(call: Callable[[], jax.Array]) -> float:
    (samples,) = in_turn([lambda: timed(call, jax.block_until_ready)], REPEATS, warm_up=1)
    return min(sample.total_s for sample in samples)
