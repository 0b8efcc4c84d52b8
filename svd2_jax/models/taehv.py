"""TAEHV's tiny decoder as pure streaming functions with the same signatures as the VAE's (`models.vae`).

Source: TAEHV (github.com/madebyollin/taehv) as used by StreamDiffusionV2. Every call decodes the last three
latent frames once more in front of the new ones, so that the memory blocks, which look one frame back, start
warm, and keeps only the new frames. Unlike the reference's wrapper, whose first call drops the frames of the
first latent, the first call here also returns the one true first frame (TAEHV's own trim of three), so a
stream has as many frames with either decoder. Unlike the VAE it takes normalised latents as they are.
Channels last; everything is computed in the parameters' dtype. The rows of the picture may be cut over devices, as in
`models.vae`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from svd2_jax.config import LATENT_STRIDE, SPATIAL_STRIDE, TAEHVConfig
from svd2_jax.nn.resample import UpsampledConv, unfold_frames
from svd2_jax.nn.row_shards import RowShards, with_halo

Params = Any  # nested dict of arrays, the parameters of one part

ITEM = "taehv"
CONTEXT_LATENTS = 3  # latent frames decoded again with every call
FRAMES_TO_TRIM = 3  # raw frames before the first true one: the doublings of frame rate make 4 of 1
MEM_BLOCKS = 3  # per stage; each looks one frame further back
TIME_GROWTH = (1, 2, 2)  # frames for one after each stage
CLAMP = 3.0  # latents are squashed softly into [-3, 3]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TAEHVState:
    """What a decoding stream remembers.

    Attributes:
      context: the last three latent frames [B, 3, h, w, C], the newest last.
      valid_B: int32, how many of them a stream really has had (the others are in front).
    """

    context: jax.Array
    valid_B: jax.Array


def _conv(x: jax.Array, features: int, name: str, shards: RowShards | None) -> jax.Array:
    """Returns a 3x3 convolution of the same size; for use in a module's `__call__`, whose parameters it takes."""
    x, rows = with_halo(x, 1, 1, shards)
    return nn.Conv(features, (3, 3), padding=(rows, (1, 1)), name=name)(x)


