"""Distinguishes whole arrays, such as `(x, y)`, from iterables of batches, and checks them."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Number
from typing import Any

import jax
import numpy as np

from distaff.core.typing import PyTree
from distaff.data.loader import array_shape
from distaff.data.tables.frames import FrameTable, is_frame
from distaff.errors import BatchError, leaf_name

_MOST = 3
_ENTRIES = "(inputs,), (inputs, labels) or (inputs, labels, weights)"


def whole_arrays(data: Any, name: str) -> PyTree | None:
    """Returns the arrays if the data are whole arrays, as NumPy arrays; None if they are batches.

    Whole arrays are one array, a `FrameTable`, a dict of arrays, or a tuple of one to three arrays:
    inputs, labels and weights, of which inputs or labels may be dicts of arrays. A list, and a
    tuple of batches that are dicts or tuples themselves, holds batches.

    Args:
        data: anything that a trainer accepts.
        name: name of the data for errors, such as `"val"`.

    Raises:
        BatchError: the arrays are not numeric, are empty or differ in length; or the data may be
            either.
    """
    if isinstance(data, FrameTable):
        data = data.arrays
    if not _is_whole(data, name):
        return None
    leaves = jax.tree.leaves_with_path(data)
    whose = f"the {name} data"
    if not leaves:
        raise BatchError(f"{whose.capitalize()} must hold at least one array; got {data!r}.")
    lengths = {
        leaf_name(path): array_shape(leaf_name(path), leaf, whose)[0] for path, leaf in leaves
    }
    first, *others = lengths
    for other in others:
        if lengths[other] != lengths[first]:
            raise BatchError(
                f"All arrays of {whose} must have the same length; got {lengths[first]} examples "
                f"in {_label(data, first)}, {lengths[other]} in {_label(data, other)}. Pass "
                "one row per example in every array. To pass batches, put them into a list."
            )
    if not lengths[first]:
        raise BatchError(
            f"{whose.capitalize()} must hold at least one example; got 0 in "
            f"{_label(data, first)}. Check how it is read and filtered."
        )
    return jax.tree.map_with_path(lambda path, leaf: _as_numpy(leaf_name(path), leaf), data)


def _label(data: Any, name: str) -> str:
    """Returns what to call a leaf of arrays in an error: its name, or its place in a tuple."""
    if isinstance(data, Mapping) or hasattr(data, "_fields"):
        return repr(name)
    if not isinstance(data, tuple):
        return "the array"
    place, _, rest = name.partition("/")
    label = ("the inputs", "the labels", "the weights")[int(place)]
    return f"{rest!r} of {label}" if rest else label


def _is_whole(data: Any, name: str) -> bool:
    if is_array(data) or isinstance(data, Mapping):
        return True
    if isinstance(data, list | tuple) and _is_number(data):
        raise BatchError(
            f"The {name} data must be arrays, or an iterable of batches; got a {_kind(data)} of "
            "Python values. Convert it: numpy.asarray(values)."
        )
    if not isinstance(data, tuple):
        return False
    if any(map(is_frame, data)):
        raise BatchError(
            f"The {name} data are a tuple with a data frame. Write data.from_frame(frame, "
            "target=...)."
        )
    arrays = [each for each in data if is_array(each)]
    mappings = [each for each in data if isinstance(each, Mapping)]
    if len(arrays) == len(data) > 0:
        if len(data) > _MOST and not hasattr(data, "_fields"):
            raise BatchError(
                f"A tuple of arrays must be {_ENTRIES}; the {name} data are {len(data)} arrays. "
                "Pass a dict to name them, or a list if they are batches."
            )
        return True
    is_mixed = arrays and len(arrays) + len(mappings) == len(data)
    differ = not arrays and len({frozenset(each) for each in mappings}) > 1
    if is_mixed and len(data) <= _MOST:
        return True
    if arrays or differ:
        raise BatchError(
            f"It is ambiguous whether the {name} data are arrays or batches: a tuple of "
            f"{', '.join(map(_kind, data))}. Pass arrays as {_ENTRIES}, each an array or a dict of "
            "arrays, or as one dict; pass batches in a list."
        )
    return False


def is_array(value: Any) -> bool:
    """Whether a value has the members of an array."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _is_number(values: Any) -> bool:
    """Whether nested lists or tuples hold numbers or texts, rather than arrays or batches."""
    while isinstance(values, list | tuple) and len(values):
        values = values[0]
    return isinstance(values, Number | str | bytes) and not is_array(values)


def _kind(value: Any) -> str:
    return type(value).__name__


def _as_numpy(name: str, leaf: Any) -> np.ndarray:
    is_masked = isinstance(leaf, np.ma.MaskedArray) and np.ma.is_masked(leaf)
    array = np.asarray(leaf)
    if is_masked or array.shape != tuple(leaf.shape) or array.dtype.kind in "OSUTMm":
        remedy = (
            "Fill its masked values" if is_masked else "Convert it to a numpy.ndarray of numbers"
        )
        raise BatchError(
            f"Arrays must be NumPy or JAX arrays of numbers; {name!r} is a {_kind(leaf)}. {remedy}."
        )
    return array
