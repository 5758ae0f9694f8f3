"""Propagation rules: the place of the examples after each primitive."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from distaff.step.independence.constants import counted_axis
from distaff.step.independence.indexing import gathered, scattered
from distaff.step.independence.place import MIXED, AxisKind, Place, combined, rows

_ENTRY_BY_ENTRY = (
    *("abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh"),
    *("bessel_i0e", "bessel_i1e", "bitcast_convert_type", "cbrt", "ceil", "clamp", "clz"),
    *("complex", "conj", "convert_element_type", "copy", "copy_p", "cos", "cosh", "digamma"),
    *("div", "dynamic_quantize", "eq", "eq_to", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1"),
    *("floor", "ge", "gt", "igamma", "igammac", "imag", "integer_pow", "is_finite", "le"),
    *("le_to", "lgamma", "log", "log1p", "logistic", "lt", "lt_to", "max", "min", "mul", "name"),
    *("ne", "neg", "nextafter", "not", "or", "polygamma", "population_count", "pow", "pvary"),
    *("real", "reduce_precision", "regularized_incomplete_beta", "rem", "round", "rsqrt"),
    *("select_n", "sharding_constraint", "shift_left", "shift_right_arithmetic"),
    *("shift_right_logical", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub"),
    *("tan", "tanh", "threefry2x32", "random_fold_in", "random_gamma", "xor", "zeta"),
)

_REDUCTIONS = (
    *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"),
    *("reduce_xor", "argmax", "argmin", "reduce"),
)

_CUMULATIVE = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")

_WINDOWS = ("reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min")

_LINEAR_ALGEBRA = (
    *("cholesky", "eig", "eigh", "householder_product", "lu", "lu_pivots_to_permutation", "qr"),
    *("geqrf", "schur", "svd", "triangular_solve", "tridiagonal_solve"),
)

Found = Place | list[Place]


def _shape(equation: Any, operand: int = 0) -> tuple[int, ...]:
    return tuple(equation.invars[operand].aval.shape)


def _entry_by_entry(equation: Any, places: Sequence[Place]) -> Found:
    found = combined(places)
    # A bitcast between widths adds or removes a last axis.
    return found if found.axis < equation.outvars[0].aval.ndim else MIXED


def _broadcast(equation: Any, places: Sequence[Place]) -> Found:
    axis = equation.params["broadcast_dimensions"][places[0].axis]
    return rows(axis, places[0].block)._replace(own=frozenset())


def _reshape(equation: Any, places: Sequence[Place]) -> Found:
    place, before = places[0], _shape(equation)
    after = tuple(equation.params["new_sizes"])
    leading = math.prod(before[: place.axis])
    inner = place.block * math.prod(before[place.axis + 1 :])
    size = before[place.axis] // place.block
    for axis, length in enumerate(after):
        rest = math.prod(after[axis + 1 :])
        starts_here = math.prod(after[:axis]) == leading and length > 1
        if starts_here and inner % rest == 0 and length == size * (inner // rest):
            return rows(axis, inner // rest)
    return MIXED


def _transpose(equation: Any, places: Sequence[Place]) -> Found:
    axis = list(equation.params["permutation"]).index(places[0].axis)
    return rows(axis, places[0].block)


def _without(axes: Sequence[int], place: Place) -> Place:
    """Returns the place after removing axes."""
    if place.kind is not AxisKind.ROWS or place.axis in axes:
        return MIXED if place.kind is AxisKind.ROWS else place
    return rows(place.axis - sum(axis < place.axis for axis in axes), place.block)


def _expand(equation: Any, places: Sequence[Place]) -> Found:
    axis = places[0].axis
    for added in sorted(equation.params["dimensions"]):
        axis += added <= axis
    return rows(axis, places[0].block)


def _reduce(equation: Any, places: Sequence[Place]) -> Found:
    params = equation.params
    axes = params["axes"] if "axes" in params else params["dimensions"]
    return _without(axes, combined(places))


def _along(name: str) -> Callable[[Any, Sequence[Place]], Found]:
    """Returns the rule of a primitive that mixes the entries along the axes of a parameter."""

    def rule(equation: Any, places: Sequence[Place]) -> Found:
        axes, found = equation.params[name], combined(places)
        axes = axes if isinstance(axes, Sequence) else (axes,)
        return MIXED if found.axis in axes else found

    return rule


def _concatenate(equation: Any, places: Sequence[Place]) -> Found:
    found, axis = combined(places), equation.params["dimension"]
    if found.kind is not AxisKind.ROWS or found.axis == axis:
        return MIXED
    own, column = set(), 0
    for atom, place in zip(equation.invars, places, strict=True):
        size = atom.aval.shape[axis]
        value = place.value
        if axis == atom.aval.ndim - 1 and size == 1 and value is not None:
            is_own = counted_axis(value, value.shape[found.axis]) == found.axis
            own |= {column} if is_own else set()
        column += size
    return found._replace(own=frozenset(own))


def _pad(equation: Any, places: Sequence[Place]) -> Found:
    found = combined(places)
    widths = equation.params["padding_config"][found.axis]
    return found if found.kind is AxisKind.ROWS and not any(widths) else MIXED


def _slice(equation: Any, places: Sequence[Place]) -> Found:
    place, before = places[0], _shape(equation)
    return place if equation.outvars[0].aval.shape[place.axis] == before[place.axis] else MIXED


def _dynamic_slice(equation: Any, places: Sequence[Place]) -> Found:
    if any(place.has_examples for place in places[1:]):
        return MIXED
    return _slice(equation, places)


def _dynamic_update(equation: Any, places: Sequence[Place]) -> Found:
    found = combined(places[:2])
    if any(place.has_examples for place in places[2:]) or found.kind is not AxisKind.ROWS:
        return MIXED
    whole, part = _shape(equation)[found.axis], _shape(equation, 1)[found.axis]
    return found if whole == part else MIXED


def _split(equation: Any, places: Sequence[Place]) -> Found:
    return MIXED if equation.params["axis"] == places[0].axis else places[0].plain()


def _dot(equation: Any, places: Sequence[Place]) -> Found:
    (contracted, batched) = equation.params["dimension_numbers"]
    found = []
    for side, place in enumerate(places[:2]):
        if not place.has_examples:
            continue
        if place.kind is not AxisKind.ROWS or place.axis in contracted[side]:
            return MIXED
        if place.axis in batched[side]:
            found.append(rows(list(batched[side]).index(place.axis), place.block))
            continue
        taken = {*contracted[side], *batched[side]}
        free = [axis for axis in range(len(_shape(equation, side))) if axis not in taken]
        before = len(batched[0]) + side * (
            len(_shape(equation, 0)) - len(contracted[0]) - len(batched[0])
        )
        found.append(rows(before + free.index(place.axis), place.block))
    return combined(found)


def _convolution(equation: Any, places: Sequence[Place]) -> Found:
    spec, place = equation.params["dimension_numbers"], places[0]
    is_batch = place.kind is AxisKind.ROWS and place.axis == spec.lhs_spec[0]
    if places[1].has_examples or not is_batch or equation.params["batch_group_count"] != 1:
        return MIXED
    return rows(spec.out_spec[0], place.block)


def _window(equation: Any, places: Sequence[Place]) -> Found:
    params, place = equation.params, combined(places)
    lengths = [
        params.get(name, (1,) * (place.axis + 1))[place.axis]
        for name in ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    ]
    is_alone = set(lengths) == {1} and not any(params["padding"][place.axis])
    return place if place.kind is AxisKind.ROWS and is_alone else MIXED


def _fft(equation: Any, places: Sequence[Place]) -> Found:
    place, lengths = places[0], equation.params["fft_lengths"]
    return place if place.axis < len(_shape(equation)) - len(lengths) else MIXED


def _linear_algebra(equation: Any, places: Sequence[Place]) -> Found:
    """Handles stacked matrices, whose last two axes are mixed."""
    found = combined(places)
    ranks = [len(atom.aval.shape) for atom in equation.invars]
    return found if found.kind is AxisKind.ROWS and found.axis < min(ranks) - 2 else MIXED


def _top_k(equation: Any, places: Sequence[Place]) -> Found:
    rank = len(_shape(equation))
    axis = equation.params.get("axis", rank - 1) % rank
    return MIXED if places[0].axis == axis else places[0].plain()


def _keys(equation: Any, places: Sequence[Place]) -> Found:
    """Handles random bits and keys, whose last axes are mixed."""
    place = places[0]
    rank = min(len(_shape(equation)), equation.outvars[0].aval.ndim)
    return place if place.axis < max(rank, 1) else MIXED


RULES: dict[str, Callable[[Any, Sequence[Place]], Found]] = {
    **dict.fromkeys(_ENTRY_BY_ENTRY, _entry_by_entry),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(_CUMULATIVE, _along("axis")),
    **dict.fromkeys(_WINDOWS, _window),
    **dict.fromkeys(_LINEAR_ALGEBRA, _linear_algebra),
    **dict.fromkeys(
        ("optimization_barrier", "device_put"), lambda _, places: [each.plain() for each in places]
    ),
    **dict.fromkeys(("random_wrap", "random_unwrap", "random_bits", "random_split"), _keys),
    **dict.fromkeys(("scatter", "scatter-add", "scatter-mul"), scattered),
    **dict.fromkeys(("scatter-min", "scatter-max", "scatter_add"), scattered),
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": lambda equation, places: _without(equation.params["dimensions"], places[0]),
    "expand_dims": _expand,
    "sort": _along("dimension"),
    "rev": _along("dimensions"),
    "concatenate": _concatenate,
    "pad": _pad,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update,
    "split": _split,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "fft": _fft,
    "gather": gathered,
    "top_k": _top_k,
}
"""The rule of each primitive, `(equation, places) -> place`, or a place for each result."""
