"""Evaluates a function with rules for some of its operations, such as another dtype of products.

The function is traced to a jaxpr, which is evaluated again. Operations with a rule are replaced;
all others run as they are, so without rules the results are bit-equal. Loops, conditionals,
`jax.jit`, `jax.checkpoint`, `shard_map` and functions with custom derivatives are entered if they
contain an operation with a rule. Derivatives are taken through the rewritten function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax.extend import source_info_util
from jax.extend.core import Literal, jaxprs_in_params

Sources: TypeAlias = frozenset[str] | None
"""Names of the arrays that a value is computed from; None if it also depends on unnamed ones."""

Rule: TypeAlias = Callable[[Any, list[Any], list[Sources]], Sequence[Any]]
"""`(equation, operands, their sources) -> results`, of the equation's shapes and dtypes."""

_NOTHING: Sources = frozenset()


class Rewriter:
    """Evaluates functions with rules. Create one per trace.

    Args:
        rules: rules by name of the primitive, such as `dot_general`.
    """

    def __init__(self, rules: Mapping[str, Rule]) -> None:
        self._rules = rules
        self._has_rule: dict[int, tuple[Any, bool]] = {}
        self._compiled: dict[Any, tuple[Any, Callable[..., Any]]] = {}

    def __call__(
        self, function: Callable[..., Any], *args: Any, sources: Sequence[Sources] = ()
    ) -> Any:
        """Returns `function(*args)`, evaluated with the rules.

        Args:
            function: a function of pytrees of arrays that returns one; it may close over arrays.
            *args: its arguments.
            sources: the sources of the leaves of `args`, in order; unnamed by default.
        """
        closed, form = jax.make_jaxpr(function, return_shape=True)(*args)
        leaves = jax.tree.leaves(args)
        results = self.evaluate(closed, leaves, list(sources) or [None] * len(leaves))
        return jax.tree.unflatten(jax.tree.structure(form), results)

    def evaluate(self, jaxpr: Any, args: Iterable[Any], sources: Iterable[Sources]) -> list[Any]:
        """Returns the results of a jaxpr for arguments with these sources."""
        plain, consts = getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())
        values = dict(zip(plain.constvars, consts, strict=True))
        values.update(zip(plain.invars, args, strict=True))
        known: dict[Any, Sources] = dict(zip(plain.invars, sources, strict=True))

        def value_of(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else values[atom]

        def sources_of(atom: Any) -> Sources:
            # Constants of an outer trace are the inputs of the model, or other activations.
            return _NOTHING if isinstance(atom, Literal) else known.get(atom)

        for equation in plain.eqns:
            operands = [value_of(atom) for atom in equation.invars]
            origins = [sources_of(atom) for atom in equation.invars]
            with _place_of(equation), equation.ctx.manager:
                results = self._results(equation, operands, origins)
            values.update(zip(equation.outvars, results, strict=True))
            known.update(dict.fromkeys(equation.outvars, _joined(origins)))
        return [value_of(atom) for atom in plain.outvars]

    def _results(self, equation: Any, operands: list[Any], sources: list[Sources]) -> Sequence[Any]:
        name = equation.primitive.name
        if name in self._rules:
            return self._rules[name](equation, operands, sources)
        enter = _ENTERED.get(name)
        if enter is None or not self._concerns(equation):
            return bound(equation, operands)
        return enter(self, equation, operands, sources)

    def _concerns(self, equation: Any) -> bool:
        """Returns whether a program inside an equation has an operation with a rule."""
        return any(map(self._contains, jaxprs_in_params(equation.params)))

    def _contains(self, jaxpr: Any) -> bool:
        if id(jaxpr) not in self._has_rule:
            found = any(
                each.primitive.name in self._rules or self._concerns(each) for each in jaxpr.eqns
            )
            self._has_rule[id(jaxpr)] = jaxpr, found
        return self._has_rule[id(jaxpr)][1]

    def _jit(self, equation: Any, operands: list[Any], sources: list[Sources]) -> list[Any]:
        inner, params = equation.params["jaxpr"], equation.params
        # A program that is called often is traced and lowered once, as without the rules.
        key = id(inner), tuple(sources)
        if key not in self._compiled:

            def run(*args: Any) -> list[Any]:
                return self.evaluate(inner, args, sources)

            run.__name__ = run.__qualname__ = params["name"]
            self._compiled[key] = inner, jax.jit(run, inline=params["inline"], **_given(params))
        return self._compiled[key][1](*operands)

    def _call(self, equation: Any, operands: list[Any], sources: list[Sources]) -> list[Any]:
        return self.evaluate(equation.params["call_jaxpr"], operands, sources)

    def _remat(self, equation: Any, operands: list[Any], sources: list[Sources]) -> list[Any]:
        params = equation.params

        def run(*args: Any) -> list[Any]:
            return self.evaluate(params["jaxpr"], args, sources)

        again = jax.checkpoint(run, prevent_cse=params["prevent_cse"], policy=params["policy"])
        return again(*operands)

    def _scan(self, equation: Any, operands: list[Any], sources: list[Sources]) -> list[Any]:
        params = equation.params
        plain = getattr(params["jaxpr"], "jaxpr", params["jaxpr"])
        num_carry = _num_same(equation.outvars, plain.outvars)
        num_consts = _num_same(equation.invars, plain.invars) - num_carry
        before = num_consts + num_carry
        inner = [*sources[:num_consts], *[None] * num_carry, *sources[before:]]

        def body(carry: list[Any], columns: list[Any]) -> tuple[list[Any], list[Any]]:
            args = [*operands[:num_consts], *carry, *columns]
            results = self.evaluate(params["jaxpr"], args, inner)
            return results[:num_carry], results[num_carry:]

        carry, stacked = jax.lax.scan(
            body,
            operands[num_consts:before],
            operands[before:],
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*carry, *stacked]

    def _while(self, equation: Any, operands: list[Any], sources: list[Sources]) -> list[Any]:
        params = equation.params
        first = params["cond_nconsts"]
        second = first + params["body_nconsts"]
        unknown: list[Sources] = [None] * (len(operands) - second)

        def condition(carry: list[Any]) -> Any:
            args, inner = [*operands[:first], *carry], [*sources[:first], *unknown]
            return self.evaluate(params["cond_jaxpr"], args, inner)[0]

        def body(carry: list[Any]) -> list[Any]:
            args, inner = [*operands[first:second], *carry], [*sources[first:second], *unknown]
            return self.evaluate(params["body_jaxpr"], args, inner)

        return jax.lax.while_loop(condition, body, operands[second:])

    def _cond(self, equation: Any, operands: list[Any], sources: list[Sources]) -> list[Any]:
        def branch(jaxpr: Any) -> Callable[..., Any]:
            return lambda *args: self.evaluate(jaxpr, args, sources[1:])

        branches = [branch(each) for each in equation.params["branches"]]
        return jax.lax.switch(operands[0], branches, *operands[1:])

    def _shard_map(self, equation: Any, operands: list[Any], sources: list[Sources]) -> list[Any]:
        params = equation.params

        def run(*args: Any) -> tuple[Any, ...]:
            return tuple(self.evaluate(params["jaxpr"], args, sources))

        mapped = jax.shard_map(
            run,
            mesh=params["mesh"],
            in_specs=params["in_specs"],
            out_specs=params["out_specs"],
            check_vma=params["check_vma"],
            axis_names=params["newly_manual_axes"],
        )
        return list(mapped(*operands))

    def _custom_jvp(self, equation: Any, operands: list[Any], sources: list[Sources]) -> list[Any]:
        @jax.custom_jvp
        def run(*args: Any) -> list[Any]:
            return self.evaluate(equation.params["call_jaxpr"], args, sources)

        @run.defjvp
        def derivative(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
            moving = [n for n, each in enumerate(tangents) if each.dtype != jax.dtypes.float0]

            def both(primals: tuple[Any, ...], moved: list[Any]) -> Any:
                all_tangents = list(tangents)
                for n, tangent in zip(moving, moved, strict=True):
                    all_tangents[n] = tangent
                return jax.jvp(_original(equation), primals, tuple(all_tangents))

            return self(both, primals, [tangents[n] for n in moving])

        return run(*operands)

    def _custom_vjp(self, equation: Any, operands: list[Any], sources: list[Sources]) -> list[Any]:
        @jax.custom_vjp
        def run(*args: Any) -> list[Any]:
            return self.evaluate(equation.params["call_jaxpr"], args, sources)

        def forward(*args: Any) -> Any:
            return self(lambda *args: jax.vjp(_original(equation), *args), *args)

        def backward(pullback: Any, cotangents: list[Any]) -> tuple[Any, ...]:
            floats: list[int] = []

            def pulled(pullback: Any, cotangents: list[Any]) -> list[Any]:
                found = pullback(cotangents)
                floats[:] = [n for n, x in enumerate(found) if x.dtype != jax.dtypes.float0]
                return [found[n] for n in floats]

            found = self(pulled, pullback, cotangents)
            of_input = dict(zip(floats, found, strict=True))
            return tuple(of_input.get(n) for n in range(len(operands)))

        run.defvjp(forward, backward)
        return run(*operands)


_ENTERED: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("jit", "pjit"), Rewriter._jit),
    **dict.fromkeys(("closed_call", "core_call"), Rewriter._call),
    **dict.fromkeys(("remat", "remat2", "checkpoint"), Rewriter._remat),
    "scan": Rewriter._scan,
    "while": Rewriter._while,
    "cond": Rewriter._cond,
    "shard_map": Rewriter._shard_map,
    "custom_jvp_call": Rewriter._custom_jvp,
    "custom_vjp_call": Rewriter._custom_vjp,
}


