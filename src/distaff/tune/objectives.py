"""The metrics that a study optimizes at once, if they are several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from distaff.callbacks import Callback
from distaff.errors import ConfigError
from distaff.metrics.monitor import Monitor, as_monitor

_HELP = 'Write objectives=("val/loss", "val/accuracy"), or {"val/score": "max", ...}.'


def as_objectives(given: Any) -> tuple[Monitor, ...]:
    """Returns the objectives of a study; empty for None: the trainer's monitor is the only one.

    Args:
        given: names of metrics or monitors; or directions, `"min"` or `"max"`, by name.

    Raises:
        ConfigError: they are not two or more different validation metrics, or a direction is wrong.
    """
    if given is None:
        return ()
    if isinstance(given, str | Monitor) or not isinstance(given, Iterable):
        raise ConfigError(f"objectives must be metrics of a study; got {given!r}. {_HELP}")
    if isinstance(given, Mapping):
        found = tuple(Monitor(name, mode) for name, mode in given.items())
    else:
        found = tuple(map(as_monitor, given))
    names = [each.name for each in found]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigError(
            f"objectives must be two or more different metrics; got {names}. {_HELP} To optimize "
            "one, set the trainer's monitor."
        )
    if of_training := [each.name for each in found if each.is_of_training]:
        raise ConfigError(
            f"Objectives are validation metrics of the trial's best model; {of_training[0]!r} is "
            "one of training. Choose a metric val/..."
        )
    return found


def directions(form: Mapping[str, Any]) -> dict[str, str]:
    """Returns the directions of the objectives of a study by metric; empty with only one."""
    return dict(form.get("objectives") or {})


class Objective(Callback):
    """Makes a run check before its start that an objective is one of its metrics.

    Args:
        monitor: the objective.
    """

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
