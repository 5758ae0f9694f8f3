"""Rules that compute matrix products and convolutions in half precision."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distaff.core.equations import PRODUCTS
from distaff.core.rewriter import Rewriter, Rule, Sources, bound

_FLOATS = {jnp.dtype(each) for each in (jnp.float32, jnp.bfloat16, jnp.float16)}


def autocast(
    dtype: Any, *, float32: Sequence[str] = (), wide_gradients: bool = False
) -> dict[str, Rule]:
    """Returns rules that cast the operands of products to a dtype, and the results back.

    The product itself has results of that dtype: so have its operands in the backward pass, which
    is then in half precision, too. Accelerators still add up in float32. Products of float64,
    complex or integer arrays stay as they are.

    Args:
        dtype: bfloat16 or float16.
        float32: shell patterns for names of sources; products with a matching operand stay as they
            are.
        wide_gradients: whether matrix products compute the gradients of named operands, such as
            parameters, in float32 and round them after that, so that devices add them up in
            float32. Such products have no forward-mode derivative (`jax.jvp`).
    """

    def is_kept(sources: Sequence[Sources]) -> bool:
        names = [name for each in sources if each is not None for name in each]
        return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in float32)

    def product(equation: Any, operands: list[Any], sources: list[Sources]) -> Sequence[Any]:
        if is_kept(sources[:2]) or not all(jnp.dtype(x.dtype) in _FLOATS for x in operands[:2]):
            return bound(equation, operands)
        named = [each is not None for each in sources[:2]]
        if wide_gradients and equation.primitive is jax.lax.dot_general_p and sum(named) == 1:
            return [_with_wide_gradient(equation, dtype, named.index(True))(*operands)]
        return _in_half(equation, operands, dtype)

    return dict.fromkeys(PRODUCTS, product)


def _in_half(equation: Any, operands: Sequence[Any], dtype: Any) -> list[Any]:
    """Returns the results of a product whose operands are cast, in the product's own dtypes."""
    factors = [jax.lax.convert_element_type(x, dtype) for x in operands[:2]]
    # The precision would apply to products of float32, and some are errors for others.
    results = bound(
        equation,
        [*factors, *operands[2:]],
        preferred_element_type=jnp.dtype(dtype),
        precision=None,
    )
    return [
        jax.lax.convert_element_type(result, var.aval.dtype)
        for result, var in zip(results, equation.outvars, strict=True)
    ]


def _with_wide_gradient(equation: Any, dtype: Any, weight: int) -> Callable[..., jax.Array]:
    """Returns a matrix product of two operands; one gets a gradient that is rounded last."""
    info = jnp.finfo(dtype)

    def product(*factors: jax.Array) -> jax.Array:
        return _in_half(equation, factors, dtype)[0]

    def forward(*factors: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        half = [jax.lax.convert_element_type(x, dtype) for x in factors]
        return product(*half), half

    def backward(half: list[jax.Array], cotangent: jax.Array) -> tuple[jax.Array, ...]:
        def pulled(n: int) -> Callable[..., jax.Array]:
            def of_one(operand: jax.Array) -> jax.Array:
                return product(*half[:n], operand, *half[n + 1 :])

            return jax.linear_transpose(of_one, half[n])

        def gradient(n: int) -> jax.Array:
            rules = {"dot_general": _widened} if n == weight else {}
            found = Rewriter(rules)(lambda ct: pulled(n)(ct)[0], cotangent)
            # XLA may leave out a conversion to half precision and back.
            found = jax.lax.reduce_precision(found, info.nexp, info.nmant) if rules else found
            return found.astype(equation.invars[n].aval.dtype)

        return gradient(0), gradient(1)

    run = jax.custom_vjp(product)
    run.defvjp(forward, backward)
    return run


def _widened(equation: Any, operands: list[Any], sources: list[Sources]) -> Sequence[Any]:
    """A rule for matrix products: their results stay in float32, in which devices add them up."""
    return bound(equation, operands, preferred_element_type=jnp.dtype(jnp.float32))
