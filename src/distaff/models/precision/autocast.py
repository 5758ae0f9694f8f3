"""Rules that compute matrix products and convolutions in half precision."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distaff.core.equations import PRODUCTS
from distaff.core.rewriter import Rule, Sources, bound

_FLOATS = {jnp.dtype(each) for each in (jnp.float32, jnp.bfloat16, jnp.float16)}


def autocast(dtype: Any, *, float32: Sequence[str] = ()) -> dict[str, Rule]:
    """Returns rules that cast the operands of products to a dtype, and the results back.

    The product itself has results of that dtype: so have its operands in the backward pass, which
    is then in half precision, too. Accelerators still add up in float32. Products of float64,
    complex or integer arrays stay as they are.

    Args:
        dtype: bfloat16 or float16.
        float32: shell patterns for names of sources; products with a matching operand stay as they
            are.
    """

    def is_kept(sources: Sequence[Sources]) -> bool:
        names = [name for each in sources if each is not None for name in each]
        return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in float32)

    def product(equation: Any, operands: list[Any], sources: list[Sources]) -> Sequence[Any]:
        factors, others = operands[:2], operands[2:]
        if is_kept(sources[:2]) or not all(jnp.dtype(x.dtype) in _FLOATS for x in factors):
            return bound(equation, operands)
        factors = [jax.lax.convert_element_type(x, dtype) for x in factors]
        # The precision would apply to products of float32, and some are errors for others.
        results = bound(
            equation,
            [*factors, *others],
            preferred_element_type=jnp.dtype(dtype),
            precision=None,
        )
        return [
            jax.lax.convert_element_type(result, var.aval.dtype)
            for result, var in zip(results, equation.outvars, strict=True)
        ]

    return dict.fromkeys(PRODUCTS, product)
