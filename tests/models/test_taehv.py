import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import GOLDENS, convert, shapes_of

from convert import taehv as table
from svd2_jax.config import TAEHVConfig
from svd2_jax.errors import ConversionError
from svd2_jax.models import taehv, vae
from svd2_jax.nn.random_params import random_params

GOLDEN_ATOL = 5e-5  # from the goldens' README: float32, another order of summation
SAME_ATOL = 2e-5  # the same sums in programs of other shapes

CFG = TAEHVConfig()
SMALL = TAEHVConfig(channels=(16, 8, 8, 8))


@functools.cache
def jitted(cfg):
    return {
        "decode_first": jax.jit(functools.partial(taehv.decode_first, cfg)),
        "decode": jax.jit(functools.partial(taehv.decode, cfg)),
        "offline": jax.jit(functools.partial(taehv.decode_offline, cfg)),
    }


def source_tensors(cfg, make):
    """{name: make(name, shape)} of the file that the table describes."""
    abstract, tensors = taehv.abstract_params(cfg), {}
    for rule in table.rules(cfg):
        item, *path = rule.target.split("/")
        leaf = functools.reduce(lambda node, key: node[key], path, abstract[item])
        name, shape = rule.source.replace("\\", ""), leaf.shape[-1:] + leaf.shape[-2:-1] + leaf.shape[:-2]
        tensors[name] = make(name, (*shape, 1, 1) if len(shape) == 2 else shape)
    return tensors


@pytest.fixture(scope="module")
def golden():
    arrays = dict(np.load(GOLDENS / "taehv.npz"))
    return {k: jnp.asarray(np.moveaxis(v, 2, -1)) if v.ndim == 5 else v for k, v in arrays.items()}


@pytest.fixture(scope="module")
def reference(golden):
    """Parameters by the rule in the goldens' README."""
    seed = int(golden["weight_seed"])

    def make(name, shape):
        fan_in = np.prod(shape[1:]) if name.endswith("weight") else 100
        draw = np.random.default_rng(zlib.crc32(name.encode()) + seed).standard_normal(shape)
        return draw.astype(np.float32) / np.float32(np.sqrt(fan_in))

    tensors = source_tensors(CFG, make)
    assert table.infer_config(shapes_of(tensors)) == CFG
    tensors["encoder.0.weight"] = np.zeros((64, 3, 3, 3), np.float32)
    return convert(table.rules(CFG), tensors, taehv.abstract_params(CFG), table.IGNORED)["taehv"]


@pytest.fixture(scope="module")
def small():
    return random_params(taehv.abstract_params(SMALL), seed=0)["taehv"]


