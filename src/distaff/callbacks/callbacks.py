"""Callbacks: hands the events of a run to all of its callbacks."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import jax

from distaff.callbacks.callback import Callback, StepInfo, StopTraining
from distaff.callbacks.chunk_scope import WatchesChunks
from distaff.callbacks.early_stopping import EarlyStopping
from distaff.callbacks.given import as_callbacks
from distaff.metrics.monitor import Monitor
from distaff.step.state import TrainState

_log = logging.getLogger("distaff")


class Callbacks:
    """Hands each event to every callback, and remembers the first reason to stop.

    Args:
        callbacks: called in this order; None for none.

    Raises:
        ConfigError: one is no callback, or defines an event that nothing calls.

    Attributes:
        names: of each callback its class, and which one of that class it is.
    """

    def __init__(self, callbacks: Iterable[Callback] | None) -> None:
        self.callbacks = as_callbacks(callbacks)
        kinds = [type(callback).__name__ for callback in self.callbacks]
        self.names = [f"{kind}-{kinds[:n].count(kind)}" for n, kind in enumerate(kinds)]
        self.stop_reason: str | None = None
        self.stop_status = "stopped"
        self._to_end: list[Callback] = []
        self.chunk_watchers = [each for each in self.callbacks if isinstance(each, WatchesChunks)]
        self.watches_steps = any(
            getattr(callback.on_step_end, "__func__", None) is not Callback.on_step_end
            for callback in self.callbacks
        )

    def judge_by(self, monitor: Monitor) -> None:
        """Gives the trainer's monitor to the callbacks that have none of their own.

        Raises:
            ConfigError: a callback calls the other direction of the same metric better.
        """
        for callback in self.callbacks:
            if isinstance(callback, EarlyStopping):
                callback.judge_by(monitor)

    @property
    def monitors(self) -> list[Monitor]:
        """What the callbacks look at."""
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
        """Remembers a request to stop; the first one counts.

        Args:
            request: what was raised.
            name: of who raised it, where the request has no reason.
        """
        if self.stop_reason is None:
            self.stop_reason, self.stop_status = request.reason or name, request.status

    def end(
        self,
        info: StepInfo,
        status: str,
        reason: str,
        error: BaseException | None = None,
    ) -> None:
        """Calls `on_training_end` of every callback whose run began, once, whatever others raise.

        Args:
            info: where the run stands; after an error, the state may have been given away.
            status: how it ended.
            reason: why it was stopped, interrupted, or failed.
            error: the exception that ended it, if one has.

        Raises:
            Exception: the first that a callback raised, where the run has not failed already;
                others are logged.
        """
        state = info.state if error is None or not _is_given_away(info.state) else None
        info = info._replace(state=state, status=status, reason=reason, error=error)
        waiting, self._to_end, first = self._to_end, [], error
        for callback in waiting:
            try:
                callback.on_training_end(info)
            except StopTraining as stop:
                self.stop(stop, type(callback).__name__)
            except Exception as failure:
                if first is not None:
                    _log.exception("%s.on_training_end failed, too", type(callback).__name__)
                first = first or failure
        if first is not error and first is not None:
            raise first


def _is_given_away(state: TrainState | None) -> bool:
    """Whether a step that failed has taken the arrays of a state."""
    arrays = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    return any(leaf.is_deleted() for leaf in arrays)
