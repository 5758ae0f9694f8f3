"""Accumulation: one update of an optimizer from the averages over several micro-steps."""

from __future__ import annotations

from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from distaff.errors import ConfigError, LossError
from distaff.slot import with_known_args
from distaff.typing import Params, PyTree


class AccumulateState(NamedTuple):
    """The state of an optimizer that accumulates.

    Attributes:
        count: micro-steps since the last update, int32 `[]`.
        grads: the sum of their gradients, in float32 or wider.
        value: the sum of their losses, float32 `[]`; 0 where none are given.
        inner: the state of the optimizer itself.
    """

    count: jax.Array
    grads: Params
    value: jax.Array
    inner: PyTree


def accumulate(
    tx: optax.GradientTransformation, every: int
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that it makes one update from the averages over `every` micro-steps.

    Both the gradients and the `value` (the loss) are averaged; `optax.MultiSteps` averages the
    gradients and hands on the loss of the last micro-step alone. The micro-steps before the last
    leave the parameters as they are, bit for bit.

    Args:
        tx: any Optax optimizer. Its `grad`, where one is given, is the averaged gradient; any
            other extra argument is that of the last micro-step. Its schedules count updates.
        every: micro-steps per update; with 1, `tx` itself.

    Returns:
        The optimizer; its state is an `AccumulateState` if `every` is more than 1.

    Raises:
        ConfigError: `every` is no whole number, or less than 1.
        LossError: raised by `update` if `value` is no scalar.

    Example:
        >>> tx = accumulate(optax.sgd(1.0), every=2)
        >>> state = tx.init(jnp.zeros([]))
        >>> updates = []
        >>> for gradient in (1.0, 3.0):
        ...     update, state = tx.update(jnp.array(gradient), state)
        ...     updates.append(float(update))
        >>> updates
        [-0.0, -2.0]
    """
    if not isinstance(every, Integral) or isinstance(every, bool) or every < 1:
        raise ConfigError(
            f"every is how many micro-steps make an update, a whole number >= 1, and is {every!r}."
        )
    inner = with_known_args(tx)
    if every == 1:
        return inner

    def init(params: Params) -> AccumulateState:
        return AccumulateState(
            count=jnp.zeros([], jnp.int32),
            grads=jax.tree.map(_zeros, params),
            value=jnp.zeros([], jnp.float32),
            inner=inner.init(params),
        )

    def update(
        updates: Params, state: PyTree, params: Params | None = None, **extra_args: Any
    ) -> tuple[Params, AccumulateState]:
        sums = jax.tree.map(
            lambda total, new: total + new.astype(total.dtype), state.grads, updates
        )
        value = state.value + _checked(extra_args.get("value"))

        def step(sums: Params, value: jax.Array, inner_state: PyTree) -> tuple[PyTree, ...]:
            mean = jax.tree.map(lambda total, new: (total / every).astype(new.dtype), sums, updates)
            averages = {"grad": mean, "value": value / every}
            given = {n: averages.get(n, arg) for n, arg in extra_args.items() if arg is not None}
            changes, inner_state = inner.update(mean, inner_state, params, **given)
            return changes, jax.tree.map(jnp.zeros_like, sums), jnp.zeros_like(value), inner_state

        def wait(sums: Params, value: jax.Array, inner_state: PyTree) -> tuple[PyTree, ...]:
            changes, *_ = jax.eval_shape(step, sums, value, inner_state)
            # x + 0.0 is not x where x is -0.0; x + -0.0 is x for every x.
            nothing = jax.tree.map(lambda leaf: jnp.full(leaf.shape, -0.0, leaf.dtype), changes)
            return nothing, sums, value, inner_state

        count = (state.count + 1) % every
        changes, *state = jax.lax.cond(count == 0, step, wait, sums, value, state.inner)
        return changes, AccumulateState(count, *state)

    return optax.GradientTransformationExtraArgs(init, update)


def _zeros(param: jax.Array) -> jax.Array:
    return jnp.zeros(jnp.shape(param), jnp.promote_types(jnp.result_type(param), jnp.float32))


def _checked(value: Any) -> jax.Array:
    """Returns a loss as a float32 scalar; 0 where there is none."""
    if jnp.shape(0.0 if value is None else value) != ():
        raise LossError(
            f"The loss that is accumulated is a scalar, and `value` has shape {jnp.shape(value)}. "
            "Average it over the batch first."
        )
    return jnp.asarray(0.0 if value is None else value, jnp.float32)
