"""Checks of the `callbacks` argument."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from distaff.callbacks.callback import Callback
from distaff.core.config.other_frameworks import EVENTS, check_methods
from distaff.core.config.overrides import check_overrides
from distaff.errors import ConfigError

EVENT_NAMES = tuple(name for name in vars(Callback) if name.startswith("on_"))
_FORM = (
    "Write a subclass of distaff.Callback that defines the events it needs, such as "
    "on_epoch_end(self, info), and pass callbacks=[MyCallback()]."
)


def as_callbacks(given: Any) -> tuple[Callback, ...]:
    """Returns a list of callbacks as a tuple; empty for None.

    Raises:
        ConfigError: `given` is not a list of callbacks, or one defines an event that nothing calls.
    """
    if given is None:
        return ()
    if isinstance(given, Callback):
        name = type(given).__name__
        raise ConfigError(f"callbacks is a list; got one {name}. Write callbacks=[{name}(...)].")
    if isinstance(given, str | bytes | Mapping | type) or not isinstance(given, Iterable):
        raise ConfigError(f"callbacks is a list of callbacks; got {given!r}. {_FORM}")
    callbacks = tuple(given)
    for callback in callbacks:
        _check(callback)
    return callbacks


def _check(callback: Any) -> None:
    if isinstance(callback, type):
        name = callback.__name__
        raise ConfigError(
            f"A callback is an object; got the class {name}. Write callbacks=[{name}(...)]."
        )
    if not isinstance(callback, Callback):
        raise ConfigError(f"A callback is a distaff.Callback; got {callback!r}. {_FORM}")
    check_methods(type(callback), Callback, EVENT_NAMES, EVENTS)
    check_overrides(callback, Callback, (*EVENT_NAMES, "get_state", "set_state"))
