"""The VAE's training: where it starts, and latents of another scale."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svd2_jax.config import VAEConfig
from svd2_jax.diffusion.noise_control import pixels_from_uint8
from svd2_jax.models import vae
from tiny_model import autoencoder, scenes

CFG = VAEConfig(dim=4, num_res_blocks=1)


@functools.cache
def params():
    return jax.tree.map(jnp.asarray, autoencoder.init_params(CFG, seed=0))


reconstruct = jax.jit(autoencoder.reconstruct, static_argnums=0)


def clip(frames=9):
    return pixels_from_uint8(jnp.asarray(scenes.clip(scenes.make_scene(4), frames, 16, 16))[None])


def test_a_still_clip_starts_as_good_as_its_picture():
    picture = clip()[:, :1]
    still = jnp.repeat(picture, 9, axis=1)
    _, of_picture = reconstruct(CFG, params(), picture)
    _, of_still = reconstruct(CFG, params(), still)
    np.testing.assert_allclose(of_still, jnp.repeat(of_picture, 9, axis=1), atol=1e-4)


@pytest.mark.slow
def test_a_whole_clip_is_drawn_as_a_stream_draws_it():
    """Training passes a clip at once; a stream passes it group by group."""
    full = jax.tree.map(
        lambda x: x + 0.05 * np.random.default_rng(1).standard_normal(x.shape, np.float32), params()
    )
    latents, drawn = reconstruct(CFG, full, clip())
    encode, decode = (jax.jit(f, static_argnums=0) for f in (vae.encode_first, vae.decode_first))
    streamed, _ = encode(CFG, full["vae.encoder"], clip())
    pixels, _ = decode(CFG, full["vae.decoder"], streamed)
    np.testing.assert_allclose(latents, streamed, atol=1e-4)
    np.testing.assert_allclose(jnp.clip(drawn, -1, 1), pixels, atol=1e-4)


def test_scaled_latents_have_the_wanted_size_and_give_the_same_pictures():
    latents, drawn = reconstruct(CFG, params(), clip())
    flat = np.asarray(latents, np.float64).reshape(-1, 16)
    scaled = autoencoder.scale_latents(CFG, params(), flat.mean(0), flat.std(0), 8.0)
    scaled = jax.tree.map(jnp.asarray, scaled)
    again, same = reconstruct(CFG, scaled, clip())
    flat = np.asarray(again).reshape(-1, 16)
    np.testing.assert_allclose(flat.mean(0), 0, atol=1e-2)
    np.testing.assert_allclose(flat.std(0), 8, rtol=1e-3)
    np.testing.assert_allclose(same, drawn, atol=1e-3)


def test_the_signal_to_noise_ratio_is_that_of_eight_bit_pixels():
    black = jnp.full((1, 1, 4, 4, 3), -1.0)
    assert float(autoencoder.psnr(black + 2 / 255, black)) == pytest.approx(20 * np.log10(255), abs=1e-3)
