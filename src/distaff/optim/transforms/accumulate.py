"""Accumulation: one update of an optimizer from the averages over several micro-steps."""

from __future__ import annotations

import dataclasses
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distaff.core.typing import Params, PyTree
from distaff.errors import ConfigError, LossError
from distaff.optim.applied import with_rates
from distaff.optim.transforms.extra_args import (
    FLUSH,
    AccumulateState,
    described,
    found,
    holds,
    with_known_args,
)


def accumulate(
    tx: optax.GradientTransformation, every: int, *, tail: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that it makes one update from the averages over `every` micro-steps.

    Both the gradients and the `value` (the loss) are averaged, each micro-step with its `weight`:
    the number of its examples, or the sum of their weights. `k` micro-batches then make the update
    that one batch of all their examples makes, also where they are ragged or weighted.
    `optax.MultiSteps` weighs all micro-steps alike, and hands on the loss of the last one alone.
    The micro-steps before the last leave the parameters as they are, bit for bit.

    A training step passes the weight. In a step of your own pass it to
    `state.apply_gradients(..., optimizer_args={"weight": ...})`; without, all micro-steps weigh 1.

    Args:
        tx: any Optax optimizer. Its `grad`, where one is given, is the averaged gradient; any
            other extra argument is that of the last micro-step. Its schedules count updates.
        every: micro-steps per update; with 1, `tx` itself.
        tail: whether the trainer makes an update of an incomplete window at the end of an epoch,
            where this is the outermost transformation.

    Returns:
        The optimizer; its state is an `AccumulateState` if `every` is more than 1.

    Raises:
        ConfigError: `every` is no whole number, or less than 1; raised by `update` if the optimizer
            evaluates the loss at other parameters (a line search, `sam`, `sophia`).
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
    made = _Accumulation(with_rates(inner), int(every), tail)
    return described(optax.GradientTransformationExtraArgs(made.init, made.update), tx, rates=None)


@dataclasses.dataclass(frozen=True)
class _Accumulation:
    """The two functions of an optimizer that accumulates."""

    inner: optax.GradientTransformationExtraArgs
    every: int
    tail: bool

    def init(self, params: Params) -> AccumulateState:
        """Returns the state before the first micro-step."""
        return AccumulateState(
            count=jnp.zeros([], jnp.int32),
            grads=jax.tree.map(_zeros, params),
            value=jnp.zeros([], jnp.float32),
            weight=jnp.zeros([], jnp.float32),
            num_updates=jnp.zeros([], jnp.int32),
            inner=self.inner.init(params),
        )

    def update(
        self, updates: Params, state: PyTree, params: Params | None = None, **extra_args: Any
    ) -> tuple[Params, AccumulateState]:
        """Returns the updates of a micro-step, which are zero within a window, and the state."""
        asked = extra_args.pop(FLUSH, None)
        weight = extra_args.pop("weight", None)
        sums, count = (state.grads, state.value, state.weight), state.count
        if asked != "end":
            sums, count = _added(sums, updates, extra_args.get("value"), weight), count + 1
        is_due = count == self.every
        if asked is not None:
            is_due = (count > 0) & (self.tail or asked == "now")

        def step(sums: tuple[Any, ...], num_updates: jax.Array, inner_state: PyTree) -> Any:
            given = dict(extra_args)
            if weight is not None and holds(inner_state, AccumulateState):
                given["weight"] = sums[2]
            changes, inner_state = self._updated(sums, updates, inner_state, params, given)
            return changes, jax.tree.map(jnp.zeros_like, sums), num_updates + 1, inner_state

        def wait(sums: tuple[Any, ...], num_updates: jax.Array, inner_state: PyTree) -> Any:
            changes, *_ = jax.eval_shape(step, sums, num_updates, inner_state)
            # x + 0.0 is not x where x is -0.0; x + -0.0 is x for every x.
            nothing = jax.tree.map(lambda leaf: jnp.full(leaf.shape, -0.0, leaf.dtype), changes)
            return nothing, sums, num_updates, inner_state

        changes, sums, num_updates, inner_state = jax.lax.cond(
            is_due, step, wait, sums, state.num_updates, state.inner
        )
        count = jnp.where(is_due, 0, count)
        return changes, AccumulateState(count, *sums, num_updates, inner_state)

    def _updated(
        self,
        sums: tuple[Any, ...],
        like: Params,
        inner_state: PyTree,
        params: Params | None,
        extra_args: dict[str, Any],
    ) -> tuple[Params, PyTree]:
        """Returns the updates and the state that the averages of a window lead to."""
        total, value, weight = sums
        divisor = jnp.where(weight == 0, 1, weight)
        mean = jax.tree.map(
            lambda leaf, new: (leaf / divisor.astype(leaf.dtype)).astype(new.dtype), total, like
        )
        averages = {"grad": mean, "value": value / divisor}
        averages.update(value_fn=_unknown, obj_fn=_unknown)
        given = {n: averages.get(n, arg) for n, arg in extra_args.items() if arg is not None}
        return self.inner.update(mean, inner_state, params, **given)


def num_updates(opt_state: PyTree) -> jax.Array | None:
    """Returns how many updates an optimizer that accumulates has made; None for all others.

    Args:
        opt_state: the state of any optimizer. Of several the smallest number is taken.
    """
    states = list(found(opt_state, AccumulateState, optax.MultiStepsState))
    counts = [
        state.num_updates if isinstance(state, AccumulateState) else state.gradient_step
        for state in states
    ]
    return jnp.min(jnp.stack(counts)) if counts else None


def _added(
    sums: tuple[Params, jax.Array, jax.Array], grads: Params, value: Any, weight: Any
) -> tuple[Params, jax.Array, jax.Array]:
    """Returns the sums with those of one more micro-step."""
    total, losses, weights = sums
    loss = _checked(value)
    if weight is None:
        total = jax.tree.map(lambda leaf, new: leaf + new.astype(leaf.dtype), total, grads)
        return total, losses + loss, weights + 1
    weight = jnp.asarray(weight, jnp.float32)

    def weighted(new: jax.Array) -> jax.Array:
        # A mean over no weight is NaN, and counts nothing.
        return jnp.where(weight == 0, 0, weight.astype(new.dtype) * new)

    total = jax.tree.map(lambda leaf, new: leaf + weighted(new.astype(leaf.dtype)), total, grads)
    return total, losses + weighted(loss), weights + weight


def _unknown(*_: Any, **__: Any) -> Any:
    """Stands for the loss as a function of the parameters, over all micro-batches of a window."""
    raise ConfigError(
        "An optimizer that evaluates the loss at other parameters (a line search, lbfgs, sam, "
        "sophia) cannot accumulate: the batches before the last one are gone by then. Use "
        "accumulate=1 with larger batches, or another optimizer."
    )


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
