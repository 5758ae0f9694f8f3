"""Checks, cuts and pads sequences of any length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from distaff.errors import BatchError, ConfigError, leaf_name, nearest


class SequencePart(NamedTuple):
    """A sequence, or a part of a longer one: arrays `[length, ...]` and scalars."""

    length: int
    leaves: dict[str, Any]


def parts_of(example: Any, index: int, limit: int, overlong: str) -> list[SequencePart]:
    """Returns the parts of an example, each of at most `limit` entries.

    Args:
        example: a dict whose leaves are arrays `[length, ...]` or scalars, or tokens alone, int
            `[length]`.
        index: index of the example, for errors.
        limit: maximal length of a part.
        overlong: what to do with a longer example: `"split"` splits it into parts, `"cut"` keeps
            only the first part, `"drop"` drops it, `"error"` raises.

    Raises:
        BatchError: the example is not a sequence, or is too long.
    """
    leaves = _as_dict(example, index)
    length = _length(leaves, index)
    if length <= limit or overlong == "split":
        starts = [*range(0, max(length, 1), limit)]
    elif overlong == "error":
        raise BatchError(
            f"A sequence may have at most {limit} entries; example {index} has {length}. Raise the "
            "limit, or set overlong='cut' or 'drop', or for packed sequences 'split'."
        )
    else:
        starts = [0] if overlong == "cut" else []
    return [
        SequencePart(min(limit, length - start), _sliced(leaves, start, start + limit))
        for start in starts
    ]


def check_overlong(overlong: str, known: Sequence[str]) -> None:
    """Checks that the option `overlong` is one of `known`; raises ConfigError otherwise."""
    if overlong not in known:
        raise ConfigError(f"Unknown overlong {overlong!r}. {nearest(str(overlong), known)}")


def padded(part: SequencePart, length: int, pad_value: float) -> dict[str, Any]:
    """Returns the leaves of a part, padded to `[length, ...]`; bools are padded with False."""

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
    """Returns the padding value in the dtype of the padded array."""
    limits = np.iinfo(dtype) if np.issubdtype(dtype, np.integer) else None
    if limits and not (float(value).is_integer() and limits.min <= value <= limits.max):
        raise BatchError(
            f"The dtype of padded arrays must be able to hold pad_value; {name!r} is {dtype}, and "
            f"cannot hold {value!r}. Change pad_value, or cast the array (data.MappedExamples)."
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
            "An example must be a dict of arrays, or tokens alone, int [length]; example "
            f"{index}, of type {type(example).__name__}, holds a value that is not an array: "
            f"{error}. Convert it (data.MappedExamples)."
        ) from error
    tokens = leaves.get("tokens")
    if not isinstance(tokens, np.ndarray):
        return leaves
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise BatchError(
            f"Tokens must be int [length]; in example {index} they have shape {tokens.shape} and "
            f"dtype {tokens.dtype}. Put other arrays into a dict, under other names "
            "(data.MappedExamples)."
        )
    narrow = tokens.astype(np.int32, copy=False)
    if narrow.dtype != tokens.dtype and not np.array_equal(narrow, tokens):
        raise BatchError(
            f"Tokens must fit into int32; in example {index} they range from {tokens.min()} to "
            f"{tokens.max()}. Check the tokenizer."
        )
    return {**leaves, "tokens": narrow}


def _array(value: Any) -> np.ndarray:
    """Converts a list, number or array to an array; an empty list is int32."""
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
            "All arrays of an example must be sequences of one length, along their first axis; "
            f"example {index} has {lengths or 'scalars only'}. Drop other arrays, or replace them "
            "by scalars (data.MappedExamples)."
        )
    return next(iter(lengths.values()))


def _sliced(leaves: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    """Returns a part of a sequence; a copy, so that the whole sequence can be freed."""

    def cut(leaf: Any) -> Any:
        if not leaf.ndim or (start == 0 and end >= len(leaf)):
            return leaf
        return leaf[start:end].copy()

    return jax.tree.map(cut, leaves)
