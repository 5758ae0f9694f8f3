"""Keeps batches whose weights are all zero out of `optax.contrib.reduce_on_plateau`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from distaff.core.typing import PyTree
from distaff.metrics import Mean
from distaff.step.state import TrainState


def with_plateaus_kept(before: TrainState, after: TrainState, loss: Any) -> TrainState:
    """Returns the state after a step, with plateau states unchanged if the batch had no weight.

    A batch whose weights are all 0 has the loss 0, which no later loss would improve on.

    Args:
        before: the state before the step.
        after: the state after the step.
        loss: the metric "loss" of the step.
    """
    has_plateau = any(map(_is_plateau, jax.tree.leaves(after.opt_state, is_leaf=_is_plateau)))
    if not has_plateau or not isinstance(loss, Mean):
        return after
    is_empty = loss.weight == 0

    def kept(old: PyTree, new: PyTree) -> PyTree:
        if not _is_plateau(new):
            return new
        return jax.tree.map(lambda a, b: jnp.where(is_empty, a, b), old, new)

    opt_state = jax.tree.map(kept, before.opt_state, after.opt_state, is_leaf=_is_plateau)
    return after.replace(opt_state=opt_state)


def _is_plateau(node: Any) -> bool:
    return isinstance(node, optax.contrib.ReduceLROnPlateauState)
