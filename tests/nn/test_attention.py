"""Attention: the blockwise form against the plain one, and masks by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from svd2_jax.nn import attention
from svd2_jax.nn.attention import attend


def qkv(rows=2, queries=5, keys=12, heads=3, dim=8, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(rows, queries, heads, dim), (rows, keys, heads, dim), (rows, keys, heads, dim)]
    return [jnp.asarray(rng.standard_normal(s, np.float32)) for s in shapes]


@pytest.mark.parametrize("implementation", ["xla", "blocked"])
def test_attention_equals_the_textbook_formula(implementation):
    q, k, v = qkv()
    weights = jax.nn.softmax(jnp.einsum("bqnd,bknd->bnqk", q, k) / np.sqrt(8).astype(np.float32))
    wanted = jnp.einsum("bnqk,bknd->bqnd", weights, v)
    np.testing.assert_allclose(attend(q, k, v, implementation=implementation), wanted, atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "blocked"])
def test_keys_beyond_the_length_have_no_influence(implementation):
    q, k, v = qkv()
    length = jnp.array([4, 9], jnp.int32)
    got = attend(q, k, v, length, implementation)
    for row, n in enumerate([4, 9]):
        alone = attend(q[row : row + 1], k[row : row + 1, :n], v[row : row + 1, :n], implementation="xla")
        np.testing.assert_allclose(got[row], alone[0], atol=1e-6)


def test_blocks_that_do_not_divide_the_keys_change_nothing(monkeypatch):
    q, k, v = qkv(keys=13)
    monkeypatch.setattr(attention, "KEY_BLOCK", 5)
    length = jnp.array([1, 13], jnp.int32)
    np.testing.assert_allclose(attend(q, k, v, length, "blocked"), attend(q, k, v, length, "xla"), atol=1e-6)
    np.testing.assert_allclose(
        attend(q, k, v, implementation="blocked"), attend(q, k, v, implementation="xla"), atol=1e-6
    )


def test_one_row_of_keys_serves_all_rows_of_queries():
    q, k, v = qkv()
    got = attend(q, k[:1], v[:1])
    np.testing.assert_allclose(got[1], attend(q[1:], k[:1], v[:1])[0], atol=1e-6)


def test_every_device_of_a_mesh_attends_to_its_own_keys_in_blocks(monkeypatch):
    q, k, v = qkv()
    monkeypatch.setattr(attention, "KEY_BLOCK", 5)
    mesh = Mesh(np.array(jax.devices()[:2]), ("stage",))
    spec = PartitionSpec("stage")

    def run(q, k, v, length):
        return attend(q, k, v, length, "blocked")

    length = jnp.array([4, 12], jnp.int32)
    got = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec))(q, k, v, length)
    np.testing.assert_allclose(got, attend(q, k, v, length, "xla"), atol=1e-6)


def test_the_fused_kernel_is_taken_on_a_gpu_in_16_bit_only():
    choose = attention.fused_if_possible
    assert choose("gpu", jnp.dtype(jnp.bfloat16), 128) == "cudnn"
    assert choose("gpu", jnp.dtype(jnp.float32), 128) == "auto"
    assert choose("gpu", jnp.dtype(jnp.bfloat16), 384) == "auto"
    assert choose("cpu", jnp.dtype(jnp.bfloat16), 128) == "auto"
