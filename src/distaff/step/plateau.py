"""Plateau: the loss of a batch without weights is no loss to judge a learning rate by."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from distaff.core.typing import PyTree
from distaff.metrics import Mean
from distaff.step.state import TrainState


def with_plateaus_kept(before: TrainState, after: TrainState, loss: Any) -> TrainState:
    """Returns a state in which `optax.contrib.reduce_on_plateau` has not seen an empty batch.

    A batch whose weights are all 0 has the loss 0, which no later one would be better than.

    Args:
        before: the state before a step.
        after: the state after it.
        loss: the metric "loss" of the step.
    """
    is_there = any(map(_is_plateau, jax.tree.leaves(after.opt_state, is_leaf=_is_plateau)))
    if not is_there or not isinstance(loss, Mean):
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
