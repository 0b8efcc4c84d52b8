"""Prompts to text embeddings, wherever the text encoder is told to live."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from svd2_jax.config import TextConfig
from svd2_jax.engine.params import ItemReader, Params
from svd2_jax.engine.tokenizer import Tokenizer
from svd2_jax.models import text_encoder

TextPlacement = Literal["host", "device", "disk"]


class Prompts(Protocol):
    """Turns prompts into text embeddings."""

    def encode(self, prompt: str) -> np.ndarray:
        """Returns the embedding, float32 [1, P, dim], of a prompt."""
        ...


class PromptEncoder:
    """Tokenizer and text encoder.

    The encoder's parameters are read on the first prompt. They stay in host memory ("host"), on the accelerator
    ("device"), or nowhere: "disk" reads them block by block for every prompt, for machines with little memory.
    """

    def __init__(self, cfg: TextConfig, tokenizer: Tokenizer, read_item: ItemReader, keep: bool):
        self._cfg, self._tokenizer, self._read_item, self._keep = cfg, tokenizer, read_item, keep
        self._kept: dict[str, Params] = {}
        self._embed = jax.jit(text_encoder.embed)
        self._block = jax.jit(functools.partial(text_encoder.run_block, cfg))
        self._head = jax.jit(text_encoder.head)

    def encode(self, prompt: str) -> np.ndarray:
        """Returns the embedding, float32 [1, P, dim], of a prompt; rows of padding are zero."""
        ids, mask = self.tokenize([prompt])
        x = self._embed(self._item(text_encoder.EMBED_ITEM), ids)
        for i in range(self._cfg.num_layers):
            x = self._block(self._item(text_encoder.block_item(i)), x, mask)
        x = self._head(self._item(text_encoder.HEAD_ITEM), x, mask)
        return np.asarray(x.astype(jnp.float32))

    def tokenize(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns token ids and mask, int32 [B, P], of prompts."""
        return self._tokenizer(prompts)

    def _item(self, item: str) -> Params:
        if item in self._kept:
            return self._kept[item]
        params = self._read_item(item)
        if self._keep:
            self._kept[item] = params
        return params
