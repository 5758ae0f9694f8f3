"""Counts the matrix products and convolutions of a training step by dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from distaff.core.equations import PRODUCTS
from distaff.errors import ConfigError
from distaff.models import PrecisionConfig
from distaff.models.precision.model import SCALED
from distaff.run.diagnosis import place

_SHOWN = 5


class Product(NamedTuple):
    """A matrix product or a convolution in a program; one in a loop counts once.

    Attributes:
        dtype: the dtype of its operands, such as `bfloat16`; `float32*bfloat16` if they differ.
        is_backward: whether it belongs to the backward pass.
        scope: scope of the module, such as `"MLP/Dense_0"`; empty outside of modules.
        line: line of the user's code, such as `"model.py:31"`; empty if in libraries only.
    """

    dtype: str
    is_backward: bool
    scope: str
    line: str

    def __str__(self) -> str:
        where = [part for part in (self.scope, self.line) if part]
        return f"{' at '.join(where) or 'a library'} ({self.dtype})"


def checked_summary(
    step: Callable[..., Any], state: Any, batch: Any, precision: PrecisionConfig
) -> str:
    """Returns a line on the products of a training step in a precision; empty for float32.

    Raises:
        ConfigError: the step does not compute in that precision at all.
    """
    if precision.compute is None:
        return ""
    jaxpr = jax.make_jaxpr(step)(state, batch)
    found = products(jaxpr)
    name = jnp.dtype(precision.compute).name
    if found and not precision.float32 and all(name not in each.dtype for each in found):
        raise ConfigError(
            f"precision={precision.name!r} has no effect: none of the {len(found)} matrix products "
            f"and convolutions of the training step is in {name}. It applies to ctx.apply, and to "
            "state.apply_fn as init_model sets it. Run the model by one of these, or pass "
            "precision='float32'."
        )
    if found and precision.is_scaled and not _is_scaled(jaxpr):
        raise ConfigError(
            f"precision={precision.name!r} needs a loss scale, which the training step does not "
            "use: without one, small gradients become zero. Run the model by ctx.apply, and in an "
            "init_optimizer of your own wrap the optimizer: optim.with_loss_scale(tx)."
        )
    return summary(found, precision.compute)


def products(jaxpr: Any) -> list[Product]:
    """Returns the products of floating-point arrays in a step, except its optimizer's.

    Args:
        jaxpr: the step, as `jax.make_jaxpr` returns it.
    """
    return [_product(path) for path in _paths(jaxpr, ())]


def summary(found: list[Product], dtype: Any) -> str:
    """Returns a line on the products of a step that should be of a dtype.

    The line names the products of the forward pass that are not; a product of another dtype has two
    in the backward pass.
    """
    name = jnp.dtype(dtype).name
    counts = []
    for what, is_backward in (("forward", False), ("backward", True)):
        each = [product for product in found if product.is_backward is is_backward]
        counts.append(f"{sum(x.dtype == name for x in each)} of {len(each)} {what}")
    line = f"Products in {name}: {', '.join(counts)}"
    others = [product for product in found if product.dtype != name]
    named = [str(each) for each in others if not each.is_backward] or list(map(str, others))
    shown = list(dict.fromkeys(named))
    if not shown:
        return line
    rest = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return f"{line}; not {name}: {', '.join(shown[:_SHOWN])}{rest}"


def _is_scaled(jaxpr: Any) -> bool:
    """Returns whether a step has a loss scale, however deep in its programs."""
    return any(
        f"distaff.{SCALED}" in str(equation.source_info.name_stack)
        or any(map(_is_scaled, jaxprs_in_params(equation.params)))
        for equation in jaxpr.eqns
    )


def _paths(jaxpr: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Yields each product, after the equations of the programs that it is in."""
    for equation in jaxpr.eqns:
        inner = (*path, equation)
        if equation.primitive.name in PRODUCTS and _is_counted(inner):
            yield inner
        for each in jaxprs_in_params(equation.params):
            yield from _paths(each, inner)


def _is_counted(path: tuple[Any, ...]) -> bool:
    factors = path[-1].invars[:2]
    is_float = all(jnp.issubdtype(var.aval.dtype, jnp.floating) for var in factors)
    return is_float and "distaff.optimizer" not in _stack(path)


def _product(path: tuple[Any, ...]) -> Product:
    dtypes = dict.fromkeys(var.aval.dtype.name for var in path[-1].invars[:2])
    stack = _stack(path)
    is_backward = "transpose(" in stack or "rematted_computation" in stack
    return Product("*".join(dtypes), is_backward, place.scope(path), place.line(path))


def _stack(path: tuple[Any, ...]) -> str:
    return "/".join(str(equation.source_info.name_stack) for equation in path)
