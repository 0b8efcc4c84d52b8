"""The parts of a model as the converter sees them: their tables, sizes and the leaves they must have."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from convert import taehv, umt5, wan_dit, wan_vae
from convert.rules import Leaf, Table, audit, best_table, strip_prefixes
from convert.source import Source, Tensor
from svd2_jax.config import PRESETS, ModelConfig
from svd2_jax.errors import ConfigError, ConversionError
from svd2_jax.models import dit, text_encoder, vae
from svd2_jax.models import taehv as taehv_model

_UNLIKE = (ConversionError, ConfigError, IndexError, ZeroDivisionError)  # last two: odd shapes


@dataclass(frozen=True)
class Component:
    """One network.

    Attributes:
      title: how messages call it.
      option: of the command line, that gives its weights.
      infer_config: (source shapes, settings of its config.json) -> sizes.
      tables: sizes -> tables of the layouts that are read.
      expected: sizes -> item -> nested dict of leaves with a shape; traced once, which takes a second.
    """

    title: str
    option: str
    infer_config: Callable[[Mapping[str, tuple[int, ...]], Mapping[str, Any]], Any]
    tables: Callable[[Any], tuple[Table, ...]]
    expected: Callable[[Any], Mapping[str, Any]]


# By their field in ModelConfig, in the order in which they are written.
COMPONENTS: Mapping[str, Component] = {
    "dit": Component(
        "Wan2.1 text-to-video transformer",
        "--generator",
        wan_dit.infer_config,
        lambda cfg: tuple(Table(r, wan_dit.IGNORED) for r in (wan_dit.RULES, wan_dit.DIFFUSERS_RULES)),
        functools.cache(dit.abstract_params),
    ),
    "vae": Component(
        "Wan2.1 VAE",
        "--vae",
        lambda shapes, _: wan_vae.infer_config(shapes),
        lambda cfg: (Table(wan_vae.rules(cfg)), Table(wan_vae.diffusers_rules(cfg))),
        functools.cache(vae.abstract_params),
    ),
    "text": Component(
        "UMT5 encoder",
        "--text-encoder",
        lambda shapes, _: umt5.infer_config(shapes),
        lambda cfg: (Table(umt5.RULES), Table(umt5.HUGGING_FACE_RULES, umt5.HUGGING_FACE_IGNORED)),
        functools.cache(text_encoder.abstract_params),
    ),
    "taehv": Component(
        "TAEHV decoder for Wan2.1",
        "--taehv",
        lambda shapes, _: taehv.infer_config(shapes),
        lambda cfg: (Table(taehv.rules(cfg), taehv.IGNORED),),
        functools.cache(taehv_model.abstract_params),
    ),
}


@dataclass(frozen=True)
class FoundComponent:
    """A component found in a source: its sizes, the leaves of its items, and what is wrong with it."""

    config: Any
    items: Mapping[str, list[Leaf[Tensor]]]
    problems: list[str]


def recognise(name: str, source: Source, settings: Mapping[str, Any]) -> FoundComponent:
    """Returns what a source holds of a component, by its name in COMPONENTS.

    Raises ConversionError if it is not that component at all; lesser problems are listed in the result.
    """
    component = COMPONENTS[name]
    tensors = [(strip_prefixes(stored), tensor) for stored, tensor in source.tensors]
    names = [stripped for stripped, _ in tensors]
    shapes = {stripped: tensor.shape for stripped, tensor in tensors}
    try:
        config = component.infer_config(shapes, settings)
    except _UNLIKE as e:
        sample = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        other = next((c for n, c in COMPONENTS.items() if n != name and _infers(c, shapes)), None)
        hint = f"; it is a {other.title}: give it with {other.option}" if other else ""
        raise ConversionError(
            f"{source.label} cannot be converted as a {component.title}: {e} "
            f"(it holds {len(names)} tensors: {sample}){hint}"
        ) from None
    table = best_table(component.tables(config), names)
    items, problems = audit(source.label, table, tensors, component.expected(config))
    return FoundComponent(config, items, problems)


def is_like(name: str, source: Source) -> bool:
    """Whether a source looks like a component, by its name in COMPONENTS."""
    return _infers(COMPONENTS[name], {strip_prefixes(stored): t.shape for stored, t in source.tensors})


def _infers(component: Component, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    try:
        component.infer_config(shapes, {"num_heads": 1})  # the shapes do not show the number
    except Exception:  # what the guess is made for may be anything
        return False
    return True


def model_config(configs: Mapping[str, Any]) -> ModelConfig:
    """Returns the whole model's sizes from those of the parts that are there, by field of ModelConfig.

    Parts that are absent get the sizes of the preset that the others match, else the published ones at the
    widths the others need. Raises ConversionError if the parts do not fit together.
    """
    for known in PRESETS.values():
        if all(getattr(known, name) == cfg for name, cfg in configs.items()):
            return known
    base = next(iter(PRESETS.values()))
    has = {"dit": base.dit, "vae": base.vae, "text": base.text, "taehv": base.taehv, **configs}
    text_dim = has["dit"].text_dim if "dit" in configs else has["text"].dim
    latent = has["dit"].in_channels if "dit" in configs else has["vae"].z_dim
    absent = {
        "dit": dataclasses.replace(has["dit"], text_dim=text_dim, in_channels=latent, out_channels=latent),
        "vae": dataclasses.replace(has["vae"], z_dim=latent),
        "text": dataclasses.replace(has["text"], dim=text_dim),
        "taehv": dataclasses.replace(has["taehv"], z_dim=latent),
    }
    try:
        model = ModelConfig("custom", **{**absent, **configs})
    except ConfigError as e:
        raise ConversionError(f"the parts are not of one model: {e}") from None
    if model.taehv.z_dim != latent:
        raise ConversionError(
            f"the parts are not of one model: TAEHV decodes {model.taehv.z_dim} channels, "
            f"the latents have {latent}"
        )
    return model
