"""Sequences: examples of any length, and what becomes of those that are too long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from distaff.errors import BatchError, ConfigError, leaf_name, nearest


class SequencePart(NamedTuple):
    """A sequence, or what was cut from a longer one.

    Attributes:
        length: how long it is.
        leaves: a dict of arrays `[length, ...]`, and of scalars.
    """

    length: int
    leaves: dict[str, Any]


def parts_of(example: Any, index: int, limit: int, overlong: str) -> list[SequencePart]:
    """Returns the parts of an example, none of them longer than a limit.

    Args:
        example: a dict whose leaves are arrays `[length, ...]` or scalars, or tokens alone, int
            `[length]`.
        index: of the example, for errors.
        limit: the most that a part may have.
        overlong: what becomes of a longer example: `"split"` cuts it into parts, `"cut"` keeps the
            first one, `"drop"` none, `"error"` raises.

    Raises:
        BatchError: the example is no sequence, or is too long.
    """
    leaves = _as_dict(example, index)
    length = _length(leaves, index)
    if length <= limit or overlong == "split":
        starts = [*range(0, max(length, 1), limit)]
    elif overlong == "error":
        raise BatchError(
            f"A sequence has at most {limit} entries; example {index} has {length}. Allow for "
            "longer ones, or say what becomes of them with overlong='cut', 'drop', or where "
            "sequences are packed, 'split'."
        )
    else:
        starts = [0] if overlong == "cut" else []
    return [
        SequencePart(min(limit, length - start), _sliced(leaves, start, start + limit))
        for start in starts
    ]


def check_overlong(overlong: str, known: Sequence[str]) -> None:
    """Looks at the name of what becomes of too long examples.

    Raises:
        ConfigError: it is not known.
    """
    if overlong not in known:
        raise ConfigError(f"Unknown overlong {overlong!r}. {nearest(str(overlong), known)}")


def padded(part: SequencePart, length: int, pad_value: float) -> dict[str, Any]:
    """Returns the leaves of a part, each `[length, ...]`; bools are padded with False."""

    def fill(path: tuple[Any, ...], leaf: Any) -> Any:
        if not np.ndim(leaf):
            return leaf
        value = False if leaf.dtype == bool else pad_value
        filled = np.empty((length, *leaf.shape[1:]), leaf.dtype)
        filled[: part.length] = leaf
        filled[part.length :] = _as_dtype(value, leaf.dtype, leaf_name(path))
        return filled

    return jax.tree.map_with_path(fill, part.leaves)


def _as_dtype(value: float, dtype: np.dtype, name: str) -> np.ndarray:
    """Returns what pads, in the dtype of what is padded."""
    limits = np.iinfo(dtype) if np.issubdtype(dtype, np.integer) else None
    if limits and not (float(value).is_integer() and limits.min <= value <= limits.max):
        raise BatchError(
            f"pad_value is a number that the padded arrays can hold; {name!r} is {dtype}, and "
            f"cannot hold {value!r}. Give another one, or cast the array (data.MappedExamples)."
        )
    return np.asarray(value).astype(dtype)


def _as_dict(example: Any, index: int) -> dict[str, Any]:
    try:
        if isinstance(example, Mapping):
            leaves = {n: jax.tree.map(_array, e, is_leaf=_is_list) for n, e in example.items()}
        else:
            leaves = {"tokens": _array(example)}
    except ValueError as error:
        raise BatchError(
            "An example is a dict of arrays, or tokens alone, int [length]; example "
            f"{index}, of type {type(example).__name__}, holds what is no array: {error}. Make "
            "it a dict (data.MappedExamples)."
        ) from error
    tokens = leaves.get("tokens")
    if not isinstance(tokens, np.ndarray):
        return leaves
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise BatchError(
            "An example is a dict of arrays, or tokens alone, int [length], as are the `tokens` of "
            f"a dict; those of example {index} have shape {tokens.shape} and dtype {tokens.dtype}. "
            "Name other arrays in a dict (data.MappedExamples)."
        )
    narrow = tokens.astype(np.int32, copy=False)
    if narrow.dtype != tokens.dtype and not np.array_equal(narrow, tokens):
        raise BatchError(
            f"Tokens are int32; those of example {index} reach from {tokens.min()} to "
            f"{tokens.max()}. Look at the tokenizer."
        )
    return {**leaves, "tokens": narrow}


def _array(value: Any) -> np.ndarray:
    """Returns a list, number or array as an array; what is empty, and says no dtype, is int."""
    array = np.asarray(value)
    return array.astype(np.int32) if array.size == 0 and _is_list(value) else array


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _length(leaves: dict[str, Any], index: int) -> int:
    lengths = {
        leaf_name(path): len(leaf) for path, leaf in jax.tree.leaves_with_path(leaves) if leaf.ndim
    }
    if len(set(lengths.values())) != 1:
        raise BatchError(
            "All arrays of an example are sequences along their first axis, of one length; example "
            f"{index} has {lengths or 'scalars only'}. Leave out what is no sequence, or make "
            "scalars of it (data.MappedExamples)."
        )
    return next(iter(lengths.values()))


def _sliced(leaves: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    """Returns a part of a sequence; a copy, where the whole would wait in memory with it."""

    def cut(leaf: Any) -> Any:
        if not leaf.ndim or (start == 0 and end >= len(leaf)):
            return leaf
        return leaf[start:end].copy()

    return jax.tree.map(cut, leaves)
