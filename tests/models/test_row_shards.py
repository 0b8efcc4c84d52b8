"""The VAE with the picture's rows cut over devices equals the VAE on one device, chunk by chunk, tails included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from svd2_jax.config import TAEHVConfig, VAEConfig
from svd2_jax.diffusion import noise_control
from svd2_jax.models import taehv, vae
from svd2_jax.nn.causal_conv import causal_conv3d
from svd2_jax.nn.random_params import random_params
from svd2_jax.nn.row_shards import RowShards, most_shards, with_halo

SAME_ATOL = 5e-5  # another order of summation, as for the goldens
AXIS = "rows"
# 4x smaller only; halves time twice as the full one does, and changes its width once.
SMALL = VAEConfig(dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, True))
TAEHV = TAEHVConfig(channels=(8, 8, 4, 4))
HEIGHT, WIDTH = 48, 16


def over(devices, function, ins, outs):
    """Returns a function over so many devices; `ins` and `outs` are the array axes that are cut, None: none is."""
    mesh = Mesh(np.array(jax.devices()[:devices]), (AXIS,))

    def spec(axis):
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS)

    run = functools.partial(function, shards=RowShards(AXIS, devices))
    specs = tuple(map(spec, ins)), tuple(map(spec, outs))
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs[0], out_specs=specs[1]))


def random(*shape, seed=0):
    return jax.random.uniform(jax.random.key(seed), shape, minval=-1.0, maxval=1.0)


def same(got, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=SAME_ATOL), got, wanted)


def test_an_encoder_over_devices_equals_one_device():
    params = random_params(vae.abstract_params(SMALL), seed=0)["vae.encoder"]
    pixels = random(1, 13, HEIGHT, WIDTH, 3)
    first, later = (functools.partial(f, SMALL) for f in (vae.encode_first, vae.encode))
    one_first, one_later = jax.jit(first), jax.jit(later)
    cut_first = over(3, first, (None, 2), (2, 2))
    cut_later = over(3, later, (None, 2, 2), (2, 2))
    wanted, state = one_first(params, pixels[:, :5])
    got, cut_state = cut_first(params, pixels[:, :5])
    same((got, cut_state), (wanted, state))
    for start in (5, 9):
        chunk = pixels[:, start : start + 4]
        wanted, state = one_later(params, state, chunk)
        got, cut_state = cut_later(params, cut_state, chunk)
        same((got, cut_state), (wanted, state))


def test_a_decoder_over_devices_equals_one_device():
    params = random_params(vae.abstract_params(SMALL), seed=0)["vae.decoder"]
    latents = random(1, 5, HEIGHT // 4, WIDTH // 4, 16)
    first, later = (functools.partial(f, SMALL) for f in (vae.decode_first, vae.decode))
    one_first, one_later = jax.jit(first), jax.jit(later)
    cut_first = over(3, first, (None, 2), (2, 2))
    cut_later = over(3, later, (None, 2, 2), (2, 2))
    wanted, state = one_first(params, latents[:, :2])
    got, cut_state = cut_first(params, latents[:, :2])
    same((got, cut_state), (wanted, state))
    for f in (2, 3):
        wanted, state = one_later(params, state, latents[:, f : f + 1])
        got, cut_state = cut_later(params, cut_state, latents[:, f : f + 1])
        same((got, cut_state), (wanted, state))


def test_the_tiny_decoder_over_devices_equals_one_device():
    params = random_params(taehv.abstract_params(TAEHV), seed=0)["taehv"]
    latents = random(1, 5, HEIGHT // 4, WIDTH // 4, 16)
    first, later = (functools.partial(f, TAEHV) for f in (taehv.decode_first, taehv.decode))
    state_axes = taehv.TAEHVState(PartitionSpec(None, None, AXIS), PartitionSpec())

    def cut(function, *before):
        run = functools.partial(function, shards=RowShards(AXIS, 3))
        image = PartitionSpec(None, None, AXIS)
        mesh = Mesh(np.array(jax.devices()[:3]), (AXIS,))
        specs = (PartitionSpec(), *before, image)
        return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=(image, state_axes)))

    wanted, state = jax.jit(first)(params, latents[:, :2])
    got, cut_state = cut(first)(params, latents[:, :2])
    same((got, cut_state), (wanted, state))
    for f in (2, 3):
        wanted, state = jax.jit(later)(params, state, latents[:, f : f + 1])
        got, cut_state = cut(later, state_axes)(params, cut_state, latents[:, f : f + 1])
        same((got, cut_state), (wanted, state))


@pytest.mark.parametrize("formulation", ["stacked", "taps", "conv3d"])
@pytest.mark.parametrize("tail", [True, False])
def test_a_convolution_sees_its_neighbours_rows_in_every_formulation(formulation, tail):
    x, kernel, bias = random(1, 4, 8, 5, 3), random(3, 5, 3, 3, 2, seed=1), random(2, seed=2)
    before = random(1, 2, 8, 5, 3, seed=3) if tail else None

    def conv(x, tail, shards=None):
        return causal_conv3d(x, kernel, bias, tail, formulation=formulation, shards=shards)

    same(over(4, conv, (2, 2), (2, 2))(x, before), conv(x, before))


def test_a_halo_is_the_neighbours_rows_and_zeros_at_the_picture_s_edges():
    x = jnp.arange(1.0, 7.0).reshape(6, 1, 1)

    def run(x, shards):
        padded, rest = with_halo(x, 1, 1, shards)
        assert rest == (0, 0)
        return (padded,)

    (got,) = over(3, run, (0,), (0,))(x)
    np.testing.assert_array_equal(got.ravel(), [0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 0])
    whole, rest = with_halo(x, 1, 2, None)
    assert whole is x
    assert rest == (1, 2)


def test_the_motion_of_a_chunk_is_that_of_the_whole_picture():
    before, frames = random(6, 4, 3), random(4, 6, 4, 3, seed=1)
    wanted = noise_control.motion(before, 0.1 * frames)

    def motion(before, frames, shards):
        return (noise_control.motion(before, frames, shards),)

    (got,) = over(3, motion, (0, 1), (None,))(before, 0.1 * frames)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("rows", "devices", "most"),
    [(60, 4, 4), (60, 8, 6), (60, 7, 6), (64, 8, 8), (6, 4, 3), (7, 4, 1), (2, 1, 1)],
)
def test_rows_are_cut_over_as_many_devices_as_get_the_same_number(rows, devices, most):
    assert most_shards(rows, devices) == most
