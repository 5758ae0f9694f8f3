"""TrainStep and EvalStep: pure functions of a state and a batch, built around a loss.

Throughout the package, "step" means one completed optimizer update of the whole state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import distaff.metrics as metrics_lib
from distaff.core.equations import named_scope
from distaff.core.typing import Batch, Key, Params, PyTree
from distaff.data import counts_itself, num_examples
from distaff.errors import BatchError, LossError, MaskError, leaf_name
from distaff.metrics import Mean, Metric, PerExample
from distaff.optim.transforms import extra_args
from distaff.step import broadcasts
from distaff.step.context import Context
from distaff.step.normalise import StepFn, reduced
from distaff.step.norms import Norms, with_norms
from distaff.step.state import TrainState

_AUGMENTATION = 0x6175676D

EvalFn: TypeAlias = Callable[[TrainState, Batch], Mapping[str, Any]]
"""`(state, batch) -> metrics`."""

LossFn: TypeAlias = Callable[[Params, Batch, Context], Any]
"""`(params, batch, ctx) -> loss` or `-> (loss, metrics)`; the loss is `[batch]` or a scalar."""

AugmentFn: TypeAlias = Callable[[Batch, Key], Batch]
"""`(batch, key) -> batch`, with the same number of examples."""


def train_step(
    loss_fn: LossFn, *, augment: AugmentFn | None = None, norms: Norms | None = None
) -> StepFn:
    """Builds a training step: forward pass, loss, gradient, update. Jit it with the state donated.

    Optimizers that accept them receive the loss as `value`, its gradient as `grad`, and the loss
    as a function of the parameters, with this step's batch and dropout, as `value_fn`.

    Args:
        loss_fn: `(params, batch, ctx) -> loss` or `(loss, metrics)`. The loss is one number per
            example, `[batch]`, or a scalar; see `distaff.metrics` for the metrics.
        augment: `(batch, key) -> batch`, called once before the loss, with a separate key for each
            step that neither `ctx.rng` nor dropout uses. See `distaff.augment`.
        norms: norms of gradients, updates and parameters to return as metrics; None for none.

    Returns:
        A pure function `(state, batch) -> (state, metrics)`. `metrics["loss"]` is the loss without
        penalties (`ctx.add_penalty`), whose sum is `metrics["penalty"]`.
        When first traced it raises LossError for a loss or metric of the wrong shape or type, and
        BatchError for a batch whose leaves differ in length, before or after `augment`.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Metric]]:
        size = num_examples(batch)
        batch = batch if augment is None else _augment(augment, state, batch, size)

        def context() -> Context:
            return Context(state, train=True)

        def objective(params: Params) -> tuple[jax.Array, tuple[dict[str, Metric], dict[str, Any]]]:
            ctx = context()
            with named_scope("loss"):
                returned = loss_fn(params, batch, ctx)
                broadcasts.check_returned(returned, size, loss_fn, (params, batch), context)
                loss, metrics = _split(returned, size, ctx)
            if ctx.penalty is not None:
                loss, metrics = _with_penalty(loss, metrics, ctx.penalty, size)
            return loss, (reduced(metrics, jnp.ones(size, bool)), ctx.changed)

        (loss, (metrics, changed)), grads = jax.value_and_grad(objective, has_aux=True)(
            state.params
        )
        args = None
        if extra_args.contains(state.opt_state, extra_args.AccumulateState):
            args = {"weight": getattr(metrics["loss"], "weight", size)}
        after = state.apply_gradients(
            grads=grads,
            value=loss,
            value_fn=lambda params: objective(params)[0],
            optimizer_args=args,
            **changed,
        )
        after = _with_plateaus_kept(state, after, metrics["loss"])
        if norms is not None:
            metrics = with_norms(metrics, norms(grads, state.params, after.params))
        return after, metrics

    return step


