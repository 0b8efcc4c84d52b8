"""Parameters as the programs take them, from a checkpoint or random."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from svd2_jax.config import ModelConfig
from svd2_jax.models import dit, taehv, text_encoder, vae
from svd2_jax.models.dit import DiTParams
from svd2_jax.nn.random_params import random_params
from svd2_jax.types import Device

Params = dict[str, Any]
ItemReader = Callable[[str], Params]
"""Returns the parameters of a checkpoint item, placed on a device in the compute dtype."""

RANDOM_VOCAB = 300  # 256 bytes and a few special tokens


@register_dataclass
@dataclass(frozen=True)
class EngineParams:
    """What a stream's programs read: the DiT, the VAE's encoder, and the decoder in use."""

    dit: DiTParams
    encoder: Params
    decoder: Params


def decoder_item(decoder: Literal["wan", "taehv"]) -> str:
    """Returns the checkpoint item of a decoder."""
    return "taehv" if decoder == "taehv" else "vae.decoder"


def read_params(model: ModelConfig, read_item: ItemReader, decoder: Literal["wan", "taehv"]) -> EngineParams:
    """Reads all parameters of a stream item by item, the transformer last: it takes longest to read in vain."""
    small = {"encoder": read_item("vae.encoder"), "decoder": read_item(decoder_item(decoder))}
    return EngineParams(dit=dit.assemble(model.dit, read_item), **small)


def with_random_text(model: ModelConfig) -> ModelConfig:
    """Returns the model with a one-block text encoder over bytes: random weights know no language anyway."""
    text = dataclasses.replace(model.text, num_layers=1, vocab=RANDOM_VOCAB)
    return dataclasses.replace(model, text=text)


def abstract_items(model: ModelConfig) -> dict[str, Params]:
    """Returns the shapes (ShapeDtypeStruct) of every checkpoint item of a model."""
    return {
        **dit.abstract_params(model.dit),
        **vae.abstract_params(model.vae),
        **taehv.abstract_params(model.taehv),
        **text_encoder.abstract_params(model.text),
    }


def random_items(model: ModelConfig, seed: int, dtype: jnp.dtype, device: Device) -> ItemReader:
    """Returns a reader that draws an item's parameters instead of reading them."""
    shapes = abstract_items(model)

    def read_item(item: str) -> Params:
        drawn = random_params(shapes[item], (seed, zlib.crc32(item.encode())))
        return jax.device_put(jax.tree.map(lambda x: x.astype(dtype), drawn), device)

    return read_item
