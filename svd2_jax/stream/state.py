"""A stream's whole memory on the device."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from svd2_jax.config import DiTConfig, StreamConfig
from svd2_jax.nn import kv_cache
from svd2_jax.nn.kv_cache import KVCache


@register_dataclass
@dataclass(frozen=True)
class StreamState:
    """What the denoiser of one stream remembers between chunks.

    Attributes:
      cache: rolling KV cache with B rows.
      start: int32 [] time index of the next chunk's first latent frame.
      ticks: int32 [] stream-batch ticks so far; row r is in use from tick r on.
      rows: float32 [B - 1, F, h, w, C] chunks on their way: row r - 1 waits for denoising step r.
      row_starts: int32 [B - 1] time index of each of them.
    """

    cache: KVCache
    start: jax.Array
    ticks: jax.Array
    rows: jax.Array
    row_starts: jax.Array


def init_stream_state(dit: DiTConfig, cfg: StreamConfig, dtype: jnp.dtype) -> StreamState:
    """Returns the state before the first group: one empty cache row and no chunk under way."""
    return StreamState(
        cache=kv_cache.init_kv_cache(dit, cfg, dtype),
        start=jnp.zeros((), jnp.int32),
        ticks=jnp.zeros((), jnp.int32),
        rows=jnp.zeros((0, cfg.frames_per_block, *cfg.latent_size, dit.in_channels), jnp.float32),
        row_starts=jnp.zeros((0,), jnp.int32),
    )


def open_rows(cfg: StreamConfig, state: StreamState) -> StreamState:
    """Returns the state after the first group with one cache row for every row of the stream batch."""
    waiting = cfg.rows - 1
    return StreamState(
        cache=kv_cache.repeat_rows(state.cache, cfg.rows),
        start=state.start,
        ticks=state.ticks,
        rows=jnp.zeros((waiting, *state.rows.shape[1:]), state.rows.dtype),
        row_starts=jnp.zeros((waiting,), jnp.int32),
    )
