"""The counter of arithmetic and memory traffic, against sums worked out by hand and against XLA's."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from svd2_jax.config import StreamConfig, preset
from svd2_jax.engine.count_flops import count_cost
from svd2_jax.hardware import Cost
from svd2_jax.models import dit
from svd2_jax.nn import kv_cache
from svd2_jax.nn.attention import attend
from svd2_jax.nn.kv_cache import WritePlan


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


SQUARE = array(4, 4)
SQUARED = Cost(2 * 4 * 4 * 4, 3 * 4 * 4 * 4)  # one product of 4x4 float32 matrices


def test_a_product_counts_two_for_a_multiply_add_and_reads_and_writes_once():
    work = count_cost(jnp.matmul, array(2, 3), array(3, 5))
    assert work == Cost(flops=2 * 2 * 3 * 5, bytes=4 * (2 * 3 + 3 * 5 + 2 * 5))


def test_a_batched_product_counts_every_batch_and_the_width_of_its_numbers():
    x, y = array(7, 2, 3, dtype=jnp.bfloat16), array(7, 3, 5, dtype=jnp.bfloat16)
    product = functools.partial(jnp.einsum, "bij,bjk->bik", preferred_element_type=jnp.float32)
    assert count_cost(product, x, y) == Cost(2 * 7 * 2 * 3 * 5, 7 * (2 * 2 * 3 + 2 * 3 * 5 + 4 * 2 * 5))


def test_elementwise_work_is_free():
    assert count_cost(lambda x: jnp.tanh(x) * 2 + x.sum(), SQUARE) == Cost()


def test_a_write_into_a_cache_moves_the_slice_only():
    update = functools.partial(lax.dynamic_update_slice, start_indices=(3, 0))
    assert count_cost(update, array(1000, 8), array(2, 8)) == Cost(0, 2 * 4 * 2 * 8)


def square_if_positive(x):
    return lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)


@jax.custom_jvp
def with_own_derivative(x):
    return x @ x


with_own_derivative.defjvp(lambda primals, tangents: (primals[0] @ primals[0], tangents[0]))


@jax.custom_vjp
def with_own_gradient(x):
    return x @ x


with_own_gradient.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x,))


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (lambda x: lax.scan(lambda c, _: (c @ c, None), x, None, length=5)[0], 5),
        (lambda x: lax.fori_loop(0, 3, lambda i, c: jax.jit(lambda c: c @ c)(c), x), 3),
        (lambda x: lax.map(lambda row: row @ row, jnp.stack([x, x])), 2),
        (lambda x: lax.while_loop(lambda c: (c @ c)[0, 0] > 1, lambda c: c @ c, x), 2),
        (square_if_positive, 2),
        (lambda x: lax.switch(0, [lambda x: x, lambda x: x @ x], x), 1),
        (jax.checkpoint(lambda x: x @ x), 1),
        (with_own_derivative, 1),
        (with_own_gradient, 1),
    ],
    ids=["scan", "fori", "map", "while", "cond", "switch", "remat", "custom_jvp", "custom_vjp"],
)
def test_products_are_found_wherever_they_are_nested(function, products):
    assert count_cost(function, SQUARE) == products * SQUARED


def test_a_sharded_program_counts_for_one_device():
    mesh = Mesh(np.array(jax.devices()), ("stage",))
    spec = PartitionSpec("stage")
    sharded = jax.shard_map(lambda x: x @ x.swapaxes(1, 2), mesh=mesh, in_specs=spec, out_specs=spec)
    assert count_cost(sharded, array(8, 4, 4)) == SQUARED


@pytest.mark.parametrize(
    ("communicate", "sent"),
    [
        (lambda x: lax.ppermute(x, "stage", [(0, 1), (1, 2)]), 64),
        (lambda x: lax.all_gather(x, "stage", axis=0, tiled=True), 3 * 64),  # to each of the others
        (
            lambda x: lax.psum_scatter(x, "stage", scatter_dimension=0, tiled=True),
            48,
        ),  # a row to each of the others
        (lambda x: lax.psum(x.sum(), "stage"), 0),
    ],
    ids=["permute", "gather", "scatter", "sum"],
)
def test_what_is_sent_to_other_devices_is_counted(communicate, sent):
    work = count_cost(communicate, SQUARE, axes=[("stage", 4)])
    assert work == Cost(sent=sent)


def convolution(**settings):
    """A 2-D convolution, channels last; returns the function."""
    settings = {"window_strides": (1, 1), "padding": "VALID", **settings}
    return functools.partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"), **settings)


def test_a_convolution_counts_its_windows():
    work = count_cost(convolution(), array(2, 6, 7, 3), array(3, 3, 3, 5))
    assert work.flops == 2 * (2 * 4 * 5) * 5 * (3 * 3 * 3)
    assert work.bytes == 4 * (2 * 6 * 7 * 3 + 3 * 3 * 3 * 5 + 2 * 4 * 5 * 5)


@pytest.mark.parametrize(
    ("settings", "kernel", "flops"),
    [
        ({"window_strides": (2, 2)}, (3, 3, 4, 6), 2 * (2 * 3) * 6 * 9 * 4),
        ({"feature_group_count": 2}, (3, 3, 2, 6), 2 * (4 * 6) * 6 * 9 * 2),
        ({"rhs_dilation": (2, 2)}, (3, 3, 4, 6), 2 * (2 * 4) * 6 * 9 * 4),
        # Along 6: 5 + 6 + 5 pairs of tap and element, along 8: 7 + 8 + 7; padding is not counted.
        ({"padding": "SAME"}, (3, 3, 4, 6), 2 * 16 * 22 * 6 * 4),
        # A transposed convolution: each of the 6 x 8 elements meets each of the 2 x 2 taps once.
        ({"lhs_dilation": (2, 2), "padding": ((1, 1), (1, 1))}, (2, 2, 4, 6), 2 * (6 * 2) * (8 * 2) * 6 * 4),
    ],
    ids=["stride", "groups", "dilation", "padding", "transposed"],
)
def test_convolutions_count_what_they_multiply(settings, kernel, flops):
    function, x, k = convolution(**settings), array(1, 6, 8, 4), array(*kernel)
    assert count_cost(function, x, k).flops == flops
    # XLA, which counts the same way (one operation more or less where it simplifies), agrees.
    compiled = jax.jit(function).lower(x, k).compile()
    assert compiled.cost_analysis()["flops"] == pytest.approx(flops, rel=0.02)


def test_a_one_dimensional_convolution_of_flax_counts_too():
    conv = nn.Conv(6, (3,), padding="VALID")
    params = jax.eval_shape(conv.init, jax.random.key(0), array(1, 10, 4))
    assert count_cost(conv.apply, params, array(1, 10, 4)).flops == 2 * 8 * 6 * 3 * 4


def test_all_forms_of_attention_cost_the_same_arithmetic_and_a_fused_one_keeps_its_logits():
    q, k = array(1, 96, 2, 32, dtype=jnp.bfloat16), array(1, 4096, 2, 32, dtype=jnp.bfloat16)
    plain, blocked = (functools.partial(attend, implementation=i) for i in ("xla", "blocked"))
    arithmetic = 4 * 2 * 96 * 4096 * 32
    assert count_cost(plain, q, k, k).flops == count_cost(blocked, q, k, k).flops == arithmetic
    logits = 2 * 96 * 4096
    inputs_and_result = 2 * 2 * 32 * (96 + 4096) * 2
    assert count_cost(plain, q, k, k).bytes == inputs_and_result + logits * (4 + 2)
    assert count_cost(plain, q, k, k, fused_attention=True).bytes == inputs_and_result


def test_a_block_of_the_large_model_costs_what_its_formula_says():
    cfg, stream, rows = preset("wan-14b").dit, StreamConfig(height=480, width=832), 2
    E, M, P, Q = cfg.dim, cfg.ffn_dim, cfg.text_len, 1560
    K = stream.cache_frames * Q
    half = functools.partial(array, dtype=jnp.bfloat16)
    item = dit.abstract_params(cfg)[dit.block_item(0)]
    params = jax.tree.map(lambda x: half(*x.shape), item)
    cache = jax.eval_shape(lambda: kv_cache.init_kv_cache(cfg, stream, jnp.bfloat16)).layers[0]
    cache = jax.tree.map(lambda x: array(rows, *x.shape[1:], dtype=x.dtype), cache)
    flag, number = array(rows, dtype=jnp.bool_), array(rows, dtype=jnp.int32)
    plan = WritePlan(active=flag, full=flag, end=number, pop=flag)
    prompt = half(1, P, cfg.num_heads, cfg.head_dim)
    table = array(rows, Q, cfg.head_dim // 2)

    def block(params, x, cache, plan, length, prompt, modulation, rope):
        apply = functools.partial(dit.Block(cfg).apply, {"params": params})
        q, k, v = apply(x, modulation, rope, method="project")
        cache = kv_cache.write(stream, cache, plan, k, v, 1)
        args = (x, q, [cache], [length], prompt, prompt, modulation, "xla")
        return apply(*args, method="finish"), cache

    args = (params, half(rows, Q, E), cache, plan, number, prompt, array(rows, 6, E), (table, table))
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms mix bfloat16 with float32
        work = count_cost(block, *args, fused_attention=True)
    # Without keys and values of the prompt, which are worked out once per prompt.
    matrices = 4 * E * E + 2 * E * E + 2 * E * M
    flops = rows * Q * (2 * matrices + 4 * K * E + 4 * P * E)
    assert work.flops == pytest.approx(flops, rel=0.01)
    # Weights and the cache are read once; products read and write 8 rows of E and the MLP's 2 of M per token.
    assert work.bytes > 2 * (matrices + rows * 2 * K * E)
    assert work.bytes < 2 * (matrices + rows * 2 * K * E + rows * Q * (24 * E + 4 * M) + rows * 2 * P * E)