def random(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def test_streamed_frames_equal_the_reference(golden, reference):
    run = jitted(CFG)
    pixels, state = run["decode_first"](reference, golden["latents_0"])
    assert pixels.shape[1] == 5
    # The reference drops the first latent's frames; here its one true frame is in front.
    np.testing.assert_allclose(pixels[:, 1:], golden["decode_stream_0"], atol=GOLDEN_ATOL)
    for i in range(1, 5):
        pixels, state = run["decode"](reference, state, golden[f"latents_{i}"])
        np.testing.assert_allclose(pixels, golden[f"decode_stream_{i}"], atol=GOLDEN_ATOL)


def test_offline_frames_equal_the_reference(golden, reference):
    latents = jnp.concatenate([golden[f"latents_{i}"] for i in range(5)], axis=1)
    raw = jitted(CFG)["offline"](reference, latents)
    np.testing.assert_allclose(raw, golden["decode_full_unit_range_untrimmed"], atol=GOLDEN_ATOL)


def test_the_frame_in_front_is_the_fourth_raw_one(small):
    latents = random((1, 2, 2, 3, 16))
    pixels, _ = jitted(SMALL)["decode_first"](small, latents)
    raw = jitted(SMALL)["offline"](small, latents)
    np.testing.assert_allclose(pixels, jnp.clip(2.0 * raw[:, 3:] - 1.0, -1.0, 1.0), atol=SAME_ATOL)


@pytest.mark.parametrize("new", [1, 2])
def test_a_chunk_equals_decoding_its_context_and_keeping_the_end(small, new):
    latents = random((1, 4 + new, 2, 3, 16))
    _, state = jitted(SMALL)["decode_first"](small, latents[:, :4])
    pixels, _ = jitted(SMALL)["decode"](small, state, latents[:, 4:])
    raw = jitted(SMALL)["offline"](small, latents[:, 1:])
    np.testing.assert_allclose(pixels, jnp.clip(2.0 * raw[:, -4 * new :] - 1.0, -1.0, 1.0), atol=SAME_ATOL)


@pytest.mark.parametrize("valid", [0, 1, 2])
def test_context_that_a_stream_never_had_changes_nothing(small, valid):
    context, latents = random((1, 3, 2, 3, 16)), random((1, 1, 2, 3, 16), seed=1)
    state = taehv.TAEHVState(context.at[:, : 3 - valid].set(99.0), jnp.full((1,), valid, jnp.int32))
    pixels, after = jitted(SMALL)["decode"](small, state, latents)
    raw = jitted(SMALL)["offline"](small, jnp.concatenate([context[:, 3 - valid :], latents], axis=1))
    np.testing.assert_allclose(pixels, jnp.clip(2.0 * raw[:, -4:] - 1.0, -1.0, 1.0), atol=SAME_ATOL)
    assert after.valid_B.tolist() == [valid + 1]


def test_rows_may_be_at_different_places_of_their_streams(small):
    context, latents = random((2, 3, 2, 3, 16)), random((2, 1, 2, 3, 16), seed=1)
    valid_B = jnp.asarray([1, 3], jnp.int32)
    together, _ = jitted(SMALL)["decode"](small, taehv.TAEHVState(context, valid_B), latents)
    for row in range(2):
        state = taehv.TAEHVState(context[row : row + 1], valid_B[row : row + 1])
        alone, _ = jitted(SMALL)["decode"](small, state, latents[row : row + 1])
        np.testing.assert_allclose(together[row : row + 1], alone, atol=SAME_ATOL)


def test_a_donated_state_gives_the_same_stream(small):
    decode = jax.jit(functools.partial(taehv.decode, SMALL), donate_argnums=1)
    latents = random((1, 5, 2, 3, 16))
    _, kept = jitted(SMALL)["decode_first"](small, latents[:, :2])
    donated = jax.tree.map(jnp.copy, kept)
    for f in range(2, 5):
        a, kept = jitted(SMALL)["decode"](small, kept, latents[:, f : f + 1])
        b, donated = decode(small, donated, latents[:, f : f + 1])
        np.testing.assert_allclose(a, b, atol=SAME_ATOL)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_state_keeps_its_shapes_and_dtypes(dtype):
    params = taehv.abstract_params(SMALL, dtype)["taehv"]
    empty = taehv.init_decode_state(SMALL, 2, 16, 24, dtype)
    latents = jax.ShapeDtypeStruct((2, 2, 2, 3, 16), jnp.float32)
    pixels, first = jax.eval_shape(functools.partial(taehv.decode_first, SMALL), params, latents)
    more, after = jax.eval_shape(functools.partial(taehv.decode, SMALL), params, first, latents)

    def kind(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    assert kind(empty) == kind(first) == kind(after)
    assert (pixels.shape, more.shape) == ((2, 5, 16, 24, 3), (2, 8, 16, 24, 3))
    assert pixels.dtype == more.dtype == first.context.dtype == dtype


def test_a_session_can_use_either_decoder_by_the_same_calls():
    for module in (vae, taehv):
        assert all(hasattr(module, name) for name in ("init_decode_state", "decode_first", "decode"))


def test_an_empty_group_is_refused(small):
    with pytest.raises(ValueError, match="F >= 1"):
        taehv.decode_first(SMALL, small, jnp.zeros((1, 0, 2, 3, 16)))


def test_of_a_layer_that_adds_more_frames_the_last_are_kept():
    (rule,) = [r for r in table.rules(CFG) if r.target == "taehv/stage_0_grow/kernel"]
    weight = np.arange(512 * 256, dtype=np.float32).reshape(512, 256, 1, 1)
    np.testing.assert_array_equal(rule.transform(weight), weight[256:, :, 0, 0].T)


def test_a_file_that_is_no_taehv_is_refused_by_name():
    with pytest.raises(ConversionError, match=r"decoder\.1\.weight"):
        table.infer_config({"encoder.0.weight": (64, 3, 3, 3)})
