"""Encoder and decoder over several devices, each with a part of the picture's rows.

Frames and the VAE's memory lie over the devices by rows. Latents have all rows on one device, the first stage's or
the last one's, as without sharing: the other devices bring zeros, and the programs sum over the devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from svd2_jax.config import StreamConfig
from svd2_jax.engine.mesh import StageMesh
from svd2_jax.nn.row_shards import RowShards, most_shards
from svd2_jax.stream.pixels import InputState
from svd2_jax.stream.step import AXIS

ROWS = PartitionSpec(None, AXIS)  # of frames [T, H, W, 3]
APART = PartitionSpec(AXIS)  # see `StageMesh`: each device's part has the shape that it would have alone
ALIKE = PartitionSpec()
INPUT_STATE = InputState(vae=APART, last_frame=APART, noise_scale=ALIKE)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Layout:
    """How the arguments and results of a function of `stream.pixels` lie over the devices, its configuration left out.

    Attributes:
      arguments: specs, of which each may stand for a whole tree.
      results: likewise, the state first.
      latents: which argument has all rows on one device: the latents, or their noise.
      encodes: whether that is the first device, which the results are for as well; else it is the last.
    """

    arguments: tuple[Any, ...]
    results: tuple[Any, ...]
    latents: int
    encodes: bool


ENCODE_FIRST = Layout((ALIKE, ROWS, APART, ALIKE), (INPUT_STATE, APART), 2, encodes=True)
ENCODE = Layout((ALIKE, INPUT_STATE, ROWS, APART, ALIKE), (INPUT_STATE, APART, ALIKE), 3, encodes=True)
DECODE_FIRST = Layout((ALIKE, APART), (APART, ROWS), 1, encodes=False)
DECODE = Layout((ALIKE, APART, APART), (APART, ROWS), 2, encodes=False)


def sharing_devices(cfg: StreamConfig, stages: int) -> int:
    """Returns how many of a pipeline's devices can share its VAE: each gets as many rows of latents."""
    return most_shards(cfg.latent_size[0], stages)


def row_shards(devices: StageMesh) -> RowShards | None:
    """Returns how rows are cut over the devices; None for a single one."""
    return RowShards(AXIS, devices.stages) if devices.stages > 1 else None


def sharding(devices: StageMesh, spec: PartitionSpec) -> Sharding:
    """Returns how an array of this spec lies over the devices, one or several."""
    if devices.stages == 1:
        return SingleDeviceSharding(devices.first)
    return NamedSharding(devices.mesh, spec)


def abstract(devices: StageMesh, layout: Layout, args: Sequence[Any]) -> tuple[Any, ...]:
    """Returns the shapes of arguments over the devices, of those that one device would take.

    Those that lie somewhere already, as results of another program do, stay as they are.
    """

    def lay(spec: Any, tree: Any) -> Any:
        return jax.tree.map(
            lambda x: x if x.sharding else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(devices, spec)),
            tree,
        )  # fmt: skip

    laid = [lay(spec, arg) for spec, arg in zip(layout.arguments, args, strict=True)]
    laid[layout.latents] = devices.abstract(args[layout.latents])
    return tuple(laid)


class SharedProgram:
    """A compiled program of several devices, to be called like that of the one that has the latents."""

    def __init__(self, program: Any, devices: StageMesh, layout: Layout, latents: Any):
        """Wraps an executable; `latents` are the shapes of what one device has of them."""
        self._program, self._devices, self._layout = program, devices, layout
        self._home = 0 if layout.encodes else devices.stages - 1
        blank = np.zeros(latents.shape, latents.dtype)
        self._parts = [jax.device_put(blank, device) for device in devices.devices]

    def __call__(self, *args: Any) -> Any:
        at, parts = self._layout.latents, list(self._parts)
        parts[self._home] = args[at]
        state, *rest = self._program(*args[:at], self._devices.join(parts), *args[at + 1 :])
        return state, *(self._devices.part(rest, self._home) if self._layout.encodes else rest)

    def memory_analysis(self) -> Any:
        """Returns what the compiler says of the memory of each device."""
        return self._program.memory_analysis()
