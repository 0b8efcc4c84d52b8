"""Writes files as `torch.save` does, without torch: a zip with one pickle and a stored record per storage."""

import itertools
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

ALIGNMENT = 64

STORAGES = {
    np.dtype("float32"): "FloatStorage",
    np.dtype("float16"): "HalfStorage",
    np.dtype("float64"): "DoubleStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype("int64"): "LongStorage",
}


@dataclass(frozen=True)
class Global:
    """A name that the pickle refers to; pickled as that name without importing it."""

    module: str
    name: str

    def __call__(self, *args):
        raise AssertionError("only ever pickled")


@dataclass(frozen=True)
class Call:
    """Pickled as the call of a global."""

    function: Global
    args: tuple


@dataclass(frozen=True)
class Storage:
    key: str
    dtype: np.dtype
    size: int


@dataclass(frozen=True)
class Lazy:
    """A tensor whose values are made when they are written, for files larger than memory."""

    shape: tuple[int, ...]
    dtype: np.dtype
    values: Callable[[], np.ndarray]


class _Pickler(pickle._Pickler):  # the pure Python one: it lets us write a global that cannot be imported
    dispatch = {**pickle._Pickler.dispatch}  # noqa: RUF012

    def save_named(self, obj):
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())

    dispatch[Global] = save_named

    def persistent_id(self, obj):
        if isinstance(obj, Storage):
            return ("storage", Global("torch", STORAGES[obj.dtype]), obj.key, "cpu", obj.size)
        return None

    def reducer_override(self, obj):
        return (obj.function, obj.args) if isinstance(obj, Call) else NotImplemented


def tensor(storage, offset, shape, strides):
    flags = (False, Call(Global("collections", "OrderedDict"), ()))
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), (storage, offset, shape, strides, *flags))


def _row_major(shape):
    return tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))


def write_torch_zip(path, content, *, root="archive", align=True):
    """Writes `content`: nested dicts whose arrays (or Lazy tensors) become tensors with a storage each."""
    storages = []
    keys = itertools.count()

    def describe(value):
        if isinstance(value, dict):
            return {k: describe(v) for k, v in value.items()}
        if isinstance(value, np.ndarray | Lazy):
            storage = Storage(str(next(keys)), value.dtype, int(np.prod(value.shape)))
            storages.append((storage, value))
            return tensor(storage, 0, tuple(value.shape), _row_major(value.shape))
        return value

    described = describe(content)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(f"{root}/data.pkl", "w") as f:
            _Pickler(f, protocol=2).dump(described)
        archive.writestr(f"{root}/byteorder", "little")
        for storage, value in storages:
            info = zipfile.ZipInfo(f"{root}/data/{storage.key}")
            if align:
                start = archive.fp.tell() + 30 + len(info.filename)
                pad = -(start + 4) % ALIGNMENT
                info.extra = struct.pack("<HH", 0x4246, pad) + b"Z" * pad
            values = value.values() if isinstance(value, Lazy) else value
            with archive.open(info, "w") as f:  # bfloat16 has no buffer interface; bytes do
                f.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        archive.writestr(f"{root}/version", "3\n")
