"""Parameters where they are used, from a checkpoint or random: each device holds its own blocks only."""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from svd2_jax.config import ModelConfig
from svd2_jax.engine.kept_programs import kept_value
from svd2_jax.engine.mesh import StageMesh
from svd2_jax.models import dit, taehv, text_encoder, vae
from svd2_jax.models.dit import DiTParams
from svd2_jax.nn.random_params import gaussian_array, random_params
from svd2_jax.progress import working
from svd2_jax.types import Device

Params = dict[str, Any]
ItemReader = Callable[[str, Device], Params]
"""Returns the parameters of a checkpoint item on a device, in the compute dtype."""

RANDOM_VOCAB = 300  # 256 bytes and a few special tokens
LARGE = 1 << 20  # elements of a random array from which on an accelerator draws it


@dataclass(frozen=True)
class EngineParams:
    """What a stream's programs read.

    Attributes:
      dit: the transformer, over the stages.
      conditioner: timestep and text embedding, on the first of this process's devices.
      encoder: the VAE's encoder on the first stage's device, or on all that share it; None where another process has
        it.
      decoder: the decoder in use, on the last stage's device, likewise.
    """

    dit: DiTParams
    conditioner: Params
    encoder: Params | None
    decoder: Params | None


def decoder_item(decoder: Literal["wan", "taehv"]) -> str:
    """Returns the checkpoint item of a decoder."""
    return "taehv" if decoder == "taehv" else "vae.decoder"


class StageWeights:
    """The parameters of a model on the devices of one stage mesh.

    Each item is read once and straight to its device. Blocks follow the split that was asked for last: what lies
    elsewhere is moved there, or read again where it comes from another process.
    """

    def __init__(self, model: ModelConfig, read_item: ItemReader, mesh: StageMesh):
        self.model, self.mesh = model, mesh
        self.split: tuple[int, ...] | None = None  # that was asked for last
        self._read_item = read_item
        self._items: dict[tuple[str, Device | tuple[Device, ...]], Params] = {}
        self._lock = threading.Lock()  # sessions of several threads may share these
        self._ends: tuple[Params, Params, Params] | None = None  # patch, head, conditioner

    def params(
        self, split: Sequence[int], decoder: Literal["wan", "taehv"], vae_devices: int = 1
    ) -> EngineParams:
        """Returns all that a stream reads, with so many blocks on each stage; the transformer is read last.

        Args:
          split: blocks on each stage.
          decoder: the one in use.
          vae_devices: how many of the first devices encode, and how many of the last decode.
        """
        mesh, count = self.mesh, vae_devices
        encoder = self._copies("vae.encoder", mesh.leading(count)) if mesh.is_local(0) else None
        decoder_params = (
            self._copies(decoder_item(decoder), mesh.trailing(count)) if mesh.is_local(-1) else None
        )
        transformer = self.dit(split)
        assert self._ends is not None
        return EngineParams(transformer, self._ends[2], encoder, decoder_params)

    def dit(self, split: Sequence[int]) -> DiTParams:
        """Returns the transformer with so many blocks on each stage.

        Position j of the result holds every stage's j-th block. Where a stage has fewer, its first one stands in,
        unread and without a copy.
        """
        with self._lock:
            return self._dit(split)

    def _dit(self, split: Sequence[int]) -> DiTParams:
        self.split = tuple(split)
        positions, parts = max(split), []
        for stage in self.mesh.local_stages:
            start = sum(split[:stage])
            blocks = [self._block(start + j, stage) for j in range(split[stage])]
            parts.append((*blocks, *blocks[:1] * (positions - len(blocks))))
        if self._ends is None:
            self._ends = self._read_ends()
        patch, head, _ = self._ends
        self._forget_blocks_of_others(split)
        return DiTParams(patch, self.mesh.join(parts), head)

    def resident_bytes(self) -> dict[Device, int]:
        """Returns the bytes of parameters on each local device."""
        held = dict.fromkeys((self.mesh.devices[s] for s in self.mesh.local_stages), 0)
        leaves = jax.tree.leaves(
            [*self._items.values(), self._ends]
        )  # keys hold devices, which have no order
        for shard in (shard for x in leaves for shard in x.addressable_shards):
            held[shard.device] += shard.data.nbytes
        return held

    def _read_ends(self) -> tuple[Params, Params, Params]:
        # About a MB that every stage gets, and the conditioner, which every process needs for its prompts.
        home = self.mesh.home
        patch, conditioner = dit.split_embed(self._read_item(dit.embed_item(), home))
        head = self._read_item(dit.head_item(), home)
        return self.mesh.replicate(patch), self.mesh.replicate(head), conditioner

    def _block(self, index: int, stage: int) -> Params:
        item, device = dit.block_item(index), self.mesh.devices[stage]
        for s in self.mesh.local_stages:
            if (held := self._items.pop((item, self.mesh.devices[s]), None)) is not None:
                self._items[item, device] = jax.device_put(held, device)
        return self._item(item, device)

    def _forget_blocks_of_others(self, split: Sequence[int]) -> None:
        """Drops blocks that another process has now."""
        stages = [stage for stage, count in enumerate(split) for _ in range(count)]
        for index, stage in enumerate(stages):
            if not self.mesh.is_local(stage):
                for device in self.mesh.devices:
                    self._items.pop((dit.block_item(index), device), None)

    def _item(self, item: str, device: Device) -> Params:
        if (item, device) not in self._items:
            params = self._read_item(item, device)
            if dit.is_block(item) and self.model.dit.weight_dtype != "compute":
                params = _stored_block(self.model.dit, params)
            self._items[item, device] = params
        return self._items[item, device]

    def _copies(self, item: str, devices: StageMesh) -> Params:
        """Returns an item on one device, or the same on several, read once."""
        if devices.stages == 1:
            return self._item(item, devices.first)
        key = item, devices.devices
        if key not in self._items:
            self._items[key] = devices.replicate(self._read_item(item, devices.first))
        return self._items[key]


