"""The six events of a run, and what a callback is told at each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from distaff.callbacks.chunk_scope import WatchesChunks
from distaff.monitor import Monitor
from distaff.state import TrainState


class StepInfo(NamedTuple):
    """What a callback is told. It is a value: changing the run is the trainer's business.

    Attributes:
        step: completed optimizer updates.
        epoch: the current epoch, counted from 1; 0 before the first.
        state: the train state. The next step donates its arrays: copy what you keep. None at a
            step inside a program of several steps (`steps_per_call`), which hands out its last
            state only.
        metrics: at a step, that step's metrics on the device (reading one waits for the step);
            at an epoch or a validation, computed values by name, such as `{"val/loss": 0.3}`.
        is_best: at a checkpoint, whether the model is the best so far.
    """

    step: int
    epoch: int
    state: TrainState | None
    metrics: Mapping[str, Any]
    is_best: bool = False


class StopTraining(Exception):  # noqa: N818 - a request, not an error
    """Raised by a callback to end the run as a normal end, after the epoch's work is saved.

    Args:
        reason: shown to the user and written beside the run's status; empty for the callback's
            name.
        status: the run's status: `"stopped"`, or `"pruned"` for a trial that a search gives up.
    """

    def __init__(self, reason: str, status: Literal["stopped", "pruned"] = "stopped") -> None:
        super().__init__(reason)
        self.reason, self.status = reason, status


class Callback:
    """Override any of the six events. A callback returns nothing and may raise `StopTraining`.

    A callback with memory gives it back in `get_state`, so that it is saved with each checkpoint.
    """

    def on_training_start(self, info: StepInfo) -> None:
        """Called once, before the first step."""

    def on_step_end(self, info: StepInfo) -> None:
        """Called after each step; runs that override it nowhere pay nothing for it."""

    def on_epoch_end(self, info: StepInfo) -> None:
        """Called after each training epoch, with its metrics as `train/...`."""

    def on_validation_end(self, info: StepInfo) -> None:
        """Called after each validation, with its metrics as `val/...`."""

    def on_checkpoint(self, info: StepInfo) -> None:
        """Called when a checkpoint was handed to the store."""

    def on_training_end(self, info: StepInfo) -> None:
        """Called once, after the last step, also when a run is stopped."""

    def get_state(self) -> dict[str, Any]:
        """Returns what this callback remembers, as strict JSON."""
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Takes back what `get_state` returned."""


class Callbacks:
    """Hands each event to every callback, and remembers the first reason to stop.

    Args:
        callbacks: called in this order.
    """

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self.callbacks = tuple(callbacks)
        self.stop_reason: str | None = None
        self.stop_status = "stopped"
        self.chunk_watchers = [each for each in self.callbacks if isinstance(each, WatchesChunks)]
        self.watches_steps = any(
            type(callback).on_step_end is not Callback.on_step_end for callback in self.callbacks
        )

    @property
    def monitors(self) -> list[Monitor]:
        """What the callbacks look at."""
        watched = [getattr(callback, "monitor", None) for callback in self.callbacks]
        return [each for each in watched if isinstance(each, Monitor)]

    def emit(self, event: str, info: StepInfo) -> None:
        """Calls the method `event` of every callback with `info`."""
        for callback in self.callbacks:
            try:
                getattr(callback, event)(info)
            except StopTraining as stop:
                if self.stop_reason is None:
                    self.stop_reason = stop.reason or type(callback).__name__
                    self.stop_status = stop.status
