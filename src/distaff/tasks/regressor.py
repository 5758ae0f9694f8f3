"""Regression: models that predict numbers for each example."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.typing import Batch, Params
from distaff.data import entry
from distaff.errors import LossError
from distaff.metrics import Mean, filled
from distaff.metrics.accumulators import aligned
from distaff.metrics.monitor import Monitor
from distaff.step.context import Context
from distaff.tasks.weighing import WeighingTask, weights_for

_TARGET_NAMES = ("y", "target", "targets", "label", "labels")


class Regressor(WeighingTask):
    """Trains a model that returns numbers `[batch, ...]`, by mean squared error.

    Batches are dicts or dataclasses with `y` (or `target`, `targets`, `label`, `labels`), of the
    shape of the model's outputs, alongside the model's input; or tuples `(input, target)`. Weights,
    `sample_weight` or `weight`, or the third item of a tuple, weight the loss and metrics:
    `[batch]`, or with more leading axes of the targets. With the option `nan_ok`, targets of NaN
    are ignored. The best model is the one with the lowest `val/loss`. `predict` returns the
    outputs.

    Args:
        model: the model, as for `TrainerModule`, whose other arguments apply too.
    """

    monitor = Monitor("val/loss", mode="min")

    def targets(self, batch: Batch) -> jax.Array:
        """Returns the targets of a batch, `[batch, ...]`. Override it for other batches.

        Raises:
            BatchError: no targets are found.
        """
        return entry(batch, _TARGET_NAMES, 1, what="The target", override="targets(self, batch)")

    def loss_fn(self, params: Params, batch: Batch, ctx: Context) -> Any:
        """Returns the mean squared error `[batch]`, and the mean absolute error, `mae`.

        Both are means over all axes but the first, in float32 or wider; with a weight for each
        value, over the values of all examples.

        Raises:
            LossError: outputs and targets, or weights and targets, differ in shape, or the outputs
                are not floats.
        """
        targets = self.targets(batch)
        weight = weights_for(self.sample_weight(batch), targets.shape, ctx)
        if self.config.nan_ok and jnp.issubdtype(targets.dtype, jnp.floating):
            weight = _without_missing(targets, weight)
        inputs = filled(self.checked_inputs(batch, ctx), weight)
        outputs = ctx.apply(params, *inputs)
        _check(outputs, targets)
        dtype = np.promote_types(outputs.dtype, np.float32)
        error = outputs.astype(dtype) - filled(targets, weight).astype(dtype)
        square, distance = jnp.square(error), jnp.abs(error)
        axes = tuple(range(1 if weight is None else weight.ndim, error.ndim))
        square, distance = square.mean(axes), distance.mean(axes)
        if weight is None:
            return square, {"mae": distance}
        return Mean.per_example(square, weight), {"mae": Mean.per_example(distance, weight)}


def _without_missing(targets: jax.Array, weight: jax.Array | None) -> jax.Array:
    """Returns a weight for each target, 0 for NaN."""
    known = ~jnp.isnan(targets)
    if weight is None:
        return known.astype(jnp.float32)
    return jnp.where(known, aligned(weight, targets), 0)


def _check(outputs: Any, targets: Any) -> None:
    """Rejects shapes that would broadcast: `[batch]` against `[batch, 1]` compares every pair."""
    if not hasattr(outputs, "shape") or not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise LossError(
            "A Regressor's model must return one array of floats [batch, ...]; it returned "
            f"{getattr(outputs, 'dtype', type(outputs).__name__)}. Override loss_fn for others."
        )
    if outputs.shape != targets.shape:
        raise LossError(
            "A Regressor's targets must have the shape of the model's outputs: others would be "
            f"broadcast, and compare examples with each other. Got outputs {outputs.shape} and "
            f"targets {targets.shape}. Reshape the targets to {outputs.shape}, in the loader or in "
            "targets(self, batch), or give the model as many outputs as there are targets."
        )
