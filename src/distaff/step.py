"""TrainStep and EvalStep: pure functions of a state and a batch, built around a loss.

"Step" means one completed optimizer update of the whole state, everywhere in this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distaff import metrics as metrics_lib
from distaff.data import num_examples
from distaff.errors import ConfigError, LossError, StateError
from distaff.metrics import Mean, Metric, PerExample
from distaff.models import Variables, model_of
from distaff.optim import decay_mask, decays, l2_loss
from distaff.state import TrainState
from distaff.typing import Batch, Key, Params

StepFn = Callable[[TrainState, Batch], tuple[TrainState, Any]]
"""`(state, batch) -> (state, metrics)`, metrics a mapping by name."""

EvalFn = Callable[[TrainState, Batch], Mapping[str, Any]]
"""`(state, batch) -> metrics`."""

_EVALUATION = 0x6576616C


class Context:
    """What a loss function needs besides parameters and batch. It lives for one trace.

    Attributes:
        state: the state before the step. Differentiate with respect to the loss function's own
            `params` argument, not `state.params`: JAX differentiates a function by its arguments.
        train: True in a training step, False in evaluation and prediction.
        penalty: the sum of what was added to the loss as a penalty; None without.
    """

    def __init__(self, state: TrainState, *, train: bool) -> None:
        self.state = state
        self.train = train
        self._batch_stats = state.batch_stats
        self._collections = state.collections
        self._root: Key | None = None
        if state.rng is not None:
            # Evaluation draws the same numbers whatever the step, so that its results compare.
            tag = state.step if train else jnp.uint32(_EVALUATION)
            self._root = jax.random.fold_in(state.rng, tag)
        self._applied = 0
        self.penalty: jax.Array | None = None

    @property
    def rng(self) -> Key:
        """The step's own random key, `fold_in(state.rng, state.step)`; a fixed one in evaluation.

        Raises:
            StateError: the state has no root key.
        """
        if self._root is None:
            raise StateError(
                "ctx.rng needs a root key, and TrainState.rng is None. "
                "Create the state with TrainState.create(..., rng=jax.random.key(0))."
            )
        return self._root

    def apply(self, params: Params, *inputs: Any, **kwargs: Any) -> Any:
        """Runs the model's forward pass.

        Dropout and running statistics are taken care of: each call draws from its own key, and in
        training a changed statistic is seen by the next call and kept in the new state.

        Args:
            params: the loss function's own `params` argument, or `{"params": params}`.
            *inputs: handed to the model.
            **kwargs: handed to the model; they win over what would be passed for `train`.

        Returns:
            The model's outputs.
        """
        if isinstance(params, Mapping) and set(params) == {"params"}:
            params = params["params"]
        key = None if self._root is None else jax.random.fold_in(self._root, 1 + self._applied)
        self._applied += 1
        outputs, variables = model_of(self.state.apply_fn).apply(
            Variables(params, self._batch_stats, self._collections),
            *inputs,
            train=self.train,
            key=key,
            **kwargs,
        )
        self._batch_stats, self._collections = variables.batch_stats, variables.collections
        return outputs

    def add_penalty(self, value: jax.Array) -> None:
        """Adds a penalty to what training differentiates, and to no loss that is reported.

        The metric "loss" stays the loss of the data, in training as in evaluation, where a penalty
        is left out; the metric "penalty" of a training step is the sum of its penalties.

        Args:
            value: a float scalar, a function of the loss function's own `params` or its outputs.

        Raises:
            LossError: `value` is no float scalar.
        """
        value = jnp.asarray(value)
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            raise LossError(
                f"A penalty is a float scalar, and has shape {value.shape} and dtype "
                f"{value.dtype}. Sum or average it first."
            )
        self.penalty = value if self.penalty is None else self.penalty + value

    def add_l2_loss(self, params: Params, coefficient: float, mask: Any = decay_mask) -> None:
        """Adds the penalty `optim.l2_loss(params, coefficient, mask)`.

        Prefer the optimizer's weight decay.

        Args:
            params: the loss function's own `params` argument, or a part of it.
            coefficient: strength of the penalty; its gradient is `coefficient * p`.
            mask: which parameters it applies to; biases and norm scales are left alone.

        Raises:
            ConfigError: the optimizer decays the parameters too.
        """
        tx = self.state.tx
        is_off = isinstance(coefficient, int | float) and coefficient == 0
        if self.train and not is_off and tx is not None and decays(tx, self.state.params):
            raise ConfigError(
                "Decay is in one place, and here it is in two: ctx.add_l2_loss with coefficient "
                f"{coefficient!r}, and an optimizer that decays the parameters itself (optax.adamw "
                "does by default). Remove ctx.add_l2_loss, or give the optimizer weight_decay=0."
            )
        self.add_penalty(l2_loss(params, coefficient, mask))

    @property
    def changed(self) -> dict[str, Any]:
        """Members of the state that the forward passes changed, with their new values."""
        return {"batch_stats": self._batch_stats, "collections": self._collections}


LossFn = Callable[[Params, Batch, Context], Any]
"""`(params, batch, ctx) -> loss` or `-> (loss, metrics)`; the loss is `[batch]` or a scalar."""


def train_step(loss_fn: LossFn) -> StepFn:
    """Builds a training step: forward pass, loss, gradient, update. Jit it with the state donated.

    Args:
        loss_fn: `(params, batch, ctx) -> loss` or `(loss, metrics)`. The loss is one number per
            example, `[batch]`, or a scalar; metrics are as `distaff.metrics` describes.

    Returns:
        A pure function `(state, batch) -> (state, metrics)`. `metrics["loss"]` is the loss;
        penalties (`ctx.add_penalty`) are apart from it, in `metrics["penalty"]`.
        At the first trace it raises LossError for a loss or metric of the wrong form, and
        BatchError for a batch whose leaves disagree in length.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Metric]]:
        size = num_examples(batch)

        def objective(params: Params) -> tuple[jax.Array, tuple[dict[str, Metric], dict[str, Any]]]:
            ctx = Context(state, train=True)
            loss, metrics = _declared(loss_fn(params, batch, ctx), size)
            if ctx.penalty is not None:
                loss, metrics = _penalized(loss, metrics, ctx.penalty, size)
            return loss, (_reduced(metrics, jnp.ones(size, bool)), ctx.changed)

        (loss, (metrics, changed)), grads = jax.value_and_grad(objective, has_aux=True)(
            state.params
        )
        state = state.apply_gradients(
            grads=grads, value=loss, value_fn=lambda params: objective(params)[0], **changed
        )
        return state, metrics

    return step


