"""Detects losses that broadcast predictions against labels by mistake.

`[batch, 1]` and `[batch]` broadcast to `[batch, batch]`, whose mean looks like a valid loss.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Literal, jaxprs_in_params

from distaff.core.typing import Batch, Params
from distaff.errors import LossError, leaf_name
from distaff.step.independence.walk import called

_PROMOTION = re.compile(r"automatic rank promotion for (\S+) on shapes (\(.*?\)) (\(.*?\))\.")

_FRESH_TRACE = jax.make_user_context(0)
_NUMBERS = itertools.count(1)
"""A new context number forces a new trace: JAX warns of rank promotion only while tracing."""

_PAIRWISE = frozenset(
    ["add", "sub", "mul", "div", "max", "min", "pow", "eq", "ne", "lt", "le", "gt", "ge", "atan2"]
)
_ENTRY_BY_ENTRY = _PAIRWISE | frozenset(
    [
        *("abs", "and", "ceil", "clamp", "convert_element_type", "copy", "cos", "cosh", "erf"),
        *("exp", "exp2", "expm1", "floor", "integer_pow", "is_finite", "log", "log1p", "logistic"),
        *("neg", "not", "or", "round", "rsqrt", "select_n", "sign", "sin", "sinh", "sqrt"),
        *("square", "stop_gradient", "tan", "tanh", "xor"),
    ]
)
_KEEPING = _ENTRY_BY_ENTRY | frozenset(
    ["broadcast_in_dim", "reshape", "squeeze", "transpose", "expand_dims", "reduce_sum"]
)


class Promotion(NamedTuple):
    """An implicit rank promotion: the function, such as `"subtract"`, and both shapes."""

    function: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]

    def crosses(self, size: int) -> bool:
        """Returns whether it may pair each example of a batch with every other one."""
        lower, higher = sorted(self.shapes, key=len)
        at = len(higher) - len(lower)
        return bool(lower) and lower[0] == higher[0] == size > 1 and higher[at] == 1


def has_pairs(closed: Any, size: int) -> bool:
    """Returns whether a program broadcasts each example of a batch against every other one.

    Args:
        closed: the program, as `jax.make_jaxpr` returns it.
        size: number of examples in the batch.
    """
    return size > 1 and any(_is_pair(equation, size) for equation in _equations(closed.jaxpr))


def check_returned(
    returned: Any,
    size: int,
    loss_fn: Callable[..., Any],
    arguments: tuple[Params, Batch],
    context: Callable[[], Any],
) -> None:
    """Calls `check` if the loss function returned an array `[batch, batch, ...]`."""
    shapes = [np.shape(leaf)[:2] for leaf in jax.tree.leaves(returned)]
    if size > 1 and (size, size) in shapes:
        check(loss_fn, arguments, context, size)


def check(
    loss_fn: Callable[..., Any],
    arguments: tuple[Params, Batch],
    context: Callable[[], Any],
    size: int,
) -> None:
    """Checks that a loss function does not broadcast predictions against labels by mistake.

    Traces the loss function again. A mistake is an implicit broadcast between an array that depends
    on the parameters and one that depends only on the batch, whose result reaches the loss or a
    metric elementwise or as a sum. An explicit broadcast is intended.

    Args:
        loss_fn: `(params, batch, ctx) -> loss` or `(loss, metrics)`.
        arguments: the model's parameters, and a batch or its shapes.
        context: creates the loss function's context.
        size: number of examples in the batch.

    Raises:
        LossError: each prediction meets every label.
    """

    def call(params: Params, batch: Batch) -> Any:
        return loss_fn(params, batch, context())

    try:
        with _promotions() as found:
            closed, shapes = jax.make_jaxpr(call, return_shape=True)(*arguments)
    except Exception:  # with debug=True, a loss need not be traceable
        return
    suspects = [each for each in found if each.crosses(size)]
    if not suspects:
        return
    trace = _Trace(suspects)
    params, batch = (len(jax.tree.leaves(each)) for each in arguments)
    values = trace(closed.jaxpr, [_Value(params=True)] * params + [_Value(data=True)] * batch)
    if trace.is_meant:
        return
    is_pair = isinstance(shapes, tuple) and len(shapes) == 2 and isinstance(shapes[1], Mapping)
    named = {"loss": shapes[0], "metrics": shapes[1]} if is_pair else {"loss": shapes}
    paths = [leaf_name(path) for path, _ in jax.tree.leaves_with_path(named)]
    for path, value in zip(paths, values, strict=True):
        if value.crossed is not None:
            raise _error(path.removeprefix("metrics/"), value.crossed)


@contextmanager
def _promotions() -> Generator[list[Promotion]]:
    """Collects the implicit rank promotions, also those in functions that were traced before."""
    found: list[Promotion] = []
    with (
        warnings.catch_warnings(record=True) as caught,
        jax.numpy_rank_promotion("warn"),
        _FRESH_TRACE(next(_NUMBERS)),
    ):
        warnings.simplefilter("always")
        yield found
    for each in caught:
        promotion = _PROMOTION.search(str(each.message))
        if promotion is not None:
            function, *shapes = promotion.groups()
            first, second = (tuple(map(int, re.findall(r"\d+", shape))) for shape in shapes)
            found.append(Promotion(function, (first, second)))


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


def _is_pair(equation: Any, size: int) -> bool:
    """Returns whether an equation broadcasts `[size, 1]` and `[1, size]` to `[size, size]`."""
    if equation.primitive.name not in _PAIRWISE or len(equation.invars) != 2:
        return False
    first, second = (getattr(atom.aval, "shape", ()) for atom in equation.invars)
    if len(first) != len(second):
        return False
    own = [n for n, (a, b) in enumerate(zip(first, second, strict=True)) if (a, b) == (size, 1)]
    other = [n for n, (a, b) in enumerate(zip(first, second, strict=True)) if (a, b) == (1, size)]
    return bool(own and other)


def _error(path: str, crossed: Promotion) -> LossError:
    first, second = (str(list(shape)) for shape in crossed.shapes)
    both = str(list(np.broadcast_shapes(*crossed.shapes)))
    what = "The loss" if path.split("/")[0] == "loss" else f"The metric {path.split('/')[0]!r}"
    return LossError(
        f"{what} must compare each prediction with its own label; {crossed.function} gets arrays "
        f"of shape {first} and shape {second}, which broadcast to {both} and compare each "
        "prediction with each label of the batch. Give both the same shape: predictions[:, 0], or "
        "labels[:, None]. If you do want every pair, write labels[None, :]."
    )


class _Value(NamedTuple):
    """Facts about an array of the program.

    Attributes:
        params: whether it depends on the parameters.
        data: whether it depends on the batch.
        crossed: the broadcast of predictions against labels that it comes from, if any.
        is_uniform: whether all its entries are one constant.
    """

    params: bool = False
    data: bool = False
    crossed: Promotion | None = None
    is_uniform: bool = False


class _Trace:
    """Propagates `_Value`s through a program.

    Attributes:
        is_meant: whether the pairs are used other than in a sum, such as in a softmax.
    """

    def __init__(self, suspects: list[Promotion]) -> None:
        self._suspects = suspects
        self.is_meant = False

    def __call__(self, jaxpr: Any, inputs: list[_Value]) -> list[_Value]:
        known = dict.fromkeys(jaxpr.constvars, _Value())
        known.update(zip(jaxpr.invars, inputs, strict=True))

        def value_of(atom: Any) -> _Value:
            return _Value(is_uniform=True) if isinstance(atom, Literal) else known[atom]

        for equation in jaxpr.eqns:
            values = [value_of(atom) for atom in equation.invars]
            inner = called(equation)
            found = [self._propagate(equation, values)] * len(equation.outvars)
            if inner is not None:
                found = self(inner.jaxpr, values)
            known.update(zip(equation.outvars, found, strict=True))
        return [value_of(atom) for atom in jaxpr.outvars]

    def _propagate(self, equation: Any, values: list[_Value]) -> _Value:
        params, data = any(v.params for v in values), any(v.data for v in values)
        name = equation.primitive.name
        is_uniform = name in _KEEPING and all(value.is_uniform for value in values)
        crossed = next((value.crossed for value in values if value.crossed is not None), None)
        if crossed is not None and not self._keeps(equation, values):
            self.is_meant |= called(equation) is None
            crossed = None
        if crossed is None and name in _PAIRWISE and len(values) == 2:
            crossed = self._crossed(equation, values)
        return _Value(params, data, crossed, is_uniform)

    def _keeps(self, equation: Any, values: list[_Value]) -> bool:
        """Returns whether the result consists of the pairs alone, elementwise or summed."""
        if equation.primitive.name not in _KEEPING:
            return False
        size = equation.outvars[0].aval.size
        others = [
            atom.aval.size
            for atom, value in zip(equation.invars, values, strict=True)
            if value.crossed is None and not value.is_uniform
        ]
        return size == 1 or all(other < size for other in others) or len(values) == 1

    def _crossed(self, equation: Any, values: list[_Value]) -> Promotion | None:
        first, second = values
        one = second if first.params else first
        if first.params == second.params or not one.data or one.params:
            return None
        shapes = [tuple(atom.aval.shape) for atom in equation.invars]
        for suspect in self._suspects:
            rank = len(equation.outvars[0].aval.shape)
            wide = [(1,) * (rank - len(shape)) + shape for shape in suspect.shapes]
            if sorted(wide) == sorted(shapes):
                return suspect
        return None
