"""StreamDiffusionV2 in JAX: live video re-drawn to a text prompt.

```
engine = svd2_jax.load("tiny")  # or the folder of a converted checkpoint
with engine.open(svd2_jax.SessionSpec("a watercolour painting")) as session:
    for chunk in session.push(frames):  # uint8 [T, H, W, 3]
        show(chunk.frames())
```

Importing the package loads neither JAX nor NumPy; `load` does. docs/api.md lists everything with its types.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from svd2_jax import shipped
from svd2_jax.api import SessionSpec
from svd2_jax.config import StreamConfig, check_flag, check_whole
from svd2_jax.errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    EngineError,
    MediaError,
    SessionError,
    Svd2Error,
)
from svd2_jax.runtime.types import StreamSettings

if TYPE_CHECKING:
    from svd2_jax.engine.engine import DeviceEngine
    from svd2_jax.runtime.stream import WhenSlow
    from svd2_jax.service import LiveService

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ConversionError",
    "EngineError",
    "LiveService",
    "MediaError",
    "SessionError",
    "SessionSpec",
    "StreamConfig",
    "StreamSettings",
    "Svd2Error",
    "WhenSlow",
    "load",
    "load_replicas",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name == "LiveService":
            from svd2_jax.service import LiveService as found
        elif name == "WhenSlow":
            from svd2_jax.runtime.stream import WhenSlow as found
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return found


def load(
    checkpoint: str | os.PathLike[str] = "tiny",
    dtype: Literal["float32", "bfloat16"] | None = None,
    text_encoder: Literal["host", "device", "disk"] = "host",
    stages: int = 1,
    batch_sizes: Sequence[int] = (1,),
    share_vae: bool = False,
    weight_dtype: Literal["int8", "fp8"] | None = None,
    keep_programs: bool = True,
) -> DeviceEngine:
    """Returns an engine that runs a converted checkpoint on JAX's devices.

    Args:
      checkpoint: the folder that `svd2 convert` wrote; "tiny", the small model that comes with the package; or
        "random:PRESET" ("random:wan-1.3b"), random weights in a preset's sizes, for measuring.
      dtype: to compute in; None takes the checkpoint's, but float32 for a small model on a CPU and for random weights.
      text_encoder: where it lives: host memory, the accelerator, or read anew for every prompt.
      stages: devices that each stream's transformer is cut over, see docs/pipeline.md.
      batch_sizes: how many sessions may share a tick, as in (1, 2, 4), see docs/streaming.md.
      share_vae: whether all stages' devices encode and decode together, see docs/pipeline.md.
      weight_dtype: 8 bits that the transformer's linear layers are held in; None: as they are computed with.
      keep_programs: whether what is compiled is kept on disk and taken from there the next time (docs/running.md).
        Holds for the whole process from now on.

    Raises:
      CheckpointError: the folder is missing, unfinished or of another format.
      ConfigError: an argument is of another type or out of its range; there is no such preset, fewer devices than
        stages, fewer blocks than stages, or batch sizes that do not ascend from 1.
      EngineError: JAX has no device to run on.
    """
    check_whole("stages", stages, 1)
    check_flag("keep_programs", keep_programs)
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise ConfigError(f"checkpoint must be a folder or a name, got {type(checkpoint).__name__}")
    from svd2_jax.engine.devices import prepare_devices
    from svd2_jax.engine.engine import DeviceEngine
    from svd2_jax.engine.mesh import stage_meshes
    from svd2_jax.engine.options import PipelineOptions

    options = PipelineOptions(batch_sizes=batch_sizes, share_vae=share_vae)
    prepare_devices(keep_programs)
    (mesh,) = stage_meshes(1, stages)
    if (name := shipped.random_preset(checkpoint)) is not None:
        return DeviceEngine.random(name, 0, dtype or "float32", mesh, options, weight_dtype)
    folder = shipped.checkpoint_folder(checkpoint)
    return DeviceEngine.from_checkpoint(folder, dtype, text_encoder, mesh, options, weight_dtype=weight_dtype)


def load_replicas(
    replicas: int, checkpoint: str | os.PathLike[str] = "tiny", *, stages: int = 1, **settings: Any
) -> tuple[DeviceEngine, ...]:
    """Returns several engines of one checkpoint, each on devices of its own: `replicas` * `stages` in all.

    They share the text encoder and the prompts that it has encoded. Each reads the other parameters to its own
    devices, and compiles its own programs; no session of one waits for one of another.

    Args:
      replicas: number of engines.
      checkpoint: see `load`.
      stages: devices of each engine.
      settings: the other arguments of `load`.

    Raises:
      ConfigError: fewer devices than replicas * stages; see also `load`.
    """
    check_whole("replicas", replicas, 1)
    engine = load(checkpoint, stages=stages, **settings)
    from svd2_jax.engine.mesh import stage_meshes

    return (engine, *(engine.replica(mesh) for mesh in stage_meshes(replicas, stages)[1:]))
