"""Finds the operation that produced a non-finite number.

The program runs one operation at a time. Each array with NaN or inf carries the origin of these, so
the operation found has caused the result, and not merely preceded it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from distaff.core.typing import PyTree
from distaff.errors import leaf_name
from distaff.run.diagnosis import place

_CALLS = {
    **dict.fromkeys(("jit", "pjit", "remat2", "checkpoint"), "jaxpr"),
    **dict.fromkeys(("core_call", "closed_call", "custom_jvp_call"), "call_jaxpr"),
    "custom_vjp_call": "call_jaxpr",
}
"""Operations that only call a function, with the parameter that holds it."""

_ELEMENTWISE = {"add", "add_any", "sub", "mul", "div", "select_n", "log", "sqrt", "rsqrt"}
"""Operations whose result at an index depends only on the operands at that index."""

OUT_OF_RANGE = "an index is out of range"
"""The note of a NaN that fills in for an entry out of range."""

_SHOWN_OPERANDS = 3
_FEW = 2**16


class Origin(NamedTuple):
    """The origin of non-finite numbers.

    Attributes:
        order: its position among all origins of a program.
        kind: `"NaN"` or `"inf"`.
        operation: JAX name, such as `"log"`; empty for an argument or a constant.
        operands: ranges of the operands, such as `"-103 to -98"`.
        scope: scope of the module, such as `"MLP/Dense_0"`; empty outside of modules.
        line: line of the user's code, such as `"model.py:31"`; empty if in libraries only.
        argument: name of the argument's leaf; empty for other origins.
        cause: the origin of the inf that a NaN was computed from, if any.
        note: further information on the operation, as a clause; or empty.
    """

    order: int
    kind: str
    operation: str = ""
    operands: str = ""
    scope: str = ""
    line: str = ""
    argument: str = ""
    cause: Origin | None = None
    note: str = ""

    @property
    def root(self) -> Origin:
        """The cause, if known and not a constant; else this origin."""
        cause = self.cause
        return self if cause is None or not (cause.operation or cause.argument) else cause

    def __str__(self) -> str:
        root = self.root
        if root is not self:
            return f"{root}; {self.operation} turns it into {self.kind}{self._place()}"
        if not self.operation:
            return f"{self.kind} in {repr(self.argument) if self.argument else 'a constant'}"
        note = f": {self.note}" * bool(self.note)
        return f"{self.operation}({self.operands}), which is {self.kind}{self._place()}{note}"

    def _place(self) -> str:
        scope, line = f" in {self.scope}" * bool(self.scope), f" at {self.line}" * bool(self.line)
        return f",{scope}{line}" if scope or line else ""


def origin_of(
    function: Callable[..., PyTree], arguments: Mapping[str, PyTree], *, deadline: float
) -> Origin | None:
    """Returns the origin of non-finite values in the result of a function.

    Loops, conditionals and nested functions are traced inside. `shard_map` and kernels count as one
    operation.

    Args:
        function: a function that JAX can trace.
        arguments: arguments by keyword. An origin's `argument` starts with the keyword.
        deadline: time limit, as `time.monotonic`.

    Returns:
        The earliest origin; None if the result is finite.

    Raises:
        TimeoutError: the deadline has passed.
    """
    jaxpr = jax.make_jaxpr(lambda arguments: function(**arguments))(dict(arguments))
    walk = _Replay(deadline)
    values = [
        walk.input(jnp.asarray(leaf), leaf_name(path))
        for path, leaf in jax.tree.leaves_with_path(dict(arguments))
    ]
    return _earliest(
        origin for value in walk.run(jaxpr, values) for origin in (value.nan, value.inf)
    )


class _Known(NamedTuple):
    """An array with the origins of its NaN and its inf; None if it has none."""

    array: Any
    nan: Origin | None = None
    inf: Origin | None = None


class _Replay:
    """Runs a program operation by operation, and tracks origins."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self._count = 0
        self._programs: dict[int, tuple[Any, Callable[..., Any]]] = {}

    def input(self, array: Any, argument: str = "") -> _Known:
        """Returns an input: a constant if it has no name, else an argument."""
        nan, inf = (
            self._origin(kind=kind, argument=argument) if is_there else None
            for kind, is_there in zip(("NaN", "inf"), _kinds(array), strict=True)
        )
        return _Known(array, nan, inf)

    def run(self, jaxpr: Any, args: Sequence[_Known], outer: tuple[Any, ...] = ()) -> list[_Known]:
        """Runs a jaxpr; `outer` holds the equations of the enclosing calls, outermost first."""
        jaxpr, constants = _opened(jaxpr), getattr(jaxpr, "consts", ())
        values = dict(zip(jaxpr.constvars, map(self.input, constants), strict=True))
        values.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> _Known:
            return self.input(atom.val) if isinstance(atom, jex.Literal) else values[atom]

        for equation, unused in _needed(jaxpr):
            self._check_time()
            results = self._results(equation, [read(atom) for atom in equation.invars], outer)
            values.update(zip(equation.outvars, results, strict=True))
            for variable in unused:
                values.pop(variable, None)
        return [read(atom) for atom in jaxpr.outvars]

    def _results(
        self, equation: Any, operands: list[_Known], outer: tuple[Any, ...]
    ) -> list[_Known]:
        name, params, path = equation.primitive.name, equation.params, (*outer, equation)
        if name in _CALLS:
            body = params[_CALLS[name]]
            is_good = all(operand.nan is operand.inf is None for operand in operands)
            # One program compiles faster. It is traced inside only if its result is bad.
            is_program = is_good and name in ("jit", "pjit")
            return (self._pass if is_program else self.run)(body, operands, path)
        if name == "cond":
            branches = params["branches"]
            chosen = np.clip(int(operands[0].array), 0, len(branches) - 1)
            return self.run(branches[chosen], operands[1:], path)
        with equation.ctx.manager:
            arrays = equation.primitive.bind(
                *(operand.array for operand in operands),
                **equation.primitive.get_bind_params(params),
            )
        arrays = arrays if equation.primitive.multiple_results else [arrays]
        loop = {"scan": self._scan, "while": self._while}.get(name)
        if loop is None or not _any_bad(arrays):
            return [self._value(array, operands, path) for array in arrays]
        known = loop(params, operands, path)
        return [
            self._value(array, operands, path, *each[1:])
            for array, each in zip(arrays, known, strict=True)
        ]

    def _value(
        self,
        array: Any,
        operands: Sequence[_Known],
        path: tuple[Any, ...],
        nan: Origin | None = None,
        inf: Origin | None = None,
    ) -> _Known:
        """Returns a result, whose origins are given, inherited from operands, or new."""
        has_nan, has_inf = _kinds(array)
        passes = functools.partial(_passes, path[-1].primitive.name in _ELEMENTWISE, array)
        if has_nan and nan is None:
            nan = _earliest(x.nan for x in operands if passes(np.isnan, x.array, np.isnan))
        if has_nan and nan is None:
            cause = _earliest(x.inf for x in operands if passes(np.isnan, x.array, np.isinf))
            nan = self._made("NaN", operands, path, cause)
        if has_inf and inf is None:
            inf = _earliest(x.inf for x in operands if passes(np.isinf, x.array, np.isinf))
        if has_inf and inf is None:
            inf = self._made("inf", operands, path)
        return _Known(array, nan if has_nan else None, inf if has_inf else None)

    def _scan(
        self, params: Mapping[str, Any], operands: list[_Known], path: tuple[Any, ...]
    ) -> list[_Known]:
        body = params["jaxpr"]
        jaxpr = _opened(body)
        # The parameters with these counts differ between JAX versions.
        num_rows = sum(
            jnp.ndim(operand.array) > len(variable.aval.shape)
            for operand, variable in zip(operands, jaxpr.invars, strict=True)
        )
        outputs = path[-1].outvars
        num_carried = sum(
            len(outer.aval.shape) == len(inner.aval.shape)
            for outer, inner in zip(outputs, jaxpr.outvars, strict=True)
        )
        fixed, rows = operands[: len(operands) - num_rows], operands[len(operands) - num_rows :]
        constants = fixed[: len(fixed) - num_carried]
        known = fixed[len(constants) :] + [_Known(None)] * (len(outputs) - num_carried)
        order = range(params["length"])
        for index in reversed(order) if params["reverse"] else order:
            here = [_row(row, index) for row in rows]
            results = self._pass(body, [*constants, *known[:num_carried], *here], path)
            known = results[:num_carried] + [
                _Known(None, _earliest((old.nan, new.nan)), _earliest((old.inf, new.inf)))
                for old, new in zip(known[num_carried:], results[num_carried:], strict=True)
            ]
        return known

    def _while(
        self, params: Mapping[str, Any], operands: list[_Known], path: tuple[Any, ...]
    ) -> list[_Known]:
        num_tested, num_fixed = params["cond_nconsts"], params["body_nconsts"]
        tested, fixed = operands[:num_tested], operands[num_tested : num_tested + num_fixed]
        carried = operands[num_tested + num_fixed :]
        test = self._program(params["cond_jaxpr"])
        while test(*(each.array for each in tested + carried))[0]:
            carried = self._pass(params["body_jaxpr"], fixed + carried, path)
        return carried

    def _pass(self, body: Any, args: list[_Known], path: tuple[Any, ...]) -> list[_Known]:
        """Runs a function as one program, and again step by step if its results are bad."""
        self._check_time()
        arrays = self._program(body)(*(each.array for each in args))
        return self.run(body, args, path) if _any_bad(arrays) else [_Known(x) for x in arrays]

    def _program(self, body: Any) -> Callable[..., Any]:
        if id(body) not in self._programs:
            self._programs[id(body)] = body, jax.jit(jex.jaxpr_as_fun(body))
        return self._programs[id(body)][1]

    def _check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise TimeoutError("The origin of a number was not found in time.")

    def _made(
        self,
        kind: str,
        operands: Sequence[_Known],
        path: tuple[Any, ...],
        cause: Origin | None = None,
    ) -> Origin:
        return self._origin(
            kind=kind,
            operation=path[-1].primitive.name,
            operands=_ranges([operand.array for operand in operands]),
            scope=place.scope(path),
            line=place.line(path),
            cause=cause,
            note=_index_note(path[-1], operands) if kind == "NaN" else "",
        )

    def _origin(self, **facts: Any) -> Origin:
        self._count += 1
        return Origin(self._count, **facts)


