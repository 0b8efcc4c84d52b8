"""Reads safetensors files: a length, a JSON header, then the data.

The `safetensors` package maps the file as well, but cannot give pages back once they were read, which is what
keeps the memory of a conversion small.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from convert.source import MappedFile, Tensor, contiguous_strides
from svd2_jax.errors import ConversionError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_LENGTH_BYTES = 8

_DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("int64"),
    "I32": np.dtype("int32"),
    "I16": np.dtype("int16"),
    "I8": np.dtype("int8"),
    "U8": np.dtype("uint8"),
    "BOOL": np.dtype("bool"),
}


def looks_like_safetensors(head: bytes) -> bool:
    """Whether a file that starts with `head` (at least 9 bytes) may be a safetensors file."""
    return head[_LENGTH_BYTES : _LENGTH_BYTES + 1] == b"{" and _header_bytes(head) <= MAX_HEADER_BYTES


def read_safetensors(file: MappedFile) -> dict[str, Tensor]:
    """Returns the file's tensors by name, unread; raises ConversionError if it is truncated or damaged."""
    nbytes = _header_bytes(file.map[:_LENGTH_BYTES])
    start = _LENGTH_BYTES + nbytes
    if start > len(file):
        raise ConversionError(f"{file.path}: truncated (its header is cut short); download it again")
    try:
        header = json.loads(file.map[_LENGTH_BYTES:start], object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        return {name: _locate(name, entry, file, start) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ConversionError(f"{file.path}: damaged safetensors header ({type(e).__name__}: {e})") from None


def _header_bytes(head: bytes) -> int:
    return int.from_bytes(head[:_LENGTH_BYTES], "little")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _locate(name: str, entry: Mapping[str, Any], file: MappedFile, start: int) -> Tensor:
    if entry["dtype"] not in _DTYPES:
        raise ConversionError(
            f"{file.path}: {name} is stored as {entry['dtype']}; only unquantised weights can be converted, "
            "use the bfloat16, float16 or float32 file"
        )
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (begin, end, *shape)):
        raise ValueError(f"{name}: impossible numbers")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name}: {end - begin} bytes cannot hold shape {shape}")
    if start + end > len(file):
        raise ConversionError(f"{file.path}: truncated at {name}; download it again")
    return Tensor(shape, dtype, file, start + begin, contiguous_strides(shape))
