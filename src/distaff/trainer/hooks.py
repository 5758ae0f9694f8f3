"""Hooks: what a run calls on its way, and what does nothing unless it is overridden."""

from __future__ import annotations

from typing import Any, Never

from distaff.core.config.other_frameworks import METHODS, check_methods, unknown_trainer_name
from distaff.core.config.overrides import check_overrides
from distaff.core.typing import Batch, Key
from distaff.step.step import AugmentFn

HOOKS = ("on_training_start", "on_training_epoch_end", "on_validation_epoch_end")

OVERRIDE_POINTS = (
    *HOOKS,
    *("loss_fn", "augment", "model_inputs", "predict_fn", "run_model_init", "init_model"),
    *("print_tabulate", "init_logger", "create_functions", "create_jitted_functions"),
    *("init_optimizer", "train_epoch", "eval_model", "tracker", "check_batch", "load_model"),
    *("save_metrics", "save_model", "is_new_model_better"),
)
"""The methods that a run calls on a trainer, and a subclass may override."""


def check_class(trainer: Any, base: type) -> None:
    """Checks that what a trainer's class defines is called, and can be.

    Args:
        trainer: of a class of the user's own.
        base: the class that calls it.

    Raises:
        ConfigError: a hook has a name that nothing calls, or an override other arguments.
    """
    check_methods(type(trainer), base, HOOKS, METHODS)
    check_overrides(trainer, base, OVERRIDE_POINTS)


class Hooks:
    """Override points without which a run is complete."""

    def __getattr__(self, name: str) -> Never:
        raise unknown_trainer_name(self, name)

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
