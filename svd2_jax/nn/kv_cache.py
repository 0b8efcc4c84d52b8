"""Rolling KV cache with sinks as a pure pytree of fixed shapes (StreamDiffusionV2, section 4.2).

A cache holds `cache_frames` latent frames of rotated keys and of values per layer and row. It fills in order.
Once full, the next write goes to the position at the head of an eviction queue, which then moves to the
queue's back. Sinks are not in the queue; an adaptive sink that no longer resembles the stream is put at its
front once. Nothing here depends on the host: one compiled program serves the life of a stream.

Differs from the reference in two ways: means of the sinks are kept at write time instead of being read back
from the cache every tick, and the queue is bounded (see `queue_capacity`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from svd2_jax.config import DiTConfig, StreamConfig
from svd2_jax.nn.quantised import MaybeQuantised, quantise

Cache = TypeVar("Cache")


@register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """One layer's cache.

    Attributes:
      k: [B, K, N, D] rotated keys, K = cache_frames * tokens per frame; quantised over D, or not.
      v: [B, K, N, D] values, held like the keys.
      sink_means: float32 [B, sinks, 2, N * D] token means of the keys and values at the sink positions; zero
        sinks where sinks do not adapt.
      queue: int32 [B, C] eviction order: exclusive ends of cache positions in latent frames, next first.
      queue_len: int32 [B] valid entries of the queue.
    """

    k: MaybeQuantised
    v: MaybeQuantised
    sink_means: jax.Array
    queue: jax.Array
    queue_len: jax.Array


@register_dataclass
@dataclass(frozen=True)
class KVCache:
    """The caches of all layers and what they share.

    Attributes:
      layers: one cache per block.
      filled: int32 [B] valid latent frames.
      held: int32 [B] writes that the present eviction target has taken beyond its first.
    """

    layers: tuple[LayerCache, ...]
    filled: jax.Array
    held: jax.Array


@register_dataclass
@dataclass(frozen=True)
class WritePlan:
    """Where a call writes, the same for all layers.

    Attributes:
      active: bool [B] rows that hold a chunk; others leave their cache untouched.
      full: bool [B] whether the write replaces an old position.
      end: int32 [B] exclusive end of the write, in latent frames, while the cache still fills.
      pop: bool [B] whether the eviction target moves on after this write.
    """

    active: jax.Array
    full: jax.Array
    end: jax.Array
    pop: jax.Array


def queue_capacity(cfg: StreamConfig) -> int:
    """Returns the queue's fixed length C.

    The reference's queue grows without bound when sequential mode re-anchors in every denoising step; ours
    keeps `4 * cache_frames` pending re-anchorings and lets a newer one replace the foremost beyond that.
    """
    return 6 * cfg.cache_frames


def init_kv_cache(dit: DiTConfig, cfg: StreamConfig, dtype: jnp.dtype, layers: int | None = None) -> KVCache:
    """Returns an empty cache with one row, of all layers or of so many."""
    tokens = cfg.cache_frames * frame_tokens(dit, cfg)
    sinks = cfg.sink_frames if cfg.adaptive_sinks else 0

    def slots() -> MaybeQuantised:
        empty = jnp.zeros((1, tokens, dit.num_heads, dit.head_dim), dtype)
        return quantise(empty, cfg.cache_dtype, axis=-1)

    def layer() -> LayerCache:
        return LayerCache(
            k=slots(),
            v=slots(),
            sink_means=jnp.zeros((1, sinks, 2, dit.dim), jnp.float32),
            queue=jnp.zeros((1, queue_capacity(cfg)), jnp.int32),
            queue_len=jnp.zeros((1,), jnp.int32),
        )

    zero = jnp.zeros((1,), jnp.int32)
    return KVCache(tuple(layer() for _ in range(dit.num_layers if layers is None else layers)), zero, zero)


def frame_tokens(dit: DiTConfig, cfg: StreamConfig) -> int:
    """Returns the tokens of one latent frame."""
    height, width = cfg.latent_size
    return (height // dit.patch[1]) * (width // dit.patch[2])


def plan_write(
    cfg: StreamConfig, cache: KVCache, start_B: jax.Array, active_B: jax.Array, frames: int
) -> tuple[WritePlan, KVCache]:
    """Returns where the next `frames` latent frames go, and the cache with its shared counters moved on.

    Args:
      cfg: cache geometry.
      cache: the cache before the write.
      start_B: int32 time index of each row's chunk.
      active_B: bool rows that hold a chunk.
      frames: latent frames of the chunk (static).
    """
    end = start_B + frames
    full = (end > cfg.cache_frames) | (cache.filled >= cfg.cache_frames)
    # One row that serves all denoising steps of a chunk overwrites one position once per step.
    writes_per_position = 1 if cfg.mode == "stream" else cfg.steps
    pop = full & (cache.held >= writes_per_position - 1)
    held = jnp.where(pop | ~full, 0, cache.held + 1)
    filled = jnp.where(full, cfg.cache_frames, end)
    moved = KVCache(
        cache.layers,
        filled=jnp.where(active_B, filled, cache.filled),
        held=jnp.where(active_B, held, cache.held),
    )
    return WritePlan(active_B, full, end, pop), moved


def write(
    cfg: StreamConfig, cache: LayerCache, plan: WritePlan, k_BQND: jax.Array, v_BQND: jax.Array, frames: int
) -> LayerCache:
    """Returns the layer's cache with the chunk's keys and values [B, Q, N, D] written where `plan` says."""
    queue, queue_len = cache.queue, cache.queue_len
    means = _token_means(k_BQND, v_BQND, frames) if cfg.adaptive_sinks else None
    if means is not None and frames == 1:
        least, position = _least_similar_sink(cache.sink_means, means[:, 0])
        reanchor = plan.active & (least < cfg.sink_threshold)
        push = functools.partial(_push_front, cfg)
        queue, queue_len = jax.vmap(push)(queue, queue_len, position + 1, reanchor)
    end, queue, queue_len = jax.vmap(functools.partial(_next_position, cfg, frames))(plan, queue, queue_len)
    tokens = cache.k.shape[1] // cfg.cache_frames
    k, v, sink_means = cache.k, cache.v, cache.sink_means
    new_k, new_v = (quantise(x, cfg.cache_dtype, axis=-1) for x in (k_BQND, v_BQND))
    # A row at a time: as a vmap this would be a scatter, which copies the cache.
    for row in range(k.shape[0]):
        first_token = (end[row] - frames) * tokens
        write_row = functools.partial(_write_row, row=row, first_token=first_token, active=plan.active[row])
        k, v = jax.tree.map(write_row, k, new_k), jax.tree.map(write_row, v, new_v)
    if means is not None:
        sink_means = _write_sink_means(sink_means, means, end - frames, plan.active)
    return LayerCache(k, v, sink_means, queue, queue_len)


def resize_rows(cache: Cache, rows: int) -> Cache:
    """Returns a cache, or a part of one, with the first `rows` rows; rows that were not there repeat the last one."""

    def one(x: jax.Array) -> jax.Array:
        return jnp.concatenate([x[:rows], jnp.repeat(x[-1:], max(0, rows - x.shape[0]), axis=0)])

    return jax.tree.map(one, cache)


def _write_row(cache_BKND, new_BQND, row, first_token, active):
    size = (1, *new_BQND.shape[1:])
    zero = jnp.zeros((), jnp.int32)
    at = (jnp.full((), row, jnp.int32), first_token, zero, zero)
    old = jax.lax.dynamic_slice(cache_BKND, at, size)
    new = jnp.where(active, new_BQND[row : row + 1], old)
    return jax.lax.dynamic_update_slice(cache_BKND, new, at)


def _token_means(k_BQND, v_BQND, frames):
    """Means over the tokens of each frame, float32 [B, F, 2, N * D]."""
    B, Q = k_BQND.shape[:2]

    def mean(x):
        return x.astype(jnp.float32).reshape(B, frames, Q // frames, -1).mean(axis=2)

    return jnp.stack([mean(k_BQND), mean(v_BQND)], axis=2)


def _write_sink_means(sink_means, means, first_B, active_B):
    """Stores the means of those new frames that landed on a sink position."""
    sinks = jnp.arange(sink_means.shape[1], dtype=jnp.int32)
    for f in range(means.shape[1]):
        hit_BS = (sinks[None, :] == (first_B + f)[:, None]) & active_B[:, None]
        sink_means = jnp.where(hit_BS[:, :, None, None], means[:, f][:, None], sink_means)
    return sink_means


def _least_similar_sink(sink_means, mean):
    """Returns the smallest similarity [B] and its sink position [B]; an unwritten sink counts as 0."""
    mean = mean[:, None]
    dot = (sink_means * mean).sum(axis=-1)
    norms = jnp.sqrt((sink_means * sink_means).sum(axis=-1) * (mean * mean).sum(axis=-1))
    similarity = (dot / jnp.maximum(norms, 1e-8)).mean(axis=-1)  # over keys and values
    return similarity.min(axis=-1), similarity.argmin(axis=-1).astype(jnp.int32)


def _push_front(cfg, queue, length, value, condition):
    """Puts `value` in front; where that would take the room that the fill phase needs, replaces the front."""
    room = length < queue.shape[0] - cfg.cache_frames
    shifted = jnp.concatenate([value[None], jnp.where(room, queue[:-1], queue[1:])])
    return jnp.where(condition, shifted, queue), length + (condition & room).astype(jnp.int32)


def _append(queue, length, value, condition):
    here = jnp.arange(queue.shape[0], dtype=jnp.int32) == length
    return jnp.where(here & condition, value, queue), length + condition.astype(jnp.int32)


def _next_position(cfg, frames, plan, queue, length):
    """Returns the exclusive end of one row's write and the queue afterwards."""
    target = queue[0]
    end = jnp.where(plan.full, target, plan.end)
    pop = plan.active & plan.pop
    queue = jnp.where(pop, jnp.roll(queue, -1), queue)
    length = length - pop.astype(jnp.int32)
    # While the cache fills, the position after this one is queued (so the first group never is); when full, the
    # target just taken goes to the back unless it is a sink.
    last = queue[jnp.maximum(length - 1, 0)]
    filling = plan.active & ~plan.full
    if not cfg.keep_first:
        # Each position is queued as it is written; sequential steps write one several times.
        fresh = filling & ((length == 0) | (last != plan.end))
        for position in range(1 - frames, 1):
            queue, length = _append(queue, length, plan.end + position, fresh)
        queue, length = _append(queue, length, target, pop)
        return end, queue, length
    following = plan.end + frames
    enqueue = filling & (following > cfg.sink_frames) & (following <= cfg.cache_frames)
    enqueue = enqueue & ((length == 0) | (last != following))
    requeue = pop & (target > cfg.sink_frames)
    queue, length = _append(queue, length, jnp.where(plan.full, target, following), enqueue | requeue)
    return end, queue, length
