"""The prompt encoder reads what it must and remembers what it said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svd2_jax.config import preset
from svd2_jax.engine.params import random_items, with_random_text
from svd2_jax.engine.prompt import REMEMBERED_PROMPTS, PromptEncoder
from svd2_jax.engine.tokenizer import Tokenizer

MODEL = with_random_text(preset("golden"))


@pytest.fixture
def make_encoder():
    def make(keep: bool) -> tuple[PromptEncoder, list[str]]:
        read, items = [], random_items(MODEL, 0, jnp.dtype(jnp.float32))

        def read_item(item):
            read.append(item)
            return items(item, jax.devices()[0])

        tokenizer = Tokenizer.bytes_fallback(MODEL.dit.text_len, MODEL.text.vocab)
        return PromptEncoder(MODEL.text, tokenizer, read_item, keep), read

    return make


@pytest.mark.parametrize("keep", [True, False])
def test_parameters_are_read_once_or_for_every_new_prompt(make_encoder, keep):
    encoder, read = make_encoder(keep)
    encoder.encode("a dog")
    once = len(read)
    encoder.encode("a cat")
    assert len(read) == (once if keep else 2 * once)


def test_a_prompt_that_was_encoded_before_costs_nothing(make_encoder):
    encoder, read = make_encoder(keep=False)
    first = encoder.encode("a dog")
    once = len(read)
    np.testing.assert_array_equal(encoder.encode("a dog"), first)
    assert len(read) == once


def test_only_the_last_prompts_are_remembered(make_encoder):
    encoder, read = make_encoder(keep=False)
    for i in range(REMEMBERED_PROMPTS + 1):
        encoder.encode(f"prompt {i}")
    before = len(read)
    encoder.encode("prompt 1")
    assert len(read) == before
    encoder.encode("prompt 0")
    assert len(read) > before
