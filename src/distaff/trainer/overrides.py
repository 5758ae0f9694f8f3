"""Checks the methods that a subclass of a trainer overrides."""

from __future__ import annotations

from typing import Any

from distaff.core.config.other_frameworks import METHODS, check_methods
from distaff.core.config.overrides import check_overrides
from distaff.step.step import AugmentFn

HOOKS = ("on_training_start", "on_training_epoch_end", "on_validation_epoch_end")

OVERRIDE_POINTS = (
    *HOOKS,
    *("loss_fn", "augment", "model_inputs", "predict_fn", "run_model_init", "init_model"),
    *("print_tabulate", "init_logger", "create_functions", "create_jitted_functions"),
    *("init_optimizer", "train_epoch", "eval_model", "tracker", "check_batch", "load_model"),
    *("save_metrics", "save_model", "is_new_model_better"),
)
"""Methods that a run calls, and that a subclass may override."""


def check_class(trainer: Any, base: type) -> None:
    """Checks the hooks and overrides of a trainer's class.

    Raises:
        ConfigError: a hook is never called, or an override has other arguments.
    """
    check_methods(type(trainer), base, HOOKS, METHODS)
    check_overrides(trainer, base, OVERRIDE_POINTS, without=("weights",))


def check_averaging(trainer: Any, base: type) -> None:
    """Checks that an override of `eval_model` can evaluate averages of the weights.

    Raises:
        ConfigError: it does not accept the argument `weights`.
    """
    check_overrides(trainer, base, ("eval_model",))


def augmentation_of(trainer: Any, base: type) -> AugmentFn | None:
    """Returns the `augment` of a trainer; None if it is not overridden."""
    is_own = getattr(trainer.augment, "__func__", None) is not getattr(base, "augment", None)
    return trainer.augment if is_own else None
