"""How much memory each device of a pipeline needs, and whether it has it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from svd2_jax.config import ModelConfig, StreamConfig
from svd2_jax.engine.costs import costs
from svd2_jax.engine.mesh import StageMesh
from svd2_jax.engine.programs import Builder
from svd2_jax.errors import ConfigError
from svd2_jax.hardware import GIB
from svd2_jax.text import blocks_named

JAX_SHARE = (
    0.75  # of a GPU's memory, which JAX takes for itself unless XLA_CLIENT_MEM_FRACTION says otherwise
)
LARGEST_SHARE = 0.9  # that is sensible: CUDA's context and the libraries need the rest


@dataclass(frozen=True)
class StageMemory:
    """What one device of a pipeline holds while a stream runs, in bytes.

    Attributes:
      first_block: its first block.
      blocks: how many it has.
      weights: its blocks, patch embedding and head; on the first device also the text and timestep embeddings and
        the VAE's encoder, on the last also the decoder; on all that share them both. The text encoder is not among
        them.
      cache: rolling KV cache. All stages run one program, so all have room for the longest stage's blocks.
      prompt: cross-attention keys and values of one prompt.
      stream: the VAE's tails and the chunks under way.
      opening: what it needs on top for a moment: the rows of the cache are copies of the first group's.
    """

    first_block: int
    blocks: int
    weights: int
    cache: int
    prompt: int
    stream: int
    opening: int

    @property
    def held(self) -> int:
        """All that stays."""
        return self.weights + self.cache + self.prompt + self.stream


@dataclass(frozen=True)
class Temporaries:
    """Bytes that the compiled programs need in passing, at most; programs on one device take turns.

    Attributes:
      tick: a pass through the blocks, on every device.
      encode: on the first device, or the first ones that share it.
      decode: on the last one, likewise.
      vae_devices: how many share encoding, and how many decoding.
    """

    tick: int
    encode: int
    decode: int
    vae_devices: int = 1

    def shared_by(self, devices: int) -> Temporaries:
        """Returns what is needed where another number of devices shares encoding and decoding, in proportion."""
        encode, decode = (size * self.vae_devices // devices for size in (self.encode, self.decode))
        return Temporaries(self.tick, encode, decode, devices)

    def on(self, stage: int, stages: int) -> int:
        """Returns the largest one on a device."""
        first, last = stage < self.vae_devices, stage >= stages - self.vae_devices
        return max(self.tick, self.encode if first else 0, self.decode if last else 0)


def stage_memory(
    model: ModelConfig, cfg: StreamConfig, dtype: jnp.dtype, split: Sequence[int], vae_devices: int = 1
) -> tuple[StageMemory, ...]:
    """Returns what each device holds with so many blocks on each stage, and so many that share the VAE."""
    sizes, room = costs(model, cfg, dtype, vae_devices).sizes, max(split)
    stages = []
    for i, blocks in enumerate(split):
        weights, stream = blocks * sizes.block + sizes.ends, sizes.message
        if i == 0:
            weights += sizes.conditioner
        if i < vae_devices:
            weights += sizes.encoder
            stream += sizes.encode_state
        if i >= len(split) - vae_devices:
            weights += sizes.decoder
            stream += sizes.decode_state
        cache = room * sizes.cache
        opening = cache // cfg.rows if cfg.rows > 1 else 0
        stages.append(
            StageMemory(sum(split[:i]), blocks, weights, cache, room * sizes.prompt, stream, opening)
        )
    return tuple(stages)


def check_memory(
    model: ModelConfig,
    cfg: StreamConfig,
    dtype: jnp.dtype,
    split: Sequence[int],
    mesh: StageMesh,
    limits: Sequence[int | None] | None = None,
    streams: int = 1,
    vae_devices: int = 1,
) -> None:
    """Refuses a stream that cannot fit, before any parameter is read.

    What compiled programs need in passing is not known yet, so a stream that passes may still turn out too large.

    Args:
      model: sizes of the networks.
      cfg: what the stream computes.
      dtype: compute dtype.
      split: blocks on each stage.
      mesh: the stages' devices.
      limits: bytes that JAX may use on each stage's device, None where that is not known; None asks the devices.
        A CPU does not say, and another process's device cannot be asked.
      streams: of this kind that are to be open at once; they share the parameters.
      vae_devices: how many devices share encoding, and how many decoding.

    Raises:
      ConfigError: a stage needs more; names the one that lacks the most.
    """
    limits = [_limit(mesh, stage) for stage in range(mesh.stages)] if limits is None else limits
    if all(limit is None for limit in limits):
        return
    stages = stage_memory(model, cfg, dtype, split, vae_devices)
    needs = [m.held + m.opening + (streams - 1) * (m.cache + m.prompt + m.stream) for m in stages]
    lacks = [0 if limit is None else need - limit for need, limit in zip(needs, limits, strict=True)]
    stage = max(range(len(lacks)), key=lacks.__getitem__)
    limit = limits[stage]
    if lacks[stage] <= 0 or limit is None:
        return
    first = sum(split[:stage])
    raise ConfigError(
        f"stage {stage} ({blocks_named(first, split[stage])}) needs {needs[stage] / GIB:.1f} GiB, its device "
        f"has {limit / GIB:.1f} GiB for JAX, {lacks[stage] / GIB:.1f} GiB too little"
        f"{f' for {streams} streams' if streams > 1 else ''}; use "
        + _remedies(model, dtype, len(split), needs[stage] / limit, streams)
    )


def _remedies(model: ModelConfig, dtype: jnp.dtype, stages: int, excess: float, streams: int) -> str:
    remedies = ["a smaller picture"]
    if streams > 1:
        remedies.insert(0, "fewer streams")
    if dtype == jnp.float32:
        remedies.insert(0, "--dtype bfloat16")
    if stages < model.dit.num_layers:
        remedies.insert(0, "more --stages")
    if excess < LARGEST_SHARE / JAX_SHARE:
        remedies.insert(0, f"XLA_CLIENT_MEM_FRACTION={LARGEST_SHARE} instead of JAX's {JAX_SHARE}")
    return " or ".join((", ".join(remedies[:-1]), remedies[-1])) if len(remedies) > 1 else remedies[0]


def _limit(mesh: StageMesh, stage: int) -> int | None:
    """Returns the bytes that JAX may use on a stage's device; None where the device does not say."""
    if not mesh.is_local(stage):
        return None
    return (mesh.devices[stage].memory_stats() or {}).get("bytes_limit")


