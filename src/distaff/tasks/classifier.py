"""Classification: one label per example."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from distaff.context import Context
from distaff.data import entry
from distaff.data.inspection import out_of_range
from distaff.errors import LossError
from distaff.monitor import Monitor
from distaff.trainer import TrainerModule
from distaff.typing import Batch, Params

_LABEL_NAMES = ("label", "labels", "y", "target", "targets")


class Classifier(TrainerModule):
    """Trains a model that returns logits `[batch, classes]`, by softmax cross-entropy.

    Batches are dicts or dataclasses with `label` (or `labels`, `y`, `target`, `targets`), int
    `[batch]`, beside the model's input; or tuples `(input, label)`. The best model is the one with
    the highest `val/accuracy`. `predict` returns the logits.

    Args:
        model: as for `TrainerModule`, as every other argument.
    """

    monitor = Monitor("val/accuracy", mode="max")

    _num_classes: int | None = None
    """As the loss has seen it when it was traced; None before, or under a loss of one's own."""

    def labels(self, batch: Batch) -> jax.Array:
        """Returns the labels of a batch, int `[batch]`. Override it for other batches.

        Raises:
            BatchError: no labels are found.
        """
        return entry(batch, _LABEL_NAMES, 1, what="The label", override="labels(self, batch)")

    def check_batch(self, batch: Batch, name: str) -> None:
        """Looks at the first batch of a loader; see `TrainerModule`.

        Raises:
            BatchError: also for labels of classes that the model does not have, unless a subclass
                has a `loss_fn` of its own.
        """
        super().check_batch(batch, name)
        # A loss around this one may change the labels before it hands them on, or mask some.
        is_own = type(self).loss_fn is Classifier.loss_fn
        if is_own and self._num_classes is not None:
            self.object_to(out_of_range(self.labels(batch), self._num_classes, name))

    def loss_fn(self, params: Params, batch: Batch, ctx: Context) -> Any:
        """Returns the cross-entropy `[batch]`, and the accuracy."""
        logits = ctx.apply(params, *self.model_inputs(batch))
        labels = self.labels(batch)
        if logits.ndim != 2 or labels.ndim != 1:
            raise LossError(
                "A Classifier's model returns logits [batch, classes] for labels [batch]; got "
                f"logits {logits.shape} and labels {labels.shape}."
            )
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise LossError(f"Labels are class indices, of an int dtype; got {labels.dtype}.")
        self._num_classes = logits.shape[1]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return loss, {"accuracy": logits.argmax(axis=-1) == labels}
