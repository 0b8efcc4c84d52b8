"""A VAE by itself: frames to latents and back, without the transformer between them."""

from __future__ import annotations

import jax
import numpy as np

from svd2_jax.config import StreamConfig
from svd2_jax.engine.engine import DeviceEngine
from svd2_jax.errors import EngineError
from svd2_jax.models import vae


def rebuild(engine: DeviceEngine, cfg: StreamConfig, frames: np.ndarray) -> np.ndarray:
    """Returns what encoder and decoder alone make of frames, uint8 [T, H, W, 3]: the best that a stream could give.

    The programs are those that a stream runs, group by group. They mix noise into the latents; here it is zero, so
    that the latents come out scaled by one minus the noise scale, which is taken back.

    Args:
      engine: the model, all of it in this process.
      cfg: says the sizes of groups and the decoder (video to video).
      frames: uint8 [T, H, W, 3]; the last one is repeated up to a whole group, and what comes of that is cut off.

    Raises:
      EngineError: another process has one of the stream's ends, or it is text to video.
    """
    params, ends, mesh = engine.params(cfg), engine.ends(cfg), engine.mesh
    if not (ends.encode_first and ends.encode and ends.decode_first and ends.decode):
        raise EngineError("the VAE by itself needs both ends of a video-to-video stream in this process")
    first, step = cfg.first_frames, cfg.chunk_frames
    missing = max(0, first - len(frames)) or (first - len(frames)) % step
    padded = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    shape = (*cfg.latent_size, engine.model.dit.in_channels)
    silence = jax.device_put(np.float32(0), ends.scale)

    def no_noise(latents: int) -> jax.Array:
        return jax.device_put(np.zeros((latents, *shape), np.float32), mesh.first)

    def clean(noisy: jax.Array, scale: jax.Array) -> jax.Array:
        latents = noisy / (np.float32(1) - np.asarray(scale))
        return jax.device_put(vae.decodable(engine.model.vae, latents), mesh.last)

    group = jax.device_put(padded[:first], ends.frames)
    input_, noisy = ends.encode_first(params.encoder, group, no_noise(cfg.first_latents), silence)
    decoder, pixels = ends.decode_first(params.decoder, clean(noisy, input_.noise_scale))
    groups = [np.asarray(pixels)]
    for start in range(first, len(padded), step):
        group = jax.device_put(padded[start : start + step], ends.frames)
        input_, noisy, _ = ends.encode(params.encoder, input_, group, no_noise(cfg.frames_per_block), silence)
        decoder, pixels = ends.decode(params.decoder, decoder, clean(noisy, input_.noise_scale))
        groups.append(np.asarray(pixels))
    return np.concatenate(groups)[: len(frames)]
