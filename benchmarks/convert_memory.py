"""Makes the files for measuring the converter's memory; see convert_memory.md for the commands and results.

PYTHONPATH=.:tests/convert python benchmarks/convert_memory.py FILE {1.3b,14b,umt5}

1.3b: random float32 values in a torch zip file of 5.7 GB. 14b: float32 zeros, a sparse safetensors file of
57 GB that takes no disk. umt5: bfloat16 zeros, a sparse safetensors file of 11 GB.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import weight_shapes as shapes
from torch_zip import Lazy, write_torch_zip

from svd2_jax.config import TextConfig, preset


def write_random_torch(path: Path, tensors: shapes.Shapes) -> None:
    """Writes a StreamDiffusionV2 checkpoint of random values."""
    rng = np.random.default_rng(0)
    lazy = {
        f"model.{name}": Lazy(shape, np.dtype(np.float32), lambda s=shape: rng.standard_normal(s, np.float32))
        for name, shape in tensors.items()
    }
    write_torch_zip(path, {"generator": lazy})


def write_sparse_safetensors(path: Path, tensors: shapes.Shapes, dtype: str, itemsize: int) -> None:
    """Writes zeros without writing them: the header, then a hole."""
    header, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + math.prod(shape) * itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64 + 56)  # data aligned to 64 bytes behind the length
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)


def main() -> None:
    """Makes one file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("model", choices=("1.3b", "14b", "umt5"))
    args = parser.parse_args()
    if args.model == "umt5":
        write_sparse_safetensors(args.file, shapes.umt5(TextConfig()), "BF16", 2)
    elif args.model == "14b":
        write_sparse_safetensors(args.file, shapes.wan_dit(preset("wan-14b").dit), "F32", 4)
    else:
        write_random_torch(args.file, shapes.wan_dit(preset("wan-1.3b").dit))


if __name__ == "__main__":
    main()
