"""Signs of life: whether a tree is finite, and whether training has changed anything."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distaff.core.typing import PyTree
from distaff.optim.transforms.extra_args import AccumulateState
from distaff.step.state import TrainState

_MAX_BYTES = 2**28


class Evidence(NamedTuple):
    """What training changes, as one number per array, which changes with its bits.

    Attributes:
        params: of the parameters, uint32; 0 where all bits are.
        averages: likewise of the averages of the gradient.
        is_whole: whether all of both was looked at.
    """

    params: np.ndarray
    averages: np.ndarray
    is_whole: bool


def evidence_of_learning(state: TrainState) -> Evidence:
    """Returns fingerprints of what training changes: the parameters, and averages of the gradient.

    The averages, arrays of the optimizer's state that are shaped like a parameter, stay as they are
    where every gradient is zero, also when weight decay changes the parameters. Of a large state
    only the smaller arrays are looked at, 256 MiB in all: they are fetched from the device.
    """
    params = _floats(state.params)
    shapes = {leaf.shape for leaf in params if leaf.ndim}
    averages = [leaf for leaf in _floats(_without_sums(state.opt_state)) if leaf.shape in shapes]
    sizes = np.cumsum([0, *sorted(leaf.nbytes for leaf in params + averages)])
    largest = max(np.diff(sizes)[sizes[1:] <= _MAX_BYTES], default=0)
    looked_at = [[leaf for leaf in group if leaf.nbytes <= largest] for group in (params, averages)]
    return Evidence(*map(_fingerprints, looked_at), bool(sizes[-1] <= _MAX_BYTES))


def what_is_missing(before: Evidence, after: Evidence) -> str:
    """Returns in a few words which sign of learning is missing; empty where all are there."""
    same_params, same_averages = (
        old.size > 0 and np.array_equal(old, new)
        for old, new in ((before.params, after.params), (before.averages, after.averages))
    )
    # What begins as a copy of the parameters, as in optax.contrib.mechanize, is no average.
    is_copied = np.isin(before.params[before.params != 0], before.averages).any()
    if not after.is_whole:
        return ""
    if same_params:
        return "No parameter has changed"
    return "Every gradient has been zero" if same_averages and not is_copied else ""


def _without_sums(opt_state: PyTree) -> PyTree:
    """Returns an optimizer's state without sums of gradients, which each update makes zero."""
    kinds = (AccumulateState, optax.MultiStepsState)

    def is_sum(node: Any) -> bool:
        return isinstance(node, kinds)

    def inner(node: Any) -> Any:
        if isinstance(node, AccumulateState):
            return node.inner
        return node.inner_opt_state if is_sum(node) else node

    return jax.tree.map(inner, opt_state, is_leaf=is_sum)


def _fingerprints(leaves: list[jax.Array]) -> np.ndarray:
    bits = [np.ascontiguousarray(leaf).view(np.uint8) for leaf in leaves]
    return np.array([zlib.crc32(x.data) if x.any() else 0 for x in bits], np.uint32)


def _floats(tree: PyTree) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def all_finite(tree: PyTree) -> bool:
    """Returns whether every float in a tree is a number; they are fetched from the device."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return all(bool(np.isfinite(leaf).all()) for leaf in leaves)


def new_bad(before: PyTree, after: PyTree) -> jax.Array:
    """Returns whether a float is NaN or infinite that was a number before; works inside `jax.jit`.

    What was not finite before does not count: some optimizers begin with an infinite number.

    Args:
        before: arrays, such as the state before a step. Integers, bools and keys are not looked at.
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
