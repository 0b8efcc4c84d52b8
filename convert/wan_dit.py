"""The table of the diffusion transformer: Wan2.1's own names and those of Diffusers' WanTransformer3DModel.

StreamDiffusionV2, Self-Forcing and CausVid checkpoints use Wan's names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from convert.rules import Rule, transpose
from svd2_jax.config import PRESETS, DiTConfig
from svd2_jax.errors import ConversionError

PUBLISHED_HEAD_DIM = 128  # both Wan2.1 sizes; the number of heads cannot be seen in the weights


def patch_kernel(x: np.ndarray) -> np.ndarray:
    """Flattens the patch convolution [E, C, pt, ph, pw] into a kernel [pt*ph*pw*C, E]."""
    return x.transpose(2, 3, 4, 1, 0).reshape(-1, x.shape[0])


def drop_lead(x: np.ndarray) -> np.ndarray:
    """Drops the leading axis of a modulation [1, K, E]."""
    return x.reshape(x.shape[1:])


# Linear layers: leaf, Wan's name, Diffusers' name.
_EMBED_LINEARS = (
    ("text_in", "text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_out", "text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_in", "time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_out", "time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_proj", "time_projection.1", "condition_embedder.time_proj"),
)
_ATTENTIONS = (("self_attn", "self_attn", "attn1"), ("cross_attn", "cross_attn", "attn2"))
_ATTENTION_LINEARS = (("q", "q", "to_q"), ("k", "k", "to_k"), ("v", "v", "to_v"), ("o", "o", "to_out.0"))
_MLP_LINEARS = (("mlp_up", "ffn.0", "ffn.net.0.proj"), ("mlp_down", "ffn.2", "ffn.net.2"))


def _linear(source: str, target: str) -> Iterator[Rule]:
    yield Rule(source + r"\.weight", target + "/kernel", transpose)
    yield Rule(source + r"\.bias", target + "/bias")


def _rules(layout: int) -> Iterator[Rule]:
    """Yields the table; `layout` is the column of the names above: 1 Wan, 2 Diffusers."""
    norm_cross, block_modulation, modulation, head = {
        1: ("norm3", "modulation", "head.modulation", "head.head"),
        2: ("norm2", "scale_shift_table", "scale_shift_table", "proj_out"),
    }[layout]
    yield Rule(r"patch_embedding\.weight", "dit.embed/patch/kernel", patch_kernel)
    yield Rule(r"patch_embedding\.bias", "dit.embed/patch/bias")
    for names in _EMBED_LINEARS:
        yield from _linear(re.escape(names[layout]), f"dit.embed/{names[0]}")

    source, target = r"blocks\.(?P<n>\d+)\.", "dit.block.{n:03d}/"
    yield Rule(source + block_modulation, target + "modulation", drop_lead)
    for attention in _ATTENTIONS:
        inner, leaf = source + re.escape(attention[layout] + "."), target + attention[0] + "/"
        for names in _ATTENTION_LINEARS:
            yield from _linear(inner + re.escape(names[layout]), leaf + names[0])
        for norm in ("norm_q", "norm_k"):
            yield Rule(inner + norm + r"\.weight", leaf + norm + "/scale")
    yield Rule(source + norm_cross + r"\.weight", target + "norm_cross/scale")
    yield Rule(source + norm_cross + r"\.bias", target + "norm_cross/bias")
    for names in _MLP_LINEARS:
        yield from _linear(source + re.escape(names[layout]), target + names[0])

    yield Rule(re.escape(modulation), "dit.head/modulation", drop_lead)
    yield from _linear(re.escape(head), "dit.head/proj")


RULES = tuple(_rules(1))
DIFFUSERS_RULES = tuple(_rules(2))
IGNORED = (r"freqs",)  # rotary table, a plain buffer in some training checkpoints; ours is computed

# Shapes that tell the sizes, in both layouts.
_MLP_UP = (r"blocks\.0\.ffn\.0\.weight", r"blocks\.0\.ffn\.net\.0\.proj\.weight")
_TEXT_IN = (r"text_embedding\.0\.weight", r"condition_embedder\.text_embedder\.linear_1\.weight")
_TIME_IN = (r"time_embedding\.0\.weight", r"condition_embedder\.time_embedder\.linear_1\.weight")
_HEAD = (r"head\.head\.weight", r"proj_out\.weight")
_PATCH = (r"patch_embedding\.weight",)


def infer_config(
    shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any] | None = None
) -> DiTConfig:
    """Returns the sizes that the source shapes show.

    Args:
      shapes: source name without prefixes -> shape, torch order, Wan's or Diffusers' names.
      settings: the model's config.json (either layout's keys) for what shapes do not show: heads, prompt
        length, epsilon. Without it the heads are 128 wide.

    Raises:
      ConversionError: a tensor that tells the sizes is missing or of wrong rank, or the heads are unknown.
    """
    settings = settings or {}

    def shape(patterns: tuple[str, ...], rank: int) -> tuple[int, ...]:
        name = next((n for n in shapes if any(re.fullmatch(p, n) for p in patterns)), None)
        if name is None or len(shapes[name]) != rank:
            found = "missing" if name is None else f"of shape {shapes[name]}"
            raise ConversionError(
                f"cannot tell the model's size: {patterns[0].replace(chr(92), '')} is {found}"
            )
        return shapes[name]

    dim, in_channels, *patch = shape(_PATCH, 5)
    _check_width(dim, settings)
    blocks = {int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", n) for n in shapes) if m}
    known = {key: settings[key] for key in ("text_len", "eps") if settings.get(key) is not None}
    return DiTConfig(
        dim=dim,
        ffn_dim=shape(_MLP_UP, 2)[0],
        num_heads=_num_heads(dim, settings),
        # A missing last block shows only in config.json; a stray blocks.99999 must not cost as many layers.
        num_layers=int(settings.get("num_layers") or min(max(blocks) + 1, 2 * len(blocks))),
        freq_dim=shape(_TIME_IN, 2)[1],
        text_dim=shape(_TEXT_IN, 2)[1],
        in_channels=in_channels,
        out_channels=shape(_HEAD, 2)[0] // math.prod(patch),
        patch=(patch[0], patch[1], patch[2]),
        **known,
    )


def _check_width(dim: int, settings: Mapping[str, Any]) -> None:
    """Raises ConversionError if config.json is of another size than the weights."""
    heads, head_dim = settings.get("num_attention_heads"), settings.get("attention_head_dim")
    said = settings.get("dim", heads * head_dim if heads and head_dim else dim)
    if said != dim:
        known = next((name for name, p in PRESETS.items() if p.dit.dim == dim), "custom")
        raise ConversionError(
            f"its width is {dim}, but config.json of the Wan2.1 folder says {said}; is this a {known} "
            "checkpoint? use the Wan2.1 folder of the same size"
        )


def _num_heads(dim: int, settings: Mapping[str, Any]) -> int:
    heads = settings.get("num_heads", settings.get("num_attention_heads"))
    if heads is not None:
        return int(heads)
    if dim % PUBLISHED_HEAD_DIM:
        raise ConversionError(
            f"cannot tell the number of heads of a model of width {dim}; give the folder with its config.json"
        )
    return dim // PUBLISHED_HEAD_DIM
