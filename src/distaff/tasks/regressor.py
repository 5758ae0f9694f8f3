"""Regression: models that predict numbers for each example."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distaff.core.config.checks import as_float
from distaff.core.config.options import described, one_of, option, or_none, positive
from distaff.core.typing import Batch, Params
from distaff.data import entry
from distaff.errors import ConfigError, LossError
from distaff.metrics import Mean, filled
from distaff.metrics.monitor import Monitor
from distaff.step.context import Context
from distaff.tasks.weighing import WeighingTask, weights_for, without_missing
from distaff.trainer.config import TrainerConfig

_TARGET_NAMES = ("y", "target", "targets", "label", "labels")
_MEDIAN = 0.5

LossKind: TypeAlias = Literal["squared", "huber", "quantile"]


def _quantiles(name: str, value: Any) -> tuple[float, ...]:
    """Checks that an option is a list of increasing numbers between 0 and 1."""
    try:
        levels = tuple(as_float(each) for each in np.asarray(value).tolist())
    except (TypeError, ValueError):
        levels = ()
    is_increasing = all(low < high for low, high in itertools.pairwise((0.0, *levels, 1.0)))
    if not levels or not is_increasing:
        raise ConfigError(
            f"{name} must be a list of increasing numbers between 0 and 1, such as [0.1, 0.5, "
            f"0.9]; got {value!r}."
        )
    return levels


@described
@dataclasses.dataclass(frozen=True, kw_only=True)
class RegressorConfig(TrainerConfig):
    """The options of a `Regressor`, in addition to `TrainerConfig`.

    Raises:
        ConfigError: an option is out of its range, or belongs to another loss.
    """

    loss: LossKind = option(
        "squared",
        """The loss of an error: "squared"; "huber", which is half the square up to `huber_delta`
        and linear beyond; or "quantile", the pinball loss of `quantiles`.""",
        check=one_of(LossKind),
    )
    huber_delta: float = option(
        1.0,
        "Error from which the Huber loss is linear, in the unit of the targets.",
        check=positive,
        traced="always",
    )
    quantiles: Sequence[float] | None = option(
        None,
        """Quantiles that the model predicts with `loss="quantile"`, such as [0.1, 0.5, 0.9], in
        increasing order.""",
        check=or_none(_quantiles),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss == "quantile" and self.quantiles is None:
            raise ConfigError(
                "loss='quantile' needs the quantiles to predict. Pass quantiles=[0.1, 0.5, 0.9]."
            )
        if self.loss != "quantile" and self.quantiles is not None:
            raise ConfigError(
                f"quantiles={self.quantiles} needs loss='quantile'; loss is {self.loss!r}. Pass "
                "loss='quantile', or no quantiles."
            )
        if self.loss != "huber" and self.huber_delta != 1:
            raise ConfigError(
                f"huber_delta={self.huber_delta} needs loss='huber'; loss is {self.loss!r}. Pass "
                "loss='huber', or no huber_delta."
            )


class Regressor(WeighingTask):
    """Trains a model that returns numbers `[batch, ...]`, by default by mean squared error.

    Batches are dicts or dataclasses with `y` (or `target`, `targets`, `label`, `labels`), of the
    shape of the model's outputs, alongside the model's input; or tuples `(input, target)`. Weights,
    `sample_weight` or `weight`, or the third item of a tuple, weight the loss and metrics:
    `[batch]`, or with more leading axes of the targets. With the option `nan_ok`, targets of NaN
    are ignored. With `loss="quantile"` the outputs have one more axis than the targets, one entry
    for each quantile. The best model is the one with the lowest `val/loss`. `predict` returns the
    outputs.

    Args:
        model: the model, as for `TrainerModule`, whose other arguments apply too.
        **options: options of `RegressorConfig`, such as `loss="huber"`.
    """

    Config = RegressorConfig
    config: RegressorConfig
    monitor = Monitor("val/loss", mode="min")

    def targets(self, batch: Batch) -> jax.Array:
        """Returns the targets of a batch, `[batch, ...]`. Override it for other batches.

        Raises:
            BatchError: no targets are found.
        """
        return entry(batch, _TARGET_NAMES, 1, what="The target", override="targets(self, batch)")

    def loss_fn(self, params: Params, batch: Batch, ctx: Context) -> Any:
        """Returns the mean loss `[batch]`, and metrics.

        The metrics are the mean absolute error, `mae`; with quantiles, `mae` of the median if it is
        one of them, and `coverage`, the fraction of targets from the lowest to the highest
        quantile. All are means over all axes but the first, in float32 or wider; with a weight for
        each value, over the values of all examples.

        Raises:
            LossError: outputs and targets, or weights and targets, differ in shape, or the outputs
                are not floats.
        """
        targets = self.targets(batch)
        weight = weights_for(self.sample_weight(batch), targets.shape, ctx)
        if self.config.nan_ok and jnp.issubdtype(targets.dtype, jnp.floating):
            weight = without_missing(targets, weight)
        inputs = filled(self.checked_inputs(batch, ctx), weight)
        outputs = ctx.apply(params, *inputs)
        _check_floats(outputs)
        dtype = np.promote_types(outputs.dtype, np.float32)
        known = filled(targets, weight).astype(dtype)
        if self.config.quantiles is None:
            _check(outputs, targets)
            outputs = outputs.astype(dtype)
            losses, metrics = self._errors(outputs - known)
        else:
            outputs = _by_quantile(outputs, targets, len(self.config.quantiles)).astype(dtype)
            losses, metrics = _quantile_errors(outputs, known, self.config.quantiles)
        axes = tuple(range(1 if weight is None else weight.ndim, targets.ndim))
        losses, metrics = losses.mean(axes), {name: x.mean(axes) for name, x in metrics.items()}
        extra = self.extra_metrics(outputs, batch, ctx)
        if weight is None:
            return losses, {**metrics, **extra}
        weighted = {name: Mean.per_example(values, weight) for name, values in metrics.items()}
        return Mean.per_example(losses, weight), {**weighted, **extra}

    def _errors(self, error: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the loss of each error, and its magnitude."""
        if self.config.loss == "huber":
            return optax.huber_loss(error, delta=self.config.huber_delta), {"mae": jnp.abs(error)}
        return jnp.square(error), {"mae": jnp.abs(error)}


