"""The result of a run, and its best models."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Never

from distaff.core.config.other_frameworks import RESULTS, unknown_name
from distaff.loggers.history import ColumnLogger, History

_EMPTY = History(ColumnLogger())


class Best(NamedTuple):
    """One of the best models of a run.

    Attributes:
        step: completed optimizer updates.
        epoch: completed epochs.
        metrics: its validation metrics, as `val/...`.
    """

    step: int
    epoch: int
    metrics: dict[str, Any]


class TrainResult(NamedTuple):
    """How a run ended.

    Attributes:
        status: `"finished"`; `"stopped"` by a callback; `"pruned"` by a hyperparameter search; or
            `"interrupted"`, and can be resumed.
        reason: why it was stopped or interrupted; empty otherwise.
        step: completed optimizer updates.
        epoch: completed epochs.
        metrics: metrics of the last training epoch (`train/`), the best validation (`val/`) and the
            test (`test/`); of the last completed epoch if the run was interrupted.
        best: the best model; None without validation, or if no model could be written.
        path: the run directory; None if nothing is written.
        first_step: completed updates when this call began. Equals `step` if the run was already
            finished, so that nothing was left to train.
        history: all recorded metrics as arrays by name, such as `history["val/loss"]`, including
            those from before the run was resumed.
    """

    status: str
    reason: str
    step: int
    epoch: int
    metrics: dict[str, Any]
    best: Best | None
    path: Path | None
    first_step: int = 0
    history: History = _EMPTY

    def figure(self) -> Any:
        """Returns the learning curves as a matplotlib Figure; see `History.figure`.

        Raises:
            MissingExtraError: matplotlib is not installed.
            MetricError: the run has not completed an epoch.
        """
        return self.history.figure()

    def __getattr__(self, name: str) -> Never:
        raise unknown_name(self, name, RESULTS)
