"""The learning rates that an optimizer applied, stored in its state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from distaff.core.typing import Params, PyTree
from distaff.optim.transforms.extra_args import Described, with_description

RATE = "learning_rate"
"""The name of a learning rate in the log; for a group `learning_rate/<group>`."""


class RatesState(NamedTuple):
    """The state of an optimizer that stores the learning rates of its latest update.

    Attributes:
        count: number of updates, int32 `[]`.
        rates: rates of the latest (or first) update by name, float32 `[]`.
        inner: the state of the optimizer itself.
    """

    count: jax.Array
    rates: Mapping[str, jax.Array]
    inner: PyTree


def with_rates(
    tx: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer whose description has rates so that its state stores the applied ones.

    Returns any other optimizer unchanged.
    """
    if not isinstance(tx, Described) or tx.rates is None:
        return tx
    schedules_of = tx.rates

    def rates(params: Params, count: jax.Array) -> dict[str, jax.Array]:
        schedules = schedules_of(params)
        return {name: jnp.asarray(rate(count), jnp.float32) for name, rate in schedules.items()}

    def init(params: Params) -> RatesState:
        count = jnp.zeros([], jnp.int32)
        return RatesState(count, rates(params, count), tx.init(params))

    def update(
        updates: Params, state: PyTree, params: Params | None = None, **extra_args: Any
    ) -> tuple[Params, RatesState]:
        applied = rates(updates, state.count)
        changes, inner = tx.update(updates, state.inner, params, **extra_args)
        return changes, RatesState(state.count + 1, applied, inner)

    return with_description(optax.GradientTransformationExtraArgs(init, update), tx, rates=None)


def applied_rates(opt_state: PyTree) -> dict[str, jax.Array]:
    """Returns the learning rates in an optimizer's state, float32 `[]` by name.

    They come from `with_rates`, which `accumulate` uses, and from `optax.inject_hyperparams`, at
    any depth. If there are several of the latter, each name has the label of its part of
    `optax.partition`, or a number.

    Args:
        opt_state: the state of any optimizer.
    """
    kinds = (RatesState, optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)

    def has_rates(node: Any) -> bool:
        return isinstance(node, kinds)

    rates: dict[str, Any] = {}
    injected: list[tuple[str, Any]] = []
    for path, node in jax.tree.leaves_with_path(opt_state, is_leaf=has_rates):
        if isinstance(node, RatesState):
            rates.update(node.rates)
            rates.update(applied_rates(node.inner))
        elif has_rates(node) and RATE in node.hyperparams:
            labels = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
            injected.append((str(labels[-1]) if labels else "", node.hyperparams[RATE]))
    for index, (label, rate) in enumerate(injected):
        name = RATE if len(injected) == 1 and RATE not in rates else f"{RATE}/{label or index}"
        rates[name] = rate
    scalars = {name: jnp.asarray(rate, jnp.float32) for name, rate in rates.items()}
    return {name: rate for name, rate in scalars.items() if rate.ndim == 0}
