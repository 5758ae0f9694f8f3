"""Applies the accumulated gradients that are left at the end of an epoch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from distaff.optim import LossScaleState, MasterCopyState, ObservedState
from distaff.optim.transforms import extra_args
from distaff.step.state import TrainState

_AROUND = (ObservedState, LossScaleState, MasterCopyState)
"""States of wrappers around an optimizer, which do not count as transformations."""


def may_have_rest(state: TrainState) -> bool:
    """Returns whether the optimizer of a state accumulates, as its outermost transformation."""
    inner = state.opt_state
    while isinstance(inner, _AROUND):
        inner = inner.inner
    return isinstance(inner, extra_args.AccumulateState)


def with_rest(state: TrainState) -> TrainState:
    """Returns a state after an update with the gradients that are accumulated so far.

    Without any, the state is unchanged, bit for bit. `step` stays the same: it counts batches.
    Requires `may_have_rest(state)`.
    """
    assert state.tx is not None
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    offered = {"value": jnp.zeros([], jnp.float32), extra_args.FLUSH: "end"}
    updates, opt_state = extra_args.update(state.tx, zeros, state.opt_state, state.params, offered)
    return state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)
