"""TAEHV for Wan2.1 (`taew2_1.pth`): the decoder's names and their leaves; the encoder is not used."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from convert.rules import Rule
from convert.wan_vae import conv_kernel, pointwise_kernel
from svd2_jax.config import TAEHVConfig
from svd2_jax.errors import ConversionError

IGNORED: tuple[str, ...] = (r"encoder\..*",)

# Places in the file's `decoder` list: the first memory block of each stage. The next two blocks, the
# up-sampling, the layer that adds frames and the convolution into the next stage follow.
STAGE_STARTS = (3, 9, 15)
GROW, OUT = 4, 5  # after the first memory block
CONV_IN, CONV_OUT = 1, 22
TIME_GROWTH = (1, 2, 2)  # frames for one after each stage


def rules(cfg: TAEHVConfig) -> tuple[Rule, ...]:
    """Returns the table for TAEHV's decoder."""
    table = [*_conv(f"decoder.{CONV_IN}", "conv_in"), *_conv(f"decoder.{CONV_OUT}", "conv_out")]
    for stage, start in enumerate(STAGE_STARTS):
        for block in range(3):
            for conv in range(3):
                table += _conv(
                    f"decoder.{start + block}.conv.{2 * conv}", f"stage_{stage}_mem_{block}/conv_{conv}"
                )
        table += [
            Rule(
                re.escape(f"decoder.{start + GROW}.conv.weight"),
                f"taehv/stage_{stage}_grow/kernel",
                _last_rows(TIME_GROWTH[stage] * cfg.channels[stage]),
            ),
            Rule(re.escape(f"decoder.{start + OUT}.weight"), f"taehv/stage_{stage}_out/kernel", conv_kernel),
        ]
    return tuple(table)


def infer_config(shapes: Mapping[str, Sequence[int]]) -> TAEHVConfig:
    """Returns the sizes that the shapes of the file's tensors imply.

    Raises:
      ConversionError: they are not those of a TAEHV.
    """
    names = [f"decoder.{CONV_IN}.weight", *(f"decoder.{start + OUT}.weight" for start in STAGE_STARTS)]
    missing = [name for name in names if name not in shapes]
    if missing:
        raise ConversionError(
            f"not a TAEHV for Wan2.1: {', '.join(missing)} missing among {len(shapes)} tensors"
        )
    first, second, third, fourth = (int(shapes[name][0]) for name in names)
    return TAEHVConfig(z_dim=int(shapes[names[0]][1]), channels=(first, second, third, fourth))


def _conv(source: str, target: str) -> list[Rule]:
    return [
        Rule(re.escape(f"{source}.weight"), f"taehv/{target}/kernel", conv_kernel),
        Rule(re.escape(f"{source}.bias"), f"taehv/{target}/bias"),
    ]


def _last_rows(rows: int) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the transform of a layer that adds frames; a file may hold more frames than we make of one."""
    return lambda x: pointwise_kernel(x[-rows:])
