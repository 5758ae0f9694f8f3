"""Plateau: a learning rate that falls when the monitored metric stops improving."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from distaff.core.config.checks import as_float, whole
from distaff.core.typing import Params, PyTree
from distaff.errors import ConfigError
from distaff.optim.transforms.extra_args import with_description


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """Lowers the learning rate after validations without improvement of the trainer's `monitor`.

    The rate is that of the schedule, times a scale that begins at 1.

    Args:
        factor: the scale is multiplied by this, above 0 and below 1.
        patience: number of validations in a row without improvement after which the rate falls.
        cooldown: number of validations after a reduction that are not counted.
        min_scale: the scale falls no further than this, from 0 to less than 1.
        min_delta: minimum change of the metric that counts as an improvement.

    Raises:
        ConfigError: a value is out of range.
    """

    factor: float = 0.1
    patience: int = 5
    cooldown: int = 0
    min_scale: float = 0.0
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        whole("patience", self.patience)
        whole("cooldown", self.cooldown, least=0)
        ranges = {
            "factor": (0 < as_float(self.factor) < 1, "above 0 and below 1"),
            "min_scale": (0 <= as_float(self.min_scale) < 1, "at least 0 and below 1"),
            "min_delta": (0 <= as_float(self.min_delta) < math.inf, "finite and at least 0"),
        }
        for name, (is_in_range, rule) in ranges.items():
            if not is_in_range:
                raise ConfigError(
                    f"{name} of Plateau must be a number {rule}; got {getattr(self, name)!r}."
                )


class PlateauState(NamedTuple):
    """The state of an optimizer with a plateau rule.

    Attributes:
        scale: the learning rate as a fraction of its schedule, float32 `[]`.
        best: best value of the metric so far, negated if larger ones are better, float32 `[]`.
        waited: validations since then, or since the last reduction, int32 `[]`.
        cooling: validations left that are not counted, int32 `[]`.
        inner: the state of the optimizer itself.
    """

    scale: jax.Array
    best: jax.Array
    waited: jax.Array
    cooling: jax.Array
    inner: PyTree


def with_plateau(
    tx: optax.GradientTransformationExtraArgs, plateau: Plateau | None
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that its updates are multiplied by the scale in its state.

    Only `after_validation` changes the scale. Returns `tx` itself for None.
    """
    if plateau is None:
        return tx

    def init(params: Params) -> PlateauState:
        zero = jnp.zeros([], jnp.int32)
        scale, best = jnp.ones([], jnp.float32), jnp.full([], jnp.inf, jnp.float32)
        return PlateauState(scale, best, zero, zero, tx.init(params))

    def update(
        updates: Params, state: PyTree, params: Params | None = None, **extra_args: Any
    ) -> tuple[Params, PlateauState]:
        updates, inner = tx.update(updates, state.inner, params, **extra_args)
        scaled = jax.tree.map(lambda leaf: leaf * state.scale.astype(leaf.dtype), updates)
        return scaled, state._replace(inner=inner)

    return with_description(
        optax.GradientTransformationExtraArgs(init, update), tx, plateau=plateau
    )


def after_validation(
    state: PlateauState, value: jax.typing.ArrayLike, *, plateau: Plateau, mode: str
) -> PlateauState:
    """Returns the numbers of a plateau rule after a validation.

    The arithmetic is that of `optax.contrib.reduce_on_plateau`.

    Args:
        state: the numbers before it; `inner` is passed on.
        value: the monitored metric, `[]`. NaN is no improvement.
        plateau: the rule.
        mode: whether smaller ("min") or larger ("max") values are better.
    """
    reduce = optax.contrib.reduce_on_plateau(
        plateau.factor,
        plateau.patience,
        # Optax wants one of the two above 0, and 1 - tiny is 1.
        rtol=0.0 if plateau.min_delta else float(np.finfo(np.float32).tiny),
        atol=plateau.min_delta,
        cooldown=plateau.cooldown,
        min_scale=plateau.min_scale,
    )
    value = jnp.asarray(value, jnp.float32)
    before = optax.contrib.ReduceLROnPlateauState(
        scale=state.scale,
        best_value=state.best,
        plateau_count=state.waited,
        cooldown_count=state.cooling,
        count=jnp.zeros([], jnp.int32),
        avg_value=jnp.zeros([], jnp.float32),
    )
    after: Any = reduce.update({}, before, value=value if mode == "min" else -value)[1]
    return PlateauState(
        after.scale, after.best_value, after.plateau_count, after.cooldown_count, state.inner
    )


def with_numbers(
    opt_state: PyTree, change: Callable[[PlateauState], PlateauState]
) -> tuple[PyTree, list[float]]:
    """Changes the numbers of a plateau rule.

    Args:
        opt_state: the state of an optimizer that is `with_plateau`, at any depth.
        change: gets the numbers, with an empty `inner`, and returns new ones.

    Returns:
        The state of the optimizer, and the scale before and after.
    """
    scales: list[float] = []

    def one(node: Any) -> Any:
        if not isinstance(node, PlateauState):
            return node
        numbers = change(node._replace(inner=()))
        scales.extend([float(node.scale), float(numbers.scale)])
        return numbers._replace(inner=node.inner)

    changed = jax.tree.map(one, opt_state, is_leaf=lambda node: isinstance(node, PlateauState))
    return changed, scales
