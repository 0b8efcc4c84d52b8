import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import GOLDENS, WAN_FOLDER, convert, shapes_of, tensors_of

from convert import wan_vae
from svd2_jax.config import VAEConfig
from svd2_jax.errors import ConfigError, ConversionError
from svd2_jax.models import vae
from svd2_jax.nn.random_params import random_params

GOLDEN_ATOL = 5e-5  # from the goldens' README: float32, another order of summation
SAME_ATOL = 2e-5  # the same sums in programs of other shapes

# 4x smaller only; halves time twice as the full one does, and changes its width once.
SMALL = VAEConfig(dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, True))
FULL_SIZE = VAEConfig()


@functools.cache
def jitted(cfg):
    return {
        "encode_first": jax.jit(functools.partial(vae.encode_first, cfg)),
        "encode": jax.jit(functools.partial(vae.encode, cfg)),
        "decode_first": jax.jit(functools.partial(vae.decode_first, cfg)),
        "decode": jax.jit(functools.partial(vae.decode, cfg)),
    }


@pytest.fixture(scope="module")
def golden():
    arrays = dict(np.load(GOLDENS / "vae.npz"))
    return {k: jnp.asarray(np.moveaxis(v, 1, -1)) if v.ndim == 5 else v for k, v in arrays.items()}


@pytest.fixture(scope="module")
def reference():
    """(config, parameters) of the goldens' weight file."""
    tensors = tensors_of(WAN_FOLDER / "Wan2.1_VAE.pth")
    cfg = wan_vae.infer_config(shapes_of(tensors))
    return cfg, convert(wan_vae.rules(cfg), tensors, vae.abstract_params(cfg))


@pytest.fixture(scope="module")
def small():
    return random_params(vae.abstract_params(SMALL), seed=0)


def random(shape, seed=0):
    return jax.random.uniform(jax.random.key(seed), shape, minval=-1.0, maxval=1.0)


def pixels_of(golden):
    return jnp.asarray(golden["frames"], jnp.float32)[None] / 127.5 - 1.0


def test_streamed_latents_equal_the_reference(golden, reference):
    cfg, params = reference
    pixels = pixels_of(golden)
    latents, state = jitted(cfg)["encode_first"](params["vae.encoder"], pixels[:, :5])
    np.testing.assert_allclose(latents, golden["encode_stream_0"], atol=GOLDEN_ATOL)
    for i, (start, stop) in enumerate([(5, 9), (9, 17), (17, 21)], 1):
        latents, state = jitted(cfg)["encode"](params["vae.encoder"], state, pixels[:, start:stop])
        np.testing.assert_allclose(latents, golden[f"encode_stream_{i}"], atol=GOLDEN_ATOL)


def test_offline_latents_equal_the_reference(golden, reference):
    cfg, params = reference
    encode = jax.jit(functools.partial(vae.encode_offline, cfg))
    latents = encode(params["vae.encoder"], pixels_of(golden))
    np.testing.assert_allclose(latents, golden["encode_full_normalised"], atol=GOLDEN_ATOL)


def test_streamed_frames_equal_the_reference(golden, reference):
    cfg, params = reference
    pixels, state = jitted(cfg)["decode_first"](params["vae.decoder"], golden["latents_0"])
    np.testing.assert_allclose(pixels, golden["decode_stream_0"], atol=GOLDEN_ATOL)
    for i in range(1, 5):
        pixels, state = jitted(cfg)["decode"](params["vae.decoder"], state, golden[f"latents_{i}"])
        np.testing.assert_allclose(pixels, golden[f"decode_stream_{i}"], atol=GOLDEN_ATOL)


def test_offline_frames_equal_the_reference(golden, reference):
    cfg, params = reference
    latents = jnp.concatenate([golden[f"latents_{i}"] for i in range(5)], axis=1)
    decode = jax.jit(functools.partial(vae.decode_offline, cfg))
    np.testing.assert_allclose(
        decode(params["vae.decoder"], latents), golden["decode_full"], atol=GOLDEN_ATOL
    )


