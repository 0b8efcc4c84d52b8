"""The devices of a pipeline and the arrays that lie over them.

Devices are a grid of data x stage: `data` carries independent streams, `stage` the stages of each one's pipeline.
Streams have nothing to wait for in each other, so programs are compiled for one row of the grid, a `StageMesh`.

Arrays lie over the stages along their first axis: inside `shard_map` every stage sees the shape that it would
have alone, and an array over all stages is no more than a label on one buffer per device.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from svd2_jax.errors import ConfigError
from svd2_jax.stream.step import AXIS
from svd2_jax.text import counted
from svd2_jax.types import Device


@dataclass(frozen=True)
class StageMesh:
    """The devices of one stream, in the order of its stages."""

    devices: tuple[Device, ...]

    @property
    def stages(self) -> int:
        return len(self.devices)

    @property
    def first(self) -> Device:
        """Where frames come in: encoder, noise, conditioning."""
        return self.devices[0]

    @property
    def last(self) -> Device:
        """Where frames go out: decoder."""
        return self.devices[-1]

    @cached_property
    def mesh(self) -> Mesh:
        return Mesh(np.array(self.devices), (AXIS,))

    @cached_property
    def over_stages(self) -> NamedSharding:
        """One part of the first axis on each stage."""
        return NamedSharding(self.mesh, PartitionSpec(AXIS))

    @cached_property
    def everywhere(self) -> NamedSharding:
        """The same on each stage."""
        return NamedSharding(self.mesh, PartitionSpec())

    def is_local(self, stage: int) -> bool:
        """Whether this process drives the device of a stage; a negative stage counts from the end."""
        return self.devices[stage].process_index == jax.process_index()

    @cached_property
    def local_stages(self) -> tuple[int, ...]:
        """Stages whose device this process drives."""
        return tuple(s for s in range(self.stages) if self.is_local(s))

    @property
    def home(self) -> Device:
        """The first of this process's devices: the first stage's where that is local."""
        return self.devices[self.local_stages[0]]

    def join(self, parts: Sequence[Any]) -> Any:
        """Labels the local stages' trees of single-device arrays as one tree over the stages.

        Nothing is copied: the result holds the same buffers.
        """

        def one(*shards: jax.Array) -> jax.Array:
            shape = (self.stages * shards[0].shape[0], *shards[0].shape[1:])
            return jax.make_array_from_single_device_arrays(shape, self.over_stages, list(shards))

        return jax.tree.map(one, *parts)

    def replicate(self, tree: Any) -> Any:
        """Copies a tree of arrays of this process, the same in every process, to every local stage."""

        def one(x: Any) -> jax.Array:
            copies = [jax.device_put(x, self.devices[s]) for s in self.local_stages]
            return jax.make_array_from_single_device_arrays(x.shape, self.everywhere, copies)

        return jax.tree.map(one, tree)

    def leading(self, stages: int) -> StageMesh:
        """The first stages' devices, so many."""
        return StageMesh(self.devices[:stages])

    def trailing(self, stages: int) -> StageMesh:
        """The last stages' devices, so many."""
        return StageMesh(self.devices[self.stages - stages :])

    def part(self, tree: Any, stage: int) -> Any:
        """Returns a local stage's part of a tree over the stages; a negative stage counts from the end."""
        device = self.devices[stage]

        def one(x: jax.Array) -> jax.Array:
            return next(shard.data for shard in x.addressable_shards if shard.device == device)

        return jax.tree.map(one, tree)

    def gather(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Returns all stages' arrays of one shape, concatenated, in every process; each gives its local stages'.

        Every process has to call it: it is a collective.
        """
        placed = [jax.device_put(x, self.devices[s]) for s, x in zip(self.local_stages, parts, strict=True)]
        return np.asarray(jax.jit(lambda x: x, out_shardings=self.everywhere)(self.join(placed)))

    def abstract(self, tree: Any) -> Any:
        """Returns the shapes (ShapeDtypeStruct) over all stages of a tree of one stage's shapes."""

        def one(x: Any) -> jax.ShapeDtypeStruct:
            shape = (self.stages * x.shape[0], *x.shape[1:])
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=self.over_stages)

        return jax.tree.map(one, tree)


def on(device: Device, tree: Any) -> Any:
    """Returns a tree of shapes as ShapeDtypeStructs that lie on one device."""
    sharding = SingleDeviceSharding(device)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def stage_meshes(
    replicas: int, stages: int, devices: Sequence[Device] | None = None
) -> tuple[StageMesh, ...]:
    """Returns the devices of several replicas of a pipeline, one mesh each.

    Args:
      replicas: pipelines that run beside one another.
      stages: of each of them.
      devices: in the order of the stages, one replica after another; None takes JAX's, of all processes.

    Raises:
      ConfigError: fewer devices than the mesh needs, or none asked for.
    """
    devices = jax.devices() if devices is None else devices
    for name, count in (("stages", stages), ("replicas", replicas)):
        if count < 1:
            raise ConfigError(f"{name} must be at least 1, got {count}")
    if replicas * stages > len(devices):
        platform = devices[0].platform
        virtual = (
            f"; for virtual CPU devices set XLA_FLAGS=--xla_force_host_platform_device_count={replicas * stages}"
            if platform == "cpu"
            else ""
        )
        raise ConfigError(
            f"{counted(stages, 'stage')}{f' for each of {replicas} replicas' if replicas > 1 else ''} need "
            f"{replicas * stages} devices, JAX sees {len(devices)} ({platform}){virtual}"
        )
    if stages > 1 and devices[0].platform == "gpu":
        # One process that drives several GPUs may hand two collectives to them in different orders.
        os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
    return tuple(StageMesh(tuple(devices[d * stages : (d + 1) * stages])) for d in range(replicas))
