"""Learning rates for the log: stored by optimizers that apply them, or computed ahead.

Even the smallest program waits for all steps dispatched to the device before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distaff.core.typing import Params, PyTree, Schedule
from distaff.optim.transforms.extra_args import Described, with_description
from distaff.optim.transforms.plateau import PlateauState

RATE = "learning_rate"
"""The name of a learning rate in the log; for a group `learning_rate/<group>`."""

_BLOCK = 1024
"""Number of steps whose rates are computed at once."""


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

    They come from `with_rates`, times the scale of a plateau rule around it, and from
    `optax.inject_hyperparams`, at any depth. If there are several of the latter, each name has the
    label of its part of `optax.partition`, or a number.

    Args:
        opt_state: the state of any optimizer.
    """
    kinds = (
        RatesState,
        PlateauState,
        optax.InjectHyperparamsState,
        optax.InjectStatefulHyperparamsState,
    )

    def has_rates(node: Any) -> bool:
        return isinstance(node, kinds)

    rates: dict[str, Any] = {}
    injected: list[tuple[str, Any]] = []
    for path, node in jax.tree.leaves_with_path(opt_state, is_leaf=has_rates):
        if isinstance(node, RatesState):
            rates.update(node.rates)
            rates.update(applied_rates(node.inner))
        elif isinstance(node, PlateauState):
            inner = applied_rates(node.inner)
            rates.update({name: rate * node.scale for name, rate in inner.items()})
        elif has_rates(node) and RATE in node.hyperparams:
            labels = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
            injected.append((str(labels[-1]) if labels else "", node.hyperparams[RATE]))
    for index, (label, rate) in enumerate(injected):
        name = RATE if len(injected) == 1 and RATE not in rates else f"{RATE}/{label or index}"
        rates[name] = rate
    scalars = {name: jnp.asarray(rate, jnp.float32) for name, rate in rates.items()}
    return {name: rate for name, rate in scalars.items() if rate.ndim == 0}


def make_rates(schedule: Schedule) -> Callable[[int], Any]:
    """Returns a schedule's values as floats, without waiting for steps in flight.

    Args:
        schedule: the learning rate by optimizer step, traceable by JAX.

    Returns:
        A function `step -> learning_rate`, to be called with ascending steps. It returns an array
        if the schedule does.
    """
    if not jax.make_jaxpr(schedule)(0).eqns:  # constant
        rate = _plain(np.asarray(schedule(0)))
        return lambda step: rate
    return _Rates(schedule)


class _Rates:
    def __init__(self, schedule: Schedule) -> None:
        self._compute = jax.jit(
            lambda block: jax.vmap(schedule)(block * _BLOCK + jnp.arange(_BLOCK, dtype=jnp.int32))
        )
        self._blocks: dict[int, jax.Array] = {}
        self._prepare(0)

    def __call__(self, step: int) -> Any:
        block, row = divmod(step, _BLOCK)
        self._prepare(block)
        return _plain(np.asarray(self._blocks[block])[row])

    def _prepare(self, block: int) -> None:
        """Computes a block and the one after it, without waiting for them."""
        wanted = block, block + 1
        kept = {number: self._blocks[number] for number in wanted if number in self._blocks}
        for number in wanted:
            if number not in kept:
                kept[number] = self._compute(np.int32(number))
                kept[number].copy_to_host_async()
        self._blocks = kept


def _plain(rate: np.ndarray) -> Any:
    return rate if np.ndim(rate) else float(rate)
