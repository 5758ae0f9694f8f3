"""Filled: values that have no weight, made harmless for the gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from distaff.metrics.accumulators import aligned


def filled(tree: Any, weight: jax.Array | None) -> Any:
    """Returns arrays in which 0 is in place of what is not finite, and has no weight.

    A value without weight counts as 0 in a mean, even if it is NaN. Its gradient is another matter:
    0 times the derivative of what was computed of NaN is NaN. So nothing may be computed of it.

    Args:
        tree: a batch, or arrays `[batch, ...]`; those that are not of floats stay as they are.
        weight: `[batch]`, or with more leading axes of the arrays; an array that does not have
            these is replaced where an example has no weight at all. None for no weights.

    >>> filled({"y": jnp.array([1.0, jnp.nan])}, jnp.array([1, 0]))["y"].tolist()
    [1.0, 0.0]
    """
    if weight is None:
        return tree

    def of_leaf(array: Any) -> Any:
        array, own = jnp.asarray(array), weight
        is_float = jnp.issubdtype(array.dtype, jnp.floating)
        if not is_float or array.shape[:1] != weight.shape[:1]:
            return array
        if array.shape[: weight.ndim] != weight.shape:
            own = (weight != 0).any(axis=tuple(range(1, weight.ndim)))
        return jnp.where((aligned(own, array) != 0) | jnp.isfinite(array), array, 0)

    return jax.tree.map(of_leaf, tree)
