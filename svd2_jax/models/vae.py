"""Wan2.1's causal 3-D VAE as pure streaming functions: frames to latents and back, in pieces of any length.

Source: Wan2.1 (`wan/modules/vae.py`), as used by StreamDiffusionV2. A stream's memory is a pytree of fixed
shapes, the last input frames ("tail") of every causal convolution. Only the very first frame is special: it
is a latent frame by itself and skips the convolutions that change the frame rate, so the start of a stream is
its own function. Channels last; all arrays inside have the dtype of the parameters, norms and the softmax are
computed in float32.

The rows of the picture may be cut over devices (`RowShards`): every spatial convolution then gets the rows next to its
own from the neighbours, and the attention keys and values from all. The tails are cut likewise and stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from svd2_jax.config import LATENT_STRIDE, VAEConfig
from svd2_jax.errors import ConfigError
from svd2_jax.nn.attention import attend
from svd2_jax.nn.causal_conv import CausalConv
from svd2_jax.nn.resample import UpsampledConv, unfold_frames
from svd2_jax.nn.row_shards import RowShards, gather, with_halo

Params = Any  # nested dict of arrays, the parameters of one part
_State = TypeVar("_State")

ENCODER_ITEM = "vae.encoder"
DECODER_ITEM = "vae.decoder"
NORM_EPS = 1e-12  # smallest norm divided by, as torch's F.normalize

# Mean and standard deviation of the 16 latent channels, published with Wan2.1.
LATENT_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
               0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
LATENT_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
              3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EncodeState:
    """What an encoding stream remembers.

    Attributes:
      tails: the last input frames of every causal convolution in the order they run, each
        [B, 2 (1 for the temporal down-samplers), H of its level, W, C].
    """

    tails: tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """What a decoding stream remembers.

    Attributes:
      tails: the last input frames of every causal convolution in the order they run, each
        [B, 2, H of its level, W, C].
    """

    tails: tuple[jax.Array, ...]


class _Tails:
    """Hands every causal convolution its old tail and collects the new ones, in the order they run."""

    def __init__(self, old: Iterable[jax.Array] | None, shards: RowShards | None):
        self.first = old is None  # start of a stream: nothing to hand out
        self.shards = shards
        self.new: list[jax.Array] = []
        self._old = iter(old or ())

    def conv(self, conv: CausalConv, x: jax.Array) -> jax.Array:
        """Runs `conv` behind its old tail, or behind zeros at the start of a stream."""
        y, tail = conv(x, None if self.first else next(self._old), self.shards)
        self.new.append(tail)
        return y

    def conv_after(self, conv: CausalConv, tail: jax.Array, x: jax.Array) -> jax.Array:
        """Runs `conv` behind the given frames instead (start of a stream only)."""
        y, tail = conv(x, tail, self.shards)
        self.new.append(tail)
        return y


class _Norm(nn.Module):
    """L2 normalisation over the channels times sqrt(C) and a learned scale, then SiLU, in float32."""

    silu: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones_init(), (channels,))
        x32 = x.astype(jnp.float32)
        norm = jnp.sqrt(jnp.sum(jnp.square(x32), axis=-1, keepdims=True))
        y = x32 * (channels**0.5 / jnp.maximum(norm, NORM_EPS))
        y = y * scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (channels,))
        return (nn.silu(y) if self.silu else y).astype(x.dtype)


class _ResBlock(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x: jax.Array, tails: _Tails) -> jax.Array:
        y = tails.conv(CausalConv(self.features, name="conv_0"), _Norm(name="norm_0")(x))
        y = tails.conv(CausalConv(self.features, name="conv_1"), _Norm(name="norm_1")(y))
        return y + (x if x.shape[-1] == self.features else nn.Dense(self.features, name="shortcut")(x))


class _Attention(nn.Module):
    """Self-attention with one head among the pixels of one frame."""

    @nn.compact
    def __call__(self, x: jax.Array, shards: RowShards | None) -> jax.Array:
        batch, frames, height, width, channels = x.shape
        qkv = nn.Dense(3 * channels, name="qkv")(_Norm(silu=False, name="norm")(x))
        qkv_BQND = qkv.reshape(batch * frames, height * width, 1, 3 * channels)
        q_BQND, k_BKND, v_BKND = jnp.split(qkv_BQND, 3, axis=-1)
        y = attend(q_BQND, gather(k_BKND, 1, shards), gather(v_BKND, 1, shards))
        return x + nn.Dense(channels, name="proj")(y.reshape(x.shape))


class _Down(nn.Module):
    """Halves height and width and, if `temporal`, the frame rate."""

    temporal: bool

    @nn.compact
    def __call__(self, x: jax.Array, tails: _Tails) -> jax.Array:
        channels = x.shape[-1]
        # Padded only at the bottom and at the right.
        x, rows = with_halo(x, 0, 1, tails.shards)
        x = nn.Conv(channels, (3, 3), strides=2, padding=(rows, (0, 1)), name="conv")(x)
        if not self.temporal:
            return x
        conv = CausalConv(channels, (3, 1, 1), time_stride=2, name="time_conv")
        if tails.first:  # the first frame passes as it is, and is what the next ones look back at
            head = x[:, :1]
            return jnp.concatenate([head, tails.conv_after(conv, head, x[:, 1:])], axis=1)
        return tails.conv(conv, x)


class _Up(nn.Module):
    """Doubles height and width, halves the channels and, if `temporal`, doubles the frame rate."""

    temporal: bool

    @nn.compact
    def __call__(self, x: jax.Array, tails: _Tails) -> jax.Array:
        channels = x.shape[-1]
        if self.temporal:
            conv = CausalConv(2 * channels, (3, 1, 1), name="time_conv")
            # The first frame passes as it is; later ones never look back at it but at zeros.
            head, rest = (x[:, :1], x[:, 1:]) if tails.first else (x[:, :0], x)
            x = jnp.concatenate([head, unfold_frames(tails.conv(conv, rest), 2)], axis=1)
        return UpsampledConv(channels // 2, name="conv")(x, tails.shards)


class Encoder(nn.Module):
    """Frames [B, T, H, W, 3] to latent mean [B, F, h, w, z_dim]; parameters of the item "vae.encoder".

    Called with `tails=None` it starts a stream (T = 1 + 4k, F = 1 + k), else it continues one (T = 4k,
    F = k).
    """

    cfg: VAEConfig
    shards: RowShards | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, tails: tuple[jax.Array, ...] | None
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        cfg, keep = self.cfg, _Tails(tails, self.shards)
        x = keep.conv(CausalConv(cfg.dim, name="conv_in"), x)
        for level, mult in enumerate(cfg.dim_mult):
            for block in range(cfg.num_res_blocks):
                x = _ResBlock(cfg.dim * mult, name=f"level_{level}_res_{block}")(x, keep)
            if level < len(cfg.dim_mult) - 1:
                x = _Down(cfg.temporal_downsample[level], name=f"down_{level}")(x, keep)
        width = cfg.dim * cfg.dim_mult[-1]
        x = _ResBlock(width, name="mid_res_0")(x, keep)
        x = _Attention(name="mid_attn")(x, self.shards)
        x = _ResBlock(width, name="mid_res_1")(x, keep)
        x = keep.conv(CausalConv(2 * cfg.z_dim, name="conv_out"), _Norm(name="norm_out")(x))
        mean_and_logvar = nn.Dense(2 * cfg.z_dim, name="quant")(x)
        return mean_and_logvar[..., : cfg.z_dim], tuple(keep.new)


class Decoder(nn.Module):
    """De-normalised latents [B, F, h, w, z_dim] to frames [B, T, H, W, 3]; parameters of "vae.decoder".

    Called with `tails=None` it starts a stream (T = 1 + 4(F-1)), else it continues one (T = 4F). Not clipped.
    """

    cfg: VAEConfig
    shards: RowShards | None = None

    @nn.compact
    def __call__(
        self, z: jax.Array, tails: tuple[jax.Array, ...] | None
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        cfg, keep = self.cfg, _Tails(tails, self.shards)
        width = cfg.dim * cfg.dim_mult[-1]
        x = nn.Dense(cfg.z_dim, name="quant")(z)
        x = keep.conv(CausalConv(width, name="conv_in"), x)
        x = _ResBlock(width, name="mid_res_0")(x, keep)
        x = _Attention(name="mid_attn")(x, self.shards)
        x = _ResBlock(width, name="mid_res_1")(x, keep)
        temporal_upsample = cfg.temporal_downsample[::-1]
        for level, mult in enumerate(reversed(cfg.dim_mult)):
            for block in range(cfg.num_res_blocks + 1):
                x = _ResBlock(cfg.dim * mult, name=f"level_{level}_res_{block}")(x, keep)
            if level < len(cfg.dim_mult) - 1:
                x = _Up(temporal_upsample[level], name=f"up_{level}")(x, keep)
        x = keep.conv(CausalConv(3, name="conv_out"), _Norm(name="norm_out")(x))
        return x, tuple(keep.new)


def normalise(latents: jax.Array) -> jax.Array:
    """Returns latents [..., 16] with the published per-channel mean removed and divided by the deviation."""
    return _affine(latents, 1.0 / np.asarray(LATENT_STD), -np.asarray(LATENT_MEAN) / np.asarray(LATENT_STD))


def decodable(cfg: VAEConfig, latents: jax.Array) -> jax.Array:
    """Returns latents [..., 16] of a stream's encoder as `decode` takes them."""
    return latents if cfg.encodes_normalised else normalise(latents)


