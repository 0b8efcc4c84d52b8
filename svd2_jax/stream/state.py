"""A stream's whole memory on the devices of its pipeline, as one stage sees it."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from svd2_jax.config import DiTConfig, StreamConfig
from svd2_jax.models.dit import Conditioning
from svd2_jax.nn import kv_cache
from svd2_jax.nn.kv_cache import KVCache


@register_dataclass
@dataclass(frozen=True)
class Message:
    """A micro-batch between two stages: the chunks of all rows, half-way through the blocks.

    What the last stage hands to the first is finished with this pass, and its latents are the clean prediction.

    Attributes:
      hidden: [B, Q, E] hidden states, compute dtype.
      latents: float32 [B, F, h, w, C] noisy latents; behind the last stage the clean prediction.
      conditioning: what the rows' timesteps contribute.
      start: int32 [B] time index of each row's first latent frame.
      active: bool [B] rows that hold a chunk; the others change nothing.
    """

    hidden: jax.Array
    latents: jax.Array
    conditioning: Conditioning
    start: jax.Array
    active: jax.Array


@register_dataclass
@dataclass(frozen=True)
class StreamState:
    """What one stage remembers of a stream between two ticks.

    Attributes:
      cache: rolling KV cache of the stage's blocks, with B rows.
      start: int32 [1] time index of the next chunk's first latent frame; only the first stage's is used.
      message: the micro-batch that waits for this stage.
    """

    cache: KVCache
    start: jax.Array
    message: Message


@register_dataclass
@dataclass(frozen=True)
class StageInput:
    """What enters a pipeline's first stage with a tick; other stages get it too and ignore it.

    Attributes:
      latents: float32 [F, h, w, C] noisy latents of a new chunk.
      open: bool [B] which rows take a chunk: row 0 the new one, the others what comes back from the last stage in
        the row before. A single chunk that comes back takes its next step where `open` is False.
      conditioning: of the B rows' timesteps.
      noise: Gaussians [F, h, w, C] that re-noise the chunks which come back from the last stage: one for each of
        the rows 1 to B - 1, or one for a single chunk.
    """

    latents: jax.Array
    open: jax.Array
    conditioning: Conditioning
    noise: tuple[jax.Array, ...]


def empty_message(dit: DiTConfig, cfg: StreamConfig, dtype: jnp.dtype, rows: int, frames: int) -> Message:
    """Returns a micro-batch of `rows` rows of `frames` latent frames that holds no chunk."""
    tokens = frames * kv_cache.frame_tokens(dit, cfg)
    return Message(
        hidden=jnp.zeros((rows, tokens, dit.dim), dtype),
        latents=jnp.zeros((rows, frames, *cfg.latent_size, dit.in_channels), jnp.float32),
        conditioning=Conditioning(
            timestep=jnp.zeros((rows,), jnp.int32),
            time=jnp.zeros((rows, dit.dim), jnp.float32),
            modulation=jnp.zeros((rows, 6, dit.dim), jnp.float32),
        ),
        start=jnp.zeros((rows,), jnp.int32),
        active=jnp.zeros((rows,), jnp.bool_),
    )


def init_stream_state(
    dit: DiTConfig, cfg: StreamConfig, dtype: jnp.dtype, layers: int | None = None
) -> StreamState:
    """Returns the state before the first group: one empty cache row and no chunk under way.

    Args:
      dit: sizes.
      cfg: what the stream computes.
      dtype: compute dtype.
      layers: blocks that the stage has room for; None is all of them.
    """
    return StreamState(
        cache=kv_cache.init_kv_cache(dit, cfg, dtype, layers),
        start=jnp.zeros((1,), jnp.int32),
        message=empty_message(dit, cfg, dtype, 1, cfg.first_latents),
    )


def open_rows(dit: DiTConfig, cfg: StreamConfig, state: StreamState) -> StreamState:
    """Returns the state after the first group: a cache row for every row of the batch, no chunk under way."""
    dtype = state.message.hidden.dtype
    return StreamState(
        cache=kv_cache.resize_rows(state.cache, cfg.rows),
        start=state.start,
        message=empty_message(dit, cfg, dtype, cfg.rows, cfg.frames_per_block),
    )


def resize_message(message: Message, rows: int) -> Message:
    """Returns a micro-batch with its first `rows` rows, or with so many rows of which the new ones hold no chunk."""

    def one(x: jax.Array) -> jax.Array:
        missing = max(0, rows - x.shape[0])
        return jnp.concatenate([x[:rows], jnp.zeros((missing, *x.shape[1:]), x.dtype)])

    return jax.tree.map(one, message)
