"""Averages of the weights: an exponential moving average (EMA), and one over epochs (SWA).

Averages are a member of the state, so that they are saved, resumed and donated with it. They cover
the float arrays of a model: its parameters and its running statistics. Training continues from the
raw weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distaff.core.config.argument import Argument
from distaff.core.config.checks import as_float
from distaff.core.config.options import Options, at_least, option, or_none
from distaff.core.typing import Batch, PyTree
from distaff.errors import ConfigError, StateError, nearest
from distaff.optim import evaluation_params, num_updates
from distaff.step.normalise import StepFn
from distaff.step.remainder import with_rest
from distaff.step.state import TrainState

RAW, _EMA, _SWA = "raw", "ema", "swa"


@dataclasses.dataclass(frozen=True)
class EMA:
    """An exponential moving average of the weights, updated after each optimizer update.

    It is debiased: the average of constant weights is that constant, and the initial weights do not
    count. With a warm-up, the decay of update `t` is `min(decay, (1 + t) / (10 + t))`, so that the
    average of a short run does not reach back to its beginning.

    >>> EMA(0.9999)
    EMA(decay=0.9999, warmup=True)

    Args:
        decay: weight of the previous average, at least 0 and less than 1. The average covers about
            the last `1 / (1 - decay)` updates.
        warmup: whether the decay rises to its value in the first updates.

    Raises:
        ConfigError: `decay` is out of range, or `warmup` is not a bool.
    """

    decay: float
    _: dataclasses.KW_ONLY
    warmup: bool = True

    def __post_init__(self) -> None:
        decay = as_float(self.decay)
        if not 0 <= decay < 1:
            raise ConfigError(
                f"The decay of an EMA must be at least 0 and less than 1; got {self.decay!r}. "
                "Write ema=0.999 to average about the last 1000 updates."
            )
        if not isinstance(self.warmup, bool):
            raise ConfigError(f"The warmup of an EMA must be True or False; got {self.warmup!r}.")
        object.__setattr__(self, "decay", decay)


def _as_ema(name: str, value: Any) -> EMA | None:
    return value if value is None or isinstance(value, EMA) else EMA(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AveragingOptions(Options):
    """Which averages of the weights to keep."""

    ema: Argument[EMA | float | None] = option(
        None,
        """Decay of an exponential moving average of the weights, such as 0.999, or an `EMA`. It is
        validated alongside the raw weights, as `val_ema/loss`. None to disable.""",
        check=_as_ema,
    )
    swa_from_epoch: int | None = option(
        None,
        """First epoch of stochastic weight averaging (SWA), the mean of the weights at the ends of
        epochs. It is validated alongside the raw weights, as `val_swa/loss`; before this epoch it
        equals them. None to disable.""",
        check=or_none(at_least(1)),
    )

    @property
    def averages(self) -> tuple[str, ...]:
        """The names of the averages."""
        kept = {_EMA: self.ema, _SWA: self.swa_from_epoch}
        return tuple(name for name, value in kept.items() if value is not None)

    def evaluations(self, prefix: str) -> Iterator[tuple[str, dict[str, str]]]:
        """Yields the prefix of the metrics, and the arguments, of each evaluation of a loader.

        >>> list(AveragingOptions(ema=0.99).evaluations("val"))
        [('val', {'weights': 'raw'}), ('val_ema', {'weights': 'ema'})]
        >>> list(AveragingOptions().evaluations("val"))
        [('val', {})]
        """
        yield prefix, {"weights": RAW} if self.averages else {}
        for name in self.averages:
            yield f"{prefix}_{name}", {"weights": name}

    def judged(self, metric: str) -> str:
        """Returns the weights that a metric is of: "ema" for `val_ema/loss`."""
        name = metric.partition("/")[0].rpartition("_")[2]
        return name if name in self.averages else RAW


class Average(NamedTuple):
    """An average of the weights.

    Attributes:
        count: number of averaged weights, int32 `[]`.
        total: sum of their weights relative to the newest, float32 `[]`; 0 before the first.
        step: `state.step` of the newest, int32 `[]`.
        values: the averages in float32 or wider, by member of the state; None for an array that is
            not a float.
    """

    count: jax.Array
    total: jax.Array
    step: jax.Array
    values: dict[str, PyTree]


def empty(state: TrainState) -> Average:
    """Returns an average of the weights of a state before the first are averaged."""
    zero = jnp.zeros([], jnp.int32)
    values = jax.tree.map(_zeros, _members(state))
    return Average(zero, jnp.zeros([], jnp.float32), zero, values)


def fits(average: Any, state: TrainState) -> bool:
    """Returns whether an average, or None, is of weights with the shapes of a state."""
    fresh = jax.eval_shape(empty, state)
    return jax.tree.map(jnp.shape, average) == jax.tree.map(jnp.shape, fresh)


def averaging(step: StepFn, options: AveragingOptions) -> StepFn:
    """Wraps a training step so that it updates the EMA in its state after each optimizer update.

    Args:
        step: `(state, batch) -> (state, metrics)`.
        options: which averages to keep.
    """
    ema = _as_ema("ema", options.ema)
    if ema is None:
        return step

    def averaging_step(state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
        returned = step(state, batch)
        # A step that returns no pair is reported by `measured`.
        if state.averages is None or not isinstance(returned, tuple | list) or len(returned) != 2:
            return returned
        after, metrics = returned
        return _with_ema(state, after, ema), metrics

    return averaging_step


def averaging_rest(options: AveragingOptions) -> Callable[[TrainState], TrainState]:
    """Returns `with_rest`, which also updates the EMA if it makes an optimizer update."""
    ema = _as_ema("ema", options.ema)

    def rest(state: TrainState) -> TrainState:
        after = with_rest(state)
        is_kept = ema is not None and state.averages is not None
        return _with_ema(state, after, ema) if is_kept else after

    return rest


def is_averaged(options: AveragingOptions, epoch: int) -> bool:
    """Returns whether SWA averages the weights at the end of an epoch."""
    return options.swa_from_epoch is not None and epoch >= options.swa_from_epoch


def with_epoch(state: TrainState) -> TrainState:
    """Returns a state whose SWA includes its weights; unchanged if it already does."""
    assert state.averages is not None
    swa = state.averages[_SWA]
    moved = _moved(swa, state, 1.0, is_due=state.step > swa.step)
    return state.replace(averages={**state.averages, _SWA: moved})


def find(state: TrainState, name: str) -> Average:
    """Returns an average of a state.

    Raises:
        ConfigError: `name` is not the name of an average.
        StateError: the state does not have this average.
    """
    if name not in (_EMA, _SWA):
        raise ConfigError(f"weights has no value {name!r}. {nearest(str(name), [RAW, _EMA, _SWA])}")
    found = state.averages or {}
    if name not in found:
        option = {_EMA: "ema=0.999", _SWA: "swa_from_epoch=5"}[name]
        kept = ", ".join(map(repr, [RAW, *found]))
        raise StateError(
            f"weights={name!r} needs an average that this model does not have; it has {kept}. "
            f"An average begins in training: pass {option}, and train; or use one of these."
        )
    return found[name]


def averaged(average: Average, state: TrainState) -> TrainState:
    """Returns a state with the averaged weights; with its own if nothing is averaged yet."""

    def one(mean: jax.Array | None, own: jax.Array) -> jax.Array:
        if mean is None:
            return own
        return jnp.where(average.total > 0, mean.astype(own.dtype), own)

    members = jax.tree.map(one, average.values, _members(state), is_leaf=_is_none)
    return state.replace(**members)


def _with_ema(before: TrainState, after: TrainState, ema: EMA) -> TrainState:
    assert before.averages is not None
    average, is_due = before.averages[_EMA], None
    updates, updates_after = (num_updates(state.opt_state) for state in (before, after))
    if updates is not None and updates_after is not None:  # gradients are accumulated
        is_due = updates_after > updates
    decay: Any = ema.decay
    if ema.warmup:
        count = average.count.astype(jnp.float32)
        decay = jnp.minimum(jnp.float32(ema.decay), (1 + count) / (10 + count))
    moved = _moved(average, after, decay, is_due)
    return after.replace(averages={**before.averages, _EMA: moved})


def _moved(average: Average, state: TrainState, decay: Any, is_due: jax.Array | None) -> Average:
    """Returns an average that includes the weights of a state.

    The weight of the newest is 1, and earlier ones are multiplied by `decay`: the total of the
    weights normalises without a bias, also if the decay changes. A decay of 1 gives the mean.
    """
    total = 1 + decay * average.total
    # The same as `optax.ema`, but exact for constant weights.
    rate = 1 / total

    def one(mean: jax.Array | None, own: jax.Array) -> jax.Array | None:
        if mean is None:
            return None
        return mean + rate.astype(mean.dtype) * (_widened(own, mean.dtype) - mean)

    values = jax.tree.map(one, average.values, _members(state), is_leaf=_is_none)
    step = jnp.asarray(state.step, jnp.int32)
    moved = Average(average.count + 1, total, step, values)
    if is_due is None:
        return moved
    return jax.tree.map(lambda new, old: jnp.where(is_due, new, old), moved, average)


def _members(state: TrainState) -> dict[str, PyTree]:
    """Returns the arrays of the model that an average covers, by member of the state."""
    return {
        "params": evaluation_params(state.opt_state, state.params),
        "batch_stats": state.batch_stats,
        "collections": state.collections,
    }


def _widened(leaf: jax.Array, dtype: Any) -> jax.Array:
    """Returns an array in a wider dtype, with the values that its own dtype can hold."""
    wide = leaf.astype(dtype)
    if leaf.dtype == dtype:
        return wide
    # XLA may use the number before it was rounded, in some programs and not in others.
    form = jnp.finfo(leaf.dtype)
    return jax.lax.reduce_precision(wide, form.nexp, form.nmant)


def _zeros(leaf: Any) -> Any:
    """Returns zeros for a float array; None for any other."""
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return None
    return jnp.zeros(jnp.shape(leaf), jnp.promote_types(dtype, jnp.float32))


def _is_none(node: Any) -> bool:
    return node is None