def denormalise(latents: jax.Array) -> jax.Array:
    """Undoes `normalise`."""
    return _affine(latents, np.asarray(LATENT_STD), np.asarray(LATENT_MEAN))


def encode_first(
    cfg: VAEConfig, params: Params, pixels: jax.Array, shards: RowShards | None = None
) -> tuple[jax.Array, EncodeState]:
    """Returns (latents, state) of the first frames of a stream.

    Unlike the offline encoder it does not normalise the latents; that is how the stream feeds the DiT.

    Args:
      cfg: sizes (static).
      params: tree of "vae.encoder".
      pixels: [B, 1 + 4k, H, W, 3] in [-1, 1], H and W multiples of 8.
      shards: how the rows are cut over devices; H is then of one device, as in all shapes here.

    Returns:
      Latents [B, 1 + k, H / 8, W / 8, C] in the parameters' dtype, and the state for `encode`.

    Raises:
      ValueError: the number of frames or the size does not fit.
      ConfigError: the latents do not have the 16 channels that Wan2.1's statistics describe.
    """
    _check(cfg)
    frames = pixels.shape[1]
    _check_pixels(pixels, frames % LATENT_STRIDE == 1, "1 + 4k")
    group = min(frames, 1 + LATENT_STRIDE)
    latents, tails = _run(Encoder(cfg, shards), params, pixels[:, :group], None)
    state = EncodeState(tails)
    if frames == group:
        return latents, state
    rest, state = encode(cfg, params, state, pixels[:, group:], shards)
    return jnp.concatenate([latents, rest], axis=1), state


