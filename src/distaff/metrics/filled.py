"""Replacement of unweighted NaN in a batch, which would make gradients NaN."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from distaff.metrics.accumulators import aligned


def filled(tree: Any, weight: jax.Array | None) -> Any:
    """Replaces values that are not finite and have weight 0 by 0.

    A weighted mean ignores values of weight 0, even NaN, but their gradient is 0 times NaN, which
    is NaN. So replace them before anything is computed from them.

    Args:
        tree: a batch, or arrays `[batch, ...]`; arrays that are not floats are unchanged.
        weight: `[batch]`, or with more leading axes of the arrays. In an array without these axes,
            an example is replaced if all its weights are 0. None to replace nothing.

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