@jax.jit
def _has_nan_and_inf(array: jax.Array) -> jax.Array:
    return jnp.stack([jnp.isnan(array).any(), jnp.isinf(array).any()])


def _kinds(array: Any) -> tuple[bool, bool]:
    """Returns whether an array holds NaN, and whether it holds inf."""
    if not jnp.issubdtype(jnp.result_type(array), jnp.inexact):
        return False, False
    if np.size(array) < _FEW:  # Copying these is faster than compiling for their shape.
        return bool(np.isnan(array).any()), bool(np.isinf(array).any())
    has_nan, has_inf = np.asarray(_has_nan_and_inf(array))
    return bool(has_nan), bool(has_inf)


def _any_bad(arrays: Iterable[Any]) -> bool:
    return any(any(_kinds(array)) for array in arrays)


def _index_note(equation: Any, operands: Sequence[_Known]) -> str:
    """Returns a note on a gather with indices out of range."""
    if equation.primitive.name != "gather":
        return ""
    entries, indices = (np.asarray(operand.array) for operand in operands[:2])
    sizes = [entries.shape[axis] for axis in equation.params["dimension_numbers"].start_index_map]
    for column, size in enumerate(sizes):
        found = indices[..., column]
        if found.size and (found.min() < 0 or found.max() >= size):
            span = f"indices span {found.min()} to {found.max()}"
            return f"{OUT_OF_RANGE}: {span}, but the axis has {size} entries"
    return ""


