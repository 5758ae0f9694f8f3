"""Overrides: which methods of a trainer a subclass may override, and whether it can be called."""

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


def augmentation_of(trainer: Any, base: type) -> AugmentFn | None:
    """Returns the `augment` of a trainer, or None where it is not overridden: steps do without."""
    is_own = getattr(trainer.augment, "__func__", None) is not getattr(base, "augment", None)
    return trainer.augment if is_own else None