class TrainStep:
    """The class form of `train_step`, with bit-equal results: `TrainStep(loss_fn)(state, batch)`.

    Or subclass it and write `loss_fn` as a method:

    >>> class Regression(TrainStep):
    ...     def loss_fn(self, params, batch, ctx):
    ...         return jnp.square(ctx.apply(params, batch["x"]) - batch["y"])

    Args:
        loss_fn: see `train_step`; not needed by a subclass that defines it.
    """

    def __init__(self, loss_fn: LossFn | None = None) -> None:
        self._step = train_step(self.loss_fn if loss_fn is None else loss_fn)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Metric]]:
        """Returns the state after one update, and the step's metrics."""
        return self._step(state, batch)

    def loss_fn(self, params: Params, batch: Batch, ctx: Context) -> Any:
        """Returns `loss` or `(loss, metrics)`, where no function is passed to the constructor."""
        raise LossError(
            f"{type(self).__name__} has no loss. Pass one, TrainStep(loss_fn), or define the "
            "method loss_fn(self, params, batch, ctx)."
        )


class MaskError(LossError):
    """A mask meets metrics that are not values per example."""


class EvalStep:
    """An evaluation step: `(state, batch, mask) -> metrics`, without gradient or update.

    Args:
        loss_fn: the loss function of training; it is called with `ctx.train` False.
    """

    def __init__(self, loss_fn: LossFn) -> None:
        self._loss_fn = loss_fn

    def __call__(
        self, state: TrainState, batch: Batch, mask: jax.Array | None = None
    ) -> dict[str, Metric]:
        """Returns the metrics over the examples whose `mask` `[batch]` is true; all without one.

        Raises:
            MaskError: a mask is given and the loss or a metric is not one value per example.
        """
        size = num_examples(batch)
        metrics = self._outputs(state, batch)
        fixed = [name for name, value in metrics.items() if not isinstance(value, PerExample)]
        if mask is not None and fixed:
            raise MaskError(f"Only values per example can be masked; {fixed} are reduced already.")
        return _reduced(metrics, jnp.ones(size, bool) if mask is None else mask)

    def _outputs(self, state: TrainState, batch: Batch) -> dict[str, Metric | PerExample]:
        ctx = Context(state, train=False)
        return _declared(self._loss_fn(state.params, batch, ctx), num_examples(batch))[1]


def _declared(returned: Any, size: int) -> tuple[jax.Array, dict[str, Metric | PerExample]]:
    """Splits what a loss function returned into the scalar to differentiate and its metrics."""
    loss, extra = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, {})
    if not isinstance(extra, Mapping) or isinstance(loss, tuple | Mapping):
        raise LossError(
            "A loss function returns loss, or (loss, metrics) with metrics a dict by name; "
            f"it returned {type(returned).__name__} holding {type(loss).__name__} and "
            f"{type(extra).__name__}."
        )
    if "loss" in extra:
        raise LossError("The name 'loss' is taken by the loss itself; rename that metric.")
    metrics = {"loss": _declared_loss(loss, size)}
    metrics.update({name: metrics_lib.declare(name, value, size) for name, value in extra.items()})
    if isinstance(metrics["loss"], PerExample):
        return metrics["loss"].reduce(jnp.ones(size, bool)).compute(), metrics
    return jnp.asarray(loss), metrics


