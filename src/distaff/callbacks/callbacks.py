"""Passes the events of a run to all its callbacks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from distaff.callbacks.callback import Callback, StepInfo, StopTraining
from distaff.callbacks.chunk_scope import WatchesChunks
from distaff.callbacks.early_stopping import EarlyStopping
from distaff.core.config.other_frameworks import EVENTS, check_methods
from distaff.core.config.overrides import check_overrides
from distaff.errors import ConfigError
from distaff.execution.dispatch.repetition import RepeatsSteps
from distaff.metrics.monitor import Monitor
from distaff.step.state import is_intact

_log = logging.getLogger("distaff")

_EVENTS = tuple(name for name in vars(Callback) if name.startswith("on_"))
_REMEDY = (
    "Write a subclass of distaff.Callback that defines the events it needs, such as "
    "on_epoch_end(self, info), and pass callbacks=[MyCallback()]."
)


class Callbacks:
    """Passes each event to every callback, and keeps the first reason to stop.

    Args:
        callbacks: called in this order; None without any.

    Raises:
        ConfigError: an item is not a callback, or defines an event that nothing calls.

    Attributes:
        names: the class of each callback, and its index among callbacks of that class.
    """

    def __init__(self, callbacks: Iterable[Callback] | None) -> None:
        self.callbacks = _as_callbacks(callbacks)
        kinds = [type(callback).__name__ for callback in self.callbacks]
        self.names = [f"{kind}-{kinds[:n].count(kind)}" for n, kind in enumerate(kinds)]
        self.stop_reason: str | None = None
        self.stop_status = "stopped"
        self._to_end: list[Callback] = []
        self.chunk_watchers = [each for each in self.callbacks if isinstance(each, WatchesChunks)]
        self.step_checks = [each for each in self.callbacks if isinstance(each, RepeatsSteps)]
        self.watches_steps = any(
            getattr(callback.on_step_end, "__func__", None) is not Callback.on_step_end
            for callback in self.callbacks
        )

    def judge_by(self, monitor: Monitor) -> None:
        """Sets the trainer's monitor on the callbacks without their own.

        Raises:
            ConfigError: a callback monitors the same metric in the other direction.
        """
        for callback in self.callbacks:
            if isinstance(callback, EarlyStopping):
                callback.judge_by(monitor)

    @property
    def monitors(self) -> list[Monitor]:
        """The monitors of the callbacks."""
        watched = [getattr(callback, "monitor", None) for callback in self.callbacks]
        return [each for each in watched if isinstance(each, Monitor)]

    def emit(self, event: str, info: StepInfo) -> None:
        """Calls the method `event` of every callback with `info`."""
        if event == "on_training_start":
            self._to_end = list(self.callbacks)
        for callback in self.callbacks:
            try:
                getattr(callback, event)(info)
            except StopTraining as stop:
                self.stop(stop, type(callback).__name__)

    def stop(self, request: StopTraining, name: str) -> None:
        """Keeps a request to stop, if it is the first; `name` is the reason if it has none."""
        if self.stop_reason is None:
            self.stop_reason, self.stop_status = request.reason or name, request.status

    def end(
        self,
        info: StepInfo,
        status: str,
        reason: str,
        error: BaseException | None = None,
    ) -> None:
        """Calls `on_training_end` once on every callback whose `on_training_start` was called.

        Args:
            info: the state of the run; after an error, its arrays may have been donated.
            status: see `StepInfo`.
            reason: why the run was stopped, interrupted, or failed.
            error: the exception that ended the run, if any.

        Raises:
            Exception: the first error of a callback, if the run has not failed already; others are
                logged.
        """
        state = info.state if error is None or is_intact(info.state) else None
        info = info._replace(state=state, status=status, reason=reason, error=error)
        waiting, self._to_end, first = self._to_end, [], error
        for callback in waiting:
            try:
                callback.on_training_end(info)
            except StopTraining as stop:
                self.stop(stop, type(callback).__name__)
            except Exception as failure:
                if first is not None:
                    _log.exception("%s.on_training_end also failed", type(callback).__name__)
                first = first or failure
        if first is not error and first is not None:
            raise first


def _as_callbacks(given: Any) -> tuple[Callback, ...]:
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
        raise ConfigError(f"callbacks is a list of callbacks; got {given!r}. {_REMEDY}")
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
        raise ConfigError(f"A callback is a distaff.Callback; got {callback!r}. {_REMEDY}")
    check_methods(type(callback), Callback, _EVENTS, EVENTS)
    check_overrides(callback, Callback, (*_EVENTS, "get_state", "set_state"))
