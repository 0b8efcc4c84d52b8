"""Reads the goldens' weight files with the converter's reader and tables, without an Orbax checkpoint."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from convert.files import open_weights
from convert.rules import Table, audit

GOLDENS = Path(__file__).parents[1] / "goldens"
WAN_FOLDER = GOLDENS / "wan_models" / "Wan2.1-T2V-tiny"


def tensors_of(path):
    return {name: tensor.view() for name, tensor in open_weights(path).tensors}


def shapes_of(tensors):
    return {name: tensor.shape for name, tensor in tensors.items()}


def convert(rules, tensors, abstract, ignored=()):
    """Returns {item: tree} of float32 arrays; fails on any tensor or leaf without a partner."""
    items, problems = audit("golden", Table(rules, ignored), list(tensors.items()), abstract)
    assert not problems, problems
    trees = {}
    for item, leaves in items.items():
        tree = trees.setdefault(item, {})
        for leaf in leaves:
            node = tree
            for name in leaf.path[:-1]:
                node = node.setdefault(name, {})
            node[leaf.path[-1]] = jnp.asarray(leaf.transform(leaf.tensor).astype(np.float32))
    return trees