def _penalized(
    loss: jax.Array, metrics: dict[str, Metric | PerExample], penalty: jax.Array, size: int
) -> tuple[jax.Array, dict[str, Metric | PerExample]]:
    if "penalty" in metrics:
        raise LossError(
            "The name 'penalty' is taken by what ctx.add_penalty collects; rename that metric."
        )
    return loss + penalty, {**metrics, "penalty": metrics_lib.declare("penalty", penalty, size)}


def _declared_loss(loss: Any, size: int) -> Metric | PerExample:
    values = loss.values[0] if isinstance(loss, PerExample) and loss.metric is Mean else loss
    rule = f"A loss is a float: one number per example, shape [{size}], or a scalar"
    if not isinstance(values, jax.Array | np.ndarray | np.generic | float):
        raise LossError(f"{rule}; the loss function returned {type(loss).__name__}.")
    values = jnp.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise LossError(f"{rule}; the loss function returned dtype {values.dtype}.")
    if values.shape not in ((), (size,)):
        axes = tuple(range(1, values.ndim))
        remedy = (
            f"loss.mean(axis={axes})" if values.shape[:1] == (size,) and axes else "loss.mean()"
        )
        raise LossError(
            f"{rule}; the loss function returned shape {values.shape}. Average it first: {remedy}."
        )
    return metrics_lib.declare("loss", loss if isinstance(loss, PerExample) else values, size)


def _reduced(metrics: Mapping[str, Metric | PerExample], mask: jax.Array) -> dict[str, Metric]:
    reduced = {
        name: value.reduce(mask) if isinstance(value, PerExample) else value
        for name, value in metrics.items()
    }
    # A Python number inside a metric would be weakly typed, and compile the merge twice.
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.asarray(leaf).dtype), reduced)


class Window(NamedTuple):
    """Metrics merged on the device over the steps since the last log line.

    Attributes:
        metrics: merged metrics by name.
        first_bad_step: int32, the first step whose loss was not finite; the largest int32 if none.
    """

    metrics: dict[str, Metric]
    first_bad_step: jax.Array


NEVER = int(np.iinfo(np.int32).max)
"""`Window.first_bad_step` of a window in which every loss was finite."""


def measured(step: StepFn) -> StepFn:
    """Wraps a training step so that all its metrics are in their accumulating form.

    Args:
        step: any `(state, batch) -> (state, metrics)`; its metrics may be scalars or arrays
            `[batch, ...]` too.
    """

    def measured_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Metric]]:
        state, metrics = step(state, batch)
        return state, accumulating(metrics, num_examples(batch))

    return measured_step


def accumulating(metrics: Mapping[str, Any], size: int) -> dict[str, Metric]:
    """Brings the metrics that a user's own step returned into their accumulating form.

    Args:
        metrics: scalars, arrays `[batch, ...]` or metrics, by name.
        size: the number of examples in the batch they come from.

    Raises:
        LossError: an array is neither a scalar nor one value per example.
    """
    declared = {name: metrics_lib.declare(name, value, size) for name, value in metrics.items()}
    return _reduced(declared, jnp.ones(size, bool))


def windowed(
    step: StepFn,
) -> Callable[[TrainState, Window, Batch], tuple[TrainState, Window, dict[str, Metric]]]:
    """Wraps a measured step so that it merges its metrics into a window, in the same program.

    Args:
        step: a training step as `measured` gives it.

    Returns:
        A pure function `(state, window, batch) -> (state, window, metrics of this step)`.
    """

    def windowed_step(
        state: TrainState, window: Window, batch: Batch
    ) -> tuple[TrainState, Window, dict[str, Metric]]:
        state, metrics = step(state, batch)
        first_bad_step = window.first_bad_step
        if "loss" in metrics:
            finite = jnp.all(jnp.isfinite(metrics["loss"].compute()))
            first_bad_step = jnp.minimum(first_bad_step, jnp.where(finite, NEVER, state.step))
        merged = metrics_lib.merge(window.metrics, metrics)
        return state, Window(merged, first_bad_step), metrics

    return windowed_step


def empty_window(metrics: Mapping[str, Metric]) -> Window:
    """Returns the window before the first step.

    Args:
        metrics: the metrics of one step, or their shapes as `jax.eval_shape` gives them.
    """
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), dict(metrics))
    empty = {name: metric.empty_like() for name, metric in zeros.items()}
    return Window(empty, jnp.asarray(NEVER, jnp.int32))
