"""Signs of life: whether a tree is finite, and whether training has changed anything."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from distaff.state import TrainState
from distaff.typing import PyTree


@jax.jit
def fingerprints(*groups: list[jax.Array]) -> tuple[jax.Array, ...]:
    """Returns for each group of float arrays one number per array, which changes with its bits.

    Means would not do: gradients that cancel each other, as those of a softmax do, keep them.
    """
    return tuple(jnp.array([_hash(array) for array in group], jnp.uint32) for group in groups)


def _hash(array: jax.Array) -> jax.Array:
    """Mixes the bits of each float, so that changes do not cancel in the sum over all of them."""
    unsigned = jnp.dtype(f"uint{8 * min(array.dtype.itemsize, 4)}")
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    mixed = bits * jnp.uint32(0x9E3779B1)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x85EBCA77)
    return jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)


def evidence_of_learning(state: TrainState) -> tuple[jax.Array, ...]:
    """Returns fingerprints of what training changes: the parameters, and averages of the gradient.

    The averages, arrays of the optimizer's state that are shaped like a parameter, stay as they are
    where every gradient is zero, also when weight decay changes the parameters.
    """

    def floats(tree: PyTree) -> list[jax.Array]:
        return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    params = floats(state.params)
    shapes = {leaf.shape for leaf in params if leaf.ndim}
    averages = [leaf for leaf in floats(state.opt_state) if leaf.shape in shapes]
    return fingerprints(params, averages)


@jax.jit
def all_finite(tree: PyTree) -> jax.Array:
    """Returns whether every float in a tree is a number: a bool scalar."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.array([jnp.isfinite(leaf).all() for leaf in leaves]).all()
