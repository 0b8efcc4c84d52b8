"""Names for types that several modules share."""

from typing import Any, TypeAlias

Device: TypeAlias = Any
"""A `jax.Device`; that name is a variable to type checkers."""
