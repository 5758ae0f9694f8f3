"""Result: what a run returns, and the best models that it has kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Never

from distaff.core.config.other_frameworks import RESULTS, unknown_name


class Best(NamedTuple):
    """The best model so far.

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
        status: `"finished"`; `"stopped"` if a callback stopped it, `"pruned"` if a search did;
            `"interrupted"` if it was asked to end before its time, and can be gone on with.
        reason: why it was stopped or interrupted; empty otherwise.
        step: completed optimizer updates.
        epoch: completed epochs.
        metrics: of the last training epoch (`train/`), the best validation (`val/`) and the test
            (`test/`); those of the last epoch that ended, if it was interrupted.
        best: the best model; None without validation, or if none could be written.
        path: the run directory; None if nothing is written.
        first_step: completed updates when this call began; `step` where it has trained nothing,
            because a run that it resumed, or found finished, had nothing left to train.
    """

    status: str
    reason: str
    step: int
    epoch: int
    metrics: dict[str, Any]
    best: Best | None
    path: Path | None
    first_step: int = 0

    def __getattr__(self, name: str) -> Never:
        raise unknown_name(self, name, RESULTS)
