"""Classification: one label per example."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from distaff.context import Context
from distaff.data import entry
from distaff.data.inspection import no_probabilities, out_of_range
from distaff.errors import LossError
from distaff.monitor import Monitor
from distaff.trainer import TrainerModule
from distaff.typing import Batch, Params

_LABEL_NAMES = ("label", "labels", "y", "target", "targets")


class Classifier(TrainerModule):
    """Trains a model that returns logits `[batch, classes]`, by softmax cross-entropy.

    Batches are dicts or dataclasses with `label` (or `labels`, `y`, `target`, `targets`) beside the
    model's input; or tuples `(input, label)`. Labels are class indices, int `[batch]`, or the
    probability of each class, float `[batch, classes]`, as `distaff.augment.mixup` makes them; the
    likeliest class is then the one that counts as right. The best model is the one with the highest
    `val/accuracy`. `predict` returns the logits.

    Args:
        model: as for `TrainerModule`, as every other argument.
    """

    monitor = Monitor("val/accuracy", mode="max")

    _num_classes: int | None = None
    """As the loss has seen it when it was traced; None before, or under a loss of one's own."""

    def labels(self, batch: Batch) -> jax.Array:
        """Returns the labels of a batch, int `[batch]` or float `[batch, classes]`.

        Override it for other batches.

        Raises:
            BatchError: no labels are found.
        """
        return entry(batch, _LABEL_NAMES, 1, what="The label", override="labels(self, batch)")

    def check_batch(self, batch: Batch, name: str) -> None:
        """Looks at the first batch of a loader; see `TrainerModule`.

        Raises:
            BatchError: also for labels of classes that the model does not have, or that are no
                probabilities, unless a subclass has a `loss_fn` of its own.
        """
        super().check_batch(batch, name)
        # A loss around this one may change the labels before it hands them on, or mask some.
        is_own = type(self).loss_fn is Classifier.loss_fn
        if is_own and self._num_classes is not None:
            labels = self.labels(batch)
            self.object_to(out_of_range(labels, self._num_classes, name))
            self.object_to(no_probabilities(labels, name))

    def loss_fn(self, params: Params, batch: Batch, ctx: Context) -> Any:
        """Returns the cross-entropy `[batch]`, and the accuracy."""
        logits = ctx.apply(params, *self.model_inputs(batch))
        labels = self.labels(batch)
        _check_forms(logits, labels)
        self._num_classes = logits.shape[1]
        if labels.ndim == 2:
            loss = optax.softmax_cross_entropy(logits, labels.astype(logits.dtype))
            labels = labels.argmax(axis=-1)
        else:
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return loss, {"accuracy": logits.argmax(axis=-1) == labels}


def _check_forms(logits: jax.Array, labels: jax.Array) -> None:
    are_indices = labels.shape == logits.shape[:1]
    if logits.ndim != 2 or not (are_indices or labels.shape == logits.shape):
        raise LossError(
            "A Classifier's model returns logits [batch, classes] for labels [batch] or "
            f"[batch, classes]; got logits {logits.shape} and labels {labels.shape}."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer if are_indices else jnp.floating):
        raise LossError(
            "Labels are class indices, of an int dtype [batch], or probabilities, of a float dtype "
            f"[batch, classes]; got {labels.dtype} {labels.shape}. Cast them, if that is all."
        )