class TrainStep:
    """The class form of `train_step`, with bit-equal results: `TrainStep(loss_fn)(state, batch)`.

    Or subclass it and write `loss_fn` as a method:

    >>> class Regression(TrainStep):
    ...     def loss_fn(self, params, batch, ctx):
    ...         return jnp.square(ctx.apply(params, batch["x"]) - batch["y"])

    Args:
        loss_fn: see `train_step`; not needed by a subclass that defines it.
        augment: see `train_step`.
    """

    def __init__(self, loss_fn: LossFn | None = None, *, augment: AugmentFn | None = None) -> None:
        self._step = train_step(self.loss_fn if loss_fn is None else loss_fn, augment=augment)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Metric]]:
        """Returns the state after one update, and the step's metrics."""
        return self._step(state, batch)

    def loss_fn(self, params: Params, batch: Batch, ctx: Context) -> Any:
        """Returns `loss` or `(loss, metrics)`; used if no function is passed to the constructor."""
        raise LossError(
            f"{type(self).__name__} has no loss. Pass one, TrainStep(loss_fn), or define the "
            "method loss_fn(self, params, batch, ctx)."
        )


class EvalStep:
    """An evaluation step: `(state, batch, mask) -> metrics`, without gradient or update.

    Args:
        loss_fn: the loss function of training; called with `ctx.train` False.
    """

    def __init__(self, loss_fn: LossFn) -> None:
        self._loss_fn = loss_fn

    def __call__(
        self, state: TrainState, batch: Batch, mask: jax.Array | None = None
    ) -> dict[str, Metric]:
        """Returns the metrics over the examples where `mask` `[batch]` is true; None for all.

        Raises:
            MaskError: a mask is given and the loss or a metric is not one value per example.
        """
        metrics = self.outputs(state, batch)
        if mask is None:
            return reduced(metrics, jnp.ones(num_examples(batch), bool))
        return reduced(per_example(metrics), mask)

    def outputs(self, state: TrainState, batch: Batch) -> dict[str, Metric | PerExample]:
        """Returns the loss and the metrics of a batch, before reduction."""

        def context() -> Context:
            return Context(state, train=False)

        ctx, size = context(), num_examples(batch)
        returned = self._loss_fn(state.params, batch, ctx)
        broadcasts.check_returned(returned, size, self._loss_fn, (state.params, batch), context)
        return _split(returned, size, ctx)[1]


def per_example(metrics: Mapping[str, Metric | PerExample]) -> dict[str, PerExample]:
    """Returns the metrics, checked to be values per example, which can be masked.

    Raises:
        MaskError: a metric is reduced already.
    """
    values = {name: each for name, each in metrics.items() if isinstance(each, PerExample)}
    if len(values) < len(metrics):
        fixed = [name for name in metrics if name not in values]
        raise MaskError(f"Only values per example can be masked; {fixed} are reduced already.")
    return values


def _augment(augment: AugmentFn, state: TrainState, batch: Batch, size: int) -> Batch:
    """Returns the augmented batch, checked to have all leaves and the same number of examples."""
    key = jax.random.fold_in(Context(state, train=True).rng, _AUGMENTATION)
    with named_scope("augmentation"):
        returned = augment(batch, key)
    leaves = {leaf_name(path): leaf for path, leaf in jax.tree.leaves_with_path(returned)}
    rule = f"augment(batch, key) returns all leaves of its batch, each with {size} examples"
    for path, _ in jax.tree.leaves_with_path(batch):
        if leaf_name(path) not in leaves:
            raise BatchError(
                f"{rule}; {leaf_name(path)!r} is missing in the returned "
                f"{type(returned).__name__} with the leaves {list(leaves)}. Return "
                "the whole batch: {**batch, 'image': images}."
            )
    for name, leaf in leaves.items():
        if not hasattr(leaf, "dtype") and not isinstance(leaf, complex | float | int):
            raise BatchError(
                f"{rule}, as arrays; {name!r} is of type {type(leaf).__name__}. Leave it out, or "
                "encode it as numbers."
            )
        shape = np.shape(leaf)
        if shape[:1] != (size,) and not counts_itself(returned):
            remedy = "Change the number of examples in the loader."
            if not shape:
                remedy = f"Give it one value per example: jnp.full({size}, value)."
            raise BatchError(f"{rule}; {name!r} has shape {shape}. {remedy}")
    if counts_itself(returned) and num_examples(returned) != size:
        raise BatchError(f"{rule}; it returned a batch of {num_examples(returned)} examples.")
    return returned