def compiled_temporaries(
    model: ModelConfig,
    cfg: StreamConfig,
    dtype: jnp.dtype,
    split: Sequence[int],
    mesh: StageMesh,
    progress: Callable[[str], None] = lambda what: None,
    share_vae: bool = False,
) -> Temporaries:
    """Returns an upper bound of what a GPU's programs need in passing, from the real ones compiled for a CPU.

    A GPU gets by with less: its fused kernel keeps no copy of keys and values, and it multiplies in bfloat16,
    where a CPU widens all weights to float32 first. So the tick is always compiled in float32, where there is
    nothing to widen and each array takes at least as much as in bfloat16. At 14B with 8+12+12+8 blocks, 480x832, two
    steps and bfloat16 this gives 2.1 GiB for a tick (10.3 when compiled in bfloat16), 4.4 to encode and 3.9 to
    decode; the same programs compiled for an H100 need 0.2, 2.1 and 2.1. Weights and cache in 8 bits are compiled in
    float32 as well: a GPU widens one layer's at a time, to 16 bits, and a CPU all of them at once.

    Args:
      model: sizes of the networks.
      cfg: what the stream computes.
      dtype: compute dtype.
      split: blocks on each stage.
      mesh: as many CPU devices; virtual ones do.
      progress: told what is compiled next.
      share_vae: see `Builder`.
    """
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms mix bfloat16 with float32
        progress(f"the tick, {max(split)} blocks a stage")
        plain_model, plain_cfg = (
            model.with_weight_dtype("compute"),
            dataclasses.replace(cfg, cache_dtype="compute"),
        )
        wide = Builder(plain_model, plain_cfg, jnp.dtype(jnp.float32), mesh, attention="blocked")
        tick = _temporaries(wide.ticks(split).tick[1])
        progress("encoder and decoder")
        builder = Builder(model, cfg, dtype, mesh, share_vae=share_vae)
        ends = builder.ends()
        encode = max(_temporaries(p) for p in (ends.encode_first, ends.encode))
        decode = max(_temporaries(p) for p in (ends.decode_first, ends.decode))
    return Temporaries(tick, encode, decode, builder.vae_devices)


def _temporaries(program: Any) -> int:
    """Returns the bytes per device; 0 for a program that is not there."""
    return 0 if program is None else program.memory_analysis().temp_size_in_bytes
