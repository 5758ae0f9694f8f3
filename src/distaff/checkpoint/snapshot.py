"""A snapshot: arrays as they are now, on the host, whatever becomes of them on the device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.typing import PyTree


def taken(tree: PyTree) -> PyTree:
    """Returns the arrays of a tree as they are now; they may be donated or changed afterwards.

    What is on one device comes back as NumPy arrays. On the CPU these are views, and nothing is
    copied: JAX does not reuse a buffer that somebody looks at.

    Args:
        tree: its leaves are JAX or NumPy arrays.
    """
    for leaf in jax.tree.leaves(tree):
        if _is_fetched(leaf):
            leaf.copy_to_host_async()
    return jax.tree.map(_taken, tree)


def num_bytes(tree: PyTree) -> int:
    """Returns the size of all arrays of a tree, in bytes."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _taken(leaf: Any) -> Any:
    if _is_fetched(leaf):
        return np.asarray(leaf)
    if isinstance(leaf, jax.Array):
        return jax.device_put(leaf, leaf.sharding, may_alias=False)
    return leaf.copy()


def _is_fetched(leaf: Any) -> bool:
    """Tells whether a leaf is one array of numbers on one device."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return isinstance(leaf, jax.Array) and not is_key and len(leaf.sharding.device_set) == 1
