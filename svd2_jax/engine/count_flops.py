"""Counts a program's arithmetic and memory traffic from its trace: nothing is compiled or run.

The model: only matrix products and convolutions cost arithmetic, and each reads its operands and writes its
result once. All else (norms, activations, softmax, copies) is taken as fused into them and free, but for writes
into a larger array, which move the slice; an operand that is widened on its way counts as it lies in memory. So both
counts are lower bounds of what a device does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from svd2_jax.hardware import Cost

# Of its operand a device sends so many times the bytes, by the number of devices; sums of scalars are left out.
_SENT: Mapping[str, Callable[[int], float]] = {
    "ppermute": lambda devices: 1,
    "all_gather": lambda devices: devices - 1,
    "reduce_scatter": lambda devices: (devices - 1) / devices,
}


def count_cost(
    function: Callable[..., Any],
    *args: Any,
    fused_attention: bool = False,
    axes: Sequence[tuple[str, int]] = (),
) -> Cost:
    """Returns what one call costs; under `shard_map`, on each device.

    A loop with a known number of passes counts that often, one that runs while a condition holds counts once, and
    of the branches of a choice the most expensive one counts.

    Args:
      function: a JAX function.
      *args: its arguments, arrays or ShapeDtypeStructs.
      fused_attention: leave out the largest array of every product with batch axes. In attention these are the
        logits, which a fused kernel keeps on the chip. The function has to be traced with the attention that
        multiplies all heads at once ("xla"), as fused kernels cannot be traced on every machine.
      axes: names and sizes of mesh axes that the function communicates over, where it is not in a `shard_map` yet.
    """
    return _count(jax.make_jaxpr(function, axis_env=list(axes))(*args).jaxpr, fused_attention)


def _count(jaxpr: Jaxpr, fused: bool) -> Cost:
    work, stored = Cost(), {}  # bytes of widened arrays where they come from
    for equation in jaxpr.eqns:
        operands = [
            _nbytes(x.aval) if isinstance(x, Literal) else stored.get(x, _nbytes(x.aval))
            for x in equation.invars
        ]
        if equation.primitive.name == "convert_element_type":
            stored[equation.outvars[0]] = min(operands[0], _nbytes(equation.outvars[0].aval))
        work += _count_equation(equation, fused, operands)
    return work


def _count_equation(equation: Any, fused: bool, operands: Sequence[int]) -> Cost:
    name, params = equation.primitive.name, equation.params
    inputs, outputs = [x.aval for x in equation.invars], [x.aval for x in equation.outvars]
    if name == "dot_general":
        (contracted, _), (batch, _) = params["dimension_numbers"]
        depth = math.prod(inputs[0].shape[axis] for axis in contracted)
        sizes = [*operands, *map(_nbytes, outputs)]
        skipped = max(sizes) if fused and batch else 0
        return Cost(2 * depth * math.prod(outputs[0].shape), sum(sizes) - skipped)
    if name == "conv_general_dilated":
        flops = _conv_flops(inputs[0], inputs[1], outputs[0], params)
        return Cost(flops, sum((*operands, *map(_nbytes, outputs))))
    if name == "dynamic_update_slice":
        return Cost(0, 2 * _nbytes(inputs[1]))  # read the new values, write them; the rest stays in place
    if name in _SENT:
        return Cost(sent=int(sum(map(_nbytes, inputs)) * _SENT[name](params.get("axis_size", 1))))
    if name == "scan":
        return _count(params["jaxpr"].jaxpr, fused) * params["length"]
    if name == "cond":
        return max(_count(branch.jaxpr, fused) for branch in params["branches"])
    return sum((_count(inner, fused) for inner in _inner_jaxprs(params)), Cost())


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """Yields what an equation calls: the body of a jit, shard_map, checkpoint, while or custom rule."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _conv_flops(lhs: Any, rhs: Any, out: Any, params: dict[str, Any]) -> int:
    """Two for each multiply-add with an element of the input; padding and inserted zeros do not count."""
    numbers = params["dimension_numbers"]
    batch, features, *space_out = numbers.out_spec
    _, features_in, *space_kernel = numbers.rhs_spec  # features_in: of one group
    _, _, *space_in = numbers.lhs_spec
    pairs = 1
    for i, (axis_in, axis_kernel, axis_out) in enumerate(zip(space_in, space_kernel, space_out, strict=True)):
        tap = np.arange(rhs.shape[axis_kernel])[:, None] * params["rhs_dilation"][i]
        window = np.arange(out.shape[axis_out])[None, :] * params["window_strides"][i]
        at, spread = tap + window - params["padding"][i][0], params["lhs_dilation"][i]
        pairs *= int(((at >= 0) & (at <= (lhs.shape[axis_in] - 1) * spread) & (at % spread == 0)).sum())
    return 2 * out.shape[batch] * out.shape[features] * rhs.shape[features_in] * pairs


def _nbytes(array: Any) -> int:
    return math.prod(array.shape) * array.dtype.itemsize