def _passes(
    is_elementwise: bool,
    result: Any,
    is_result_bad: Callable[[Any], np.ndarray],
    operand: Any,
    is_bad: Callable[[Any], np.ndarray],
) -> bool:
    """Whether bad values of a result may come from bad values of an operand."""
    is_float = jnp.issubdtype(jnp.result_type(operand), jnp.inexact)
    if not (is_elementwise and is_float and np.shape(operand) == np.shape(result)):
        return is_float
    return bool((is_result_bad(result) & is_bad(operand)).any())


def _row(stack: _Known, index: int) -> _Known:
    array = jax.lax.dynamic_index_in_dim(stack.array, index, keepdims=False)
    has_nan, has_inf = _kinds(array)
    return _Known(array, stack.nan if has_nan else None, stack.inf if has_inf else None)


def _earliest(origins: Iterable[Origin | None]) -> Origin | None:
    there = [origin for origin in origins if origin is not None]
    return min(there, key=lambda origin: origin.order, default=None)


def _opened(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _needed(jaxpr: Any) -> list[tuple[Any, list[Any]]]:
    """Returns the equations that the results depend on, with the variables unused afterwards."""
    used = {atom for atom in jaxpr.outvars if not isinstance(atom, jex.Literal)}
    needed = []
    for equation in reversed(jaxpr.eqns):
        if used.isdisjoint(equation.outvars):
            continue
        read = {atom for atom in equation.invars if not isinstance(atom, jex.Literal)}
        needed.append((equation, [*(read - used), *set(equation.outvars) - used]))
        used |= read
    return needed[::-1]


def _ranges(arrays: Sequence[Any]) -> str:
    """Returns the minimum and maximum of each float operand."""
    floats = [x for x in arrays if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
    more = ["..."] * (len(floats) > _SHOWN_OPERANDS)
    return ", ".join([*map(_range, floats[:_SHOWN_OPERANDS]), *more])


def _range(array: Any) -> str:
    numbers = np.asarray(array).astype(np.float64)
    numbers = numbers[~np.isnan(numbers)]
    if not numbers.size:
        return "nothing"
    low, high = numbers.min(), numbers.max()
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
