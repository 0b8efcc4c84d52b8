"""What a tick gives: finished chunks, on the device or on their way to the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from svd2_jax.errors import SessionError


@dataclass(frozen=True)
class DeviceChunk:
    """A finished chunk whose frames are still on the device or on their way to the host; see `api.Chunk`.

    Attributes:
      first_frame: index of its first frame in the output.
      frame_count: frames in it.
      result: the frames; where another process has the last stage, something that is there when they are.
      is_here: whether this process has the frames.
    """

    first_frame: int
    frame_count: int
    result: jax.Array
    is_here: bool = True

    def frames(self) -> np.ndarray:
        """Waits for the frames [T, H, W, 3]."""
        if not self.is_here:
            raise SessionError("these frames are in the process that drives the last stage; read them there")
        return np.asarray(self.result)[: self.frame_count]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.frames(), dtype, copy=copy)

    def __repr__(self) -> str:
        first, last = self.first_frame, self.first_frame + self.frame_count - 1
        return f"<DeviceChunk frames {first} to {last}>"

    def wait(self) -> None:
        """Waits until the chunk is finished as far as this process works on it."""
        self.result.block_until_ready()


@dataclass(frozen=True)
class DeviceTicket:
    """A tick on its way through the devices; see `api.Ticket`.

    Attributes:
      chunks: that it finishes, for each part.
      came_back: what leaves the stages, for each part.
    """

    chunks: Sequence[Sequence[DeviceChunk]]
    came_back: Sequence[Sequence[jax.Array]]

    def wait_stages(self) -> None:
        """Waits until this process's stages are through with it."""
        jax.block_until_ready(self.came_back)

    def wait(self) -> None:
        """Waits until this process's devices are through with it."""
        jax.block_until_ready([self.came_back, [chunk.result for done in self.chunks for chunk in done]])


def read(chunks: Iterable[DeviceChunk], on_step: Callable[[], object]) -> Iterator[np.ndarray]:
    """Waits for chunks and yields the frames of those that are in this process."""
    for chunk in chunks:
        if not chunk.is_here:
            chunk.wait()
        elif chunk.frame_count:
            yield chunk.frames()
        on_step()


def cut(chunk: DeviceChunk, limit: int) -> DeviceChunk:
    """Cuts the frames beyond `limit` off a chunk."""
    count = max(0, min(chunk.frame_count, limit - chunk.first_frame))
    return dataclasses.replace(chunk, frame_count=count)
