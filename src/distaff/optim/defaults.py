"""The learning rate and schedule of an optimizer for which a config gives none."""

from __future__ import annotations

import inspect

from distaff.optim import catalog

_UNSCALED = {"adadelta": 1.0, "lbfgs": 1.0}
"""Optimizers whose rate is None by default in Optax, which means 1.

Adafactor's is None, too, for which its paper has a schedule that Optax leaves out.
"""

_OWN_PACE = {"lbfgs"}
"""Optimizers that find the length of each step, which a schedule would only shorten."""


class DefaultRate(float):
    """A learning rate that was not given. It follows the optimizer's name where that changes."""


class DefaultSchedule(str):
    """A schedule that was not given. It follows the optimizer's name where that changes."""


RATE = DefaultRate(1e-3)
SCHEDULE = DefaultSchedule("cosine")


def default_rate(name: str) -> DefaultRate:
    """Returns the rate of an optimizer by default: Optax's own if it has one, else 1e-3.

    Args:
        name: of a known optimizer.
    """
    function = catalog.optimizers().get(name)
    if function is None:  # learned
        return RATE
    own = inspect.signature(function).parameters["learning_rate"].default
    return DefaultRate(own if isinstance(own, int | float) else _UNSCALED.get(name, RATE))


def default_schedule(name: str) -> DefaultSchedule:
    """Returns the schedule of an optimizer by default: constant for one without need of any.

    Args:
        name: of a known optimizer.
    """
    needs_none = name in _OWN_PACE or name.startswith("schedule_free")
    return DefaultSchedule("constant") if needs_none else SCHEDULE
