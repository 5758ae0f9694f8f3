"""Checks for NaN and infinite values, and for parameters that training does not change."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distaff.core.typing import PyTree
from distaff.optim.transforms.extra_args import AccumulateState
from distaff.step.state import TrainState

_ODD = 0x9E3779B1
_SMALL_BYTES = 2**24
"""Fetching this much is faster than compiling a program; a save fetches it anyway."""


class Evidence(NamedTuple):
    """Fingerprints of the arrays that training changes, uint32, one per array; 0 for all zeros.

    Attributes:
        params: fingerprints of the parameters.
        averages: fingerprints of the moving averages of the gradient.
    """

    params: np.ndarray
    averages: np.ndarray


def evidence_of_learning(state: TrainState) -> Evidence:
    """Returns fingerprints of the parameters and of the optimizer's moving averages.

    The averages are the arrays of the optimizer's state that are shaped like a parameter. They do
    not change if every gradient is zero, even if weight decay changes the parameters.
    """
    params = _floats(state.params)
    shapes = {leaf.shape for leaf in params if leaf.ndim}
    averages = [leaf for leaf in _floats(_without_sums(state.opt_state)) if leaf.shape in shapes]
    found = _fingerprints([*params, *averages])
    return Evidence(found[: len(params)], found[len(params) :])


def what_is_missing(before: Evidence, after: Evidence) -> str:
    """Returns which sign of learning is missing; an empty string if training learns."""
    same_params, same_averages = (
        old.size > 0 and np.array_equal(old, new)
        for old, new in ((before.params, after.params), (before.averages, after.averages))
    )
    # An initial copy of the parameters, as in optax.contrib.mechanize, is not an average.
    is_copied = np.isin(before.params[before.params != 0], before.averages).any()
    if same_params:
        return "No parameter has changed"
    return "Every gradient has been zero" if same_averages and not is_copied else ""


def _without_sums(opt_state: PyTree) -> PyTree:
    """Returns an optimizer's state without sums of gradients, which each update resets to zero."""
    kinds = (AccumulateState, optax.MultiStepsState)

    def is_sum(node: Any) -> bool:
        return isinstance(node, kinds)

    def inner(node: Any) -> Any:
        if isinstance(node, AccumulateState):
            return node.inner
        return node.inner_opt_state if is_sum(node) else node

    return jax.tree.map(inner, opt_state, is_leaf=is_sum)


def _fingerprints(leaves: list[jax.Array]) -> np.ndarray:
    if not are_near(leaves):
        return np.asarray(_sums_of_bits(leaves))
    bits = [np.ascontiguousarray(leaf).view(np.uint8) for leaf in leaves]
    return np.array([zlib.crc32(x.data) if x.any() else 0 for x in bits], np.uint32)


@jax.jit
def _sums_of_bits(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([_sum_of_bits(leaf) for leaf in leaves])


def _sum_of_bits(leaf: jax.Array) -> jax.Array:
    """Returns a uint32 that changes if any single element does."""
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag])
    whole = jnp.dtype(f"uint{min(jnp.finfo(leaf.dtype).bits, 32)}")
    bits = jax.lax.bitcast_convert_type(leaf, whole).astype(jnp.uint32)
    # An odd factor for each element; not reshaped, so that each device sums its own shard.
    factors = jnp.ones(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        factors += index * jnp.uint32(2 * pow(_ODD, axis + 1, 2**31))
    return (bits * factors).sum(dtype=jnp.uint32)


def _floats(tree: PyTree) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def all_finite(tree: PyTree) -> bool:
    """Returns whether every float in a tree is finite; waits for the device."""
    leaves = _floats(tree)
    if not are_near(leaves):
        return bool(_all_finite(leaves))
    return all(bool(np.isfinite(leaf).all()) for leaf in leaves)


def finite_rows(tree: PyTree) -> np.ndarray:
    """Returns which rows of a tree, whose arrays are `[rows, ...]`, are finite: bool `[rows]`."""
    leaves = _floats(tree)
    if not are_near(leaves):
        return np.asarray(_finite_rows(leaves))
    rows = [np.isfinite(leaf).reshape(len(leaf), -1).all(axis=1) for leaf in leaves]
    return np.all(rows, axis=0)


@jax.jit
def _finite_rows(leaves: list[jax.Array]) -> jax.Array:
    rows = [jnp.isfinite(leaf).reshape(len(leaf), -1).all(axis=1) for leaf in leaves]
    return jnp.stack(rows).all(axis=0)


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def are_near(leaves: Sequence[jax.Array]) -> bool:
    """Returns whether reading arrays with NumPy is faster than compiling a program for them.

    On the CPU, NumPy reads them without a copy.
    """
    is_near = jax.default_backend() == "cpu" or sum(x.nbytes for x in leaves) <= _SMALL_BYTES
    return is_near and all(getattr(leaf, "is_fully_addressable", True) for leaf in leaves)


def new_bad(before: PyTree, after: PyTree) -> jax.Array:
    """Returns whether a float that was finite has become NaN or infinite; works inside `jax.jit`.

    Values that were not finite before do not count: some optimizers start with infinity.

    Args:
        before: arrays, such as the state before a step. Integers, bools and keys are ignored.
        after: the same arrays later, of the same structure, shapes and dtypes.

    Returns:
        Bool `[]`.

    >>> bool(new_bad({"best": jnp.inf}, {"best": jnp.inf}))
    False
    >>> bool(new_bad({"best": jnp.inf, "w": 1.0}, {"best": 2.0, "w": jnp.nan}))
    True
    """
    flags = jax.tree.leaves(jax.tree.map(_is_new_bad, before, after))
    return jnp.stack(flags).any() if flags else jnp.asarray(False)


def _is_new_bad(before: Any, after: Any) -> jax.Array:
    before, after = jnp.asarray(before), jnp.asarray(after)
    if not jnp.issubdtype(after.dtype, jnp.inexact):
        return jnp.asarray(False)
    return (jnp.isfinite(before) & ~jnp.isfinite(after)).any()
