"""Copies of a trainer with some arguments changed."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from distaff.callbacks.callbacks import Callbacks
from distaff.checkpoint.weights import as_init_from
from distaff.errors import ConfigError, FixedAttributeError
from distaff.loggers.protocol import as_loggers
from distaff.metrics.monitor import as_monitor
from distaff.optim.build import as_optimizer
from distaff.trainer.config import make_config
from distaff.trainer.predictor import Predictor

T = TypeVar("T", bound=Predictor)

_CHECKS: dict[str, Any] = {
    "optimizer": as_optimizer,
    "loggers": as_loggers,
    "callbacks": Callbacks,
    "init_from": as_init_from,
    "monitor": as_monitor,
}
_DESCRIPTION = ("model", "config", "optimizer", "callbacks", "loggers", "init_from", "monitor")
_PLACE = ("step", "epoch", "best", "best_metrics", "stop_reason", "last_run")


def check_assignment(trainer: Predictor, name: str, value: Any) -> None:
    """Checks that an attribute of a trainer may be set.

    Raises:
        FixedAttributeError: it is read-only, or part of a description that a run has recorded.
    """
    if name in _PLACE:
        raise FixedAttributeError(
            f"{name} is read-only, because only a run changes it. To continue from another state, "
            "set trainer.state, or start a new run with init_from."
        )
    run = vars(trainer).get("_run") if name in _DESCRIPTION else None
    if run is not None and run.recorder.has_begun and getattr(trainer, name, None) is not value:
        change = "<option>=..." if name == "config" else f"{name}=..."
        raise FixedAttributeError(
            f"{name} is fixed once a trainer has trained. Make a copy that differs: "
            f"trainer.variant({change}), with init_from=trainer.state.params to keep the weights."
        )


def variant_of(trainer: T, changes: dict[str, Any]) -> T:
    """Returns an uninitialized copy of a trainer; see `TrainerModule.variant`.

    Raises:
        ConfigError: an argument is unknown or out of range.
    """
    if "example_batch" in changes:
        raise ConfigError(
            "variant returns an uninitialized copy, so it takes no example_batch. Train the copy, "
            f"or create a {type(trainer).__name__} with example_batch."
        )
    arguments = {name: _CHECKS[name](x) for name, x in changes.items() if name in _CHECKS}
    options = {name: x for name, x in changes.items() if name not in _CHECKS}
    other = copy.copy(trainer)
    known = {**vars(trainer.config), **options}
    vars(other)["config"] = make_config(type(trainer.config), known, type(trainer))
    vars(other).update(arguments, _run=None, example_batch=None)
    vars(other)["_workspace"] = other._new_workspace()
    return other