def test_a_long_first_group_gives_the_latents_of_single_chunks(small):
    run, params, pixels = jitted(SMALL), small["vae.encoder"], random((1, 5, 16, 24, 3))
    whole, whole_state = run["encode_first"](params, pixels)
    first, state = run["encode_first"](params, pixels[:, :1])
    second, state = run["encode"](params, state, pixels[:, 1:])
    np.testing.assert_allclose(whole, jnp.concatenate([first, second], axis=1), atol=SAME_ATOL)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=SAME_ATOL), whole_state, state)


def test_a_long_first_group_gives_the_frames_of_single_latents(small):
    run, params, latents = jitted(SMALL), small["vae.decoder"], random((1, 4, 4, 6, 16))
    whole, whole_state = run["decode_first"](params, latents)
    pixels, state = run["decode_first"](params, latents[:, :1])
    pieces = [pixels]
    for f in range(1, 4):
        pixels, state = run["decode"](params, state, latents[:, f : f + 1])
        pieces.append(pixels)
    assert whole.shape == (1, 13, 16, 24, 3)
    np.testing.assert_allclose(whole, jnp.concatenate(pieces, axis=1), atol=SAME_ATOL)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=SAME_ATOL), whole_state, state)


def test_rows_of_a_batch_do_not_see_each_other(small):
    run, params, latents = jitted(SMALL), small["vae.decoder"], random((2, 1, 4, 6, 16))
    both, _ = run["decode_first"](params, latents)
    alone, _ = run["decode_first"](params, latents[1:])
    np.testing.assert_allclose(both[1:], alone, atol=SAME_ATOL)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_states_keep_their_shapes_and_dtypes(dtype):
    params = vae.abstract_params(SMALL, dtype)
    encoder, decoder = params["vae.encoder"], params["vae.decoder"]
    pixels, latents = random((2, 5, 16, 24, 3)), random((2, 2, 4, 6, 16))
    empty = vae.init_encode_state(SMALL, 2, 16, 24, dtype), vae.init_decode_state(SMALL, 2, 16, 24, dtype)

    def chunks(encoder, decoder, pixels, latents):
        z, encode_state = vae.encode_first(SMALL, encoder, pixels)
        x, decode_state = vae.decode_first(SMALL, decoder, latents)
        z_next, encode_next = vae.encode(SMALL, encoder, encode_state, pixels[:, 1:])
        x_next, decode_next = vae.decode(SMALL, decoder, decode_state, latents[:, 1:])
        return (encode_state, decode_state), (encode_next, decode_next), (z, x, z_next, x_next)

    before, after, outputs = jax.eval_shape(chunks, encoder, decoder, pixels, latents)

    def kind(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    assert kind(empty) == kind(before) == kind(after)
    assert {leaf.dtype for leaf in jax.tree.leaves((before, outputs))} == {jnp.dtype(dtype)}


def test_donated_states_give_the_same_stream(small):
    run = jitted(SMALL)
    encode = jax.jit(functools.partial(vae.encode, SMALL), donate_argnums=1)
    decode = jax.jit(functools.partial(vae.decode, SMALL), donate_argnums=1)
    pixels, latents = random((1, 13, 16, 24, 3)), random((1, 4, 4, 6, 16))
    _, kept = run["encode_first"](small["vae.encoder"], pixels[:, :1])
    donated = jax.tree.map(jnp.copy, kept)
    for t in (1, 5, 9):
        a, kept = run["encode"](small["vae.encoder"], kept, pixels[:, t : t + 4])
        gone = jax.tree.leaves(donated)
        b, donated = encode(small["vae.encoder"], donated, pixels[:, t : t + 4])
        np.testing.assert_allclose(a, b, atol=SAME_ATOL)
        assert all(leaf.is_deleted() for leaf in gone)
    _, kept = run["decode_first"](small["vae.decoder"], latents[:, :1])
    donated = jax.tree.map(jnp.copy, kept)
    for f in (1, 2, 3):
        a, kept = run["decode"](small["vae.decoder"], kept, latents[:, f : f + 1])
        b, donated = decode(small["vae.decoder"], donated, latents[:, f : f + 1])
        np.testing.assert_allclose(a, b, atol=SAME_ATOL)


def test_random_parameters_keep_the_scale_of_their_input(small):
    latents, _ = jitted(SMALL)["encode_first"](small["vae.encoder"], random((1, 5, 16, 24, 3)))
    frames, _ = jitted(SMALL)["decode_first"](small["vae.decoder"], random((1, 4, 4, 6, 16)))
    assert 0.05 < float(jnp.std(latents)) < 5.0
    assert 0.05 < float(jnp.std(frames)) < 1.0


def test_random_parameters_have_the_described_shapes(small):
    abstract = vae.abstract_params(SMALL)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), small) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract
    )


