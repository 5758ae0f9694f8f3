"""The callback protocol: six events of a run, and the `StepInfo` passed to each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distaff.loggers.many import ManyLoggers
from distaff.step.state import TrainState


class StepInfo(NamedTuple):
    """The current state of a run, as an immutable value.

    Attributes:
        step: completed optimizer updates.
        epoch: the current epoch, counted from 1; 0 before the first.
        state: the train state. The next step donates its arrays, so copy what you keep. None
            inside a program of several steps (`steps_per_call`), which returns its last state
            only; and after an error in a step that had donated the arrays.
        metrics: at a step, that step's metrics on the device (reading one waits for the step);
            at an epoch or a validation, computed values by name, such as `{"val/loss": 0.3}`.
        is_best: at a checkpoint, whether the model is the best so far.
        status: at the end of training, `"finished"`, `"stopped"`, `"pruned"`, `"interrupted"` or
            `"failed"`; empty at every other event.
        reason: why the run was stopped, interrupted, or failed; empty otherwise.
        error: the exception that ended the run; None without one.
        logger: logs metrics, figures, images, histograms and texts to all loggers of the run, and
            to files of its directory; None outside of a run.
        path: the run directory; None if nothing is written.
    """

    step: int
    epoch: int
    state: TrainState | None
    metrics: Mapping[str, Any]
    is_best: bool = False
    status: str = ""
    reason: str = ""
    error: BaseException | None = None
    logger: ManyLoggers | None = None
    path: Path | None = None


class StopTraining(Exception):  # noqa: N818 - a request, not an error
    """Raise this in a callback to stop training normally.

    Within an epoch, it ends the epoch early: its metrics cover the steps so far, and the run
    validates and saves as usual.

    Args:
        reason: shown to the user and saved with the run's status; defaults to the callback's name
            if empty.
        status: the run's status: `"stopped"`, or `"pruned"` for a pruned trial of a search.
    """

    def __init__(self, reason: str, status: Literal["stopped", "pruned"] = "stopped") -> None:
        super().__init__(reason)
        self.reason, self.status = reason, status


class Callback:
    """Base class of callbacks: override any of the six events.

    Events return nothing and may raise `StopTraining`. To save attributes with each checkpoint,
    override `get_state` and `set_state`.
    """

    def on_training_start(self, info: StepInfo) -> None:
        """Called once, before the first step."""

    def on_step_end(self, info: StepInfo) -> None:
        """Called after each step; costs nothing if no callback overrides it."""

    def on_epoch_end(self, info: StepInfo) -> None:
        """Called after each training epoch, with its metrics as `train/...`."""

    def on_validation_end(self, info: StepInfo) -> None:
        """Called after each validation, with its metrics as `val/...`."""

    def on_checkpoint(self, info: StepInfo) -> None:
        """Called when a checkpoint has been passed to the store."""

    def on_training_end(self, info: StepInfo) -> None:
        """Called once at the end of training, before the test, whatever ended it.

        `info.status` is how it ended. An error raised here after another error is only logged.
        """

    def get_state(self) -> dict[str, Any]:
        """Returns the state of the callback to save, as strict JSON."""
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores the state that `get_state` returned."""