def bound(equation: Any, operands: Sequence[Any], **changes: Any) -> Sequence[Any]:
    """Returns the results of an equation for other operands, with some parameters changed."""
    primitive = equation.primitive
    params = primitive.get_bind_params({**equation.params, **changes})
    results = primitive.bind(*operands, **params)
    return results if primitive.multiple_results else [results]


def _original(equation: Any) -> Callable[..., Sequence[Any]]:
    """Returns an equation as a function, with its own derivatives."""
    return lambda *operands: list(bound(equation, operands))


def _place_of(equation: Any) -> Any:
    """Returns a context in which operations have the source line and the scope of an equation."""
    info = equation.source_info
    stack = source_info_util.current_name_stack() + info.name_stack
    return source_info_util.user_context(info.traceback, name_stack=stack)


def _joined(sources: Sequence[Sources]) -> Sources:
    named = [each for each in sources if each is not None]
    return frozenset().union(*named) if len(named) == len(sources) else None


def _num_same(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    """Returns the number of arrays that a scan neither slices nor stacks."""
    pairs = zip(outer, inner, strict=True)
    return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in pairs)


def _given(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the shardings that a user gave to `jax.jit`."""

    def given(values: Sequence[Any]) -> list[Any]:
        return [None if type(each).__name__ == "UnspecifiedValue" else each for each in values]

    before, after = (given(params[name]) for name in ("in_shardings", "out_shardings"))
    found: dict[str, Any] = {}
    if any(each is not None for each in before):
        found["in_shardings"] = tuple(before)
    if any(each is not None for each in after):
        found["out_shardings"] = after
    return found
