"""Reuse of an optimizer's state in the next call of `train_model`."""

from __future__ import annotations

from typing import Any

import jax
import optax

from distaff.core.typing import PyTree
from distaff.optim import catalog
from distaff.optim.build import OptimizerLike
from distaff.optim.config import OptimizerConfig
from distaff.optim.rates import RatesState
from distaff.optim.transforms.plateau import PlateauState

_OF_HYPERPARAMS = ("count", "hyperparams", "hyperparams_states")


def reusable_state(old: PyTree, fresh: PyTree, optimizer: OptimizerLike) -> PyTree:
    """Returns the state that a second call of `train_model` starts with.

    Args:
        old: the state after the first call.
        fresh: a new state.
        optimizer: the trainer's optimizer. The schedule of a config, or of a function of the number
            of steps, spans one call and restarts; a transformation continues.

    Returns:
        None if the old state cannot be reused: its structure differs, or the optimizer is a learned
        one, which is at the end of its number of steps.
    """
    is_config = isinstance(optimizer, OptimizerConfig)
    if (is_config and optimizer.name in catalog.LEARNED) or not _is_alike(old, fresh):
        return None
    is_function = not isinstance(optimizer, optax.GradientTransformation | optax.MultiSteps)
    return restart_schedules(old, fresh) if is_function else old


def _is_alike(old: PyTree, new: PyTree) -> bool:
    if jax.tree.structure(old) != jax.tree.structure(new):
        return False
    pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    return all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs)


def restart_schedules(old: Any, fresh: Any) -> Any:
    """Returns an optimizer's state with the schedules of a fresh one, and the old moments."""

    def one(old: Any, fresh: Any) -> Any:
        if not _has_schedule(old):
            return old
        if old._fields == ("count",):
            return fresh
        if isinstance(old, RatesState | PlateauState):
            return fresh._replace(inner=restart_schedules(old.inner, fresh.inner))
        new = {name: getattr(fresh, name) for name in _OF_HYPERPARAMS if name in old._fields}
        inner = restart_schedules(old.inner_state, fresh.inner_state)
        return old._replace(**new, inner_state=inner)

    return jax.tree.map(one, old, fresh, is_leaf=_has_schedule)


def _has_schedule(node: Any) -> bool:
    """Returns whether a node is about the learning rate, and has the moments in a part of it."""
    fields = getattr(node, "_fields", ())
    is_rates = isinstance(node, RatesState | PlateauState)
    return is_rates or fields == ("count",) or {"hyperparams", "inner_state"} <= set(fields)
