import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import GOLDENS, WAN_FOLDER, convert, shapes_of, tensors_of

from convert import umt5
from svd2_jax.config import TextConfig
from svd2_jax.errors import ConversionError
from svd2_jax.models import text_encoder
from svd2_jax.nn.random_params import random_params

GOLDEN_ATOL = 5e-5  # from the goldens' README: float32, another order of summation
SAME_ATOL = 2e-5  # the same sums in programs of other shapes

SMALL = TextConfig(vocab=20, dim=16, dim_attn=24, dim_ffn=32, num_heads=2, num_layers=2)


@pytest.fixture(scope="module")
def golden():
    return {k: jnp.asarray(v) for k, v in np.load(GOLDENS / "umt5.npz").items()}


@pytest.fixture(scope="module")
def reference():
    tensors = tensors_of(WAN_FOLDER / "models_t5_umt5-xxl-enc-bf16.pth")
    cfg = umt5.infer_config(shapes_of(tensors))
    return cfg, convert(umt5.RULES, tensors, text_encoder.abstract_params(cfg))


@pytest.fixture(scope="module")
def small():
    return random_params(text_encoder.abstract_params(SMALL), seed=0)


def ids_and_mask(lengths, tokens):
    ids = jax.random.randint(jax.random.key(1), (len(lengths), tokens), 1, SMALL.vocab, jnp.int32)
    mask = (np.arange(tokens)[None, :] < np.asarray(lengths)[:, None]).astype(np.int32)
    return ids * mask, jnp.asarray(mask)


def test_embeddings_equal_the_reference(golden, reference):
    cfg, params = reference
    embeds = text_encoder.encode(cfg, params.__getitem__, golden["ids"], golden["mask"])
    np.testing.assert_allclose(embeds, golden["embeds"], atol=GOLDEN_ATOL)


def test_the_sizes_are_those_of_the_reference(reference):
    cfg, _ = reference
    assert cfg == TextConfig(vocab=300, dim=48, dim_attn=64, dim_ffn=96, num_heads=4, num_layers=3)


def test_padding_is_zero_and_more_of_it_changes_nothing(small):
    ids, mask = ids_and_mask([3, 5], 8)
    embeds = text_encoder.encode(SMALL, small.__getitem__, ids, mask)
    assert not np.any(np.asarray(embeds)[np.asarray(mask) == 0])
    short = text_encoder.encode(SMALL, small.__getitem__, ids[:, :5], mask[:, :5])
    np.testing.assert_allclose(embeds[:, :5], short, atol=SAME_ATOL)


def test_what_the_padding_holds_changes_nothing(small):
    ids, mask = ids_and_mask([3, 5], 8)
    embeds = text_encoder.encode(SMALL, small.__getitem__, ids, mask)
    other = text_encoder.encode(SMALL, small.__getitem__, jnp.where(mask > 0, ids, 7), mask)
    np.testing.assert_array_equal(embeds, other)


def test_every_item_is_read_once_and_in_order(small):
    ids, mask = ids_and_mask([6], 6)
    read = []

    def read_item(item):
        read.append(item)
        return small[item]

    text_encoder.encode(SMALL, read_item, ids, mask)
    assert read == list(text_encoder.abstract_params(SMALL))


def test_distances_share_buckets_as_in_t5():
    buckets = text_encoder.relative_buckets(tokens=300, num_buckets=32, max_distance=128)
    assert buckets[0, :10].tolist() == [0, 17, 18, 19, 20, 21, 22, 23, 24, 24]  # keys behind the query
    assert buckets[:10, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]  # keys before it
    assert buckets[[11, 12, 16, 23, 32, 64, 90, 91, 128, 299], 0].tolist() == [
        8,
        9,
        10,
        11,
        12,
        14,
        14,
        15,
        15,
        15,
    ]


def test_half_precision_parameters_give_half_precision_embeddings_close_to_the_full_ones(golden, reference):
    cfg, params = reference
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    embeds = text_encoder.encode(cfg, half.__getitem__, golden["ids"], golden["mask"])
    assert embeds.dtype == jnp.bfloat16
    error = jnp.abs(embeds.astype(jnp.float32) - golden["embeds"])
    assert float(jnp.mean(error)) < 0.02  # bfloat16 keeps 8 bits of values around 1


def test_random_parameters_give_bounded_embeddings(small):
    ids, mask = ids_and_mask([8], 8)
    embeds = text_encoder.encode(SMALL, small.__getitem__, ids, mask)
    assert 0.5 < float(jnp.std(embeds)) < 2.0


def source_shapes(rules, abstract):
    """{name: shape} of the file that the table describes."""
    shapes = {}
    for rule in rules:
        for layer in range(SMALL.num_layers):
            for part in "qkvo" if "{part}" in rule.target else "-":
                item, *path = rule.target.format(n=layer, part=part).split("/")
                leaf = functools.reduce(lambda node, key: node[key], path, abstract[item])
                name = rule.source.replace(r"(?P<n>\d+)", str(layer)).replace("(?P<part>[qkvo])", part)
                shape = leaf.shape[::-1] if rule.transform is umt5.transpose else leaf.shape
                shapes[name.replace("\\", "")] = shape
    return shapes


@pytest.mark.parametrize("rules", [umt5.RULES, umt5.HUGGING_FACE_RULES], ids=["wan", "hugging face"])
def test_either_layout_fills_every_parameter_and_tells_the_sizes(rules):
    abstract = text_encoder.abstract_params(SMALL)
    shapes = source_shapes(rules, abstract)
    assert len(shapes) == len(jax.tree.leaves(abstract))
    assert umt5.infer_config(shapes) == SMALL
    convert(rules, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, abstract)


def test_a_file_that_is_no_text_encoder_is_refused_by_name():
    with pytest.raises(ConversionError, match=r"token_embedding\.weight"):
        umt5.infer_config({"conv1.weight": (3, 3)})
