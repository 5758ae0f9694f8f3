"""Propagates the places of the examples through a jaxpr.

The program is not run. Everything that is not known to keep examples apart counts as mixing them,
so that an answer "apart" is never wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from distaff.step.independence.constants import folded
from distaff.step.independence.place import FREE, MIXED, SINGLE, AxisKind, Place, combined, rows
from distaff.step.independence.rules import RULES

_CALLS = frozenset(
    [
        *("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "composite"),
        *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
    ]
)
_JAXPRS = ("jaxpr", "call_jaxpr", "fun_jaxpr")


class Walk:
    """Propagates places through programs that take a batch.

    Attributes:
        numbers: constants in equations that depend on examples.
        other_numbers: constants in other floating-point equations.
    """

    def __init__(self) -> None:
        self.numbers: list[float] = []
        self.other_numbers: list[float] = []

    def __call__(self, closed: Any, places: Sequence[Place]) -> list[Place]:
        """Returns the places of a program's outputs.

        Args:
            closed: the program, as `jax.make_jaxpr` returns it.
            places: the places of its inputs.
        """
        known = {}
        for var, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
            known[var] = _constant(value)
        known.update(zip(closed.jaxpr.invars, places, strict=True))

        def place_of(atom: Any) -> Place:
            return _constant(atom.val) if isinstance(atom, Literal) else known[atom]

        for equation in closed.jaxpr.eqns:
            before = [place_of(atom) for atom in equation.invars]
            after = self._propagate(equation, before)
            known.update(zip(equation.outvars, after, strict=True))
        return [place_of(atom) for atom in closed.jaxpr.outvars]

    def _propagate(self, equation: Any, places: list[Place]) -> list[Place]:
        name, count = equation.primitive.name, len(equation.outvars)
        inner = called(equation)
        if inner is not None:
            return self(inner, places)
        if name in _LOOPS:
            return _LOOPS[name](self, equation, places)
        if not count:
            return []
        has_examples = any(place.has_examples for place in places)
        values = [place.value for place in places if place.value is not None]
        numbers = [value.item() for value in values if value.size == 1]
        if has_examples:
            self.numbers += numbers
        elif _is_inexact(equation.outvars[0]):
            self.other_numbers += numbers
        if not has_examples:
            return [folded(equation, places)] if count == 1 else [FREE] * count
        if any(place.kind is AxisKind.MIXED for place in places) or name not in RULES:
            return [MIXED] * count
        if all(place.kind in (AxisKind.FREE, AxisKind.SINGLE) for place in places):
            return [SINGLE] * count
        found = RULES[name](equation, places)
        return found if isinstance(found, list) else [found] * count

    def scan(self, equation: Any, places: list[Place]) -> list[Place]:
        """Returns the places of the outputs of a scan, over time or over the examples."""
        body = equation.params["jaxpr"]
        num_carry = _num_same(equation.outvars, body.jaxpr.outvars)
        num_consts = _num_same(equation.invars, body.jaxpr.invars) - num_carry
        consts, carry = places[:num_consts], places[num_consts : num_consts + num_carry]
        columns = places[num_consts + num_carry :]
        is_over = any(p.kind is AxisKind.ROWS and p.axis == 0 for p in columns)
        sliced = [_sliced(place) for place in columns]
        if is_over:
            consts = [MIXED if place.has_examples else place for place in consts]
        carry, stacked = self._fixed_point(
            lambda carry: self(body, [*consts, *carry, *sliced]), carry, is_over=is_over
        )
        return [*carry, *(_stacked(place, is_over=is_over) for place in stacked)]

    def loop(self, equation: Any, places: list[Place]) -> list[Place]:
        """Returns the places of the outputs of a `while` loop."""
        params = equation.params
        num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
        cond, body = places[:num_cond], places[num_cond : num_cond + num_body]
        carry, _ = self._fixed_point(
            lambda carry: self(params["body_jaxpr"], [*body, *carry]),
            places[num_cond + num_body :],
            is_over=False,
        )
        [condition] = self(params["cond_jaxpr"], [*cond, *carry])
        return [_select(condition, place) for place in carry]

    def cond(self, equation: Any, places: list[Place]) -> list[Place]:
        """Returns the places of the outputs of a `cond` or `switch`."""
        found = [self(branch, places[1:]) for branch in equation.params["branches"]]
        joined = [combined(each) for each in zip(*found, strict=True)]
        return [_select(places[0], place) for place in joined]

    def _fixed_point(
        self, body: Callable[[list[Place]], list[Place]], carry: list[Place], *, is_over: bool
    ) -> tuple[list[Place], list[Place]]:
        """Repeats the body of a loop until the places of its carry no longer change."""
        carry = [place.plain() for place in carry]
        while True:
            found = body(carry)
            after = [combined(pair) for pair in zip(carry, found[: len(carry)], strict=True)]
            if is_over:
                after = [MIXED if place.has_examples else place for place in after]
            if after == carry:
                return carry, found[len(carry) :]
            carry = after


_LOOPS: dict[str, Any] = {"scan": Walk.scan, "while": Walk.loop, "cond": Walk.cond}


def called(equation: Any) -> Any:
    """Returns the program that an equation calls with its own operands; None without one."""
    if equation.primitive.name not in _CALLS:
        return None
    found = [equation.params[name] for name in _JAXPRS if name in equation.params]
    if not found:
        return None
    closed = found[0] if hasattr(found[0], "consts") else ClosedJaxpr(found[0], ())
    return closed if len(closed.jaxpr.invars) == len(equation.invars) else None


def _num_same(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    """Returns the number of arrays that a scan neither slices nor stacks."""
    pairs = zip(outer, inner, strict=True)
    return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in pairs)


def _is_inexact(var: Any) -> bool:
    return jnp.issubdtype(getattr(var.aval, "dtype", np.int32), jnp.inexact)


def _constant(value: Any) -> Place:
    is_number = isinstance(value, np.ndarray | np.generic | bool | int | float)
    return FREE._replace(value=np.asarray(value)) if is_number and np.size(value) <= 1 else FREE


def _sliced(place: Place) -> Place:
    """Returns the place of a slice that a scan takes from an array."""
    if place.kind is not AxisKind.ROWS:
        return place.plain()
    if place.axis:
        return rows(place.axis - 1, place.block)
    return SINGLE if place.block == 1 else MIXED


def _stacked(place: Place, *, is_over: bool) -> Place:
    """Returns the place of an output that a scan stacks."""
    if place.kind is AxisKind.ROWS:
        return rows(place.axis + 1, place.block)
    return rows(0) if place.kind is AxisKind.SINGLE and is_over else place.plain()


def _select(chooser: Place, place: Place) -> Place:
    """Returns the place of a result that a condition selects."""
    if not chooser.has_examples:
        return place
    is_single = chooser.kind is AxisKind.SINGLE and place.kind in (AxisKind.FREE, AxisKind.SINGLE)
    return SINGLE if is_single else MIXED
