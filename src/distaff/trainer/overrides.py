"""Checks the methods that a subclass of a trainer overrides."""

from __future__ import annotations

from typing import Any

from distaff.core.config.other_frameworks import METHODS, check_methods
from distaff.core.config.overrides import check_overrides
from distaff.errors import ConfigError
from distaff.step.accumulation.micro_batches import in_micro_batches
from distaff.step.normalise import StepFn
from distaff.step.norms import norms_of
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


def split(step: StepFn, trainer: Any, base: type) -> StepFn:
    """Returns a training step that splits its batch as the option `micro_batch` of a trainer says.

    Args:
        step: the step of the trainer.
        trainer: the trainer.
        base: the class whose training step can be split.

    Raises:
        ConfigError: the step is the user's own, or a micro-batch does not divide over the devices.
    """
    size = trainer.config.micro_batch
    if not isinstance(size, int):
        return step
    if type(trainer).create_functions is not getattr(base, "create_functions", None):
        raise ConfigError(
            f"micro_batch={size} splits the batches of Distaff's training step, but "
            f"{type(trainer).__name__} overrides create_functions. Split them in your own step, or "
            "pass micro_batch=None."
        )
    num_parts = trainer._workspace.execution.placement.num_parts
    if size % num_parts:
        raise ConfigError(
            f"micro_batch={size} does not divide over the {num_parts} devices that split a batch. "
            f"Use a multiple of {num_parts}."
        )
    return in_micro_batches(step, size, norms_of(trainer.config))


def augmentation_of(trainer: Any, base: type) -> AugmentFn | None:
    """Returns the `augment` of a trainer; None if it is not overridden."""
    is_own = getattr(trainer.augment, "__func__", None) is not getattr(base, "augment", None)
    return trainer.augment if is_own else None
