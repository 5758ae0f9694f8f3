"""Gradient accumulation: one update from averages over several micro-steps."""

from __future__ import annotations

import dataclasses
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distaff.core.typing import Params, PyTree
from distaff.errors import ConfigError, LossError
from distaff.optim.rates import with_rates
from distaff.optim.transforms.extra_args import (
    FLUSH,
    AccumulateState,
    contains,
    find_states,
    with_description,
    with_known_args,
)
from distaff.optim.transforms.loss_scale import scales


def accumulate(
    tx: optax.GradientTransformation, every: int, *, tail: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that it makes one update from averages over `every` micro-steps.

    It averages the gradients and the `value` (the loss), weighting each micro-step by `weight`: the
    number of its examples, or the sum of their weights. So `k` micro-batches make the same update
    as one batch of all their examples, even if they are ragged or weighted. `optax.MultiSteps`
    weights all micro-steps equally, and passes on the loss of the last one only. Micro-steps before
    the last leave the parameters unchanged, bit for bit.

    A training step passes the weight. In your own step, pass it to `state.apply_gradients` with
    `optimizer_args={"weight": ...}`; by default all micro-steps weigh 1.

    Args:
        tx: any Optax optimizer. Its `grad` argument, if passed, is the averaged gradient; other
            extra arguments come from the last micro-step. Its schedules count updates.
        every: micro-steps per update; 1 to return `tx` itself.
        tail: whether the trainer makes an update from an incomplete window at the end of an epoch,
            if this is the outermost transformation.

    Returns:
        The optimizer; its state is an `AccumulateState` if `every` is more than 1.

    Raises:
        ConfigError: `every` is not an integer >= 1; or, from `update`, the optimizer evaluates the
            loss at other parameters (a line search, `sam`, `sophia`).
        LossError: from `update`, if `value` is not a scalar.

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
            f"every, the number of micro-steps per update, must be an int >= 1; got {every!r}."
        )
    inner = with_known_args(tx)
    if every == 1:
        return inner
    wrapped = _Accumulation(with_rates(inner), int(every), tail)
    wrapped_tx = optax.GradientTransformationExtraArgs(wrapped.init, wrapped.update)
    return with_description(wrapped_tx, tx, rates=None)


@dataclasses.dataclass(frozen=True)
class _Accumulation:
    inner: optax.GradientTransformationExtraArgs
    every: int
    tail: bool

    def init(self, params: Params) -> AccumulateState:
        return nothing_accumulated(params, self.inner.init(params))

    def update(
        self, updates: Params, state: PyTree, params: Params | None = None, **extra_args: Any
    ) -> tuple[Params, AccumulateState]:
        """Returns the updates of a micro-step, which are -0.0 within a window, and the state."""
        flush = extra_args.pop(FLUSH, None)
        weight = extra_args.pop("weight", None)
        sums, count = (state.grads, state.value, state.weight), state.count
        if flush != "end":
            sums, count = _add(sums, updates, extra_args.get("value"), weight), count + 1
        is_due = count == self.every
        if flush is not None:
            is_due = (count > 0) & (self.tail or flush == "now")

        def step(sums: tuple[Any, ...], num_updates: jax.Array, inner_state: PyTree) -> Any:
            arguments = dict(extra_args)
            if weight is not None and contains(inner_state, AccumulateState):
                arguments["weight"] = sums[2]
            changes, inner_state = self._update_inner(sums, updates, inner_state, params, arguments)
            return changes, jax.tree.map(jnp.zeros_like, sums), num_updates + 1, inner_state

        def wait(sums: tuple[Any, ...], num_updates: jax.Array, inner_state: PyTree) -> Any:
            changes, *_ = jax.eval_shape(step, sums, num_updates, inner_state)
            return jax.tree.map(_no_update, changes), sums, num_updates, inner_state

        changes, sums, num_updates, inner_state = jax.lax.cond(
            is_due, step, wait, sums, state.num_updates, state.inner
        )
        count = jnp.where(is_due, 0, count)
        return changes, AccumulateState(count, *sums, num_updates, inner_state)

    def _update_inner(
        self,
        sums: tuple[Any, ...],
        like: Params,
        inner_state: PyTree,
        params: Params | None,
        extra_args: dict[str, Any],
    ) -> tuple[Params, PyTree]:
        """Returns the updates and the inner state for the averages of a window."""
        mean, value = _means(sums, like)
        averages = {"grad": mean, "value": value}
        averages.update(value_fn=_loss_of_window, obj_fn=_loss_of_window)
        arguments = {n: averages.get(n, arg) for n, arg in extra_args.items() if arg is not None}
        return self.inner.update(mean, inner_state, params, **arguments)


