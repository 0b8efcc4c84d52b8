"""The devices that there are, and the threads that prepare programs for them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import jax

from svd2_jax.config import (
    ModelConfig,
)
from svd2_jax.engine.kept_programs import keep_programs
from svd2_jax.engine.mesh import StageMesh
from svd2_jax.errors import ConfigError, EngineError
from svd2_jax.types import Device


def prepare_devices(keep: bool = True) -> None:
    """Sees that JAX has devices; if `keep`, compiled programs are taken from and put where they are kept.

    Raises:
      EngineError: JAX has no device.
    """
    if keep:
        keep_programs()
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as e:  # JAX asserts that the platform it was told to use is there
        reason = (str(e).splitlines() or ["none was found"])[0]
        raise EngineError(
            f"JAX has no device to run on: {reason}; is JAX_PLATFORMS set to another machine's?"
        ) from e


@contextmanager
def threads() -> Iterator[ThreadPoolExecutor]:
    """Gives threads to share work; where anything fails, what has not begun is left undone."""
    with ThreadPoolExecutor() as pool:
        try:
            yield pool
        except BaseException:  # Ctrl-C too: nobody wants to wait for programs that nobody needs
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def checked_mesh(model: ModelConfig, mesh: StageMesh | None) -> StageMesh:
    """Returns the mesh, or one of the first device; raises ConfigError where a model cannot run on it."""
    mesh = mesh or StageMesh((jax.devices()[0],))
    if not mesh.local_stages:
        raise ConfigError(
            f"process {jax.process_index()} drives no device of a pipeline of {mesh.stages} stages; start fewer "
            "processes, or use more stages"
        )
    if mesh.stages > model.dit.num_layers:
        raise ConfigError(
            f"{mesh.stages} stages are more than the model's {model.dit.num_layers} blocks; use at most "
            f"{model.dit.num_layers}"
        )
    return mesh


def host_device() -> Device:
    """Returns JAX's CPU device; raises EngineError where JAX was told to leave it out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as e:
        raise EngineError(
            f"the text encoder cannot live in host memory ({str(e).splitlines()[0]}); add cpu to JAX_PLATFORMS, as in "
            "JAX_PLATFORMS=cuda,cpu, or use --text-encoder device"
        ) from e
