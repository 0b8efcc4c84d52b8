"""Wan2.1's VAE: the names in `Wan2.1_VAE.pth` and in a diffusers folder, and the leaves they become.

Both layouts number the layers of a level through, so where a tensor goes depends on the number of residual
blocks per level: the tables are made by functions of the config.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from convert.rules import Rule
from svd2_jax.config import VAEConfig
from svd2_jax.errors import ConfigError, ConversionError


def conv_kernel(x: np.ndarray) -> np.ndarray:
    """Turns a convolution's weight [out, in, (time,) height, width] into [(time,) height, width, in, out]."""
    return x.transpose(*range(2, x.ndim), 1, 0)


def pointwise_kernel(x: np.ndarray) -> np.ndarray:
    """Turns the weight [out, in, 1, ...] of a convolution that sees one pixel into a kernel [in, out]."""
    return x.reshape(x.shape[:2]).T


def vector(x: np.ndarray) -> np.ndarray:
    """Drops the broadcast axes of a norm's scale [C, 1, ...]."""
    return x.reshape(-1)


def rules(cfg: VAEConfig) -> tuple[Rule, ...]:
    """Returns the table for `Wan2.1_VAE.pth`."""
    table = [
        *_conv("encoder.conv1", "vae.encoder/conv_in"),
        *_wan_middle("encoder.middle", "vae.encoder"),
        _norm("encoder.head.0", "vae.encoder/norm_out"),
        *_conv("encoder.head.2", "vae.encoder/conv_out"),
        *_pointwise("conv1", "vae.encoder/quant"),
        *_pointwise("conv2", "vae.decoder/quant"),
        *_conv("decoder.conv1", "vae.decoder/conv_in"),
        *_wan_middle("decoder.middle", "vae.decoder"),
        _norm("decoder.head.0", "vae.decoder/norm_out"),
        *_conv("decoder.head.2", "vae.decoder/conv_out"),
    ]
    for source, target, temporal in _numbered(cfg, "encoder.downsamples", "decoder.upsamples"):
        table += _wan_res(source, target) if temporal is None else _resample(source, target, temporal)
    return tuple(table)


def diffusers_rules(cfg: VAEConfig) -> tuple[Rule, ...]:
    """Returns the table for the `vae` folder of a diffusers pipeline (AutoencoderKLWan)."""
    table = [
        *_pointwise("quant_conv", "vae.encoder/quant"),
        *_pointwise("post_quant_conv", "vae.decoder/quant"),
    ]
    for part in ("encoder", "decoder"):
        source, target = part, f"vae.{part}"
        table += [
            *_conv(f"{source}.conv_in", f"{target}/conv_in"),
            *_diffusers_res(f"{source}.mid_block.resnets.0", f"{target}/mid_res_0"),
            *_attention(f"{source}.mid_block.attentions.0", f"{target}/mid_attn"),
            *_diffusers_res(f"{source}.mid_block.resnets.1", f"{target}/mid_res_1"),
            _norm(f"{source}.norm_out", f"{target}/norm_out"),
            *_conv(f"{source}.conv_out", f"{target}/conv_out"),
        ]
    for source, target, temporal in _numbered(cfg, "encoder.down_blocks", None):
        table += _diffusers_res(source, target) if temporal is None else _resample(source, target, temporal)
    for level in range(len(cfg.dim_mult)):
        source, target = f"decoder.up_blocks.{level}", "vae.decoder"
        for block in range(cfg.num_res_blocks + 1):
            table += _diffusers_res(f"{source}.resnets.{block}", f"{target}/level_{level}_res_{block}")
        if level < len(cfg.dim_mult) - 1:
            temporal = cfg.temporal_downsample[::-1][level]
            table += _resample(f"{source}.upsamplers.0", f"{target}/up_{level}", temporal)
    return tuple(table)