def encode(
    cfg: VAEConfig,
    params: Params,
    state: EncodeState,
    pixels: jax.Array,
    shards: RowShards | None = None,
) -> tuple[jax.Array, EncodeState]:
    """Returns (latents, new state) of the next frames of a stream, four frames per pass.

    Args:
      cfg: sizes (static).
      params: tree of "vae.encoder".
      state: what the stream remembers; may be donated.
      pixels: [B, 4k, H, W, 3] in [-1, 1].
      shards: as in `encode_first`.

    Returns:
      Latents [B, k, H / 8, W / 8, C], not normalised, and a state of the same shapes.

    Raises:
      ValueError: the number of frames or the size does not fit.
    """
    _check_pixels(pixels, pixels.shape[1] % LATENT_STRIDE == 0 and pixels.shape[1] > 0, "4k")

    def step(state: EncodeState, pixels: jax.Array) -> tuple[EncodeState, jax.Array]:
        latents, tails = _run(Encoder(cfg, shards), params, pixels, state.tails)
        return EncodeState(tails), latents

    return _in_pieces(step, state, pixels, LATENT_STRIDE)


def decode_first(
    cfg: VAEConfig, params: Params, latents: jax.Array, shards: RowShards | None = None
) -> tuple[jax.Array, DecodeState]:
    """Returns (pixels, state) of the first latent frames of a stream.

    Args:
      cfg: sizes (static).
      params: tree of "vae.decoder".
      latents: [B, F, h, w, C], normalised.
      shards: how the rows are cut over devices; h is then of one device, as in all shapes here.

    Returns:
      Pixels [B, 1 + 4(F-1), 8h, 8w, 3] clipped to [-1, 1] in the parameters' dtype, and the state
      for `decode`.

    Raises:
      ValueError: there is no latent frame.
      ConfigError: the latents do not have the 16 channels that Wan2.1's statistics describe.
    """
    _check(cfg)
    _check_latents(latents)
    group = min(latents.shape[1], 2)
    z = denormalise(latents[:, :group].astype(jnp.float32))
    pixels, tails = _run(Decoder(cfg, shards), params, z, None)
    pixels, state = _clip(pixels), DecodeState(tails)
    if latents.shape[1] == group:
        return pixels, state
    rest, state = decode(cfg, params, state, latents[:, group:], shards)
    return jnp.concatenate([pixels, rest], axis=1), state


