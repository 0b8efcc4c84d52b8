"""8 bits and a scale: how far from what they stand for, and that products with them use the right scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svd2_jax.config import DiTConfig, StreamConfig, preset
from svd2_jax.errors import ConfigError
from svd2_jax.models import dit
from svd2_jax.nn import attention
from svd2_jax.nn.attention import attend
from svd2_jax.nn.quantised import Quantised, dequantise, quantise
from svd2_jax.nn.random_params import random_params

F32 = jnp.dtype(jnp.float32)


def gaussian(*shape, seed=0):
    """Rows of very different sizes, so that each needs a scale of its own."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape, np.float32) * 10.0 ** rng.uniform(-4, 4, (*shape[:-1], 1))
    return jnp.asarray(x, jnp.float32)


def test_int8_is_off_by_half_a_step_at_most():
    x = gaussian(40, 3, 32)
    got = quantise(x, "int8", axis=-1)
    assert isinstance(got, Quantised)
    assert got.values.dtype == jnp.int8
    assert got.scales.shape == (40, 3, 1)
    step = np.abs(x).max(axis=-1, keepdims=True) / 127
    assert (np.abs(dequantise(got, F32) - x) <= step * 0.5001).all()
    assert (np.abs(got.values).max(axis=-1) == 127).all()


def test_fp8_is_off_by_a_sixteenth_of_each_value_at_most():
    x = gaussian(40, 3, 32)
    got = quantise(x, "fp8", axis=-1)
    assert isinstance(got, Quantised)
    assert got.values.dtype == jnp.float8_e4m3fn
    smallest = np.abs(x).max(axis=-1, keepdims=True) / 448 * 2**-9  # subnormal
    assert (np.abs(dequantise(got, F32) - x) <= np.maximum(np.abs(x) / 16, smallest / 2) * 1.0001).all()


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_zeros_stay_zeros_and_the_largest_value_what_it_was(storage):
    x = jnp.array([[0.0, 0.0], [-3.0, 1e-6]], jnp.float32)
    got = np.asarray(dequantise(quantise(x, storage, axis=-1), F32))
    np.testing.assert_array_equal(got[0], 0)
    assert got[1, 0] == pytest.approx(-3.0, rel=1e-6)


def test_what_is_to_stay_as_it_is_computed_stays():
    x = gaussian(2, 3)
    assert quantise(x, "compute", axis=0) is x


@pytest.mark.parametrize("storage", ["int8", "fp8"])
@pytest.mark.parametrize("implementation", ["xla", "blocked"])
def test_attention_to_a_quantised_cache_equals_attention_to_what_it_stands_for(
    implementation, storage, monkeypatch
):
    monkeypatch.setattr(attention, "KEY_BLOCK", 5)  # does not divide the keys
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, n, 3, 8), np.float32)) for n in (4, 13, 13))
    sizes = jnp.asarray(rng.uniform(0.2, 2, (2, 13, 3, 1)), jnp.float32)
    k, v = quantise(k * sizes, storage, axis=-1), quantise(v / sizes, storage, axis=-1)
    length = jnp.array([7, 13], jnp.int32)
    plain = [dequantise(x, F32) for x in (k, v)]
    wanted = attend(q, *plain, length, implementation)
    np.testing.assert_allclose(attend(q, k, v, length, implementation), wanted, atol=1e-5)
    # One row of keys for all rows of queries.
    first = jax.tree.map(lambda x: x[:1], (k, v))
    wanted = attend(q, *(x[:1] for x in plain), implementation=implementation)
    np.testing.assert_allclose(attend(q, *first, implementation=implementation), wanted, atol=1e-5)


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_a_linear_layer_takes_the_kernel_that_its_8_bits_stand_for(storage):
    x, kernel, bias = gaussian(2, 5, 16, seed=1), gaussian(8, 16, seed=2).T, gaussian(8, seed=3)
    held = quantise(kernel, storage, axis=0)

    def layer(kernel):
        return dit.Dense(8).apply({"params": {"kernel": kernel, "bias": bias}}, x)

    wanted = layer(dequantise(held, F32))
    np.testing.assert_allclose(layer(held), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_all_kernels_of_a_block_and_nothing_else_are_held_in_8_bits():
    cfg = DiTConfig(dim=8, ffn_dim=16, num_heads=2, num_layers=1, weight_dtype="int8")
    block = random_params(dit.abstract_params(cfg)[dit.block_item(0)], 0)
    held = dit.stored_block(cfg, block)
    assert jax.tree.structure(block) == jax.tree.structure(
        jax.tree.map(lambda x: 0, held, is_leaf=lambda x: isinstance(x, Quantised))
    )
    kernels = [
        x
        for x in jax.tree.leaves(held, is_leaf=lambda x: isinstance(x, Quantised))
        if not hasattr(x, "dtype")
    ]
    assert sorted(x.shape for x in kernels) == [(8, 8)] * 8 + [(8, 16), (16, 8)]
    assert all(x.scales.shape == (1, x.shape[1]) for x in kernels)


def test_an_unknown_way_to_hold_numbers_is_refused():
    with pytest.raises(ConfigError, match=r"cache_dtype must be one of .*'int8', 'fp8'.*, got 'int4'"):
        StreamConfig(cache_dtype="int4")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"weight_dtype must be one of .*'int8', 'fp8'.*, got 'int4'"):
        preset("tiny").with_weight_dtype("int4")  # pyright: ignore[reportArgumentType]
