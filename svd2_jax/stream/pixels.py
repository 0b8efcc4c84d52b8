"""The two ends of a stream: frames to noisy latents, clean latents to frames.

The rows of the frames may be cut over devices (`RowShards`). Latents are not: they are small, and the transformer wants
all rows on one device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from svd2_jax.config import ModelConfig, StreamConfig, TAEHVConfig, VAEConfig
from svd2_jax.diffusion import noise_control
from svd2_jax.models import taehv, vae
from svd2_jax.nn.row_shards import RowShards, gather, take_own

DecoderConfig = VAEConfig | TAEHVConfig


@register_dataclass
@dataclass(frozen=True)
class InputState:
    """What the input end remembers between chunks.

    Attributes:
      vae: tails of the encoder's causal convolutions.
      last_frame: uint8 [H, W, 3] the last frame seen.
      noise_scale: float32 [] that of the last chunk.
    """

    vae: vae.EncodeState
    last_frame: jax.Array
    noise_scale: jax.Array


def encode_first_group(
    cfg: VAEConfig,
    params: Any,
    frames_THWC: jax.Array,
    noise_FHWC: jax.Array,
    noise_scale: jax.Array,
    shards: RowShards | None = None,
) -> tuple[InputState, jax.Array]:
    """Returns the input state and the noisy latents, float32 [F, h, w, C], of a stream's first frames.

    Args:
      cfg: sizes of the VAE.
      params: encoder parameters.
      frames_THWC: uint8 [1 + 4k, H, W, 3].
      noise_FHWC: Gaussian of the latents' shape.
      noise_scale: float32 [] the session's noise scale.
      shards: how the frames' rows are cut over devices. The latents come out on each of them, all rows; where the
        noise is zero on all but one, that one's are meant.
    """
    latents, state = vae.encode_first(cfg, params, _batch(params, frames_THWC), shards)
    latents_FHWC = gather(latents[0].astype(jnp.float32), 1, shards)
    noisy = noise_control.mix(latents_FHWC, noise_FHWC, noise_scale)
    # A copy: the state is donated later, the caller's scalar is not.
    return InputState(state, frames_THWC[-1], noise_scale + 0.0), noisy


def encode_chunk(
    cfg: VAEConfig,
    params: Any,
    state: InputState,
    frames_THWC: jax.Array,
    noise_FHWC: jax.Array,
    initial_noise_scale: jax.Array,
    motion_range: float,
    shards: RowShards | None = None,
) -> tuple[InputState, jax.Array, jax.Array]:
    """Returns the state, the noisy latents and the first timestep (int32 []) of a later chunk of 4k frames.

    See `encode_first_group` for the arguments.
    """
    pixels = noise_control.pixels_from_uint8(frames_THWC)
    level = noise_control.motion(noise_control.pixels_from_uint8(state.last_frame), pixels, shards)
    noise_scale = noise_control.next_noise_scale(level, initial_noise_scale, state.noise_scale, motion_range)
    latents, vae_state = vae.encode(cfg, params, state.vae, _batch(params, frames_THWC), shards)
    latents_FHWC = gather(latents[0].astype(jnp.float32), 1, shards)
    noisy = noise_control.mix(latents_FHWC, noise_FHWC, noise_scale)
    state = InputState(vae_state, frames_THWC[-1], noise_scale)
    return state, noisy, noise_control.first_timestep(noise_scale)


def decode_first_group(
    cfg: DecoderConfig, params: Any, latents_FHWC: jax.Array, pixels: str, shards: RowShards | None = None
) -> tuple[Any, jax.Array]:
    """Returns the decoder's state and the 1 + 4(F-1) frames of a stream's first clean latents.

    Where `shards` cuts the frames' rows over devices, one device has the latents, all rows, and the others zeros.
    """
    latents = take_own(latents_FHWC, 1, shards)[None].astype(_dtype(params))
    frames, state = _decoder(cfg).decode_first(cfg, params, latents, shards)
    return state, to_output(frames[0], pixels)


def decode_chunk(
    cfg: DecoderConfig,
    params: Any,
    state: Any,
    latents_FHWC: jax.Array,
    pixels: str,
    shards: RowShards | None = None,
) -> tuple[Any, jax.Array]:
    """Returns the decoder's state and the 4F frames of a later chunk's clean latents; see `decode_first_group`."""
    latents = take_own(latents_FHWC, 1, shards)[None].astype(_dtype(params))
    frames, state = _decoder(cfg).decode(cfg, params, state, latents, shards)
    return state, to_output(frames[0], pixels)


def to_output(frames_THWC: jax.Array, pixels: str) -> jax.Array:
    """Turns frames in [-1, 1] into uint8, or into float32 in [0, 1]."""
    unit = jnp.clip(frames_THWC.astype(jnp.float32) * 0.5 + 0.5, 0.0, 1.0)
    return jnp.round(unit * 255.0).astype(jnp.uint8) if pixels == "uint8" else unit


def decoder_config(model: ModelConfig, cfg: StreamConfig) -> DecoderConfig:
    """Returns the configuration of the decoder that a stream uses."""
    return model.taehv if cfg.decoder == "taehv" else model.vae


def _decoder(cfg: DecoderConfig) -> Any:
    """Returns the module whose functions decode with this configuration; their signatures are the same."""
    return taehv if isinstance(cfg, TAEHVConfig) else vae


def _batch(params: Any, frames_THWC: jax.Array) -> jax.Array:
    return noise_control.pixels_from_uint8(frames_THWC).astype(_dtype(params))[None]


def _dtype(params: Any) -> jnp.dtype:
    return jax.tree.leaves(params)[0].dtype
