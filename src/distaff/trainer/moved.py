"""Deprecated attributes of a trainer, and their new places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distaff.core.config.other_frameworks import unknown_trainer_name
from distaff.core.warnings import warn
from distaff.run.run import Run
from distaff.run.workspace import Workspace

_OF_A_RUN: dict[str, tuple[str, Callable[[Run], Any]]] = {
    "best_models": ("last_run.best_models", lambda run: run.best_models),
    "first_step": ("last_run.state.first_step", lambda run: run.state.first_step),
    "forms": ("last_run.forms", lambda run: run.forms),
    "last_metrics": ("last_run.state.last_metrics", lambda run: run.state.last_metrics),
    "recording": ("last_run.logger, or last_run.path", lambda run: run.recorder.recording),
    "report": ("last_run.report", lambda run: run.report),
}

_OF_A_WORKSPACE: dict[str, tuple[str, Callable[[Workspace], Any]]] = {
    "ready_state": ("state", lambda workspace: workspace.ready_state),
    "restore": ("load_weights, or init_from", lambda workspace: workspace.restore),
}


def moved(trainer: Any, name: str) -> Any:
    """Returns the value of a deprecated attribute, with a DeprecationWarning.

    Raises:
        UnknownNameError: there is no such attribute, or not before the first run.
    """
    of_a_run = name in _OF_A_RUN
    owner = vars(trainer).get("_run" if of_a_run else "_workspace")
    known: dict[str, tuple[str, Callable[[Any], Any]]] = _OF_A_RUN if of_a_run else _OF_A_WORKSPACE
    if owner is None or name not in known:
        raise unknown_trainer_name(trainer, name)
    place, get = known[name]
    text = f"trainer.{name} is deprecated and will be removed. Use trainer.{place}."
    warn(text, DeprecationWarning, stacklevel=3)
    return get(owner)