class _MemBlock(nn.Module):
    """Residual block that sees each frame beside the one before, `past`."""

    shards: RowShards | None

    @nn.compact
    def __call__(self, x: jax.Array, past: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        y = jnp.concatenate([x, past], axis=-1)
        y = nn.relu(_conv(y, channels, "conv_0", self.shards))
        y = nn.relu(_conv(y, channels, "conv_1", self.shards))
        y = _conv(y, channels, "conv_2", self.shards)
        return nn.relu(x + y)


class Decoder(nn.Module):
    """Latents [B, F, h, w, C] to raw frames [B, T, 8h, 8w, 3] in [0, 1] units, neither trimmed nor clipped.

    `valid_B` of the latents, the newest, exist: the memory blocks see zeros before the first of these. Only
    the last `emit` latents' frames are returned (T = 4 * emit), and what these do not depend on is not
    computed.
    """

    cfg: TAEHVConfig
    shards: RowShards | None = None

    @nn.compact
    def __call__(self, z: jax.Array, valid_B: jax.Array, emit: int) -> jax.Array:
        channels, shards = self.cfg.channels, self.shards
        x = jnp.tanh(z / CLAMP) * CLAMP
        x = nn.relu(_conv(x, channels[0], "conv_in", shards))
        needed = _frames_needed(emit)
        rate = 1  # frames per latent
        for stage, growth in enumerate(TIME_GROWTH):
            for block in range(MEM_BLOCKS):
                past = _previous_frame(x, rate * valid_B)
                x = _MemBlock(shards, name=f"stage_{stage}_mem_{block}")(x, past)
            grow = nn.Dense(growth * channels[stage], use_bias=False, name=f"stage_{stage}_grow")
            # Before the pixels are doubled, of which it makes the same.
            x = unfold_frames(grow(x[:, -needed[stage] :]), growth)
            rate *= growth
            x = UpsampledConv(channels[stage + 1], use_bias=False, name=f"stage_{stage}_out")(x, shards)
        return _conv(nn.relu(x), 3, "conv_out", shards)


def decode_first(
    cfg: TAEHVConfig, params: Params, latents: jax.Array, shards: RowShards | None = None
) -> tuple[jax.Array, TAEHVState]:
    """Returns (pixels, state) of the first latent frames of a stream.

    Args:
      cfg: sizes (static).
      params: tree of "taehv".
      latents: [B, F, h, w, C], normalised.
      shards: how the rows are cut over devices; h is then of one device, as in all shapes here.

    Returns:
      Pixels [B, 1 + 4(F-1), 8h, 8w, 3] clipped to [-1, 1] in the parameters' dtype, and the state for
      `decode`.

    Raises:
      ValueError: there is no latent frame.
    """
    _check_latents(cfg, latents)
    batch, frames = latents.shape[:2]
    latents = _cast(params, latents)
    state = TAEHVState(
        jnp.zeros((batch, CONTEXT_LATENTS, *latents.shape[2:]), latents.dtype), jnp.zeros((batch,), jnp.int32)
    )
    raw = _run(cfg, params, latents, jnp.full((batch,), frames, jnp.int32), frames, shards)
    return _to_pixels(raw[:, FRAMES_TO_TRIM:]), _remember(state, latents)


def decode(
    cfg: TAEHVConfig,
    params: Params,
    state: TAEHVState,
    latents: jax.Array,
    shards: RowShards | None = None,
) -> tuple[jax.Array, TAEHVState]:
    """Returns (pixels, new state) of the next latent frames of a stream, all in one pass.

    Args:
      cfg: sizes (static).
      params: tree of "taehv".
      state: what the stream remembers; may be donated.
      latents: [B, F, h, w, C], normalised.
      shards: as in `decode_first`.

    Returns:
      Pixels [B, 4F, 8h, 8w, 3] clipped to [-1, 1], and a state of the same shapes.

    Raises:
      ValueError: there is no latent frame.
    """
    _check_latents(cfg, latents)
    frames = latents.shape[1]
    latents = _cast(params, latents)
    seen = jnp.concatenate([state.context, latents], axis=1)
    raw = _run(cfg, params, seen, state.valid_B + jnp.int32(frames), frames, shards)
    return _to_pixels(raw), _remember(state, latents)


def decode_offline(cfg: TAEHVConfig, params: Params, latents: jax.Array) -> jax.Array:
    """Returns the raw frames [B, 4F, 8h, 8w, 3] of a whole clip, in [0, 1] units, not trimmed or clipped."""
    _check_latents(cfg, latents)
    batch, frames = latents.shape[:2]
    return _run(cfg, params, _cast(params, latents), jnp.full((batch,), frames, jnp.int32), frames)


def init_decode_state(
    cfg: TAEHVConfig, batch: int, height: int, width: int, dtype: Any = jnp.float32
) -> TAEHVState:
    """Returns an empty state with the shapes that `decode` takes, for frames of the given pixels."""
    size = (height // SPATIAL_STRIDE, width // SPATIAL_STRIDE)
    return TAEHVState(
        context=jnp.zeros((batch, CONTEXT_LATENTS, *size, cfg.z_dim), dtype),
        valid_B=jnp.zeros((batch,), jnp.int32),
    )


def abstract_params(cfg: TAEHVConfig, dtype: Any = jnp.float32) -> dict[str, Params]:
    """Returns {"taehv": tree} of ShapeDtypeStruct; computes nothing."""

    def init() -> dict[str, Params]:
        latents, valid_B = jnp.zeros((1, 1, 1, 1, cfg.z_dim)), jnp.ones((1,), jnp.int32)
        params = Decoder(cfg).init(jax.random.key(0), latents, valid_B, 1)["params"]
        return {ITEM: jax.tree.map(lambda leaf: leaf.astype(dtype), params)}

    return jax.eval_shape(init)


def _frames_needed(emit: int) -> list[int]:
    """Returns how many of the last frames of each stage's output the frames of `emit` latents depend on."""
    needed = LATENT_STRIDE * emit
    stages = []
    for growth in reversed(TIME_GROWTH):
        stages.append(-(-needed // growth))
        needed = stages[-1] + MEM_BLOCKS
    return stages[::-1]


def _previous_frame(x_BTHWC: jax.Array, valid_B: jax.Array) -> jax.Array:
    """Returns the frame before each one; zeros before the first and the first of the `valid_B` last."""
    batch, frames = x_BTHWC.shape[:2]
    past = jnp.concatenate([jnp.zeros_like(x_BTHWC[:, :1]), x_BTHWC[:, :-1]], axis=1)
    to_the_end_T = jnp.arange(frames, 0, -1, dtype=jnp.int32)
    starts_BT = to_the_end_T[None, :] == valid_B[:, None]
    return jnp.where(starts_BT.reshape(batch, frames, 1, 1, 1), jnp.zeros((), x_BTHWC.dtype), past)


def _remember(state: TAEHVState, latents: jax.Array) -> TAEHVState:
    seen = jnp.concatenate([state.context, latents], axis=1)
    valid_B = jnp.minimum(state.valid_B + jnp.int32(latents.shape[1]), CONTEXT_LATENTS)
    return TAEHVState(seen[:, -CONTEXT_LATENTS:], valid_B)


def _run(
    cfg: TAEHVConfig,
    params: Params,
    latents: jax.Array,
    valid_B: jax.Array,
    emit: int,
    shards: RowShards | None = None,
) -> jax.Array:
    return cast(jax.Array, Decoder(cfg, shards).apply({"params": params}, latents, valid_B, emit))


def _cast(params: Params, latents: jax.Array) -> jax.Array:
    return latents.astype(params["conv_in"]["kernel"].dtype)


def _to_pixels(raw: jax.Array) -> jax.Array:
    return jnp.clip(2.0 * raw - 1.0, -1.0, 1.0)


def _check_latents(cfg: TAEHVConfig, latents: jax.Array) -> None:
    if latents.ndim != 5 or latents.shape[1] < 1 or latents.shape[-1] != cfg.z_dim:
        raise ValueError(f"latents must be [B, F >= 1, h, w, {cfg.z_dim}], got {latents.shape}")
