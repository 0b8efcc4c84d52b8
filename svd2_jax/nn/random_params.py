"""Random parameters for models without a checkpoint: tests, demos and benchmarks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

CONSTANTS = {"scale": 1.0, "bias": 0.0}  # by the name of the leaf
UNIT_NORMAL = "embedding"


Gaussian = Callable[[np.random.Generator, tuple[int, ...], float], Any]
"""(where random numbers come from, shape, deviation) -> array."""


def gaussian_array(rng: np.random.Generator, shape: tuple[int, ...], deviation: float) -> np.ndarray:
    """Returns a float32 array of Gaussians of mean 0."""
    return rng.standard_normal(shape, np.float32) * np.float32(deviation)


def random_params(abstract: Any, seed: int | tuple[int, ...], gaussian: Gaussian = gaussian_array) -> Any:
    """Returns a tree of float32 arrays on the host, shaped like `abstract`, that keeps activations their size.

    Scales are 1, biases 0, embeddings normal, and everything else (output axis last) normal with variance
    1 / fan-in. Drawn by numpy: compiling the initialisers of one VAE for the CPU takes most of a minute.

    Args:
      abstract: nested dict of anything with a shape.
      seed: same seed, same parameters.
      gaussian: draws the arrays; on the host unless told otherwise.
    """
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        name, shape = path[-1].key, leaf.shape
        if name in CONSTANTS:
            return np.full(shape, CONSTANTS[name], np.float32)
        fan_in = 1 if name == UNIT_NORMAL else math.prod(shape[:-1])
        return gaussian(rng, shape, fan_in**-0.5)

    return jax.tree_util.tree_map_with_path(draw, abstract)
