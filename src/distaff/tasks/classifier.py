"""Classification: one label per example."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distaff.core.typing import Batch, Params
from distaff.data import entry
from distaff.data.inspection import ROUNDING, no_probabilities, out_of_range
from distaff.errors import LossError
from distaff.metrics import Mean, filled
from distaff.metrics.accumulators import floating
from distaff.metrics.monitor import Monitor
from distaff.run.sanity import report
from distaff.step.context import Context
from distaff.tasks.weighing import (
    WeighingTask,
    check_ignore_index,
    weights_for,
    with_entry_name,
)
from distaff.trainer.config import TrainerConfig

_LABEL_NAMES = ("label", "labels", "y", "target", "targets")
_ADVICE = (
    "Give the model as many outputs as there are classes, or check how labels are read. To ignore "
    "examples with a certain label, pass ignore_index=label."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig(TrainerConfig):
    """The options of a `Classifier`, in addition to `TrainerConfig`.

    Args:
        ignore_index: a label whose examples are ignored in the loss and metrics, such as -100; None
            to disable.

    Raises:
        ConfigError: an option is out of its range.
    """

    ignore_index: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ignore_index(self.ignore_index)


class Classifier(WeighingTask):
    """Trains a model that returns logits `[batch, classes]`, by softmax cross-entropy.

    Batches are dicts or dataclasses with `label` (or `labels`, `y`, `target`, `targets`) alongside
    the model's input; or tuples `(input, label)`. Labels are class indices, int `[batch]`, or
    probabilities of the classes, float `[batch, classes]`, as from `distaff.augment.mixup`;
    accuracy then compares with the most likely class. An index out of range raises an error, in any
    batch. Weights `[batch]`, `sample_weight` or `weight`, or the third item of a tuple, weight the
    loss and the accuracy. The best model is the one with the highest `val/accuracy`. `predict`
    returns the logits.

    Args:
        model: the model, as for `TrainerModule`, whose other arguments apply too.
        **options: options of `ClassifierConfig`, such as `ignore_index=-100`.
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
        """Returns the cross-entropy `[batch]` and the accuracy, both weighted."""
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
            loss = optax.softmax_cross_entropy(logits, labels)
            labels = labels.argmax(axis=-1)
        else:
            what, labels = with_entry_name("label", labels, batch), labels.astype(jnp.int32)
            ctx.check_indices(what, labels, logits.shape[1], where=where, advice=_ADVICE)
            labels = labels if where is None else jnp.where(where, labels, 0)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        hits = logits.argmax(axis=-1) == labels
        if weight is None:
            return loss, {"accuracy": hits}
        return Mean.per_example(loss, weight), {"accuracy": Mean.per_example(hits, weight)}


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
