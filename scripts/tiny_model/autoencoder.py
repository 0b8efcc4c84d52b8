"""Training of the VAE: first on single pictures, then on clips, from the same parameters.

A picture costs much less than a clip of five frames, as it needs one tap in time of every convolution. So colours
and edges are learned on pictures, and the network of clips starts as one that shows each latent frame four times
(`init_params`).
Latents are not sampled: a KL term or noise from the start makes them collapse. Noise of a share of their size comes
in at the end, so that the decoder forgives small errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from svd2_jax.config import VAEConfig
from svd2_jax.diffusion.noise_control import pixels_from_uint8
from svd2_jax.models import vae
from svd2_jax.nn.random_params import random_params

Params = Any

GRADIENT_WEIGHT = 0.5  # of errors of neighbouring pixels' differences: sharp edges
SQUARE_WEIGHT = 2.0


def init_params(cfg: VAEConfig, seed: int) -> dict[str, Params]:
    """Returns parameters of both halves, float32, with which a still clip is as good as its single picture.

    Convolutions see the present frame only, the temporal ones mean two frames and show each one twice. Residual
    branches start at zero.
    """
    drawn = random_params(vae.abstract_params(cfg), seed)

    def one(path: tuple[Any, ...], x: np.ndarray) -> np.ndarray:
        names = [str(entry.key) for entry in path]
        if names[-1] != "kernel":
            return x
        if names[-2] in ("conv_1", "proj"):
            return np.zeros_like(x)
        if names[-2] == "time_conv":
            x = np.zeros_like(x)
            channels = x.shape[3]
            if names[0] == "vae.encoder":
                x[1:, 0, 0] = 0.5 * np.eye(channels, dtype=x.dtype)
            else:
                x[2, 0, 0] = np.tile(np.eye(channels, dtype=x.dtype), 2)
        elif x.ndim == 5:
            x[-1] *= np.float32(x.shape[0] ** 0.5)
            x[:-1] = 0.0
        return x

    return jax.tree_util.tree_map_with_path(one, drawn)


def reconstruct(
    cfg: VAEConfig, params: Mapping[str, Params], pixels: jax.Array, noise: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns (latents, pixels drawn from them, not clipped) of clips [B, 1 + 4k, H, W, 3] in [-1, 1].

    Args:
      cfg: sizes.
      params: trees of "vae.encoder" and "vae.decoder".
      pixels: whole clips, each a stream from its start.
      noise: added to the latents before they are decoded, times each channel's deviation.
    """
    encoder: Any = vae.Encoder(cfg).apply({"params": params[vae.ENCODER_ITEM]}, pixels, None)
    latents = encoder[0]
    seen = latents
    if noise is not None:
        deviation = jax.lax.stop_gradient(latents.std(axis=(0, 1, 2, 3), keepdims=True))
        seen = latents + noise * deviation
    decoder: Any = vae.Decoder(cfg).apply({"params": params[vae.DECODER_ITEM]}, vae.denormalise(seen), None)
    return latents, decoder[0]


def loss(
    cfg: VAEConfig, latent_noise: float, params: Params, clips: jax.Array, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the loss and the PSNR in dB of uint8 clips [B, 1 + 4k, H, W, 3].

    Args:
      cfg: sizes.
      latent_noise: share of the latents' deviation.
      params: of both halves.
      clips: to be reconstructed.
      key: of the noise.
    """
    pixels = pixels_from_uint8(clips)
    noise = None
    if latent_noise:
        batch, frames, height, width, _ = clips.shape
        shape = (batch, 1 + (frames - 1) // 4, height // 8, width // 8, cfg.z_dim)
        noise = latent_noise * jax.random.normal(key, shape)
    _, drawn = reconstruct(cfg, params, pixels, noise)
    error = drawn - pixels
    square = jnp.square(error).mean()
    slopes = jnp.abs(jnp.diff(error, axis=3)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
    value = jnp.abs(error).mean() + SQUARE_WEIGHT * square + GRADIENT_WEIGHT * slopes
    return value, {"psnr": psnr(drawn, pixels)}


def psnr(drawn: jax.Array, pixels: jax.Array) -> jax.Array:
    """Returns the peak signal-to-noise ratio in dB, float32 [], of pixels in [-1, 1]."""
    return -10.0 * jnp.log10(jnp.square(jnp.clip(drawn, -1.0, 1.0) - pixels).mean() / 4.0)


def scale_latents(
    cfg: VAEConfig, params: Mapping[str, Params], mean: np.ndarray, deviation: np.ndarray, size: float
) -> dict[str, Params]:
    """Returns parameters that draw the same pictures from latents of mean 0 and deviation `size` in each channel.

    Both halves end in a linear map at the latents, which takes it up exactly.

    Args:
      cfg: sizes.
      params: of both halves.
      mean: float [C] of the latents as they are.
      deviation: float [C] of the latents as they are.
      size: wanted.
    """
    channels, scale = cfg.z_dim, size / deviation
    encoder, decoder = dict(params[vae.ENCODER_ITEM]), dict(params[vae.DECODER_ITEM])
    kernel, bias = (np.array(encoder["quant"][name]) for name in ("kernel", "bias"))
    kernel[:, :channels] *= scale
    bias[:channels] = (bias[:channels] - mean) * scale
    encoder["quant"] = {"kernel": kernel, "bias": bias}
    # Old decoder: W (D z + M) + b with z = z' / scale + mean; the new one is given D z' + M.
    kernel, bias = (np.array(decoder["quant"][name]) for name in ("kernel", "bias"))
    published_mean, published_std = np.array(vae.LATENT_MEAN), np.array(vae.LATENT_STD)
    shift = published_std * mean + published_mean - published_mean / scale
    decoder["quant"] = {
        "kernel": (kernel / scale[:, None]).astype(np.float32),
        "bias": (bias + shift @ kernel).astype(np.float32),
    }
    return {vae.ENCODER_ITEM: encoder, vae.DECODER_ITEM: decoder}


def draw_sample(cfg: VAEConfig, clips: np.ndarray, params: Params, file: Path) -> None:
    """Writes a picture of clips, uint8 [B, T, H, W, 3]: first frames, what is drawn of them, and last frames so."""
    _, drawn = _reconstruct(cfg, params, pixels_from_uint8(jnp.asarray(clips)))
    shown = np.clip((np.asarray(drawn) + 1.0) * 127.5 + 0.5, 0, 255).astype(np.uint8)
    rows = [
        np.concatenate([clip[end] for clip in pair], axis=1) for end in (0, -1) for pair in (clips, shown)
    ]
    Image.fromarray(np.concatenate(rows)).save(file)


_reconstruct = jax.jit(reconstruct, static_argnums=0)