def decode(
    cfg: VAEConfig,
    params: Params,
    state: DecodeState,
    latents: jax.Array,
    shards: RowShards | None = None,
) -> tuple[jax.Array, DecodeState]:
    """Returns (pixels, new state) of the next latent frames of a stream, one latent frame per pass.

    One at a time because at 480x832 the activations of a single one already take hundreds of megabytes.

    Args:
      cfg: sizes (static).
      params: tree of "vae.decoder".
      state: what the stream remembers; may be donated.
      latents: [B, F, h, w, C], normalised.
      shards: as in `decode_first`.

    Returns:
      Pixels [B, 4F, 8h, 8w, 3] clipped to [-1, 1], and a state of the same shapes.

    Raises:
      ValueError: there is no latent frame.
    """
    _check_latents(latents)

    def step(state: DecodeState, latents: jax.Array) -> tuple[DecodeState, jax.Array]:
        z = denormalise(latents.astype(jnp.float32))
        pixels, tails = _run(Decoder(cfg, shards), params, z, state.tails)
        return DecodeState(tails), _clip(pixels)

    return _in_pieces(step, state, latents, 1)


def encode_offline(cfg: VAEConfig, params: Params, pixels: jax.Array) -> jax.Array:
    """Returns the normalised latents [B, 1 + k, h, w, C] of a whole clip [B, 1 + 4k, H, W, 3] in [-1, 1]."""
    latents, _ = encode_first(cfg, params, pixels)
    return decodable(cfg, latents)


def decode_offline(cfg: VAEConfig, params: Params, latents: jax.Array) -> jax.Array:
    """Returns the pixels [B, 1 + 4(F-1), 8h, 8w, 3] in [-1, 1] of a whole clip's normalised latents."""
    pixels, _ = decode_first(cfg, params, latents)
    return pixels


def init_encode_state(
    cfg: VAEConfig, batch: int, height: int, width: int, dtype: Any = jnp.float32
) -> EncodeState:
    """Returns an all-zero state with the shapes that `encode` takes, for frames of the given pixels."""
    params = abstract_params(cfg, dtype)[ENCODER_ITEM]
    pixels = jax.ShapeDtypeStruct((batch, 1, height, width, 3), dtype)
    _, state = jax.eval_shape(lambda p, x: encode_first(cfg, p, x), params, pixels)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)


