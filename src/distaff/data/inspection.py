"""Checks batches for bad values: NaN, unknown labels or tokens, narrowed dtypes."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.config.options import Options, one_of, option
from distaff.core.typing import Batch
from distaff.errors import ConfigError, leaf_name

ROUNDING = 0.01
"""Tolerance of the sum of probabilities: bfloat16 has three digits."""

BadInputPolicy: TypeAlias = Literal["raise", "warn", "ignore"]


def _names(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(each, str) for each in value):
        raise ConfigError(f"{name} must be a tuple of leaf names, such as ('y',); got {value!r}.")
    return tuple(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectionOptions(Options):
    """How to check for bad input, and what to do about it."""

    on_bad_input: BadInputPolicy = option(
        "raise",
        """What to do about invalid values: NaN in the first batch of a loader, and in any batch
        labels or tokens that the model does not have, or negative weights. "raise" raises
        `BatchError`, "warn" issues a warning, "ignore" skips the checks.""",
        check=one_of(BadInputPolicy),
        resume="same run",
    )
    nan_ok: tuple[str, ...] = option(
        (),
        """Names of the leaves of a batch in which NaN marks a missing value, such as `("y",)`; for
        a tuple, `("1",)`. A `Regressor` ignores such targets; a custom loss must do so itself.""",
        check=_names,
        resume="same run",
    )
    check_validation: bool = option(
        True,
        """Evaluate one batch of each validation loader before training, to find mistakes
        early.""",
        resume="same run",
    )


def not_finite(batch: Batch, name: str, *, nan_ok: Collection[str] = (), weight: Any = None) -> str:
    """Returns a message about NaN or infinities in a batch, or an empty string.

    Args:
        batch: a pytree of arrays `[batch, ...]`; JAX arrays are fetched.
        name: name of the batch's loader.
        nan_ok: names of the leaves in which NaN is allowed.
        weight: weights of the examples `[batch]`, or of their values `[batch, ...]`; values of
            weight 0 are not checked. None to check all values.

    >>> not_finite({"x": np.array([[1.0, np.nan]])}, "train").split(";")[0]
    'All inputs must be finite'
    """
    for leaf_path, values in _floats(batch):
        bad = np.isinf(values) if leaf_path in nan_ok else ~np.isfinite(values)
        if bad.any() and weight is not None:
            bad &= _counting(np.asarray(weight), values)
        if bad.any():
            num_nan = int(np.isnan(values[bad]).sum())
            counts = (f"{num_nan} NaN", f"{int(bad.sum()) - num_nan} infinite")
            found = " and ".join(each for each in counts if not each.startswith("0 "))
            return (
                f"All inputs must be finite; in a batch of the {name} loader, {leaf_path!r} has "
                f"{found} among {values.size} values, first in example {np.argwhere(bad)[0][0]}. "
                "Check how it is read, and fill or drop missing values. Or, if NaN marks a missing "
                f"value that the loss ignores, pass nan_ok=({leaf_path!r},)."
            )
    return ""


def _counting(weight: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns a mask of the values of a leaf `[batch, ...]` with a non-zero weight."""
    if values.shape[: weight.ndim] != weight.shape:
        weight = np.abs(weight).reshape(len(weight), -1).sum(1)
    if values.shape[:1] != weight.shape[:1]:
        return np.ones(values.shape, bool)
    counting = (weight != 0).reshape(weight.shape + (1,) * (values.ndim - weight.ndim))
    return np.broadcast_to(counting, values.shape)


def leaf_names(batch: Batch) -> list[str]:
    """Returns the names of the leaves of a batch, as in error messages."""
    return [leaf_name(path) for path, _ in jax.tree.leaves_with_path(batch)]


def narrowed(batch: Batch, name: str) -> str:
    """Returns a message about leaves that JAX casts to narrower floats, or an empty string."""
    changed = {
        leaf_name(path): leaf.dtype
        for path, leaf in jax.tree.leaves_with_path(batch)
        if not isinstance(leaf, jax.Array)
        and jnp.issubdtype(leaf.dtype, jnp.inexact)
        and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype
    }
    if not changed:
        return ""
    dtype = next(iter(changed.values()))
    names, narrow = ", ".join(map(repr, changed)), jax.dtypes.canonicalize_dtype(dtype)
    return (
        f"In batches of the {name} loader, JAX casts {names} from {dtype} to {narrow}. Cast them "
        "in the loader with .astype(numpy.float32), which halves their memory, or set "
        "jax_enable_x64."
    )


def out_of_range(labels: Any, num_classes: int, name: str) -> str:
    """Returns a message about labels, int `[batch]`, outside of the classes, or an empty string."""
    values = np.asarray(labels)
    if not jnp.issubdtype(values.dtype, jnp.integer) or not values.size:
        return ""
    low, high = int(values.min()), int(values.max())
    if low >= 0 and high < num_classes:
        return ""
    first = int(np.argwhere((values < 0) | (values >= num_classes))[0][0])
    remedy = (
        "Subtract 1: they seem to start at 1."
        if low > 0 and high == num_classes
        else "Give the model one output per class, or check how labels are read."
    )
    return (
        f"Labels must be class indices from 0 to {num_classes - 1}, as the model returns "
        f"{num_classes} logits; labels in a batch of the {name} loader range from {low} to {high}, "
        f"and that of example {first} is {int(values.flat[first])}. {remedy}"
    )


def unknown_tokens(tokens: Any, vocab_size: int, name: str) -> str:
    """Returns a message about tokens, int `[batch, length]`, outside of the vocabulary, or ""."""
    values = np.asarray(tokens)
    unknown = (values < 0) | (values >= vocab_size)
    if not unknown.any():
        return ""
    row, place = (int(each) for each in np.argwhere(unknown)[0])
    return (
        f"Tokens must be from 0 to {vocab_size - 1}, as the model returns {vocab_size} logits; "
        f"tokens in a batch of the {name} loader range from {values.min()} to {values.max()}, and "
        f"the one at {place} of example {row} is {values[row, place]}. Give the model the "
        "vocab_size of the tokenizer, and pad with a token of the vocabulary."
    )


def no_probabilities(labels: Any, name: str, counts: Any = True) -> str:
    """Returns a message about labels that are not probabilities, or an empty string.

    Only float labels `[batch, classes]` are checked, in examples with `counts`, bool `[batch]`.

    >>> no_probabilities(np.array([[0.5, 0.5], [0.5, 1.5]]), "val").split(";")[0]
    'Labels of shape [batch, classes] must be probabilities that add up to 1'
    """
    values = np.asarray(labels)
    if not jnp.issubdtype(values.dtype, jnp.floating) or values.ndim != 2:
        return ""
    values = values.astype(np.float64)
    sums = values.sum(axis=1)
    is_bad = ~(values >= 0).all(axis=1) | ~(abs(sums - 1) <= ROUNDING)
    bad = np.flatnonzero(is_bad & counts)
    if not bad.size:
        return ""
    first = bad[0]
    return (
        "Labels of shape [batch, classes] must be probabilities that add up to 1; in a batch of "
        f"the {name} loader, example {first} has the sum {sums[first]:.4g} and the minimum "
        f"{values[first].min():.4g}. Divide counts by their sum, or apply softmax to logits."
    )


def _floats(batch: Batch) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in jax.tree.leaves_with_path(batch):
        is_here = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
        if is_here and jnp.issubdtype(leaf.dtype, jnp.inexact):
            yield leaf_name(path), np.asarray(leaf)
