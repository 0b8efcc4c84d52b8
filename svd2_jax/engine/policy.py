"""How programs are computed and compiled, in one place: dtypes, precision of products, and XLA's options.

docs/running.md tells users what is decided here and how to decide otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from svd2_jax.engine.checkpoint import Manifest
from svd2_jax.engine.params import abstract_items
from svd2_jax.errors import ConfigError
from svd2_jax.types import Device

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
SMALL_BYTES = 1 << 30  # parameters in float32 that no machine minds

CompilerOptions = tuple[tuple[str, bool | int | str], ...]
"""Names and values of XLA's options, without dashes."""

ONEDNN = "xla_cpu_experimental_onednn_custom_call"
"""Name of the option that has oneDNN convolve: up to 1.4 times as fast in float32, twice in bfloat16."""
ONEDNN_CONVOLVES = jax.__version_info__ >= (0, 12)
"""Whether it does: XLA had the option before, and did nothing about convolutions."""

# By platform. They go with each program: nothing has to be set before JAX starts, and what else a process compiles is
# left alone.
XLA_OPTIONS: Mapping[str, CompilerOptions] = {
    # Convolutions stay outside CUDA graphs, as XLA has it: captured without having been run before, as happens to
    # programs that were kept on disk, they fail (cuDNN status 5003, seen on an H200 with jax 0.11.2).
    "gpu": (
        # Three-dimensional convolutions as they are written, channels last; else XLA transposes around each of them.
        ("xla_gpu_force_conv_nhwc", True),
        # Products of one input are not joined: that would copy their weights together in every tick.
        ("xla_gpu_dot_merger_threshold_mb", 0),
    ),
}
# By platform, for programs of the VAE alone: the others gain nothing, and what oneDNN computes cannot be kept on disk
# (`kept_programs`).
VAE_OPTIONS: Mapping[str, CompilerOptions] = {"cpu": ((ONEDNN, True),) if ONEDNN_CONVOLVES else ()}


def checked_dtype(name: str) -> jnp.dtype:
    """Returns the dtype called `name`; raises ConfigError for anything but float32 and bfloat16."""
    if name not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return jnp.dtype(DTYPES[name])


def default_dtype(manifest: Manifest, device: Device) -> str:
    """Returns what to compute a checkpoint in: its own dtype, but float32 on a CPU where that takes little memory.

    XLA's CPU backend mostly turns bfloat16 into float32 and back around every operation.
    """
    if device.platform != "cpu":
        return manifest.dtype
    shapes = abstract_items(manifest.model)
    held = jax.tree.leaves([shapes[item] for item in manifest.items])
    return "float32" if sum(x.size for x in held) * 4 < SMALL_BYTES else manifest.dtype


def matmul_precision(dtype: jnp.dtype) -> str:
    """Returns JAX's precision for products in a dtype: float32 means float32, not TensorFloat-32 or bfloat16."""
    return "highest" if dtype == jnp.float32 else "default"


def compiler_options(platform: str, is_vae: bool = False, given: str | None = None) -> CompilerOptions:
    """Returns XLA's options for a platform, without those that the environment's `XLA_FLAGS` decides.

    Args:
      platform: of the devices, in JAX's words.
      is_vae: whether it is for a program that encodes or decodes.
      given: what stands for `XLA_FLAGS`.
    """
    decided = _flags(os.environ.get("XLA_FLAGS", "") if given is None else given)
    ours = XLA_OPTIONS.get(platform, ()) + (VAE_OPTIONS.get(platform, ()) if is_vae else ())
    return tuple((name, value) for name, value in ours if name not in decided)


def computes_by_onednn(options: CompilerOptions, given: str | None = None) -> bool:
    """Returns whether oneDNN may compute in a program of these options, or by what stands for `XLA_FLAGS`."""
    decided = _flags(os.environ.get("XLA_FLAGS", "") if given is None else given)
    return dict(options).get(ONEDNN, decided.get(ONEDNN)) in (True, "true", "1", "")


def _flags(text: str) -> dict[str, str]:
    """Returns the options that `XLA_FLAGS` names, with their values; without one an option is switched on."""
    parts = (flag.lstrip("-").partition("=") for flag in text.split())
    return {name: value for name, _, value in parts}
