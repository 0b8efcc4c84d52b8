"""Dataclasses from plain values, each checked against the type of its field; errors are one line."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from svd2_jax.errors import ConfigError

T = TypeVar("T")

_NAMES = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}


def build(cls: type[T], values: Any, where: str = "") -> T:
    """Returns a dataclass of plain values: numbers, texts, lists for tuples, mappings for dataclasses within.

    Args:
      cls: a dataclass. Its fields may be numbers, texts, flags, Literal, tuples of these, dataclasses, or None.
      values: by the fields' names; those with a default may be left out.
      where: what messages call the whole.

    Raises:
      ConfigError: an unknown or missing name, a value of another type, or what the dataclass itself refuses.
    """
    read, prefix = read_values(cls, values, where), f"{where}: " if where else ""
    for field in dataclasses.fields(typing.cast(Any, cls)):
        if field.name not in read and field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{prefix}{field.name!r} is missing")
    try:
        return cls(**read)
    except ConfigError as e:
        raise ConfigError(f"{prefix}{e}") from e


def read_values(cls: type, values: Any, where: str = "") -> dict[str, Any]:
    """Returns some of a dataclass's values as its fields hold them; raises ConfigError as `build` does."""
    prefix = f"{where}: " if where else ""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix}expected named values, got {type(values).__name__}")
    kinds = field_types(cls)
    if unknown := sorted(set(values) - set(kinds), key=str):
        raise ConfigError(f"{prefix}unknown key {unknown[0]!r}; known are {', '.join(kinds)}")
    return {n: _read(kinds[n], v, f"{where}.{n}" if where else n) for n, v in values.items()}


@functools.cache
def field_types(cls: type) -> Mapping[str, Any]:
    """Returns the types of a dataclass's fields by their names."""
    kinds = typing.get_type_hints(cls)
    return {field.name: kinds[field.name] for field in dataclasses.fields(cls)}


def _read(kind: Any, value: Any, where: str) -> Any:
    """Returns a value as a field of a type holds it; raises ConfigError if it is of another type."""
    if dataclasses.is_dataclass(kind):
        cls = typing.cast(type, kind)
        return value if isinstance(value, cls) else build(cls, value, where)
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else _read(parts[0], value, where)
    if origin is Literal:
        if value not in parts:
            raise ConfigError(f"{where} must be one of {parts}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        if parts[-1] is not Ellipsis and len(value) != len(parts):
            raise ConfigError(f"{where} must have {len(parts)} values, got {value!r}")
        return tuple(_read(parts[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    expected = (int, float) if kind is float else kind
    if not isinstance(value, expected) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{where} must be {_NAMES[kind]}, got {value!r}")
    return value
