"""An optimizer's state from one call of `train_model` to the next."""

from __future__ import annotations

from typing import Any

import jax
import optax

from distaff.core.typing import PyTree
from distaff.optim import catalog
from distaff.optim.applied import RatesState
from distaff.optim.config import OptimizerConfig
from distaff.optim.given import OptimizerLike

_OF_HYPERPARAMS = ("count", "hyperparams", "hyperparams_states")


def kept_state(old: PyTree, fresh: PyTree, optimizer: OptimizerLike) -> PyTree:
    """Returns the state that a second call of `train_model` begins with.

    Args:
        old: the state after the first call.
        fresh: a new one.
        optimizer: as the trainer has it. The schedule of a config, or of a function of the number
            of steps, is made for one call, and begins again; a transformation keeps its place.

    Returns:
        None where the first call has left nothing of use: the form of the state differs, or the
        optimizer is a learned one, which paces itself by the number of steps and is at its end.
    """
    is_config = isinstance(optimizer, OptimizerConfig)
    if (is_config and optimizer.name in catalog.LEARNED) or not is_alike(old, fresh):
        return None
    is_function = not isinstance(optimizer, optax.GradientTransformation | optax.MultiSteps)
    return begun_again(old, fresh) if is_function else old


def is_alike(old: PyTree, new: PyTree) -> bool:
    """Whether two states of optimizers have the same structure, shapes and dtypes."""
    if jax.tree.structure(old) != jax.tree.structure(new):
        return False
    pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    return all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs)


def begun_again(old: Any, fresh: Any) -> Any:
    """Returns an optimizer's state whose schedules begin again, and whose moments are kept.

    Args:
        old: the state after training.
        fresh: a new state of the same optimizer, alike in form.
    """

    def one(old: Any, fresh: Any) -> Any:
        if not _has_schedule(old):
            return old
        if old._fields == ("count",):
            return fresh
        if isinstance(old, RatesState):
            return fresh._replace(inner=begun_again(old.inner, fresh.inner))
        new = {name: getattr(fresh, name) for name in _OF_HYPERPARAMS if name in old._fields}
        return old._replace(**new, inner_state=begun_again(old.inner_state, fresh.inner_state))

    return jax.tree.map(one, old, fresh, is_leaf=_has_schedule)


def _has_schedule(node: Any) -> bool:
    """Whether a node counts the steps of a schedule, and of nothing else."""
    fields = getattr(node, "_fields", ())
    is_rates = isinstance(node, RatesState)
    return is_rates or fields == ("count",) or {"hyperparams", "inner_state"} <= set(fields)
