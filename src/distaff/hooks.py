"""Hooks: what a run calls on its way, and what does nothing unless it is overridden."""

from __future__ import annotations

from typing import Any

from distaff.step import AugmentFn
from distaff.typing import Batch, Key


class Hooks:
    """Override points without which a run is complete."""

    def augment(self, batch: Batch, key: Key) -> Batch:
        """Returns a batch to train on in place of one of the loader, such as a shifted picture.

        The training step of `create_functions` calls it once, on the device, before the loss, also
        where an optimizer evaluates the loss several times; of accumulated steps, each has its own
        batch and key. Evaluation and prediction do not call it. See `distaff.augment`.

        Args:
            batch: as the loader yields it, each leaf `[batch, ...]`.
            key: a random key, `[]`, that depends on the seed and the step alone, so that a resumed
                run draws what an uninterrupted one does. Nothing else draws from it.

        Returns:
            A batch with the same leaves, maybe others, and as many examples. Otherwise the step
            raises BatchError.
        """
        return batch

    def augmentation(self) -> AugmentFn | None:
        """Returns `augment`, or None where it is not overridden, so that a step does without."""
        is_own = getattr(self.augment, "__func__", None) is not Hooks.augment
        return self.augment if is_own else None

    def on_training_start(self) -> None:
        """Called before the first step."""

    def on_training_epoch_end(self, epoch: int, metrics: dict[str, Any]) -> None:
        """Called after each training epoch; what is added to `metrics` is logged."""

    def on_validation_epoch_end(self, epoch: int, metrics: dict[str, Any], val_loader: Any) -> None:
        """Called after each validation; what is added to `metrics` is logged, or monitored.

        Several validation loaders come as a dict.
        """
