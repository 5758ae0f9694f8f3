"""Equations of a program, whose compiled calls are read as what they compute."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax

SCOPES = ("loss", "optimizer", "augmentation")
"""Parts of a training step, marked by `named_scope`."""

_CALLS = ("jit", "pjit")
"""Primitives that only call a program."""

_MANY = 2**20
"""More than an equation has results."""

_PREFIX = "distaff."
_SCOPE = re.compile(re.escape(_PREFIX) + r"(\w+)")


def named_scope(name: str) -> Any:
    """Returns the scope that marks a part of a step, to be entered while it is traced.

    Args:
        name: one of `SCOPES`.
    """
    return jax.named_scope(_PREFIX + name)


def is_scope(name: str) -> bool:
    """Whether a name in a stack of scopes is one that `named_scope` has put there."""
    return name.startswith(_PREFIX)


class Var(NamedTuple):
    """A variable of a call that is read as if it stood where it is called.

    Attributes:
        aval: its shape and dtype.
        number: which one it is.
    """

    aval: Any
    number: int


class Equation(NamedTuple):
    """An equation, with its operands and results as the program around its call knows them."""

    primitive: Any
    params: Mapping[str, Any]
    invars: list[Any]
    outvars: list[Any]
    effects: Any


class Flat:
    """A program whose compiled calls are read as what they compute, wherever they end.

    Attributes:
        equations: each with the scope that it is in.
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
        """Reads the equations of a jaxpr; returns its results."""

        def known(var: Any) -> Any:
            return var if is_literal(var) else names[var]

        for var, value in zip(jaxpr.constvars, consts, strict=True):
            names.setdefault(var, Var(var.aval, -1 - len(self.consts)))
            self.consts[names[var]] = value
        for equation in jaxpr.eqns:
            own, invars = _scope_of(equation, scope), [known(var) for var in equation.invars]
            if equation.primitive.name in _CALLS:
                called = equation.params["jaxpr"]
                inner = dict(zip(called.jaxpr.invars, invars, strict=True))
                outvars = self._read(called.jaxpr, called.consts, inner, own)
            else:
                number = len(self.equations)
                outvars: list[Any] = [
                    Var(var.aval, _MANY * number + n) for n, var in enumerate(equation.outvars)
                ]
                read = Equation(
                    equation.primitive, equation.params, invars, outvars, equation.effects
                )
                self.equations.append((read, own))
            names.update(zip(equation.outvars, outvars, strict=True))
        return [known(var) for var in jaxpr.outvars]


def live(flat: Flat) -> list[tuple[Equation, str]]:
    """Returns the equations that a result or an effect depends on, but for what only prints."""
    needed = {var for var in flat.outvars if not is_literal(var)}
    kept = []
    for equation, own in reversed(flat.equations):
        prints = equation.primitive.name.startswith("debug_")
        is_needed = equation.effects or any(var in needed for var in equation.outvars)
        if is_needed and not prints:
            kept.append((equation, own))
            needed.update(var for var in equation.invars if not is_literal(var))
    return kept[::-1]


def _scope_of(equation: Any, scope: str) -> str:
    return _innermost(equation.source_info.name_stack) or scope


@functools.lru_cache(maxsize=4096)
def _innermost(stack: Any) -> str:
    """Returns the last of our scopes in a stack of names; empty without."""
    known = [name for name in _SCOPE.findall(str(stack)) if name in SCOPES]
    return known[-1] if known else ""


def is_literal(var: Any) -> bool:
    """Returns whether an operand is a number that stands in the program."""
    return hasattr(var, "val")