def test_denormalising_undoes_normalising():
    latents = random((1, 2, 3, 4, 16))
    np.testing.assert_allclose(vae.denormalise(vae.normalise(latents)), latents, atol=1e-6)
    mean = jnp.asarray(vae.LATENT_MEAN, jnp.float32)
    np.testing.assert_allclose(vae.normalise(mean), jnp.zeros(16), atol=1e-6)


@pytest.mark.parametrize("frames", [0, 2, 4])
def test_a_first_group_that_is_not_one_and_chunks_is_refused(small, frames):
    with pytest.raises(ValueError, match=r"1 \+ 4k"):
        vae.encode_first(SMALL, small["vae.encoder"], jnp.zeros((1, frames, 16, 24, 3)))


def test_a_size_that_is_no_multiple_of_eight_is_refused(small):
    with pytest.raises(ValueError, match="multiple of 8"):
        vae.encode_first(SMALL, small["vae.encoder"], jnp.zeros((1, 5, 20, 24, 3)))


def test_latents_that_are_not_wans_are_refused():
    with pytest.raises(ConfigError, match="z_dim"):
        vae.init_decode_state(dataclasses.replace(SMALL, z_dim=4), 1, 16, 16)


def leaf_targets(abstract):
    return {
        "/".join([item, *(key.key for key in path)])
        for item, tree in abstract.items()
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize("table", [wan_vae.rules, wan_vae.diffusers_rules])
@pytest.mark.parametrize("cfg", [FULL_SIZE, SMALL], ids=["full", "small"])
def test_both_layouts_name_every_parameter_once(table, cfg):
    targets = [rule.target for rule in table(cfg)]
    leaves = leaf_targets(vae.abstract_params(cfg))
    assert len(targets) == len(set(targets))
    assert leaves <= set(targets)
    assert all("/shortcut/" in target for target in set(targets) - leaves)


@pytest.mark.parametrize("table", [wan_vae.rules, wan_vae.diffusers_rules])
def test_the_sizes_are_inferred_from_either_layout(table):
    cfg = VAEConfig(dim=8, dim_mult=(1, 3, 2), num_res_blocks=3, temporal_downsample=(True, False))
    abstract = vae.abstract_params(cfg)
    shapes = {}
    for rule in table(cfg):
        item, *path = rule.target.split("/")
        leaf = abstract[item]
        for key in path:
            leaf = leaf.get(key) if leaf is not None else None
        if leaf is not None:  # back to torch's order: out, in first
            shape = (leaf.shape[-1], *leaf.shape[-2:-1], *leaf.shape[:-2])
            shapes[rule.source.replace("\\", "")] = shape
    assert wan_vae.infer_config(shapes) == cfg


def test_a_file_that_is_no_vae_is_refused_by_name():
    with pytest.raises(ConversionError, match=r"encoder\.conv1\.weight"):
        wan_vae.infer_config({"blocks.0.weight": (3, 3)})
