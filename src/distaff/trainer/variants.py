"""Copies of a trainer with some arguments changed."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from distaff.callbacks.callbacks import Callbacks
from distaff.checkpoint.weights import as_init_from
from distaff.loggers.given import as_loggers
from distaff.optim.given import as_optimizer
from distaff.trainer.config import make_config
from distaff.trainer.predictor import Predictor

T = TypeVar("T", bound=Predictor)

_CHECKS: dict[str, Any] = {
    "optimizer": as_optimizer,
    "loggers": as_loggers,
    "callbacks": Callbacks,
    "init_from": as_init_from,
}


def variant_of(trainer: T, changes: dict[str, Any]) -> T:
    """Returns an uninitialized copy of a trainer; see `TrainerModule.variant`.

    Args:
        trainer: the trainer to copy.
        changes: options and other arguments of the constructor.

    Raises:
        ConfigError: an argument is unknown or out of range.
    """
    arguments = {name: _CHECKS[name](x) for name, x in changes.items() if name in _CHECKS}
    options = {name: x for name, x in changes.items() if name not in _CHECKS}
    other = copy.copy(trainer)
    known = {**vars(trainer.config), **options}
    vars(other)["config"] = make_config(type(trainer.config), known, type(trainer))
    vars(other).update(arguments, _run=None, example_batch=None)
    vars(other)["_workspace"] = other._new_workspace()
    return other
