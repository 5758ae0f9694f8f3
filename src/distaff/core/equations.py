"""Flattens a jaxpr: compiled calls are replaced by the equations inside them."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax

SCOPES = ("loss", "optimizer", "augmentation")
"""Parts of a training step, marked by `named_scope`."""

PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")
"""Primitives that multiply two arrays and add up: matrix products and convolutions."""

_CALLS = ("jit", "pjit")
"""Primitives that only call a program."""

_MAX_RESULTS = 2**20
"""More than the results of any equation."""

_PREFIX = "distaff."
_SCOPE = re.compile(re.escape(_PREFIX) + r"(\w+)")


def named_scope(name: str) -> Any:
    """Returns a context manager that marks a part of a step, one of `SCOPES`, during tracing."""
    return jax.named_scope(_PREFIX + name)


def is_scope(name: str) -> bool:
    """Whether a name in a stack of scopes comes from `named_scope`."""
    return name.startswith(_PREFIX)


class Var(NamedTuple):
    """A variable inside an inlined call, by its shape and dtype and a unique number."""

    aval: Any
    number: int


class Equation(NamedTuple):
    """An equation whose operands and results are variables of the flat program."""

    primitive: Any
    params: Mapping[str, Any]
    invars: list[Any]
    outvars: list[Any]
    effects: Any


class Flat:
    """A jaxpr whose compiled calls are inlined.

    Attributes:
        equations: each equation with its scope.
        consts: values of constants, by variable.
        outvars: the results.
    """

    def __init__(self, jaxpr: Any, consts: Iterable[Any], scope: str) -> None:
        self.equations: list[tuple[Equation, str]] = []
        self.consts: dict[Any, Any] = {}
        names = {var: var for var in (*jaxpr.invars, *jaxpr.constvars)}
        self.outvars = self._read(jaxpr, consts, names, scope)

    def _read(
        self, jaxpr: Any, consts: Iterable[Any], names: dict[Any, Any], scope: str
    ) -> list[Any]:
        """Appends the equations of a jaxpr; returns its results."""

        def known(var: Any) -> Any:
            return var if is_literal(var) else names[var]

        for var, value in zip(jaxpr.constvars, consts, strict=True):
            names.setdefault(var, Var(var.aval, -1 - len(self.consts)))
            self.consts[names[var]] = value
        for equation in jaxpr.eqns:
            own = _innermost(equation.source_info.name_stack) or scope
            invars = [known(var) for var in equation.invars]
            if equation.primitive.name in _CALLS:
                called = equation.params["jaxpr"]
                inner = dict(zip(called.jaxpr.invars, invars, strict=True))
                outvars = self._read(called.jaxpr, called.consts, inner, own)
            else:
                number = len(self.equations)
                outvars: list[Any] = [
                    Var(var.aval, _MAX_RESULTS * number + n)
                    for n, var in enumerate(equation.outvars)
                ]
                read = Equation(
                    equation.primitive, equation.params, invars, outvars, equation.effects
                )
                self.equations.append((read, own))
            names.update(zip(equation.outvars, outvars, strict=True))
        return [known(var) for var in jaxpr.outvars]


def live(flat: Flat) -> list[tuple[Equation, str]]:
    """Returns the equations that a result or an effect depends on, without debug printing."""
    needed = {var for var in flat.outvars if not is_literal(var)}
    kept = []
    for equation, own in reversed(flat.equations):
        prints = equation.primitive.name.startswith("debug_")
        is_needed = equation.effects or any(var in needed for var in equation.outvars)
        if is_needed and not prints:
            kept.append((equation, own))
            needed.update(var for var in equation.invars if not is_literal(var))
    return kept[::-1]


@functools.lru_cache(maxsize=4096)
def _innermost(stack: Any) -> str:
    """Returns the innermost Distaff scope in a stack of names, or an empty string."""
    known = [name for name in _SCOPE.findall(str(stack)) if name in SCOPES]
    return known[-1] if known else ""


def is_literal(var: Any) -> bool:
    """Whether an operand is a literal number."""
    return hasattr(var, "val")