def _split(
    returned: Any, size: int, ctx: Context
) -> tuple[jax.Array, dict[str, Metric | PerExample]]:
    """Splits the return value of a loss function into the scalar to differentiate and metrics."""
    loss, extra = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, {})
    if not isinstance(extra, Mapping) or isinstance(loss, tuple | Mapping):
        raise LossError(
            "A loss function returns loss, or (loss, metrics) with metrics as a dict; "
            f"it returned {type(returned).__name__} holding {type(loss).__name__} and "
            f"{type(extra).__name__}."
        )
    if "loss" in extra:
        raise LossError("The metric name 'loss' is reserved for the loss. Rename the metric.")
    metrics = {"loss": _declare_loss(loss, size)}
    extra = {**extra, **ctx.limits}
    metrics.update({name: metrics_lib.declare(name, value, size) for name, value in extra.items()})
    if isinstance(metrics["loss"], PerExample):
        return _mean(metrics["loss"].reduce(jnp.ones(size, bool))), metrics
    return metrics_lib.floating(loss), metrics


def _mean(mean: Any) -> jax.Array:
    """Returns the mean, or 0 if the total weight is 0."""
    is_empty = mean.weight == 0
    return jnp.where(is_empty, 0, mean.total) / jnp.where(is_empty, 1, mean.weight)


def _with_penalty(
    loss: jax.Array, metrics: dict[str, Metric | PerExample], penalty: jax.Array, size: int
) -> tuple[jax.Array, dict[str, Metric | PerExample]]:
    if "penalty" in metrics:
        raise LossError(
            "The metric name 'penalty' is reserved for ctx.add_penalty. Rename the metric."
        )
    return loss + penalty, {**metrics, "penalty": metrics_lib.declare("penalty", penalty, size)}


def _declare_loss(loss: Any, size: int) -> Metric | PerExample:
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
        advice = f"Average it first: {remedy}."
        if values.shape[:2] == (size, size):
            advice = (
                f"An array of shape [{size}, {size}] often comes from a broadcast of [{size}, 1] "
                f"with [{size}]: give predictions and labels the same shape. If its second axis is "
                f"not the batch, average it first: {remedy}."
            )
        raise LossError(f"{rule}; the loss function returned shape {values.shape}. {advice}")
    return metrics_lib.declare("loss", loss if isinstance(loss, PerExample) else values, size)


def _with_plateaus_kept(before: TrainState, after: TrainState, loss: Any) -> TrainState:
    """Keeps the state of `optax.contrib.reduce_on_plateau` if the batch had no weight.

    The loss of such a batch is 0, which no later loss would improve on.
    """
    has_plateau = any(map(_is_plateau, jax.tree.leaves(after.opt_state, is_leaf=_is_plateau)))
    if not has_plateau or not isinstance(loss, Mean):
        return after
    is_empty = loss.weight == 0

    def kept(old: PyTree, new: PyTree) -> PyTree:
        if not _is_plateau(new):
            return new
        return jax.tree.map(lambda a, b: jnp.where(is_empty, a, b), old, new)

    opt_state = jax.tree.map(kept, before.opt_state, after.opt_state, is_leaf=_is_plateau)
    return after.replace(opt_state=opt_state)


def _is_plateau(node: Any) -> bool:
    return isinstance(node, optax.contrib.ReduceLROnPlateauState)
