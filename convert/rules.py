"""The conversion table: which tensor of a source file becomes which leaf of which checkpoint item."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np


def keep(x: np.ndarray) -> np.ndarray:
    """Returns the tensor as it is."""
    return x


def transpose(x: np.ndarray) -> np.ndarray:
    """Turns a linear layer's weight [out, in] into a kernel [in, out]."""
    return x.T


@dataclass(frozen=True)
class Rule:
    """One line of a conversion table.

    Attributes:
      source: regular expression that a source name matches in full (prefixes already stripped); named groups
        that are all digits are handed to `target` as integers.
      target: "item/path/to/leaf" with the groups as format fields, e.g. "dit.block.{n:03d}/mlp_up/kernel".
      transform: source array -> leaf, in the source's dtype (bfloat16 as ml_dtypes.bfloat16).
    """

    source: str
    target: str
    transform: Callable[[np.ndarray], np.ndarray] = keep


@dataclass(frozen=True)
class Table:
    """All rules for one layout of one component.

    Attributes:
      rules: each source name must match one of them.
      ignored: regular expressions of source names that are known and not needed.
    """

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()


class Shaped(Protocol):
    """Anything with a shape and a dtype."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...


T = TypeVar("T", bound=Shaped)


@dataclass(frozen=True)
class Leaf(Generic[T]):
    """One leaf to write: where it goes, what it is made of and how."""

    item: str
    path: tuple[str, ...]
    tensor: T
    transform: Callable[[np.ndarray], np.ndarray]


_PREFIXES = re.compile(
    # Wrappers that put their own name into every parameter's: model classes, data parallel, FSDP,
    # activation checkpointing, torch.compile.
    r"(?:(?<=\.)|^)(?:model|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\."
)


def strip_prefixes(name: str) -> str:
    """Returns a parameter's name without what training wrappers added to it, in any place of the name."""
    return _PREFIXES.sub("", name)


def best_table(tables: Sequence[Table], names: Sequence[str]) -> Table:
    """Returns the table that knows most of the names; the first one if several do."""
    return max(tables, key=lambda table: sum(_match(table, name) is not None for name in names))


def audit(
    label: str, table: Table, tensors: Sequence[tuple[str, T]], expected: Mapping[str, Any]
) -> tuple[dict[str, list[Leaf[T]]], list[str]]:
    """Returns (leaves of each item, problems): what the table makes of the tensors, checked both ways.

    Every source name must be known and every expected leaf must come from exactly one source of the right
    shape. The problems are lines for the user; the leaves are only good if there are none.

    Args:
      label: the source's name in the lines.
      table: rules of the source's layout.
      tensors: pairs of (name without prefixes, tensor); a name may occur twice.
      expected: item -> nested dict of leaves with a shape.
    """
    shapes = {(item, path): shape for item, tree in expected.items() for path, shape in _leaf_shapes(tree)}
    items: dict[str, list[Leaf[T]]] = {item: [] for item in expected}
    sources: dict[tuple[str, tuple[str, ...]], str] = {}
    problems = []
    for name, tensor in tensors:
        match = _match(table, name)
        if match is None:
            if not any(re.fullmatch(pattern, name) for pattern in table.ignored):
                problems.append(f"{label}: {name}: unknown, shape {tensor.shape}")
            continue
        rule, (item, path) = match
        target = (item, path)
        if target not in shapes:
            problems.append(f"{label}: {name}: unknown, the model has no {_target_name(target)}")
        elif target in sources:
            problems.append(
                f"{label}: {name}: duplicate, {sources[target]} is {_target_name(target)} as well"
            )
        else:
            sources[target] = name
            problems += _shape_problem(f"{label}: {name}", rule, tensor, shapes[target])
            items[item].append(Leaf(item, path, tensor, rule.transform))
    problems += [
        f"{label}: {_source_name(table, target)}: missing, expected for {_target_name(target)}"
        for target in shapes
        if target not in sources
    ]
    return items, problems


def _match(table: Table, name: str) -> tuple[Rule, tuple[str, tuple[str, ...]]] | None:
    """Returns the rule that knows the name and its target (item, path)."""
    for rule in table.rules:
        if match := re.fullmatch(rule.source, name):
            groups = {k: int(v) if v.isdigit() else v for k, v in match.groupdict(default="").items()}
            item, *path = rule.target.format(**groups).split("/")
            return rule, (item, tuple(path))
    return None


def _leaf_shapes(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaf_shapes(value, (*path, key))
    else:
        yield path, tuple(tree.shape)


def _shape_problem(where: str, rule: Rule, tensor: Shaped, expected: tuple[int, ...]) -> list[str]:
    """Returns a line if the transformed tensor would not have the expected shape."""
    try:  # on one repeated element, so that nothing is read or allocated
        got = rule.transform(np.broadcast_to(np.zeros((), tensor.dtype), tensor.shape)).shape
    except (ValueError, IndexError):  # not even the number of axes is right
        return [f"{where}: expected a tensor that gives {expected}, got {tensor.shape}"]
    if got == expected:
        return []
    if rule.transform is transpose:
        expected, got = expected[::-1], tensor.shape
    return [f"{where}: expected {expected}, got {got}"]


def _target_name(target: tuple[str, tuple[str, ...]]) -> str:
    return "/".join((target[0], *target[1]))


def _source_name(table: Table, target: tuple[str, tuple[str, ...]]) -> str:
    """Returns the source name that would give the target: the rule's pattern with its numbers filled in."""
    for rule in table.rules:
        template = re.escape(re.sub(r"\{(\w+)[^}]*\}", r"<\1>", rule.target))
        if match := re.fullmatch(re.sub(r"<(\w+)>", r"(?P<\1>\\w+)", template), _target_name(target)):
            groups = {k: str(int(v)) if v.isdigit() else v for k, v in match.groupdict().items()}
            name = re.sub(r"\(\?P<(\w+)>[^)]*\)", lambda m, g=groups: g.get(m[1], m[0]), rule.source)
            return re.sub(r"\\(.)", r"\1", name)
    return "no rule"
