"""Moved: names that a trainer had, and where they are by now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distaff.core.config.other_frameworks import unknown_trainer_name
from distaff.core.warnings import warn
from distaff.run.run import Run

_OF_A_RUN: dict[str, tuple[str, Callable[[Run], Any]]] = {
    "best_models": ("last_run.best_models", lambda run: run.best_models),
    "first_step": ("last_run.state.first_step", lambda run: run.state.first_step),
    "forms": ("last_run.forms", lambda run: run.forms),
    "last_metrics": ("last_run.state.last_metrics", lambda run: run.state.last_metrics),
    "recording": ("last_run.logger, or last_run.path", lambda run: run.recorder.recording),
    "report": ("last_run.report", lambda run: run.report),
}


def moved(trainer: Any, name: str) -> Any:
    """Returns what a name stood for that is on the last run by now, with a DeprecationWarning.

    Raises:
        UnknownNameError: a trainer never had it, or has no run yet.
    """
    run = vars(trainer).get("_run")
    if run is None or name not in _OF_A_RUN:
        raise unknown_trainer_name(trainer, name)
    place, get = _OF_A_RUN[name]
    text = f"trainer.{name} is trainer.{place} by now, and will be removed."
    warn(text, DeprecationWarning, stacklevel=3)
    return get(run)
