"""The denoising step of a stream: one step of one chunk, or one tick of the stream batch.

Pure functions of (params, state, inputs). Noise is an argument: whoever draws it decides on what it depends.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from svd2_jax.config import DiTConfig, StreamConfig
from svd2_jax.diffusion import flow_match
from svd2_jax.models import dit
from svd2_jax.models.dit import DiTParams, PromptKV
from svd2_jax.nn.attention import AttentionImplementation
from svd2_jax.nn.kv_cache import KVCache
from svd2_jax.stream.state import StreamState


def step_chunk(
    model: DiTConfig,
    cfg: StreamConfig,
    params: DiTParams,
    prompt: PromptKV,
    state: StreamState,
    noisy_FHWC: jax.Array,
    timestep: jax.Array,
    next_timestep: jax.Array,
    noise_FHWC: jax.Array,
    last: jax.Array,
    attention: AttentionImplementation = "auto",
) -> tuple[StreamState, jax.Array, jax.Array]:
    """Runs one denoising step of one chunk on a one-row state: the first group, and sequential mode.

    Args:
      model: sizes of the DiT.
      cfg: what the stream computes.
      params: DiT parameters.
      prompt: cross-attention keys and values.
      state: state with one cache row.
      noisy_FHWC: the chunk at `timestep`, float32 [F, h, w, C].
      timestep: int32 [] timestep of this step.
      next_timestep: int32 [] timestep of the following step (ignored after the last).
      noise_FHWC: Gaussian for re-noising to `next_timestep` (ignored after the last).
      last: bool [] whether this is the chunk's last step; the time index then moves on.
      attention: see `attend`.

    Returns:
      The state, the clean prediction and the chunk re-noised for the next step, both float32 [F, h, w, C].
    """
    clean, cache = _denoise(
        model, cfg, params, prompt, state.cache, noisy_FHWC[None], timestep[None], state.start[None],
        jnp.ones((1,), jnp.bool_), attention,
    )  # fmt: skip
    again = flow_match.add_noise(clean, noise_FHWC[None], next_timestep[None])
    start = jnp.where(last, _next_start(cfg, state.start, noisy_FHWC.shape[0]), state.start)
    return StreamState(cache, start, state.ticks, state.rows, state.row_starts), clean[0], again[0]


def tick(
    model: DiTConfig,
    cfg: StreamConfig,
    params: DiTParams,
    prompt: PromptKV,
    state: StreamState,
    noisy_FHWC: jax.Array,
    timestep: jax.Array,
    noise: tuple[jax.Array, ...],
    attention: AttentionImplementation = "auto",
) -> tuple[StreamState, jax.Array]:
    """Runs one tick of the stream batch: rows shift by one, every row takes one denoising step.

    Args:
      model: sizes of the DiT.
      cfg: what the stream computes.
      params: DiT parameters.
      prompt: cross-attention keys and values.
      state: state with `cfg.rows` cache rows.
      noisy_FHWC: the chunk that enters row 0, float32 [F, h, w, C].
      timestep: int32 [] its timestep; later rows are at the configured ones.
      noise: B - 1 Gaussians [F, h, w, C]; entry r re-noises the chunk of row r to step r + 1.
      attention: see `attend`.

    Returns:
      The state, and the chunk that leaves the last row, float32 [F, h, w, C]: a finished chunk from tick B - 1
      on, zeros before.
    """
    frames = noisy_FHWC.shape[0]
    later = jnp.asarray(cfg.timesteps[1:], jnp.int32)
    x = jnp.concatenate([noisy_FHWC[None], state.rows])
    timestep_B = jnp.concatenate([timestep[None], later])
    start_B = jnp.concatenate([state.start[None], state.row_starts])
    active_B = jnp.arange(cfg.rows, dtype=jnp.int32) <= state.ticks

    clean, cache = _denoise(
        model, cfg, params, prompt, state.cache, x, timestep_B, start_B, active_B, attention
    )
    clean = jnp.where(active_B[:, None, None, None, None], clean, 0.0)
    noise_BFHWC = jnp.stack(noise) if noise else jnp.zeros_like(state.rows)
    again = flow_match.add_noise(clean[:-1], noise_BFHWC, later)
    again = jnp.where(active_B[:-1, None, None, None, None], again, 0.0)
    return StreamState(
        cache=cache,
        start=_next_start(cfg, state.start, frames),
        ticks=state.ticks + 1,
        rows=again,
        row_starts=start_B[:-1],
    ), clean[-1]


def _denoise(
    model: DiTConfig,
    cfg: StreamConfig,
    params: DiTParams,
    prompt: PromptKV,
    cache: KVCache,
    x_BFHWC: jax.Array,
    timestep_B: jax.Array,
    start_B: jax.Array,
    active_B: jax.Array,
    attention: AttentionImplementation,
) -> tuple[jax.Array, KVCache]:
    velocity, cache = dit.forward(
        model, cfg, params, prompt, cache, x_BFHWC, timestep_B, start_B, active_B, attention
    )
    return flow_match.clean_prediction(x_BFHWC, velocity, timestep_B), cache


def _next_start(cfg: StreamConfig, start: jax.Array, frames: int) -> jax.Array:
    """Moves the time index on; at the refresh it restarts so that an endless stream stays in trained range."""
    following = start + frames
    return jnp.where(following >= cfg.rope_refresh, cfg.cache_frames - 1, following)
