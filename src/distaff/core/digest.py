"""Computes digests of programs, functions and arrays that are equal in every process.

The digest of a program covers how its values depend on each other, and the bytes of its constants.
It ignores the order of independent equations, names of functions, source locations, shardings and
dead code.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from distaff.core.equations import Equation, Flat, is_literal, live

REST = "rest"
"""The part of a program outside of all scopes."""

_ADDRESS = re.compile(r"( at)? 0x[0-9a-fA-F]+")
_MAX_NUMBERS = 64
_MAX_DEPTH = 6
_MAX_TERMS = 256
_MAX_BYTES, _PIECES, _ROWS = 2**22, 509, 64

_HOW_IT_RUNS = {
    *("name", "inline", "keep_unused", "donated_invars", "compiler_options_kvs", "ctx_mesh"),
    *("in_shardings", "out_shardings", "in_layouts", "out_layouts", "sharding", "out_sharding"),
    *("jvp_jaxpr_fun", "jvp_jaxpr_thunk", "fwd_jaxpr_thunk", "bwd", "out_trees", "debug_info"),
    *("policy", "prevent_cse", "name_and_src_info", "metadata", "backend", "device", "devices"),
}
"""Parameters of equations that do not change the values: how they are run, and derivative rules
that are already traced."""


class Part(NamedTuple):
    """The digest of a part of a program.

    Attributes:
        form: digest of its operations, without scalar literals.
        whole: digest with them.
        numbers: its distinct scalar literals, as text, in order of appearance.
    """

    form: str
    whole: str
    numbers: tuple[str, ...]


class Program(NamedTuple):
    """Digests of a program: of all its results, and of its parts by scope.

    `REST` is the part outside all scopes.
    """

    whole: str
    parts: dict[str, Part]


def program_digest(function: Callable[..., Any], *arguments: Any) -> Program:
    """Traces a pure function, or reuses JAX's cached trace, and returns its digest.

    The arguments are pytrees of arrays, or of `jax.ShapeDtypeStruct`; the function is not run.
    """
    traced = jax.make_jaxpr(function)(*arguments)
    return _Digester().program(traced.jaxpr, traced.consts)


def digest(*values: Any) -> str:
    """Returns a short digest of values: numbers, strings, arrays, containers and functions."""
    return _hashed(*map(_token, values))


def sample_digest(array: Any) -> str:
    """Returns the dtype, shape and digest of an array or random keys; samples a large array."""
    if isinstance(array, jax.Array) and jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        return _array(array)
    host = np.asarray(array)
    form = f"{host.dtype}{host.shape}"
    if host.nbytes > _MAX_BYTES and not host.flags.c_contiguous:
        host = host[np.linspace(0, len(host) - 1, min(len(host), _ROWS)).astype(int)]
    data = _bytes(host)
    if data.size > _MAX_BYTES:
        pieces = data[: data.size - data.size % _PIECES].reshape(_PIECES, -1)
        data = pieces[:, : _MAX_BYTES // _PIECES]
    return f"{form}{_hashed_bytes(data.tobytes())}"


class _Digester:
    """Computes the digests of a program and of the programs nested in it."""

    def __init__(self) -> None:
        self._programs: dict[tuple[int, str], tuple[Any, Program]] = {}
        self._terms: dict[str, tuple[str, list[str]]] = {}

    def program(self, jaxpr: Any, consts: Iterable[Any], scope: str = REST) -> Program:
        """Returns the digest of a jaxpr with the values of its constants."""
        values = {var: f"i{n} {_form(var)}" for n, var in enumerate(jaxpr.invars)}
        flat = Flat(jaxpr, consts, scope)
        held = {var: _token(value) for var, value in flat.consts.items()}
        values |= held
        equations = live(flat)
        exported = _exported(flat, equations)
        parts: dict[str, _Collected] = {}
        effects = []
        for equation, own in equations:
            inner, head = self._parameters(equation, own)
            operands = [_operand(values, each) for each in equation.invars]
            whole = self._result(head, [each.whole for each in inner], operands)
            values |= {var: f"{whole}.{n}" for n, var in enumerate(equation.outvars)}
            if equation.effects:
                effects.append(whole)
            part = parts.setdefault(own, _Collected(held))
            tokens = self._add(equation, head, inner, part, own)
            if exported.intersection(equation.outvars) or equation.effects:
                part.tokens.append(tokens)
            _add_others(head, inner, own, parts)
        results = [_operand(values, each) for each in flat.outvars]
        found = {name: each.part() for name, each in parts.items() if each.tokens}
        return Program(_hashed(*results, "effects", *sorted(effects)), found)

    def _parameters(self, equation: Any, scope: str) -> tuple[list[Program], str]:
        """Returns the programs nested in an equation, and its other parameters as text."""
        inner, static = [], [equation.primitive.name]
        for name, value in sorted(equation.params.items()):
            if name in _HOW_IT_RUNS:
                continue
            values = value if isinstance(value, tuple | list) else (value,)
            programs = [each for each in values if hasattr(each, "eqns")]
            inner += [self._inner(each, scope) for each in programs]
            static.append(name if programs else f"{name}={_token(value)}")
        return inner, " ".join(static)

    def _inner(self, jaxpr: Any, scope: str) -> Program:
        key = (id(jaxpr), scope)
        if key not in self._programs:
            plain, consts = getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())
            self._programs[key] = jaxpr, self.program(plain, consts, scope)
        return self._programs[key][1]

    def _result(self, head: str, inner: list[str], operands: list[str]) -> str:
        """Returns the token of a result; sums and products ignore the order of operands."""
        operation = head.partition(" ")[0].removesuffix("_any")
        if operation not in ("add", "mul"):
            return _hashed(head, *inner, *operands)
        terms = []
        for operand in operands:
            known, its_terms = self._terms.get(operand, ("", []))
            terms += its_terms if known == operation else [operand]
        if len(terms) > _MAX_TERMS:
            terms = operands
        result = _hashed(operation, *sorted(terms))
        self._terms[f"{result}.0"] = operation, terms
        return result

    def _add(
        self, equation: Any, head: str, inner: list[Program], part: _Collected, own: str
    ) -> tuple[str, str]:
        """Adds an equation to its part; returns the tokens of its results in that part."""
        programs = [each.parts[own] for each in inner if own in each.parts]
        part.numbers.update(dict.fromkeys(n for each in programs for n in each.numbers))
        operands = [part.operand(each) for each in equation.invars]
        form = self._result(head, [each.form for each in programs], [each[0] for each in operands])
        whole = self._result(
            head, [each.whole for each in programs], [each[1] for each in operands]
        )
        for n, var in enumerate(equation.outvars):
            part.values[var] = f"{form}.{n}", f"{whole}.{n}"
        return form, whole


def _add_others(head: str, inner: list[Program], own: str, parts: dict[str, _Collected]) -> None:
    """Adds operations nested in an equation that belong to another part."""
    for name in {name for each in inner for name in each.parts} - {own}:
        programs = [each.parts[name] for each in inner if name in each.parts]
        part = parts.setdefault(name, _Collected({}))
        part.numbers.update(dict.fromkeys(n for each in programs for n in each.numbers))
        forms, wholes = [each.form for each in programs], [each.whole for each in programs]
        part.tokens.append((_hashed(head, *forms), _hashed(head, *wholes)))


def _exported(flat: Flat, equations: list[tuple[Equation, str]]) -> set[Any]:
    """Returns the variables that are results, or are used outside the part that computes them."""
    made = {var: own for equation, own in equations for var in equation.outvars}
    used = {
        var
        for equation, own in equations
        for var in equation.invars
        if not is_literal(var) and made.get(var, own) != own
    }
    return used | {var for var in flat.outvars if not is_literal(var)}


class _Collected:
    """A part of a program while it is collected.

    Attributes:
        values: tokens of its constants and variables, without and with literals.
        tokens: tokens of the values that leave the part.
        numbers: its distinct literals, in order.
    """

    def __init__(self, constants: Mapping[Any, str]) -> None:
        self.values = {var: (token, token) for var, token in constants.items()}
        self.tokens: list[tuple[str, str]] = []
        self.numbers: dict[str, None] = {}

    def operand(self, var: Any) -> tuple[str, str]:
        """Returns the tokens of an operand; one from another part counts by shape and dtype."""
        form = _form(var)
        if not is_literal(var):
            return self.values.get(var, (form, form))
        token = f"{form} {_token(var.val)}"
        if np.ndim(var.val):
            return token, token
        self.numbers.setdefault(_shown(var.val))
        return form, token

    def part(self) -> Part:
        """Returns the digest, independent of the order of equations."""
        forms, wholes = zip(*self.tokens, strict=True)
        numbers = tuple(self.numbers)[:_MAX_NUMBERS]
        return Part(_hashed(*sorted(forms)), _hashed(*sorted(wholes)), numbers)


def _operand(values: Mapping[Any, str], var: Any) -> str:
    return f"{_form(var)} {_token(var.val)}" if is_literal(var) else values[var]


def _shown(number: Any) -> str:
    value = np.asarray(number).item()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _form(var: Any) -> str:
    return _form_of(var.aval)


@functools.lru_cache(maxsize=4096)
def _form_of(aval: Any) -> str:
    shape, dtype = getattr(aval, "shape", None), getattr(aval, "dtype", None)
    return f"{dtype}{shape}{getattr(aval, 'weak_type', '')}" if dtype is not None else str(aval)


def _hashed(*pieces: str) -> str:
    return hashlib.blake2b("\n".join(pieces).encode(), digest_size=8).hexdigest()


def _token(value: Any, depth: int = 0) -> str:
    """Returns a string that is the same for equal values, in every process."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if depth > _MAX_DEPTH:
        return type(value).__qualname__
    inner = functools.partial(_token, depth=depth + 1)
    match value:
        case enum.Enum():
            return f"{type(value).__qualname__}.{value.name}"
        case np.ndarray() | np.generic() | jax.Array():
            return _array(value)
        case Mapping():
            items = ((inner(name), inner(each)) for name, each in value.items())
            return f"{{{sorted(items)}}}"
        case set() | frozenset():
            return f"{{{sorted(map(inner, value))}}}"
        case tuple() | list():
            return f"({', '.join(map(inner, value))})"
        case types.FunctionType() | types.MethodType():
            return _function(value, depth)
        case functools.partial():
            return f"partial {inner((value.func, value.args, value.keywords))}"
        case type():
            return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "eqns"):
        return (
            _Digester().program(getattr(value, "jaxpr", value), getattr(value, "consts", ())).whole
        )
    if dataclasses.is_dataclass(value):
        members = {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}
        return f"{type(value).__qualname__}{inner(members)}"
    if hasattr(value, "shape") and hasattr(value, "__array__"):
        return _array(np.asarray(value))
    return _ADDRESS.sub("", str(value))


