"""Prompts to text embeddings, wherever the text encoder is told to live."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import jax.numpy as jnp
import numpy as np

from svd2_jax.config import TextConfig
from svd2_jax.engine.params import Params
from svd2_jax.engine.programs import run_where_it_lies
from svd2_jax.engine.tokenizer import Tokenizer
from svd2_jax.models import text_encoder

TextPlacement = Literal["host", "device", "disk"]
REMEMBERED_PROMPTS = 32  # 8 MB each at UMT5-XXL's size


class Prompts(Protocol):
    """Turns prompts into text embeddings."""

    def encode(self, prompt: str) -> np.ndarray:
        """Returns the embedding, float32 [1, P, dim], of a prompt."""
        ...


class PromptEncoder:
    """Tokenizer and text encoder.

    The encoder's parameters are read on the first prompt. They stay in host memory ("host"), on the accelerator
    ("device"), or nowhere: "disk" reads them block by block for every prompt, for machines with little memory.
    The last embeddings are remembered: encode a prompt ahead of time, and a stream changes to it without a pause.
    """

    def __init__(self, cfg: TextConfig, tokenizer: Tokenizer, read_item: Callable[[str], Params], keep: bool):
        self._cfg, self._tokenizer, self._read_item, self._keep = cfg, tokenizer, read_item, keep
        self._kept: dict[str, Params] = {}
        self._remembered: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()  # live streams change their prompts from several threads

    def encode(self, prompt: str) -> np.ndarray:
        """Returns the embedding, float32 [1, P, dim], of a prompt; rows of padding are zero."""
        if (embedding := self._remembered.get(prompt)) is not None:
            return embedding
        with self._lock:
            if prompt not in self._remembered:
                embedding = self._encode(prompt)
                if len(self._remembered) >= REMEMBERED_PROMPTS:
                    del self._remembered[next(iter(self._remembered))]  # the oldest
                self._remembered[prompt] = embedding
            return self._remembered[prompt]

    def _encode(self, prompt: str) -> np.ndarray:
        ids, mask = self.tokenize([prompt])
        embedding = text_encoder.encode(self._cfg, self._item, ids, mask, run_where_it_lies)
        return np.asarray(embedding.astype(jnp.float32))

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
