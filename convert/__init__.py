"""Converts published PyTorch checkpoints into the checkpoint folder that svd2_jax loads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.conversion import convert_checkpoint

__all__ = ["convert_checkpoint"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # late, so that `--help` does not wait for JAX
        from convert import conversion

        return getattr(conversion, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
