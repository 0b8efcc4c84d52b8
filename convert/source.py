"""Source files: memory-mapped tensors that are read late and released early, and the files' SHA-256."""

from __future__ import annotations

import hashlib
import math
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from svd2_jax.errors import ConversionError

HASH_PIECE_BYTES = 8 << 20


class MappedFile:
    """A file mapped read-only; pages that were read stay resident until `release`."""

    def __init__(self, path: Path):
        """Maps `path`; raises ConversionError if it is missing, empty or unreadable."""
        self.path = path
        try:
            with open(path, "rb") as f:
                self.map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ConversionError(f"{path}: no such file") from None
        except ValueError:
            raise ConversionError(f"{path}: the file is empty") from None
        except OSError as e:
            raise ConversionError(f"{path}: cannot be read ({e.strerror})") from None

    def __len__(self) -> int:
        return len(self.map)

    def release(self, offset: int, nbytes: int) -> None:
        """Gives the pages of a byte range back to the system; reading them again is valid but slow.

        Mapped pages count as resident memory, so a conversion that keeps them needs as much as the file.
        """
        if not hasattr(self.map, "madvise"):  # Windows has no madvise and trims mapped pages by itself
            return
        start = offset - offset % mmap.PAGESIZE
        self.map.madvise(mmap.MADV_DONTNEED, start, offset + nbytes - start)


@dataclass(frozen=True)
class Tensor:
    """A tensor in a mapped file that has not been read yet.

    Attributes:
      shape: as stored, torch order.
      dtype: bfloat16 is ml_dtypes.bfloat16.
      file: where it lies.
      offset: bytes from the start of the file.
      strides: steps between neighbours of each axis, in elements.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    file: MappedFile
    offset: int
    strides: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def span_bytes(self) -> int:
        """Bytes from the first to behind the last element."""
        if not self.size:
            return 0
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        return (last + 1) * self.dtype.itemsize

    def view(self) -> np.ndarray:
        """Returns the tensor as a read-only view of the file; nothing is read until its values are used."""
        strides = tuple(s * self.dtype.itemsize for s in self.strides)
        return np.ndarray(self.shape, self.dtype, self.file.map, self.offset, strides)

    def release(self) -> None:
        """Gives back the memory of the pages that were read."""
        self.file.release(self.offset, self.span_bytes)


@dataclass(frozen=True)
class Source:
    """The named tensors of one component and the files they lie in.

    Attributes:
      label: how messages call it, e.g. the file name.
      tensors: pairs of name and tensor in file order; names are as stored and may repeat across shards.
      files: every file read.
    """

    label: str
    tensors: tuple[tuple[str, Tensor], ...]
    files: tuple[Path, ...]


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the element strides of a C-ordered array."""
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * n)
    return tuple(reversed(strides)) if shape else ()


def file_pieces(path: Path) -> Iterator[bytes]:
    """Yields the file's bytes in pieces."""
    with open(path, "rb") as f:
        while piece := f.read(HASH_PIECE_BYTES):
            yield piece


def sha256(path: Path, advance: Callable[[int], object]) -> str:
    """Returns the file's SHA-256 in hex, calling `advance(bytes)` as it goes."""
    digest = hashlib.sha256()
    for piece in file_pieces(path):
        digest.update(piece)
        advance(len(piece))
    return digest.hexdigest()
