"""Propagation rules of gather and scatter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distaff.step.independence.constants import counted_axis
from distaff.step.independence.place import FREE, MIXED, AxisKind, Place, rows


def gathered(equation: Any, places: Sequence[Place]) -> Place:
    """Returns the place of the result of a gather."""
    numbers = equation.params["dimension_numbers"]
    columns = {
        column: axis
        for column, axis in enumerate(numbers.start_index_map)
        if axis in numbers.collapsed_slice_dims
    }
    array, index = places[0], _counted(equation, places, columns)
    shape = tuple(equation.invars[0].aval.shape)
    rank = equation.outvars[0].aval.ndim
    batch_axes = [axis for axis in range(rank) if axis not in numbers.offset_dims]
    if not _are_rows(array, index):
        return MIXED
    last = len(equation.invars[1].aval.shape) - 1
    if index.has_examples and index.axis == last:
        return MIXED
    if not array.has_examples:
        return rows(batch_axes[index.axis], index.block)
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    if array.axis in numbers.operand_batching_dims:
        place = list(numbers.operand_batching_dims).index(array.axis)
        paired = numbers.start_indices_batching_dims[place]
        is_paired = not index.has_examples or index.plain() == rows(paired, array.block)
        return _if(is_paired, rows(batch_axes[paired], array.block))
    if array.axis not in gone and not index.has_examples:
        windows = [axis for axis in range(len(shape)) if axis not in gone]
        is_whole = equation.params["slice_sizes"][array.axis] == shape[array.axis]
        axis = sorted(numbers.offset_dims)[windows.index(array.axis)]
        return _if(is_whole, rows(axis, array.block))
    is_own = any(columns.get(column) == array.axis for column in index.own)
    return _if(is_own and array.block == 1, rows(batch_axes[index.axis]))


def scattered(equation: Any, places: Sequence[Place]) -> Place:
    """Returns the place of the result of a scatter."""
    numbers = equation.params["dimension_numbers"]
    columns = {
        column: axis
        for column, axis in enumerate(numbers.scatter_dims_to_operand_dims)
        if axis in numbers.inserted_window_dims
    }
    array, index, update = places[0], _counted(equation, places, columns), places[2]
    if not _are_rows(array, index, update):
        return MIXED
    shape, part = (tuple(equation.invars[n].aval.shape) for n in (0, 2))
    windows = sorted(numbers.update_window_dims)
    spread = [axis for axis in range(len(part)) if axis not in windows]
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    kept = [axis for axis in range(len(shape)) if axis not in gone]
    pairs = zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True)
    ways = [(axis, paired, spread[paired]) for axis, paired in pairs]
    ways += [
        (axis, None, window)
        for axis, window in zip(kept, windows, strict=True)
        if shape[axis] == part[window]
    ]
    owned = [columns[column] for column in index.own if column in columns]
    ways += [(axis, index.axis, spread[index.axis]) for axis in owned]
    for axis, paired, window in ways:
        if _fits(array, axis) and _fits(index, paired) and _fits(update, window):
            return rows(axis)
    return MIXED


def _fits(place: Place, axis: int | None) -> bool:
    """Returns whether the examples of an array, if it has any, lie along an axis."""
    return not place.has_examples or (place.axis == axis and place.block == 1)


def _are_rows(*places: Place) -> bool:
    return all(place.kind in (AxisKind.FREE, AxisKind.ROWS) for place in places)


def _if(fits: bool, place: Place) -> Place:
    return place if fits else MIXED


def _counted(equation: Any, places: Sequence[Place], columns: Mapping[int, int]) -> Place:
    """Returns the place of the indices; indices that count the examples belong to them.

    Args:
        equation: a gather or scatter, whose second operand indexes the first.
        places: the places of its operands.
        columns: the axis that each column of the indices selects from.
    """
    array, index = places[0], places[1]
    if index.has_examples or index.value is None or array.kind is not AxisKind.ROWS:
        return index
    for column, picked in columns.items():
        size = equation.invars[0].aval.shape[array.axis]
        axis = counted_axis(index.value[..., column], size)
        if picked == array.axis and axis is not None:
            return rows(axis)._replace(own=frozenset({column}))
    return FREE
