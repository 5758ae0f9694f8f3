"""Multi-label classification: any number of labels per example."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distaff.core.config.checks import is_zero
from distaff.core.config.options import described, option, or_none
from distaff.core.typing import Batch, Params
from distaff.data import entry
from distaff.errors import LossError
from distaff.metrics import F1, Mean, filled
from distaff.metrics.accumulators import aligned, floating
from distaff.metrics.monitor import Monitor
from distaff.step.context import Context
from distaff.tasks.class_weights import check_number, class_weights
from distaff.tasks.cross_entropy import check_together, focusing, fraction
from distaff.tasks.weighing import WeighingTask, ignored_index, weights_for, without_missing
from distaff.trainer.config import TrainerConfig

_LABEL_NAMES = ("labels", "label", "y", "targets", "target")
_HALF = 0.5
_RULE = "A label is 0, 1, or a probability between them"
_ADVICE = "To ignore unknown labels, pass ignore_index=value."


@described
@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiLabelClassifierConfig(TrainerConfig):
    """The options of a `MultiLabelClassifier`, in addition to `TrainerConfig`.

    Raises:
        ConfigError: an option is out of its range.
    """

    ignore_index: int | None = option(
        None,
        "A label that is ignored in the loss and metrics, such as -1 for unknown; None to disable.",
        check=or_none(ignored_index),
    )
    label_weights: Sequence[float] | None = option(
        None,
        """Weight of each label in the loss, one per class; None for equal weights. It multiplies
        the sample weight; the loss is divided by the sum of the products. Metrics ignore it.""",
        check=or_none(class_weights),
        traced="always",
    )
    positive_weights: Sequence[float] | None = option(
        None,
        """Weight of the examples that have a label, relative to those that do not, one per class;
        None for 1. It multiplies the other weights of the loss.""",
        check=or_none(class_weights),
        traced="always",
    )
    label_smoothing: float = option(
        0.0,
        """Probability, in [0, 1): labels become `(1 - label_smoothing) * label + label_smoothing /
        2` in the loss of training and evaluation; 0 to disable.""",
        check=fraction,
        traced="always",
    )
    focal: float = option(
        0.0,
        """Focusing parameter gamma of the focal loss, such as 2 (T.-Y. Lin et al., Focal Loss for
        Dense Object Detection, ICCV 2017); 0 for cross-entropy.""",
        check=focusing,
        traced="unless zero",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_together(self.label_smoothing, self.focal)


class MultiLabelClassifier(WeighingTask):
    """Trains a model that returns logits `[batch, classes]`, by sigmoid cross-entropy.

    Batches are dicts or dataclasses with `labels` (or `label`, `y`, `targets`, `target`) alongside
    the model's input; or tuples `(input, labels)`. Labels are 0 or 1, or probabilities, `[batch,
    classes]`, of any dtype. Weights, `sample_weight` or `weight`, or the third item of a tuple,
    weight the loss and metrics: `[batch]`, or `[batch, classes]`. With the option `nan_ok`, labels
    of NaN are ignored. The loss and `accuracy` are means over all labels, and `f1` is computed from
    the counts of all labels. The best model is the one with the highest `val/f1`. `predict` returns
    the logits.

    Args:
        model: the model, as for `TrainerModule`, whose other arguments apply too.
        **options: options of `MultiLabelClassifierConfig`, such as `positive_weights=[5, 20]`.
    """

    Config = MultiLabelClassifierConfig
    config: MultiLabelClassifierConfig
    monitor = Monitor("val/f1", mode="max")

    def labels(self, batch: Batch) -> jax.Array:
        """Returns the labels of a batch, `[batch, classes]`. Override it for other batches.

        Raises:
            BatchError: no labels are found.
        """
        return entry(batch, _LABEL_NAMES, 1, what="The label", override="labels(self, batch)")

    def loss_fn(self, params: Params, batch: Batch, ctx: Context) -> Any:
        """Returns the mean sigmoid cross-entropy `[batch]`, `accuracy` and `f1`.

        Raises:
            LossError: labels and logits differ in shape, or a list of weights has another length.
        """
        labels = self.labels(batch)
        weight = self._weight(labels, batch, ctx)
        # The axis of the labels is not an axis of the inputs, even if both have the same length.
        of_rows = weight if weight is None or weight.ndim == 1 else (weight != 0).any(axis=1)
        inputs = filled(self.checked_inputs(batch, ctx), of_rows)
        logits = ctx.apply(params, *inputs)
        _check_shapes(logits, labels)
        logits, labels, kept = floating(logits), floating(labels), None
        if weight is not None:
            weight = jnp.broadcast_to(aligned(weight, labels), labels.shape)
            kept = weight != 0
            labels = jnp.where(kept, labels, 0)
        ctx.check_range(_RULE, labels, 0, 1, where=kept, advice=_ADVICE)
        present, predicted = labels > _HALF, logits > 0
        hits = present == predicted
        f1 = F1.per_example(present, predicted, num_classes=2, weight=weight)
        losses, loss_weight = self._losses(logits, labels), self._loss_weight(labels, weight)
        loss: Any = losses.mean(axis=1)
        if loss_weight is not None:
            loss = Mean.per_example(losses, loss_weight)
        accuracy = hits.mean(axis=1) if weight is None else Mean.per_example(hits, weight)
        extra = self.extra_metrics(logits, batch, ctx)
        return loss, {"accuracy": accuracy, "f1": f1, **extra}

    def _weight(self, labels: jax.Array, batch: Batch, ctx: Context) -> jax.Array | None:
        """Returns the sample weights, 0 for ignored labels: `[batch]` or `[batch, classes]`."""
        weight = weights_for(self.sample_weight(batch), labels.shape, ctx)
        if self.config.nan_ok and jnp.issubdtype(labels.dtype, jnp.floating):
            weight = without_missing(labels, weight)
        if self.config.ignore_index is None:
            return weight
        kept = floating(labels) != self.config.ignore_index
        return jnp.where(kept, 1.0 if weight is None else aligned(weight, labels), 0.0)

    def _losses(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """Returns the loss of each label, `[batch, classes]`."""
        gamma, smoothing = self.config.focal, self.config.label_smoothing
        if not is_zero(gamma):
            return labels * _focal(logits, gamma) + (1 - labels) * _focal(-logits, gamma)
        if not is_zero(smoothing):
            labels = (1 - smoothing) * labels + smoothing / 2
        return optax.sigmoid_binary_cross_entropy(logits, labels)

    def _loss_weight(self, labels: jax.Array, weight: jax.Array | None) -> jax.Array | None:
        """Returns the products of all weights, `[batch, classes]`."""
        of_labels, of_positives = self.config.label_weights, self.config.positive_weights
        if of_labels is not None:
            check_number("label_weights", of_labels, labels.shape[1])
            own = jnp.broadcast_to(jnp.asarray(of_labels, labels.dtype)[None], labels.shape)
            weight = own if weight is None else weight * own
        if of_positives is not None:
            check_number("positive_weights", of_positives, labels.shape[1])
            own = 1 + labels * (jnp.asarray(of_positives, labels.dtype) - 1)[None]
            weight = own if weight is None else weight * own
        return weight


def _focal(logits: jax.Array, gamma: float) -> jax.Array:
    """Returns the focal loss of the label 1."""
    return -jnp.exp(gamma * jax.nn.log_sigmoid(-logits)) * jax.nn.log_sigmoid(logits)


def _check_shapes(logits: Any, labels: Any) -> None:
    if logits.ndim != 2 or logits.shape != labels.shape:
        raise LossError(
            "A MultiLabelClassifier's model must return logits [batch, classes] for labels of the "
            f"same shape; got logits {logits.shape} and labels {labels.shape}. Encode lists of "
            "labels as 0 and 1, or use tasks.Classifier for one label per example."
        )
