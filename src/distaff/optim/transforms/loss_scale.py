"""A dynamic loss scale: keeps small gradients of float16 from becoming zero."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from distaff.core.typing import Params, PyTree
from distaff.errors import ConfigError
from distaff.optim.rates import with_rates
from distaff.optim.transforms.extra_args import (
    FLUSH,
    find_states,
    with_description,
    with_known_args,
)

_SMALLEST, _LARGEST = 1.0, 2.0**40


class LossScaleState(NamedTuple):
    """The state of an optimizer with a loss scale.

    Attributes:
        scale: factor of the cotangents inside the model, float32 `[]`.
        in_a_row: steps with finite gradients since the scale changed, int32 `[]`.
        num_skipped: number of skipped steps, int32 `[]`.
        num_updates: number of other steps, int32 `[]`.
        inner: the state of the optimizer itself.
    """

    scale: jax.Array
    in_a_row: jax.Array
    num_skipped: jax.Array
    num_updates: jax.Array
    inner: PyTree


def with_loss_scale(
    tx: optax.GradientTransformation, *, initial: float = 2.0**24, grow_every: int = 2000
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that its state holds a loss scale, which `ctx.apply` uses.

    Inside the model, cotangents are multiplied by the scale; gradients come out without it. A step
    whose gradients are not finite halves the scale and changes nothing else: neither the parameters
    nor the optimizer's state, with its moments and its count for the schedule. The scale doubles
    after `grow_every` finite steps. Micikevicius et al. 2018, arXiv:1710.03740.

    At a scale of 1 a step is no longer skipped: its gradients are not finite for another reason.

    Args:
        tx: any Optax optimizer.
        initial: the scale of the first step, a power of two: it then changes no bit of a gradient.
        grow_every: number of steps with finite gradients after which the scale doubles.

    Returns:
        The optimizer; its state is a `LossScaleState`.

    Raises:
        ConfigError: `initial` is not a power of two from 1 to 2**40, or `grow_every` is not at
            least 1.
    """
    if initial not in [2.0**power for power in range(41)] or grow_every < 1:
        raise ConfigError(
            "A loss scale starts at a power of two from 1 to 2**40, and grows every 1 or more "
            f"steps; got initial={initial!r} and grow_every={grow_every!r}."
        )
    # The schedule counts updates, which the host does not know if steps are skipped.
    inner = with_rates(with_known_args(tx))

    def init(params: Params) -> LossScaleState:
        # Three arrays, since a loop that donates the state must not donate one twice.
        counts = (jnp.zeros([], jnp.int32) for _ in range(3))
        return LossScaleState(jnp.asarray(initial, jnp.float32), *counts, inner.init(params))

    def update(
        updates: Params, state: PyTree, params: Params | None = None, **extra_args: Any
    ) -> tuple[Params, LossScaleState]:
        def step(inner_state: PyTree) -> Any:
            return inner.update(updates, inner_state, params, **extra_args)

        if extra_args.get(FLUSH) == "end":  # accumulated gradients, which were finite
            changes, inner_state = step(state.inner)
            return changes, state._replace(inner=inner_state)

        def skip(inner_state: PyTree) -> Any:
            changes, _ = jax.eval_shape(step, inner_state)
            # -0.0 + 0.0 is 0.0, but x + -0.0 is x for every x.
            return jax.tree.map(lambda x: jnp.full(x.shape, -0.0, x.dtype), changes), inner_state

        is_skipped = ~_is_finite(updates) & (state.scale > _SMALLEST)
        changes, inner_state = jax.lax.cond(is_skipped, skip, step, state.inner)
        in_a_row = jnp.where(is_skipped, 0, state.in_a_row + 1)
        is_due = in_a_row >= grow_every
        grown = jnp.where(is_due, jnp.minimum(state.scale * 2, _LARGEST), state.scale)
        return changes, LossScaleState(
            scale=jnp.where(is_skipped, state.scale / 2, grown),
            in_a_row=jnp.where(is_due, 0, in_a_row),
            num_skipped=state.num_skipped + is_skipped,
            num_updates=state.num_updates + ~is_skipped,
            inner=inner_state,
        )

    return with_description(optax.GradientTransformationExtraArgs(init, update), tx, rates=None)


def loss_scale(opt_state: PyTree) -> jax.Array | None:
    """Returns the loss scale of an optimizer's state, float32 `[]`; None without one."""
    return next((state.scale for state in scales(opt_state)), None)


def scales(opt_state: PyTree) -> list[LossScaleState]:
    """Returns the state of the loss scale of an optimizer; empty without one."""
    return list(find_states(opt_state, LossScaleState))


def _is_finite(tree: PyTree) -> jax.Array:
    leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(leaves).all() if leaves else jnp.bool_(True)
