"""The devices of a pipeline and the arrays that lie over them.

Devices are a grid of data x stage: `data` carries independent streams, `stage` the stages of each one's pipeline.
Streams have nothing to wait for in each other, so programs are compiled for one row of the grid, a `StageMesh`.

Arrays lie over the stages along their first axis: inside `shard_map` every stage sees the shape that it would
have alone, and an array over all stages is no more than a label on one buffer per device. So blocks move between
stages without a copy of those that stay.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from svd2_jax.errors import ConfigError
from svd2_jax.stream.step import AXIS
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

    def transfer(self, tree: Any, like: Any, source: int, target: int) -> Any:
        """Returns a copy on one stage of a tree of single-device arrays on another.

        Processes that drive neither of both need not call this; those that do have to call it in the same order.

        Args:
          tree: what to copy; looked at only where the source is local.
          like: its shapes.
          source: stage that has it.
          target: stage that gets it.

        Returns:
          The copy, or None where the target is not local.
        """
        here, there = self.is_local(source), self.is_local(target)
        if here and there:
            return jax.device_put(tree, self.devices[target])
        if not here and not there:
            return None
        pair = StageMesh((self.devices[source], self.devices[target]))
        if there:
            tree = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=self.devices[target]), like)
        moved = _shift(pair)(pair.join([tree]))
        return pair.part(moved, 1) if there else None

    def abstract(self, tree: Any) -> Any:
        """Returns the shapes (ShapeDtypeStruct) over all stages of a tree of one stage's shapes."""

        def one(x: Any) -> jax.ShapeDtypeStruct:
            shape = (self.stages * x.shape[0], *x.shape[1:])
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=self.over_stages)

        return jax.tree.map(one, tree)


@functools.lru_cache(maxsize=64)
def _shift(pair: StageMesh) -> Callable[[Any], Any]:
    """Returns a program that copies the first stage's part of a tree to the second."""
    over = PartitionSpec(AXIS)
    shift = functools.partial(jax.lax.ppermute, axis_name=AXIS, perm=[(0, 1)])
    shift = jax.shard_map(
        functools.partial(jax.tree.map, shift), mesh=pair.mesh, in_specs=over, out_specs=over
    )
    return jax.jit(shift)


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
            f"{stages} stage{'s'[: stages - 1]}{f' for each of {replicas} replicas' if replicas > 1 else ''} need "
            f"{replicas * stages} devices, JAX sees {len(devices)} ({platform}){virtual}"
        )
    if stages > 1 and devices[0].platform == "gpu":
        # One process that drives several GPUs may hand two collectives to them in different orders.
        os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
    return tuple(StageMesh(tuple(devices[d * stages : (d + 1) * stages])) for d in range(replicas))
