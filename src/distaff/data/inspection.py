"""Inspection: what of a batch a run would fail at late, or change silently."""

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
"""How far the sum of probabilities may be from 1: bfloat16 has three digits."""


BadInputPolicy: TypeAlias = Literal["raise", "warn", "ignore"]


def _names(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(each, str) for each in value):
        raise ConfigError(f"{name} is a tuple of names of leaves, such as ('y',); got {value!r}.")
    return tuple(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectionOptions(Options):
    """What to do about bad input, and where to look for it."""

    on_bad_input: BadInputPolicy = option(
        "raise",
        """What to do about values that are surely wrong: NaN in the first batch of a loader, and
        in any batch labels or tokens that the model does not have, or weights that are negative.
        "raise" raises `BatchError`, "warn" warns, "ignore" does not look.""",
        check=one_of(BadInputPolicy),
        resume="same run",
    )
    nan_ok: tuple[str, ...] = option(
        (),
        """Names of the leaves of a batch in which NaN stands for a missing value, such as
        `("y",)`; of a tuple, `("1",)`. It is then no bad input. A `Regressor` leaves such targets
        out; a loss of your own does so itself.""",
        check=_names,
        resume="same run",
    )
    check_validation: bool = option(
        True,
        """Evaluate one batch of each validation loader before the training begins, so that a
        mistake in it shows at once.""",
        resume="same run",
    )


def not_finite(batch: Batch, name: str, *, nan_ok: Collection[str] = (), weight: Any = None) -> str:
    """Returns what is wrong with a batch that holds NaN or infinities; nothing without.

    Args:
        batch: a pytree of arrays `[batch, ...]`; those of JAX are fetched.
        name: of the loader that it comes from.
        nan_ok: names of the leaves in which NaN is no mistake.
        weight: of the examples `[batch]`, or of their values `[batch, ...]`; what has none may be
            anything. None for none.

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
                f"All inputs must be finite; of a batch of the {name} loader, {leaf_path!r} has "
                f"{found} among {values.size} values, first in example {np.argwhere(bad)[0][0]}. "
                "Look at how it is read, and fill or leave out what is missing. Or, if NaN stands "
                f"for a missing value that the loss leaves out, pass nan_ok=({leaf_path!r},)."
            )
    return ""


def _counting(weight: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns which values of a leaf `[batch, ...]` have a weight."""
    if values.shape[: weight.ndim] != weight.shape:
        weight = np.abs(weight).reshape(len(weight), -1).sum(1)
    if values.shape[:1] != weight.shape[:1]:
        return np.ones(values.shape, bool)
    counting = (weight != 0).reshape(weight.shape + (1,) * (values.ndim - weight.ndim))
    return np.broadcast_to(counting, values.shape)


def leaf_names(batch: Batch) -> list[str]:
    """Returns the names of the leaves of a batch, as errors write them."""
    return [leaf_name(path) for path, _ in jax.tree.leaves_with_path(batch)]


def narrowed(batch: Batch, name: str) -> str:
    """Returns which leaves JAX makes narrower floats of; nothing where it keeps them all.

    Args:
        batch: a pytree of arrays.
        name: of the loader that it comes from.
    """
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
        f"Of the batches of the {name} loader, {names} come as {dtype}, and are trained on as "
        f"{narrow}, as JAX casts them. Cast them in the loader, with "
        ".astype(numpy.float32), which takes half the memory; or set jax_enable_x64."
    )


def out_of_range(labels: Any, num_classes: int, name: str) -> str:
    """Returns what is wrong with labels that name no class; nothing where all do.

    Args:
        labels: class indices, int `[batch]`.
        num_classes: how many there are.
        name: of the loader that they come from.
    """
    values = np.asarray(labels)
    if not jnp.issubdtype(values.dtype, jnp.integer) or not values.size:
        return ""
    low, high = int(values.min()), int(values.max())
    if low >= 0 and high < num_classes:
        return ""
    first = int(np.argwhere((values < 0) | (values >= num_classes))[0][0])
    remedy = (
        "Subtract 1: they seem to begin at 1."
        if low > 0 and high == num_classes
        else "Give the model as many outputs as there are classes, or look at how labels are read."
    )
    return (
        f"Labels are class indices from 0 to {num_classes - 1}, as the model returns {num_classes} "
        f"logits; those of a batch of the {name} loader reach from {low} to {high}, and that of "
        f"example {first} is {int(values.flat[first])}. {remedy}"
    )


def unknown_tokens(tokens: Any, vocab_size: int, name: str) -> str:
    """Returns what is wrong with tokens that the model does not know; nothing where it knows all.

    Args:
        tokens: int `[batch, length]`.
        vocab_size: how many there are.
        name: of the loader that they come from.
    """
    values = np.asarray(tokens)
    unknown = (values < 0) | (values >= vocab_size)
    if not unknown.any():
        return ""
    row, place = (int(each) for each in np.argwhere(unknown)[0])
    return (
        f"Tokens are from 0 to {vocab_size - 1}, as the model returns {vocab_size} logits; those "
        f"of a batch of the {name} loader reach from {values.min()} to {values.max()}, and the one "
        f"at {place} of example {row} is {values[row, place]}. Give the model the vocab_size of "
        "the tokenizer, and pad with a token that it has."
    )


def no_probabilities(labels: Any, name: str, counts: Any = True) -> str:
    """Returns what is wrong with labels that should be probabilities; nothing where they are.

    Args:
        labels: float `[batch, classes]`; others are not looked at.
        name: of the loader that they come from.
        counts: which of them count, bool `[batch]`.

    >>> no_probabilities(np.array([[0.5, 0.5], [0.5, 1.5]]), "val").split(";")[0]
    'Labels of shape [batch, classes] are probabilities, and add up to 1'
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
        "Labels of shape [batch, classes] are probabilities, and add up to 1; in a batch of the "
        f"{name} loader, those of example {first} add up to {sums[first]:.4g}, and the lowest is "
        f"{values[first].min():.4g}. Divide counts by their sum, or take the softmax of logits."
    )


def _floats(batch: Batch) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in jax.tree.leaves_with_path(batch):
        is_here = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
        if is_here and jnp.issubdtype(leaf.dtype, jnp.inexact):
            yield leaf_name(path), np.asarray(leaf)
