"""Parameters as the programs take them, from a checkpoint or random."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from svd2_jax.config import ModelConfig
from svd2_jax.models import dit, taehv, text_encoder, vae
from svd2_jax.models.dit import DiTParams

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
    """Reads all parameters of a stream item by item."""
    return EngineParams(
        dit.assemble(model.dit, read_item), read_item("vae.encoder"), read_item(decoder_item(decoder))
    )


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


def random_items(model: ModelConfig, seed: int, dtype: jnp.dtype, device: jax.Device) -> ItemReader:
    """Returns a reader that draws an item's parameters instead of reading them.

    Drawn on the host: compiling the initialisers of a whole VAE takes most of a minute.
    """
    shapes = abstract_items(model)

    def read_item(item: str) -> Params:
        rng = np.random.default_rng((seed, zlib.crc32(item.encode())))

        def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
            return jax.device_put(_draw(path[-1].key, leaf.shape, rng).astype(dtype), device)

        return jax.tree_util.tree_map_with_path(draw, shapes[item])

    return read_item


def _draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Draws a leaf so that activations keep their size: kernels by their fan-in, norms at one, biases at zero."""
    if name in ("scale", "gamma"):
        return np.ones(shape, np.float32)
    if name == "bias":
        return np.zeros(shape, np.float32)
    spread = np.float32({"kernel": np.prod(shape[:-1]), "modulation": shape[-1]}.get(name, 1.0) ** -0.5)
    return rng.standard_normal(shape, np.float32) * spread