def infer_config(shapes: Mapping[str, Sequence[int]]) -> VAEConfig:
    """Returns the sizes that the shapes of either layout's tensors imply.

    Raises:
      ConversionError: they are not those of a Wan2.1 VAE.
    """
    diffusers = "encoder.conv_in.weight" in shapes
    first = "encoder.conv_in.weight" if diffusers else "encoder.conv1.weight"
    latent = "post_quant_conv.weight" if diffusers else "conv2.weight"
    layers = "encoder.down_blocks" if diffusers else "encoder.downsamples"
    conv = "conv1" if diffusers else "residual.2"
    missing = [name for name in (first, latent, f"{layers}.0.{conv}.weight") if name not in shapes]
    if missing:
        raise ConversionError(f"not a Wan2.1 VAE: {', '.join(missing)} missing among {len(shapes)} tensors")
    dim = int(shapes[first][0])
    widths: list[int] = []
    blocks: list[int] = [0]
    temporal: list[bool] = []
    number = 0
    while True:
        if (width := shapes.get(f"{layers}.{number}.{conv}.weight")) is not None:
            blocks[-1] += 1
            widths[len(blocks) - 1 :] = [int(width[0])]
        elif f"{layers}.{number}.resample.1.weight" in shapes:
            temporal.append(f"{layers}.{number}.time_conv.weight" in shapes)
            blocks.append(0)
        else:
            break
        number += 1
    if len(set(blocks)) != 1 or len(widths) != len(blocks) or any(width % dim for width in widths):
        raise ConversionError(
            f"not a Wan2.1 VAE: {layers} has {blocks} residual blocks of widths {widths}; expected "
            f"the same number at every level and multiples of {dim}"
        )
    try:
        return VAEConfig(
            dim=dim,
            z_dim=int(shapes[latent][0]),
            dim_mult=tuple(width // dim for width in widths),
            num_res_blocks=blocks[0],
            temporal_downsample=tuple(temporal),
        )
    except ConfigError as error:
        raise ConversionError(f"not a Wan2.1 VAE: {error}") from error


def _numbered(cfg: VAEConfig, down: str, up: str | None) -> list[tuple[str, str, bool | None]]:
    """Returns (source, target, temporal) of layers numbered through; temporal is None for residual blocks."""
    found: list[tuple[str, str, bool | None]] = []
    parts = [(down, "vae.encoder", "down", cfg.num_res_blocks, cfg.temporal_downsample)]
    if up is not None:
        parts += [(up, "vae.decoder", "up", cfg.num_res_blocks + 1, cfg.temporal_downsample[::-1])]
    for source, target, resample, blocks, temporal in parts:
        number = 0
        for level in range(len(cfg.dim_mult)):
            for block in range(blocks):
                found.append((f"{source}.{number}", f"{target}/level_{level}_res_{block}", None))
                number += 1
            if level < len(cfg.dim_mult) - 1:
                found.append((f"{source}.{number}", f"{target}/{resample}_{level}", temporal[level]))
                number += 1
    return found


def _conv(source: str, target: str) -> list[Rule]:
    return [
        Rule(re.escape(f"{source}.weight"), f"{target}/kernel", conv_kernel),
        Rule(re.escape(f"{source}.bias"), f"{target}/bias"),
    ]


def _pointwise(source: str, target: str) -> list[Rule]:
    return [
        Rule(re.escape(f"{source}.weight"), f"{target}/kernel", pointwise_kernel),
        Rule(re.escape(f"{source}.bias"), f"{target}/bias"),
    ]


def _norm(source: str, target: str) -> Rule:
    return Rule(re.escape(f"{source}.gamma"), f"{target}/scale", vector)


def _attention(source: str, target: str) -> list[Rule]:
    return [
        _norm(f"{source}.norm", f"{target}/norm"),
        *_pointwise(f"{source}.to_qkv", f"{target}/qkv"),
        *_pointwise(f"{source}.proj", f"{target}/proj"),
    ]


def _wan_middle(source: str, target: str) -> list[Rule]:
    return [
        *_wan_res(f"{source}.0", f"{target}/mid_res_0"),
        *_attention(f"{source}.1", f"{target}/mid_attn"),
        *_wan_res(f"{source}.2", f"{target}/mid_res_1"),
    ]


def _wan_res(source: str, target: str) -> list[Rule]:
    return [
        _norm(f"{source}.residual.0", f"{target}/norm_0"),
        *_conv(f"{source}.residual.2", f"{target}/conv_0"),
        _norm(f"{source}.residual.3", f"{target}/norm_1"),
        *_conv(f"{source}.residual.6", f"{target}/conv_1"),
        *_pointwise(f"{source}.shortcut", f"{target}/shortcut"),  # only where the width changes
    ]


def _diffusers_res(source: str, target: str) -> list[Rule]:
    return [
        _norm(f"{source}.norm1", f"{target}/norm_0"),
        *_conv(f"{source}.conv1", f"{target}/conv_0"),
        _norm(f"{source}.norm2", f"{target}/norm_1"),
        *_conv(f"{source}.conv2", f"{target}/conv_1"),
        *_pointwise(f"{source}.conv_shortcut", f"{target}/shortcut"),  # only where the width changes
    ]


def _resample(source: str, target: str, temporal: bool) -> list[Rule]:
    return [
        *_conv(f"{source}.resample.1", f"{target}/conv"),
        *(_conv(f"{source}.time_conv", f"{target}/time_conv") if temporal else []),
    ]
