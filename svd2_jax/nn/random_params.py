"""Random parameters for models without a checkpoint: tests, demos and benchmarks."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

CONSTANTS = {"scale": 1.0, "bias": 0.0}  # by the name of the leaf
UNIT_NORMAL = "embedding"


def random_params(abstract: Any, key: jax.Array, dtype: Any) -> Any:
    """Returns a tree like `abstract` whose layers keep the variance of their input.

    Scales are 1, biases 0, embeddings normal, and everything else (output axis last) normal with variance
    1 / fan-in. All of it is cut from one draw: XLA:CPU compiles for half a second for every draw of its own.

    Args:
      abstract: nested dict of anything with a shape.
      key: random key.
      dtype: of the result.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    names = [path[-1].key for path, _ in leaves]
    sizes = [
        0 if name in CONSTANTS else math.prod(leaf.shape)
        for name, (_, leaf) in zip(names, leaves, strict=True)
    ]
    normal = jax.random.normal(key, (sum(sizes),), jnp.float32)
    drawn, offset = [], 0
    for name, size, (_, leaf) in zip(names, sizes, leaves, strict=True):
        if name in CONSTANTS:
            drawn.append(jnp.full(leaf.shape, CONSTANTS[name], dtype))
        else:
            fan_in = 1 if name == UNIT_NORMAL else math.prod(leaf.shape[:-1])
            values = normal[offset : offset + size].reshape(leaf.shape) * fan_in**-0.5
            drawn.append(values.astype(dtype))
            offset += size
    return jax.tree.unflatten(structure, drawn)