def _quantile_errors(
    outputs: jax.Array, targets: jax.Array, quantiles: Sequence[float]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the mean pinball loss of each target, and metrics.

    Args:
        outputs: `[..., quantiles]`.
        targets: `[...]`.
        quantiles: levels, in increasing order.
    """
    above = targets[..., None] - outputs
    levels = _along_last(quantiles, above)
    losses = jnp.maximum(levels * above, (levels - 1) * above).mean(-1)
    metrics = {}
    if _MEDIAN in quantiles:
        metrics["mae"] = jnp.abs(above[..., list(quantiles).index(_MEDIAN)])
    if len(quantiles) > 1:
        is_inside = (above[..., 0] >= 0) & (above[..., -1] <= 0)
        metrics["coverage"] = is_inside.astype(above.dtype)
    return losses, metrics


def _along_last(values: Sequence[float], like: jax.Array) -> jax.Array:
    """Returns values as an array that broadcasts along the last axis of another."""
    return jnp.asarray(values, like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


def _by_quantile(outputs: jax.Array, targets: jax.Array, num_quantiles: int) -> jax.Array:
    """Returns outputs `[..., quantiles]` for targets `[...]`."""
    if num_quantiles == 1 and outputs.shape == targets.shape:
        return outputs[..., None]
    expected = (*targets.shape, num_quantiles)
    if outputs.shape != expected:
        raise LossError(
            f"With {num_quantiles} quantiles, a Regressor's model must return an array of shape "
            f"{expected} for targets of shape {targets.shape}; it returned {outputs.shape}. Give "
            f"the model {num_quantiles} outputs per target; targets [batch, 1] need an axis less."
        )
    return outputs


def _check_floats(outputs: Any) -> None:
    if not hasattr(outputs, "shape") or not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise LossError(
            "A Regressor's model must return one array of floats [batch, ...]; it returned "
            f"{getattr(outputs, 'dtype', type(outputs).__name__)}. Override loss_fn for others."
        )


def _check(outputs: Any, targets: Any) -> None:
    """Rejects shapes that would broadcast: `[batch]` against `[batch, 1]` compares every pair."""
    if outputs.shape != targets.shape:
        is_column = outputs.shape == (*targets.shape, 1)
        of_columns = " (y[:, None], or from_frame(target=[...]))" if is_column else ""
        raise LossError(
            "A Regressor's targets must have the shape of the model's outputs: others would be "
            f"broadcast, and compare examples with each other. Got outputs {outputs.shape} and "
            f"targets {targets.shape}. Reshape the targets to {outputs.shape}, in the loader or in "
            f"targets(self, batch){of_columns}, or give the model as many outputs as there are "
            "targets."
        )