_stored_block = jax.jit(dit.stored_block, static_argnums=0)


def with_random_text(model: ModelConfig) -> ModelConfig:
    """Returns the model with a one-block text encoder over bytes: random weights know no language anyway."""
    text = dataclasses.replace(model.text, num_layers=1, vocab=RANDOM_VOCAB)
    return dataclasses.replace(model, text=text)


@functools.lru_cache(maxsize=16)
def abstract_items(model: ModelConfig, dtype: jnp.dtype | None = None) -> dict[str, Params]:
    """Returns the shapes (ShapeDtypeStruct) of every item of a model.

    Args:
      model: sizes of the networks.
      dtype: that is computed in, for the items as devices hold them; None for float32, as they are made.
    """
    items = kept_value(_traced_items, model)
    if dtype is None:
        return items
    items = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), items)
    block = jax.eval_shape(functools.partial(dit.stored_block, model.dit), items[dit.block_item(0)])
    return {item: block if dit.is_block(item) else tree for item, tree in items.items()}


def _traced_items(model: ModelConfig) -> dict[str, Params]:
    return {
        **dit.abstract_params(model.dit),
        **vae.abstract_params(model.vae),
        **taehv.abstract_params(model.taehv),
        **text_encoder.abstract_params(model.text),
    }


def random_items(model: ModelConfig, seed: int, dtype: jnp.dtype) -> ItemReader:
    """Returns a reader that draws an item's parameters instead of reading them."""
    shapes = abstract_items(model)

    def read_item(item: str, device: Device) -> Params:
        def on_device(rng: np.random.Generator, shape: tuple[int, ...], deviation: float) -> Any:
            if math.prod(shape) < LARGE:  # each shape is a program to compile
                return gaussian_array(rng, shape, deviation)
            seed = jax.device_put(np.int32(rng.integers(2**31)), device)
            return _gaussian(seed, shape, dtype, deviation)

        # The host takes minutes for the weights of a large model, an accelerator one second.
        gaussian = gaussian_array if device.platform == "cpu" else on_device
        with working(f"drawing {item}"):
            drawn = random_params(shapes[item], (seed, zlib.crc32(item.encode())), gaussian)
            return jax.device_put(jax.tree.map(lambda x: x.astype(dtype), drawn), device)

    return read_item


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _gaussian(seed: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, deviation: float) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype) * jnp.asarray(deviation, dtype)
