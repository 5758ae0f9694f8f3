"""Snapshots of arrays on the host, which later donations do not change."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.typing import PyTree


def taken(tree: PyTree) -> PyTree:
    """Returns a snapshot of JAX and NumPy arrays, which may be donated or changed afterwards.

    Arrays on one device become NumPy arrays. On the CPU these are views without a copy: JAX does
    not reuse a buffer that has a view.
    """
    for leaf in jax.tree.leaves(tree):
        if _is_on_one_device(leaf):
            leaf.copy_to_host_async()
    return jax.tree.map(_copy, tree)


def num_bytes(tree: PyTree) -> int:
    """Returns the total size of the arrays of a tree, in bytes."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _copy(leaf: Any) -> Any:
    if _is_on_one_device(leaf):
        return np.asarray(leaf)
    if isinstance(leaf, jax.Array):
        return jax.device_put(leaf, leaf.sharding, may_alias=False)
    return leaf.copy()


def _is_on_one_device(leaf: Any) -> bool:
    """Returns whether a leaf is an array of numbers on a single device."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return isinstance(leaf, jax.Array) and not is_key and len(leaf.sharding.device_set) == 1
