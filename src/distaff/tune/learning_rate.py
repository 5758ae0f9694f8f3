"""Finds a learning rate by a range test: Smith 2017, arXiv:1506.01186, section 3.3."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distaff.core.config.checks import as_float, whole
from distaff.core.typing import Batch, PyTree
from distaff.data import Loader, epoch_of, first_to_train, num_examples
from distaff.errors import ConfigError, MetricError, NonFiniteError
from distaff.execution.processes import check_not_joined
from distaff.metrics.accumulators import WeightedMean
from distaff.optim import OptimizerConfig, OptimizerLike, build_optimizer, num_updates
from distaff.optim.build import check_optimizer
from distaff.optim.catalog import LEARNED
from distaff.optim.factory import is_factory, takes_learning_rate
from distaff.optim.precision import for_precision
from distaff.optim.rates import RATE
from distaff.step.normalise import StepFn
from distaff.step.state import TrainState
from distaff.trainer.module import TrainerModule
from distaff.trainer.trials import StepAlone, step_alone, training_batches
from distaff.tune.range_test import RangeTest, evaluate

AtRate: TypeAlias = Callable[[Any], optax.GradientTransformation]
"""A function from a learning rate, which may be traced, to an optimizer."""

_IN_FLIGHT = 8
"""Number of steps after which the host waits for the device, and asks whether the test is over."""

_MOST_PER_UPDATE = 1024
_RISE = 3.0


def find_learning_rate(
    trainer: TrainerModule,
    train_loader: Any,
    *,
    low: float = 1e-7,
    high: float = 10.0,
    num_steps: int = 100,
    smoothing: float | None = None,
    make_optimizer: Callable[[Any], OptimizerLike] | None = None,
) -> RangeTest:
    """Trains a copy of a trainer while the learning rate rises, and suggests one.

    The learning rate rises geometrically from update to update. The test ends at `high`, or when
    the smoothed loss has risen above its minimum by three times that minimum, or by three times
    what it had fallen, whichever is more. All steps are calls of one compiled program.

    The trainer does not change: not its state, its files, its loggers, or the position of the
    loader. The copy starts from its current weights, and needs memory for a second state.

    What is varied is the `learning_rate` of an `OptimizerConfig`, without warm-up and schedule.
    Groups with a rate of their own keep it. Of an Optax transformation it is the `learning_rate` of
    `optax.inject_hyperparams`. For any other, pass `make_optimizer`.

    Args:
        trainer: a trainer that has not trained yet, or has.
        train_loader: a loader, any iterable of batches, or arrays such as `(x, y)`. If it has too
            few batches, it starts again. Short last batches are left out.
        low: the first learning rate.
        high: the last one.
        num_steps: the number of updates, at least 10. With accumulation each takes several batches.
        smoothing: how much a loss is averaged with its neighbours, from 0 to below 1: the weight of
            each step as a factor of that of its neighbour. By default 1 - 20 / num_steps, so that
            an average covers the same part of the curve for any number of steps.
        make_optimizer: a function from a learning rate to an optimizer, such as `optax.adam`, to
            use instead of the trainer's. It is called in a compiled program: the rate has no value.

    Returns:
        The losses by learning rate, and the suggestion.

    Raises:
        ConfigError: an argument is invalid, or the optimizer has no learning rate to vary.
        BatchError: the loader is empty, or can be read only once.
        NonFiniteError: the loss is NaN or infinite before the first update.

    Example:
        >>> found = tune.find_learning_rate(trainer, (x, y))
        >>> found.suggestion
        0.0123
    """
    rates = _checked(trainer, low, high, num_steps)
    smoothing = _factor(smoothing, num_steps)
    if trainer.config.mesh is not None:
        check_not_joined("find_learning_rate on a mesh")
    at_rate = _optimizer_at_rate(trainer, make_optimizer, num_steps)
    with training_batches(trainer, train_loader) as loader:
        batch = first_to_train(loader)
        tx = None if at_rate is None else at_rate(low)
        alone = step_alone(trainer, batch, num_steps, tx)
        if at_rate is None:
            _check_injected(alone.state.opt_state)
        batches = islice(_batches(loader, batch), num_steps * _MOST_PER_UPDATE)
        progress = _run(alone, at_rate, rates, smoothing, batches)
    done = int(progress.index)
    losses = np.asarray(progress.losses)[:done]
    if not np.isfinite(losses[0]):
        raise NonFiniteError(
            f"The loss is {losses[0]} before the first update, at any learning rate. Check the "
            "loss and the data, for example by trainer.eval_model(train_loader)."
        )
    return evaluate(
        rates[:done],
        losses,
        highest_loss=float(progress.highest),
        diverged=bool(progress.diverged),
        smoothing=smoothing,
        title=f"Learning rate range test: {type(trainer).__name__}, seed {trainer.config.seed}",
    )


def _checked(trainer: Any, low: float, high: float, num_steps: int) -> np.ndarray:
    """Returns the learning rates, float64 `[num_steps]`, after a check of the arguments."""
    if not isinstance(trainer, TrainerModule):
        raise ConfigError(
            f"find_learning_rate takes a trainer, such as tasks.Classifier(model); got {trainer!r}."
        )
    whole("num_steps", num_steps, least=10)
    if not 0 < as_float(low) < as_float(high) < np.inf:
        raise ConfigError(
            f"low and high must be finite numbers with 0 < low < high; got low={low!r} and "
            f"high={high!r}."
        )
    return np.geomspace(low, high, num_steps)


def _factor(smoothing: float | None, num_steps: int) -> float:
    if smoothing is None:
        return max(0.0, 1 - 20 / num_steps)
    if not 0 <= as_float(smoothing) < 1:
        raise ConfigError(f"smoothing must be a number from 0 to below 1; got {smoothing!r}.")
    return float(smoothing)


def _optimizer_at_rate(
    trainer: TrainerModule, make_optimizer: Callable[[Any], OptimizerLike] | None, num_steps: int
) -> AtRate | None:
    """Returns the optimizer as a function of its learning rate.

    Returns None for a transformation, whose learning rate must be in its state.
    """
    make = make_optimizer
    if make is None:
        if type(trainer).init_optimizer is not TrainerModule.init_optimizer:
            return None
        given = _resolved(trainer.optimizer, num_steps)
        if not isinstance(given, OptimizerConfig):
            return None
        make = partial(_with_learning_rate, given)

    def at_rate(rate: Any) -> optax.GradientTransformation:
        optimizer = make(rate)
        check_optimizer(optimizer)
        optimizer = _resolved(optimizer, num_steps)
        if isinstance(optimizer, OptimizerConfig):
            _check_has_rate(optimizer)
            optimizer = _constant(optimizer)
        built = build_optimizer(optimizer, num_steps * getattr(optimizer, "accumulate", 1))
        return for_precision(built.tx, trainer.config.precision)

    return at_rate


def _resolved(optimizer: OptimizerLike, num_steps: int) -> Any:
    """Returns the optimizer itself for a function of the number of steps."""
    kinds = OptimizerConfig | optax.GradientTransformation | optax.MultiSteps
    return optimizer if isinstance(optimizer, kinds) else optimizer(num_steps)


def _with_learning_rate(config: OptimizerConfig, rate: Any) -> OptimizerConfig:
    _check_has_rate(config)
    return dataclasses.replace(config, learning_rate=rate, schedule="constant", warmup_steps=0)


def _has_rate(config: OptimizerConfig) -> bool:
    is_without = is_factory(config.name) and not takes_learning_rate(config.name)
    return config.name not in LEARNED and not is_without


def _check_has_rate(config: OptimizerConfig) -> None:
    """Checks that an optimizer has a learning rate.

    Raises:
        ConfigError: it has none.
    """
    if not _has_rate(config):
        raise ConfigError(f"The optimizer {config.name!r} has no learning rate to search for.")


def _constant(config: OptimizerConfig) -> OptimizerConfig:
    """Returns a config without schedules."""
    groups = [
        dataclasses.replace(group, optimizer=_constant(group.optimizer))
        if isinstance(group.optimizer, OptimizerConfig) and _has_rate(group.optimizer)
        else group
        for group in config.groups
    ]
    return dataclasses.replace(config, schedule="constant", warmup_steps=0, groups=tuple(groups))


def _is_injected(node: Any) -> bool:
    kinds = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)
    return isinstance(node, kinds) and RATE in node.hyperparams


def _check_injected(opt_state: PyTree) -> None:
    """Checks that the state of an optimizer has one learning rate that may be set.

    Raises:
        ConfigError: it has none, or several, or one that follows a schedule.
    """
    nodes = [x for x in jax.tree.leaves(opt_state, is_leaf=_is_injected) if _is_injected(x)]
    remedy = (
        "Pass make_optimizer, a function from a learning rate to the optimizer, such as "
        "make_optimizer=optax.adam; or use an OptimizerConfig or optax.inject_hyperparams."
    )
    if len(nodes) != 1:
        has = "no learning rate" if not nodes else f"{len(nodes)} learning rates"
        raise ConfigError(
            f"The state of the optimizer must have one learning rate that can be set; it has "
            f"{has}. {remedy}"
        )
    if RATE in getattr(nodes[0], "hyperparams_states", {}):
        raise ConfigError(
            "The learning rate of the optimizer follows a schedule, and must be one that can be "
            f"set. {remedy}"
        )


def _injected(opt_state: PyTree, rate: jax.Array) -> PyTree:
    """Returns the state of an optimizer with this learning rate."""

    def one(node: Any) -> Any:
        if not _is_injected(node):
            return node
        old = node.hyperparams[RATE]
        own = jnp.broadcast_to(rate.astype(jnp.result_type(old)), jnp.shape(old))
        return node._replace(hyperparams={**node.hyperparams, RATE: own})

    return jax.tree.map(one, opt_state, is_leaf=_is_injected)


def _batches(loader: Loader, first: Batch) -> Iterator[Batch]:
    """Yields the batches of a loader, epoch by epoch, without those shorter than the first one."""
    size = num_examples(first)
    while True:
        for batch in epoch_of(loader, name="train"):
            if num_examples(batch) >= size:
                yield batch


class _Progress(NamedTuple):
    """Where a range test stands, on the device.

    Attributes:
        state: the state that is trained.
        index: number of updates, int32 `[]`.
        losses: their losses, float32 `[num_steps]`.
        total: sum of the losses of the next update so far, float32 `[]`.
        weight: sum of their weights, float32 `[]`.
        average: exponential average of the losses, not debiased, float32 `[]`.
        lowest: lowest debiased average, float32 `[]`.
        highest: the loss at which the test ends, float32 `[]`.
        diverged: whether it has reached that, bool `[]`.
        is_over: whether nothing is left to do, bool `[]`.
    """

    state: TrainState
    index: jax.Array
    losses: jax.Array
    total: jax.Array
    weight: jax.Array
    average: jax.Array
    lowest: jax.Array
    highest: jax.Array
    diverged: jax.Array
    is_over: jax.Array


def _run(
    alone: StepAlone,
    at_rate: AtRate | None,
    rates: np.ndarray,
    smoothing: float,
    batches: Iterable[Batch],
) -> _Progress:
    """Trains until the test is over."""
    progress = _Progress(
        state=alone.state,
        index=jnp.int32(0),
        losses=jnp.zeros(len(rates), jnp.float32),
        total=jnp.float32(0),
        weight=jnp.float32(0),
        average=jnp.float32(0),
        lowest=jnp.float32(jnp.inf),
        highest=jnp.float32(jnp.inf),
        diverged=jnp.zeros([], bool),
        is_over=jnp.zeros([], bool),
    )
    advance = _advance(alone.step, at_rate, jnp.asarray(rates, jnp.float32), smoothing)

    def guarded(progress: _Progress, batch: Batch) -> _Progress:
        return jax.lax.cond(
            progress.is_over, lambda progress, _: progress, advance, progress, batch
        )

    program = alone.execution.program(guarded, donate=0)
    for number, batch in enumerate(batches, 1):
        progress = program(progress, batch)
        if number % _IN_FLIGHT == 0 and bool(progress.is_over):
            break
    return progress


def _advance(
    step: StepFn, at_rate: AtRate | None, rates: jax.Array, smoothing: float
) -> Callable[[_Progress, Batch], _Progress]:
    """Returns the program of one step of a range test."""

    def advance(progress: _Progress, batch: Batch) -> _Progress:
        state, index = progress.state, progress.index
        after, metrics = step(_with_rate(state, at_rate, rates[index]), batch)
        total, weight = _loss_of(metrics)
        total, weight = progress.total + total, progress.weight + weight
        loss = total / weight
        is_finite = jnp.isfinite(loss)
        before, now = num_updates(state.opt_state), num_updates(after.opt_state)
        # A micro-batch, or a step that the loss scale skips, is no update.
        is_update = jnp.bool_(True) if before is None or now is None else now > before
        ends = is_update | ~is_finite

        count = index + ends
        average = smoothing * progress.average + (1 - smoothing) * loss
        debiased = average / (1 - smoothing ** count.astype(jnp.float32))
        losses = progress.losses.at[index].set(loss)
        lowest = jnp.fmin(progress.lowest, debiased)
        # A loss may be negative, and the lowest one 0.
        highest = lowest + _RISE * jnp.maximum(abs(lowest), losses[0] - lowest)
        diverged = ~is_finite | (debiased > highest)
        ended = progress._replace(
            index=count,
            losses=losses,
            total=jnp.zeros_like(total),
            weight=jnp.zeros_like(weight),
            average=average,
            lowest=lowest,
            highest=highest,
            diverged=diverged,
            is_over=diverged | (count == len(rates)),
        )
        going = progress._replace(total=total, weight=weight)
        chosen = jax.tree.map(lambda a, b: jnp.where(ends, a, b), ended[1:], going[1:])
        return _Progress(after.replace(tx=state.tx), *chosen)

    return advance


def _with_rate(state: TrainState, at_rate: AtRate | None, rate: jax.Array) -> TrainState:
    if at_rate is None:
        return state.replace(opt_state=_injected(state.opt_state, rate))
    return state.replace(tx=at_rate(rate))


def _loss_of(metrics: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of the losses of a batch, and of their weights.

    Raises:
        MetricError: the step returns no loss.
    """
    loss = metrics.get("loss")
    if not isinstance(loss, WeightedMean) or jnp.ndim(loss.total):
        raise MetricError(
            "The test reads the training metric 'loss', a scalar, which is not among "
            f"{sorted(metrics)}. Return it from train_step."
        )
    return loss.total.astype(jnp.float32), jnp.asarray(loss.weight, jnp.float32)
