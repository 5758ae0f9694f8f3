"""Counts the floating point operations of a step from its jaxpr, with the length of its loops."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

_REDUCED = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "argmax", "argmin")
_ELEMENTWISE = frozenset(
    (
        *("add", "add_any", "sub", "mul", "div", "max", "min", "neg", "abs", "sign", "pow"),
        *("exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic", "erf", "erf_inv", "rsqrt"),
        *("sqrt", "sin", "cos", "integer_pow", "square", "cumsum", "erfc", "clamp"),
    )
)


class Operations(Counter[str]):
    """Floating point operations of all devices by dtype: `"bfloat16"`, `"float32"`, `"other"`.

    Products count by the dtype of their operands; everything else is in `"other"`.

    Attributes:
        unknown_loops: number of `while` loops, whose length is not known. They count once.
    """

    unknown_loops = 0


def operations(jaxpr: Any) -> Operations:
    """Returns the operations of one call of a traced function.

    Args:
        jaxpr: the result of `jax.make_jaxpr`, or `traced.jaxpr`.
    """
    found = Operations()
    _count(getattr(jaxpr, "jaxpr", jaxpr), 1, found)
    return found


def _count(jaxpr: Any, times: int, found: Operations) -> None:
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inner = list(jaxprs_in_params(params))
        if name == "scan":
            _count(inner[0], times * params["length"], found)
        elif name == "cond":  # the longest branch
            counts = [operations(each) for each in inner]
            longest = max(counts, key=lambda each: each.total())
            for dtype, count in longest.items():
                found[dtype] += times * count
        elif name == "while":
            found.unknown_loops += 1
            _count(getattr(params["body_jaxpr"], "jaxpr", params["body_jaxpr"]), times, found)
        elif name == "shard_map":
            _count(inner[0], times * math.prod(params["mesh"].shape.values()), found)
        elif inner and not name.startswith(("reduce", "scatter", "custom_lin")):
            # Functions with custom derivatives hold only their forward pass here.
            _count(inner[0], times, found)
        else:
            dtype, count = _of_equation(equation)
            found[dtype] += times * count


def _of_equation(equation: Any) -> tuple[str, int]:
    name = equation.primitive.name
    if not equation.outvars or not hasattr(equation.outvars[0].aval, "shape"):
        return "other", 0
    result = equation.outvars[0].aval
    operands = [each.aval for each in equation.invars]
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        length = math.prod(operands[0].shape[axis] for axis in contracted)
        return _dtype(operands), 2 * length * math.prod(result.shape)
    if name == "conv_general_dilated":
        kernel = operands[1].shape
        features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
        return _dtype(operands), 2 * math.prod(result.shape) * math.prod(kernel) // features
    if not jnp.issubdtype(result.dtype, jnp.floating):
        return "other", 0
    if name in _REDUCED:
        return "other", math.prod(operands[0].shape)
    return "other", math.prod(result.shape) if name in _ELEMENTWISE else 0


def _dtype(operands: list[Any]) -> str:
    dtypes = {jnp.dtype(each.dtype).name for each in operands[:2]}
    half = dtypes <= {"bfloat16", "float16"}
    return "bfloat16" if half else "float32"
