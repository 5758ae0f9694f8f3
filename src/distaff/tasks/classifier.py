"""Classification: one label per example."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.config.options import described, option, or_none
from distaff.core.typing import Batch, Params
from distaff.data import entry
from distaff.data.inspection import ROUNDING, no_probabilities, out_of_range
from distaff.errors import LossError
from distaff.metrics import Mean, filled
from distaff.metrics.accumulators import floating
from distaff.metrics.monitor import Monitor
from distaff.run.sanity import report
from distaff.step.context import Context
from distaff.tasks.class_weights import class_weights, weighed
from distaff.tasks.cross_entropy import check_together, cross_entropy, focusing, fraction
from distaff.tasks.weighing import WeighingTask, ignored_index, weights_for, with_entry_name
from distaff.trainer.config import TrainerConfig

_LABEL_NAMES = ("label", "labels", "y", "target", "targets")
_ADVICE = (
    "Give the model as many outputs as there are classes, or check how labels are read. To ignore "
    "examples with a certain label, pass ignore_index=label."
)


@described
@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig(TrainerConfig):
    """The options of a `Classifier`, in addition to `TrainerConfig`.

    Raises:
        ConfigError: an option is out of its range.
    """

    ignore_index: int | None = option(
        None,
        """A label whose examples are ignored in the loss and metrics, such as -100; None to
        disable.""",
        check=or_none(ignored_index),
    )
    class_weights: Sequence[float] | None = option(
        None,
        """Weight of the examples of each class in the loss, one per class; None for equal weights.
        It multiplies the sample weight, and the loss is divided by the sum of the products. Metrics
        ignore it. `tasks.balanced_weights(labels)` returns weights that balance the classes.""",
        check=or_none(class_weights),
        traced="always",
    )
    label_smoothing: float = option(
        0.0,
        """Probability, in [0, 1), that is taken from each label and spread evenly over all classes,
        in the loss of training and evaluation; 0 to disable.""",
        check=fraction,
        traced="always",
    )
    focal: float = option(
        0.0,
        """Focusing parameter gamma of the focal loss, `-(1 - p)**gamma * log(p)`, such as 2 (T.-Y.
        Lin et al., Focal Loss for Dense Object Detection, ICCV 2017); 0 for cross-entropy. Its
        alpha is `class_weights`. It needs class indices as labels.""",
        check=focusing,
        traced="unless zero",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_together(self.label_smoothing, self.focal)


class Classifier(WeighingTask):
    """Trains a model that returns logits `[batch, classes]`, by softmax cross-entropy.

    Batches are dicts or dataclasses with `label` (or `labels`, `y`, `target`, `targets`) alongside
    the model's input; or tuples `(input, label)`. Labels are class indices, int `[batch]`, or
    probabilities of the classes, float `[batch, classes]`, as from `distaff.augment.mixup`;
    accuracy then compares with the most likely class. An index out of range raises an error, in any
    batch. Weights `[batch]`, `sample_weight` or `weight`, or the third item of a tuple, weight the
    loss and the accuracy; `class_weights` weight the loss. The best model is the one with the
    highest `val/accuracy`. `predict` returns the logits.

    Args:
        model: the model, as for `TrainerModule`, whose other arguments apply too.
        **options: options of `ClassifierConfig`, such as `label_smoothing=0.1`.
    """

    Config = ClassifierConfig
    config: ClassifierConfig
    monitor = Monitor("val/accuracy", mode="max")

    def labels(self, batch: Batch) -> jax.Array:
        """Returns the labels of a batch, int `[batch]` or float `[batch, classes]`.

        Override it for other batches.

        Raises:
            BatchError: no labels are found.
        """
        return entry(batch, _LABEL_NAMES, 1, what="The label", override="labels(self, batch)")

    def check_batch(self, batch: Batch, name: str) -> None:
        """Checks the first batch of a loader; see `TrainerModule`.

        Raises:
            BatchError: also for labels of classes that the model does not have, or invalid
                probabilities, unless a subclass overrides `loss_fn`.
        """
        super().check_batch(batch, name)
        # A subclass's loss may change or mask labels before it calls this one.
        num_classes = self.num_outputs(batch) if type(self).loss_fn is Classifier.loss_fn else None
        if num_classes is None:
            return
        labels, weight = np.asarray(self.labels(batch)), self.sample_weight(batch)
        counts = np.ones(len(labels), bool) if weight is None else np.asarray(weight) != 0
        if labels.ndim > 1:
            report(no_probabilities(labels, name, counts), self.config)
            return
        if self.config.ignore_index is not None:
            counts &= labels != self.config.ignore_index
        report(out_of_range(np.where(counts, labels, 0), num_classes, name), self.config)

    def loss_fn(self, params: Params, batch: Batch, ctx: Context) -> Any:
        """Returns the cross-entropy `[batch]`, the accuracy, both weighted, and `extra_metrics`."""
        labels = self.labels(batch)
        weight = weights_for(self.sample_weight(batch), labels.shape[:1], ctx)
        weight = _ignore(labels, self.config.ignore_index, weight)
        inputs = filled(self.checked_inputs(batch, ctx), weight)
        logits = ctx.apply(params, *inputs)
        _check_shapes(logits, labels)
        logits, where = floating(logits), None if weight is None else weight != 0
        if labels.ndim == 2:
            labels = filled(labels.astype(logits.dtype), weight)
            _check_probabilities(labels, where, ctx)
            classes = labels.argmax(axis=-1)
        else:
            what, labels = with_entry_name("label", labels, batch), labels.astype(jnp.int32)
            ctx.check_indices(what, labels, logits.shape[1], where=where, advice=_ADVICE)
            labels = classes = labels if where is None else jnp.where(where, labels, 0)
        smoothing, focal = self.config.label_smoothing, self.config.focal
        loss = cross_entropy(logits, labels, smoothing=smoothing, focal=focal)
        hits = logits.argmax(axis=-1) == classes
        loss_weight = self._loss_weight(labels, logits.shape[1], weight)
        accuracy = hits if weight is None else Mean.per_example(hits, weight)
        if loss_weight is not None:
            loss = Mean.per_example(loss, loss_weight)
        return loss, {"accuracy": accuracy, **self.extra_metrics(logits, batch, ctx)}

    def _loss_weight(
        self, labels: jax.Array, num_classes: int, weight: jax.Array | None
    ) -> jax.Array | None:
        """Returns the products of class weights and sample weights `[batch]`."""
        of_classes = self.config.class_weights
        if of_classes is None:
            return weight
        own = weighed("class_weights", tuple(of_classes), labels, num_classes)
        return own if weight is None else own * weight


def _check_probabilities(labels: jax.Array, where: jax.Array | None, ctx: Context) -> None:
    lowest = labels.min(axis=1)
    ctx.check_range(
        "The probabilities of the classes are at least 0, and their sum is 1",
        jnp.where(lowest < 0, lowest, labels.sum(axis=1)),
        1 - ROUNDING,
        1 + ROUNDING,
        where=where,
        advice="Divide counts by their sum, or take the softmax of logits.",
    )


def _ignore(
    labels: jax.Array, ignore_index: int | None, weight: jax.Array | None
) -> jax.Array | None:
    """Returns weights that are 0 for labels equal to `ignore_index`."""
    if ignore_index is None or labels.ndim != 1:
        return weight
    kept = jnp.asarray(labels).astype(jnp.int32) != ignore_index
    return kept.astype(jnp.float32) if weight is None else jnp.where(kept, weight, 0)


def _check_shapes(logits: jax.Array, labels: jax.Array) -> None:
    are_indices = labels.shape == logits.shape[:1]
    if logits.ndim != 2 or not (are_indices or labels.shape == logits.shape):
        raise LossError(
            "A Classifier's model must return logits [batch, classes] for labels [batch] or "
            f"[batch, classes]; got logits {logits.shape} and labels {labels.shape}."
        )
    has_valid_dtype = (
        labels.dtype == bool or jnp.issubdtype(labels.dtype, jnp.integer)
        if are_indices
        else jnp.issubdtype(labels.dtype, jnp.floating)
    )
    if not has_valid_dtype:
        raise LossError(
            "Labels must be class indices, int or bool [batch], or probabilities, float "
            f"[batch, classes]; got {labels.dtype} {labels.shape}. Cast them."
        )