def init_decode_state(
    cfg: VAEConfig, batch: int, height: int, width: int, dtype: Any = jnp.float32
) -> DecodeState:
    """Returns an all-zero state with the shapes that `decode` takes, for frames of the given pixels."""
    params = abstract_params(cfg, dtype)[DECODER_ITEM]
    scale = 2 ** (len(cfg.dim_mult) - 1)
    latents = jax.ShapeDtypeStruct((batch, 1, height // scale, width // scale, cfg.z_dim), dtype)
    _, state = jax.eval_shape(lambda p, z: decode_first(cfg, p, z), params, latents)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)


def abstract_params(cfg: VAEConfig, dtype: Any = jnp.float32) -> dict[str, Params]:
    """Returns {"vae.encoder": tree, "vae.decoder": tree} of ShapeDtypeStruct; computes nothing."""
    size = 2 ** (len(cfg.dim_mult) - 1)

    def init() -> dict[str, Params]:
        key = jax.random.key(0)
        pixels = jnp.zeros((1, 1 + LATENT_STRIDE, size, size, 3))
        latents = jnp.zeros((1, 2, 1, 1, cfg.z_dim))
        params = {
            ENCODER_ITEM: Encoder(cfg).init(key, pixels, None)["params"],
            DECODER_ITEM: Decoder(cfg).init(key, latents, None)["params"],
        }
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    return jax.eval_shape(init)


def _in_pieces(
    step: Callable[[_State, jax.Array], tuple[_State, jax.Array]], state: _State, x: jax.Array, size: int
) -> tuple[jax.Array, _State]:
    """Returns (outputs, state) of `step` over pieces of `size` frames; a loop, so that it compiles once."""
    pieces = x.shape[1] // size
    if pieces == 1:
        state, y = step(state, x)
        return y, state
    x = jnp.moveaxis(x.reshape(x.shape[0], pieces, size, *x.shape[2:]), 1, 0)
    state, y = lax.scan(step, state, x)
    y = jnp.moveaxis(y, 0, 1)
    return y.reshape(y.shape[0], pieces * y.shape[2], *y.shape[3:]), state


def _affine(latents: jax.Array, scale: np.ndarray, shift: np.ndarray) -> jax.Array:
    """Returns latents * scale + shift per channel, computed in float32, in the latents' dtype."""
    shape = (1,) * (latents.ndim - 1) + (-1,)
    scale32, shift32 = jnp.asarray(scale, jnp.float32), jnp.asarray(shift, jnp.float32)
    y = latents.astype(jnp.float32) * scale32.reshape(shape) + shift32.reshape(shape)
    return y.astype(latents.dtype)


def _run(
    model: Encoder | Decoder, params: Params, x: jax.Array, tails: tuple[jax.Array, ...] | None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns (output, new tails) of one pass in the parameters' dtype."""
    return cast(Any, model.apply({"params": params}, x.astype(params["conv_in"]["kernel"].dtype), tails))


def _clip(pixels: jax.Array) -> jax.Array:
    return jnp.clip(pixels, -1.0, 1.0)


def _check(cfg: VAEConfig) -> None:
    if cfg.z_dim != len(LATENT_MEAN):
        raise ConfigError(
            f"VAE: z_dim must be {len(LATENT_MEAN)}, the channels of Wan2.1's latents; got {cfg.z_dim}"
        )


def _check_pixels(pixels: jax.Array, frames_fit: bool, frames: str) -> None:
    _, _, height, width, channels = pixels.shape
    if not frames_fit or height % 8 or width % 8 or channels != 3:
        raise ValueError(
            f"pixels must be [B, {frames} frames, multiple of 8, multiple of 8, 3], got {pixels.shape}"
        )


def _check_latents(latents: jax.Array) -> None:
    if latents.ndim != 5 or latents.shape[1] < 1:
        raise ValueError(f"latents must be [B, F >= 1, h, w, C], got {latents.shape}")
