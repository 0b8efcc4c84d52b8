"""How an engine runs its streams on its devices."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from svd2_jax.config import (
    check_flag,
    check_several,
    check_whole,
)
from svd2_jax.errors import ConfigError
from svd2_jax.nn.attention import AttentionImplementation


@dataclass(frozen=True)
class PipelineOptions:
    """How streams run on their devices.

    Attributes:
      attention: see `attend`.
      split: blocks on each stage; None weighs encoder and decoder against them, until `measure_split` finds another.
      batch_sizes: how many streams may share a tick, ascending, beginning with 1.
      share_vae: whether all stages' devices share encoding and decoding, each with a part of the picture's rows; else
        the first one encodes and the last one decodes. Stages then cannot be measured: the devices wait for one
        another in every chunk, so that none of them could be told to be slow.
    """

    attention: AttentionImplementation = "auto"
    split: tuple[int, ...] | None = None
    batch_sizes: Sequence[int] = (1,)
    share_vae: bool = False

    def __post_init__(self):
        check_flag("share_vae", self.share_vae)
        check_several("batch_sizes", self.batch_sizes, "numbers, as in (1, 2, 4)")
        sizes = tuple(self.batch_sizes)
        for size in sizes:
            check_whole("a batch size", size, 1)
        object.__setattr__(self, "batch_sizes", sizes)
        if not sizes or sizes[0] != 1 or any(a >= b for a, b in itertools.pairwise(sizes)):
            raise ConfigError(f"batch_sizes must ascend from 1, as in (1, 2, 4), got {sizes}")


DEFAULT_OPTIONS = PipelineOptions()


def checked_split(split: tuple[int, ...] | None, layers: int, stages: int) -> None:
    """Raises ConfigError for a split that does not give so many stages all layers, at least one each."""
    if split is not None and (len(split) != stages or sum(split) != layers or min(split) < 1):
        noun = "stage" if stages == 1 else "stages"
        raise ConfigError(
            f"the split has to give {stages} {noun} all {layers} blocks, at least one each; got {split}"
        )
