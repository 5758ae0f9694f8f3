"""Checks what a population of trainers supports."""

from __future__ import annotations

from typing import Any

from distaff.callbacks import Callback, EarlyStopping
from distaff.data import is_on_policy
from distaff.errors import ConfigError
from distaff.run.events import Plan
from distaff.trainer.memory.ladder import asks_to_fit
from distaff.trainer.module import TrainerModule

_NOT_CALLED = (
    *("train_epoch", "save_model", "load_model", "save_metrics"),
    *("on_training_start", "on_training_epoch_end", "on_validation_epoch_end"),
)


def check_trainer(trainer: Any, owner: str) -> None:
    """Checks that the members of a population do what a run of this trainer does.

    Raises:
        ConfigError: they do not.
    """
    if not isinstance(trainer, TrainerModule):
        raise ConfigError(
            f"{owner} takes a trainer, such as tasks.Classifier(model); got {trainer!r}."
        )
    kind, config = type(trainer), trainer.config
    own = [n for n in _NOT_CALLED if getattr(kind, n) is not getattr(TrainerModule, n)]
    if own:
        raise ConfigError(
            f"{owner} does not call {kind.__name__}.{', '.join(own)}, because it trains several "
            "members at once. Train one run per seed: trainer.variant(seed=s).train_model(...)."
        )
    called = [each for each in trainer.callbacks.callbacks if not _is_followed(each)]
    if called:
        names = ", ".join(type(each).__name__ for each in called)
        raise ConfigError(
            f"{owner} calls no callbacks but EarlyStopping, and this trainer has {names}. Pass "
            "trainer.variant(callbacks=[...]) with EarlyStopping only, or without callbacks."
        )
    if asks_to_fit(config):
        raise ConfigError(
            f"{owner} does not look for a micro-batch that fits into memory. Pass "
            "trainer.variant(fit_memory=False, micro_batch=None), or a number for micro_batch."
        )
    limits = {
        "debug": (config.debug, False),
        "max_time": (config.max_time, None),
        "mesh": (config.mesh, None),
        "on_bad_numbers": (config.on_bad_numbers == "rollback" and "rollback", False),
        "on_loss_spike": (config.on_loss_spike == "rollback" and "rollback", False),
    }
    for name, (value, neutral) in limits.items():
        if value != neutral:
            raise ConfigError(
                f"{owner} does not support {name}={value!r}. Pass trainer.variant({name}=...) "
                "with another value, or train one run per seed."
            )


def _is_followed(callback: Callback) -> bool:
    """Whether a population follows this callback, or it is one of a task and only shows things."""
    return isinstance(callback, EarlyStopping) or "distaff.tasks." in type(callback).__module__


def check_plan(plan: Plan, owner: str) -> None:
    """Checks that a population can train by this plan.

    Raises:
        ConfigError: it validates within epochs, ends by a count of examples, tokens or seconds, or
            its batches depend on a state.
    """
    if plan.limit is not None:
        raise ConfigError(
            f"{owner} trains a number of epochs or steps; got num_epochs={str(plan.limit)!r}. "
            'Write num_epochs=5, or "1000 steps".'
        )
    if plan.val_every.unit != "epochs":
        raise ConfigError(
            f"{owner} validates at the ends of epochs, but this trainer validates every "
            f"{plan.val_every}. Validate every n epochs."
        )
    if plan.num_epochs is None:
        raise ConfigError(f"{owner} needs the length of the training. Pass num_epochs=20.")
    if is_on_policy(plan.train_loader):
        raise ConfigError(
            f"{owner} gives all members the same batches, but the batches of an OnPolicy "
            "loader depend on the state of one trainer. Train one run per seed."
        )