def _array(array: Any) -> str:
    """Returns the dtype, shape and digest of an array."""
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        name = str(jax.random.key_impl(array))
        return f"key {_ADDRESS.sub('', name)} {_array(jax.random.key_data(array))}"
    host = np.asarray(array)
    return f"{host.dtype}{host.shape}{_hashed_bytes(_bytes(host).tobytes())}"


def _bytes(array: np.ndarray) -> np.ndarray:
    """Returns the bytes of an array, uint8 `[size]`; empty if it holds Python objects."""
    if not array.size or array.dtype.hasobject:
        return np.zeros(0, np.uint8)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _hashed_bytes(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _function(function: Any, depth: int) -> str:
    """Returns the name of a function, and a digest of its code and closure."""
    plain = getattr(function, "__func__", function)
    cells = [_cell(cell) for cell in plain.__closure__ or ()]
    held = (plain.__defaults__, plain.__kwdefaults__, cells)
    code = _code(plain.__code__)
    return f"{plain.__module__}.{plain.__qualname__} {code} {_token(held, depth + 1)}"


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _code(code: types.CodeType) -> str:
    inner = [
        _code(each) if isinstance(each, types.CodeType) else _token(each) for each in code.co_consts
    ]
    return _hashed(code.co_code.hex(), *inner, *code.co_names)
