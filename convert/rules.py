"""The conversion table: which tensor of a source file becomes which leaf of which checkpoint item."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


def keep(x: np.ndarray) -> np.ndarray:
    """Returns the tensor as it is."""
    return x


def transpose(x: np.ndarray) -> np.ndarray:
    """Turns a linear layer's weight [out, in] into a kernel [in, out]."""
    return x.T


@dataclass(frozen=True)
class Rule:
    """One line of a conversion table.

    Attributes:
      source: regular expression that a source name matches in full (prefixes already stripped); named groups
        that are all digits are handed to `target` as integers.
      target: "item/path/to/leaf" with the groups as format fields, e.g. "dit.block.{n:03d}/mlp_up/kernel".
      transform: source array -> leaf, in the source's dtype (bfloat16 as ml_dtypes.bfloat16).
    """

    source: str
    target: str
    transform: Callable[[np.ndarray], np.ndarray] = keep
