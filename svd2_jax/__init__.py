"""StreamDiffusionV2 in JAX: live video re-drawn to a text prompt.

```
engine = svd2_jax.load("tiny")  # or the folder of a converted checkpoint
with engine.open(svd2_jax.SessionSpec("a watercolour painting", engine.stream_config())) as session:
    for chunk in session.push(frames):  # uint8 [T, H, W, 3]
        show(chunk.frames())
```

Importing the package loads no JAX; `load` and `random_engine` do.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from svd2_jax import shipped
from svd2_jax.api import SessionSpec
from svd2_jax.config import StreamConfig
from svd2_jax.errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    EngineError,
    MediaError,
    SessionError,
    Svd2Error,
)

if TYPE_CHECKING:
    from svd2_jax.engine.engine import DeviceEngine

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ConversionError",
    "EngineError",
    "MediaError",
    "SessionError",
    "SessionSpec",
    "StreamConfig",
    "Svd2Error",
    "load",
    "random_engine",
]


def load(
    checkpoint: str | os.PathLike[str] = "tiny",
    dtype: Literal["float32", "bfloat16"] | None = None,
    text_encoder: Literal["host", "device", "disk"] = "host",
    stages: int = 1,
    streams: int = 1,
    batch_sizes: tuple[int, ...] = (1,),
    share_vae: bool = False,
    weight_dtype: Literal["int8", "fp8"] | None = None,
) -> DeviceEngine:
    """Returns an engine that runs a converted checkpoint on JAX's devices.

    Args:
      checkpoint: the folder that `svd2 convert` wrote, or "tiny", the small model that comes with the package.
      dtype: to compute in; None takes the checkpoint's, but float32 for a small model on a CPU.
      text_encoder: where it lives: host memory, the accelerator, or read anew for every prompt.
      stages: devices that each stream's transformer is cut over, see docs/pipeline.md.
      streams: sets of so many devices; sessions open at once are spread over them.
      batch_sizes: how many sessions may share a tick, as in (1, 2, 4), see docs/streaming.md.
      share_vae: whether all stages' devices encode and decode together, see docs/pipeline.md.
      weight_dtype: 8 bits that the transformer's linear layers are held in; None: as they are computed with.

    Raises:
      CheckpointError: the folder is missing, unfinished or of another format.
      ConfigError: fewer devices than stages * streams, fewer blocks than stages, or batch sizes that
        do not ascend from 1.
    """
    from svd2_jax.engine.engine import DeviceEngine, PipelineOptions
    from svd2_jax.engine.mesh import stage_meshes

    meshes = stage_meshes(streams, stages)
    options = PipelineOptions(batch_sizes=batch_sizes, share_vae=share_vae)
    folder = shipped.checkpoint_folder(checkpoint)
    return DeviceEngine.from_checkpoint(
        folder, dtype, text_encoder, meshes, options, weight_dtype=weight_dtype
    )


def random_engine(
    preset: str,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] = "float32",
    stages: int = 1,
    streams: int = 1,
    batch_sizes: tuple[int, ...] = (1,),
    share_vae: bool = False,
    weight_dtype: Literal["int8", "fp8"] | None = None,
) -> DeviceEngine:
    """Returns an engine of a preset's sizes with random weights: its pictures mean nothing, its speed does.

    Args:
      preset: "tiny", "wan-1.3b" or "wan-14b".
      seed: same seed, same weights.
      dtype: to compute in.
      stages: see `load`.
      streams: see `load`.
      batch_sizes: see `load`.
      share_vae: see `load`.
      weight_dtype: see `load`.

    Raises:
      ConfigError: there is no such preset, fewer devices than stages * streams, fewer blocks than stages, or batch
        sizes that do not ascend from 1.
    """
    from svd2_jax.engine.engine import DeviceEngine, PipelineOptions
    from svd2_jax.engine.mesh import stage_meshes

    options = PipelineOptions(batch_sizes=batch_sizes, share_vae=share_vae)
    meshes = stage_meshes(streams, stages)
    return DeviceEngine.random(preset, seed, dtype, meshes, options, weight_dtype)
