"""The VAE by itself, through a stream's programs, against the same without a stream."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svd2_jax.config import StreamConfig
from svd2_jax.engine.autoencode import rebuild
from svd2_jax.media import synthetic_clip
from svd2_jax.models import vae

CFG = StreamConfig(height=32, width=48)
ONE_LEVEL = 1  # what lies between two levels may be rounded to either


@pytest.fixture(scope="module")
def offline(engine):
    """What the VAE makes of a whole clip at once."""

    @functools.partial(jax.jit, static_argnums=0)
    def both(cfg, encoder, decoder, pixels):
        return vae.decode_offline(cfg, decoder, vae.encode_offline(cfg, encoder, pixels))

    def run(clip: np.ndarray) -> np.ndarray:
        params = engine.params(CFG)
        pixels = jnp.asarray(clip, jnp.float32)[None] / 127.5 - 1
        rebuilt = both(engine.model.vae, params.encoder, params.decoder, pixels)
        return np.round((np.asarray(rebuilt)[0] * 0.5 + 0.5) * 255).astype(int)

    return run


@pytest.mark.slow  # compiles the VAE twice
@pytest.mark.parametrize("frames", [3, 9, 11])
def test_a_clip_of_any_length_is_what_the_offline_vae_makes_of_it(engine, offline, frames):
    clip = np.stack(list(synthetic_clip(frames, CFG.height, CFG.width)))
    expected = offline(np.concatenate([clip, np.repeat(clip[-1:], 13 - frames, axis=0)]))[:frames]
    got = rebuild(engine, CFG, clip)
    assert (got.dtype, got.shape) == (np.uint8, clip.shape)
    assert np.abs(got.astype(int) - expected).max() <= ONE_LEVEL
