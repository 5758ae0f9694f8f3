"""The six events of a run, and what a callback is told at each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from distaff.step.state import TrainState


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
        status: at the end of the training, how it ended: `"finished"`, `"stopped"`, `"pruned"`,
            `"interrupted"` or `"failed"`; empty at every other event.
        reason: why it was stopped, interrupted, or failed; empty otherwise.
        error: the exception that ended it; None for any other end. After an error, `state` is None
            where a step that failed had taken the arrays.
    """

    step: int
    epoch: int
    state: TrainState | None
    metrics: Mapping[str, Any]
    is_best: bool = False
    status: str = ""
    reason: str = ""
    error: BaseException | None = None


class StopTraining(Exception):  # noqa: N818 - a request, not an error
    """Raised by a callback to end the run as a normal end, after the epoch's work is saved.

    Raised within an epoch, it ends the epoch there: metrics are of the steps so far, which are
    validated and saved.

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
        """Called once at the end of the training, whatever ended it: see `info.status`.

        A run that was stopped, interrupted or failed calls it, too. An error raised here after
        another one is logged. The test follows it.
        """

    def get_state(self) -> dict[str, Any]:
        """Returns what this callback remembers, as strict JSON."""
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Takes back what `get_state` returned."""