def collecting(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that it only adds up gradients, for `collected`.

    Args:
        tx: any Optax optimizer.

    Returns:
        The optimizer; its state is an `AccumulateState`, as `nothing_accumulated` returns it.
    """
    inner = with_known_args(tx)

    def update(
        updates: Params, state: PyTree, params: Params | None = None, **extra_args: Any
    ) -> tuple[Params, AccumulateState]:
        if extra_args.get(FLUSH) is not None:  # as `decays` asks
            changes, inner_state = inner.update(updates, state.inner, params, **extra_args)
            return changes, state._replace(inner=inner_state)
        sums = state.grads, state.value, state.weight
        sums = _add(sums, updates, extra_args.get("value"), extra_args.get("weight"))
        nothing = jax.tree.map(_no_update, updates)
        return nothing, AccumulateState(state.count + 1, *sums, state.num_updates, state.inner)

    def init(params: Params) -> AccumulateState:
        return nothing_accumulated(params, inner.init(params))

    return with_description(optax.GradientTransformationExtraArgs(init, update), tx, rates=None)


def nothing_accumulated(params: Params, inner: PyTree) -> AccumulateState:
    """Returns the state of an optimizer that accumulates, before its first micro-step.

    Args:
        params: the parameters.
        inner: the state of the optimizer itself.
    """
    zero = jnp.zeros([], jnp.float32)
    count = jnp.zeros([], jnp.int32)
    return AccumulateState(count, jax.tree.map(_zeros, params), zero, zero, count, inner)


def collected(state: AccumulateState, params: Params) -> tuple[Params, dict[str, Any]]:
    """Returns the mean gradient of the micro-steps, and further arguments of an optimizer's update.

    Args:
        state: the state of an optimizer of `collecting`.
        params: the parameters, whose dtypes the gradient gets.
    """
    grads, value = _means((state.grads, state.value, state.weight), params)
    args: dict[str, Any] = {"value": value, "value_fn": _loss_of_window}
    if contains(state.inner, AccumulateState):
        args["weight"] = state.weight
    return grads, args


def num_updates(opt_state: PyTree) -> jax.Array | None:
    """Returns the number of updates of an optimizer that accumulates or skips; None for all others.

    Args:
        opt_state: the state of any optimizer. If several accumulate, the smallest number counts.
    """
    for state in scales(opt_state):
        inside = num_updates(state.inner)
        return state.num_updates if inside is None else inside
    states = list(find_states(opt_state, AccumulateState, optax.MultiStepsState))
    counts = [
        state.num_updates if isinstance(state, AccumulateState) else state.gradient_step
        for state in states
    ]
    return jnp.min(jnp.stack(counts)) if counts else None


def _means(sums: tuple[Params, jax.Array, jax.Array], like: Params) -> tuple[Params, jax.Array]:
    """Returns the mean gradient, in the dtypes of `like`, and the mean loss."""
    total, value, weight = sums
    divisor = jnp.where(weight == 0, 1, weight)
    mean = jax.tree.map(
        lambda leaf, new: (leaf / divisor.astype(leaf.dtype)).astype(new.dtype), total, like
    )
    return mean, value / divisor


def _no_update(leaf: Any) -> jax.Array:
    """Returns -0.0: x + -0.0 is x for every x, but -0.0 + 0.0 is 0.0."""
    return jnp.full(leaf.shape, -0.0, leaf.dtype)


def _add(
    sums: tuple[Params, jax.Array, jax.Array], grads: Params, value: Any, weight: Any
) -> tuple[Params, jax.Array, jax.Array]:
    """Adds a micro-step to the sums of gradients, losses and weights."""
    total, losses, weights = sums
    loss = _checked_loss(value)
    if weight is None:
        total = jax.tree.map(lambda leaf, new: leaf + new.astype(leaf.dtype), total, grads)
        return total, losses + loss, weights + 1
    weight = jnp.asarray(weight, jnp.float32)

    def weighted(new: jax.Array) -> jax.Array:
        # A mean of weight 0 is NaN; it must not count.
        return jnp.where(weight == 0, 0, weight.astype(new.dtype) * new)

    total = jax.tree.map(lambda leaf, new: leaf + weighted(new.astype(leaf.dtype)), total, grads)
    return total, losses + weighted(loss), weights + weight


def _loss_of_window(*_: Any, **__: Any) -> Any:
    """Stands in for the loss over all micro-batches of a window, which cannot be evaluated."""
    raise ConfigError(
        "An optimizer that evaluates the loss at other parameters (a line search, lbfgs, sam, "
        "sophia) cannot accumulate, since only the last batch is still available then. Use "
        "accumulate=1 and micro_batch=None, or another optimizer."
    )


def _zeros(param: jax.Array) -> jax.Array:
    return jnp.zeros(jnp.shape(param), jnp.promote_types(jnp.result_type(param), jnp.float32))


def _checked_loss(value: Any) -> jax.Array:
    """Returns a loss as a float32 scalar; 0 for None."""
    value = 0.0 if value is None else value
    if jnp.shape(value) != ():
        raise LossError(
            f"The accumulated loss must be a scalar, but `value` has shape {jnp.shape(value)}. "
            "Average it over the batch first."
        )
    return jnp.asarray(value, jnp.float32)
