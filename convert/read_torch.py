"""Reads files written by `torch.save` (the zip format, PyTorch 1.6 and later) without PyTorch.

The zip holds one pickle, which describes the tensors, and one stored record per tensor storage. The pickle is
read with a closed list of globals: whatever else it names is refused, so opening a checkpoint runs no code of
its author. Tensor data is never read here, only located.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from convert.source import MappedFile, Tensor
from svd2_jax.errors import ConversionError

STATE_KEYS = ("generator", "generator_ema", "state_dict")  # first found wins, like the reference

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra field
_LOCAL_SIGNATURE = b"PK\x03\x04"
_HOW_TO_RESAVE = (
    "If you trust the file, load it with PyTorch once and save only its weights: "
    "torch.save(torch.load(FILE, weights_only=False)['generator'], NEW_FILE)"
)


# What the pickle's globals become. Named tuples and slotted callables: a pickle can set no attribute on them.
class _Storage(NamedTuple):
    dtype: str
    key: str


class _TensorRef(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _RebuildTensor:
    __slots__ = ()

    def __call__(self, storage, offset, size, stride, *_flags) -> _TensorRef:
        return _TensorRef(storage, offset, size, stride)


class _RebuildParameter:
    __slots__ = ()

    def __call__(self, data, *_flags) -> _TensorRef:
        return data


class _ToTuple:
    __slots__ = ()

    def __call__(self, values=()) -> tuple:
        return tuple(values)


_STORAGE_DTYPES: Mapping[str, np.dtype] = {
    "DoubleStorage": np.dtype("float64"),
    "FloatStorage": np.dtype("float32"),
    "HalfStorage": np.dtype("float16"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("int64"),
    "IntStorage": np.dtype("int32"),
    "ShortStorage": np.dtype("int16"),
    "CharStorage": np.dtype("int8"),
    "ByteStorage": np.dtype("uint8"),
    "BoolStorage": np.dtype("bool"),
}

ALLOWED_GLOBALS: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    ("torch", "Size"): _ToTuple(),
    **{("torch", name): name for name in _STORAGE_DTYPES},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, label: str):
        super().__init__(io.BytesIO(data))
        self._label = label

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED_GLOBALS:
            raise ConversionError(
                f"{self._label}: its pickle names {module}.{name}, which weights do not need and which could "
                f"run code; refused. {_HOW_TO_RESAVE}"
            )
        return ALLOWED_GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, *_ = pid
        if kind != "storage" or dtype not in _STORAGE_DTYPES:
            raise ConversionError(f"{self._label}: unknown storage {pid!r}")
        return _Storage(dtype, key)


def read_torch(file: MappedFile) -> dict[str, Tensor]:
    """Returns the state dict's tensors by their stored names, in order, unread.

    The state dict is the top level's `generator`, `generator_ema` or `state_dict`, else the top level itself.
    Raises ConversionError if the file is truncated, not written by torch.save, or names a forbidden global.
    """
    label = file.path
    directory = _directory(file)
    pickles = [name for name in directory if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ConversionError(f"{label}: a zip file, but not a PyTorch checkpoint (no data.pkl inside)")
    root = pickles[0].removesuffix("data.pkl")
    if root + "constants.pkl" in directory:
        raise ConversionError(f"{label}: a TorchScript program, not a checkpoint of weights")
    byteorder = directory.get(root + "byteorder")  # absent in files of older versions
    if byteorder is not None and _read_record(file, byteorder) != b"little":
        raise ConversionError(f"{label}: written on a big-endian machine; re-save it on a little-endian one")
    try:
        content = _Unpickler(_read_record(file, directory[pickles[0]]), str(label)).load()
        state = _state_dict(content, str(label))
        return {name: _locate(name, ref, file, root, directory) for name, ref in state.items()}
    except ConversionError:
        raise
    except Exception as e:  # a damaged pickle, or what it describes, fails in any way at all
        raise ConversionError(
            f"{label}: damaged, its pickle cannot be read ({type(e).__name__}: {e})"
        ) from None


def _state_dict(content: Any, label: str) -> dict[str, _TensorRef]:
    if isinstance(content, dict):
        key = next((k for k in STATE_KEYS if isinstance(content.get(k), dict)), None)
        content = content if key is None else content[key]
    if not isinstance(content, dict) or not content:
        raise ConversionError(f"{label}: holds no dictionary of weights")
    strangers = [str(k) for k, v in content.items() if not (isinstance(k, str) and isinstance(v, _TensorRef))]
    if strangers:
        raise ConversionError(
            f"{label}: not a dictionary of weights: these entries are no tensors: {', '.join(strangers[:8])}"
            f"{' ...' if len(strangers) > 8 else ''}"
        )
    return dict(content)


class _Record(NamedTuple):
    offset: int
    nbytes: int


def _directory(file: MappedFile) -> dict[str, zipfile.ZipInfo]:
    """Returns the archive's records by name; raises ConversionError if it is damaged or cut short."""
    try:
        with zipfile.ZipFile(file.path) as archive:
            return {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, struct.error, EOFError):
        raise ConversionError(
            f"{file.path}: truncated or damaged (its zip directory is missing); download it again"
        ) from None


def _record(file: MappedFile, info: zipfile.ZipInfo) -> _Record:
    """Returns where the record's bytes lie; raises ConversionError if they are not all there."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ConversionError(f"{file.path}: {info.filename} is compressed, as torch.save never does")
    header = file.map[info.header_offset : info.header_offset + _LOCAL_HEADER.size]
    if len(header) == _LOCAL_HEADER.size:
        signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        offset = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        if signature == _LOCAL_SIGNATURE and offset + info.file_size <= len(file):
            return _Record(offset, info.file_size)
    raise ConversionError(f"{file.path}: truncated or damaged at {info.filename}; download it again")


def _read_record(file: MappedFile, info: zipfile.ZipInfo) -> bytes:
    record = _record(file, info)
    return file.map[record.offset : record.offset + record.nbytes]


def _locate(
    name: str, ref: _TensorRef, file: MappedFile, root: str, directory: Mapping[str, zipfile.ZipInfo]
) -> Tensor:
    """Returns the tensor at its place in the file, checked against the bounds of its storage."""
    dtype = _STORAGE_DTYPES[ref.storage.dtype]
    info = directory.get(f"{root}data/{ref.storage.key}")
    if info is None:
        raise ConversionError(f"{file.path}: damaged, the data of {name} is missing")
    record = _record(file, info)
    numbers = (ref.offset, *ref.shape, *ref.strides)
    if len(ref.shape) != len(ref.strides) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ConversionError(f"{file.path}: damaged, {name} has the impossible shape {ref.shape}")
    tensor = Tensor(ref.shape, dtype, file, record.offset + ref.offset * dtype.itemsize, ref.strides)
    if math.prod(ref.shape) and ref.offset * dtype.itemsize + tensor.span_bytes > record.nbytes:
        raise ConversionError(
            f"{file.path}: damaged, {name} of shape {ref.shape} needs more than its {record.nbytes} bytes"
        )
    return tensor
