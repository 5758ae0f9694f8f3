"""The result of a run, and its best models."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Never

import numpy as np

from distaff.core.config.other_frameworks import RESULTS, unknown_name
from distaff.core.views import html
from distaff.core.views.brief import brief
from distaff.errors import DistaffError
from distaff.loggers.history import ColumnLogger, History
from distaff.run.display.lines import number, rows_by_split

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

    def __repr__(self) -> str:
        scalars = {name: x for name, x in self.metrics.items() if np.ndim(x) == 0}
        tested = [name for name in scalars if name.startswith("test/")]
        names = tested or [name for name in scalars if name.startswith("val")] or list(scalars)
        numbers = [f"{name} {scalars[name]:.4g}" for name in names[:4]]
        place = "" if self.path is None else f"path={str(self.path)!r}"
        return brief(self, self.status, f"step {self.step}", f"epoch {self.epoch}", *numbers, place)

    def _repr_html_(self) -> str:
        rows = rows_by_split(self.metrics, {})
        names = dict.fromkeys(name for metrics in rows.values() for name in metrics)
        cells = [
            [name, *(number(x[name]) if name in x else "-" for x in rows.values())]
            for name in names
        ]
        head = f"{self.status}, step {self.step}, epoch {self.epoch}"
        head += f": {self.reason}" if self.reason else ""
        place = "" if self.path is None else html.preformatted(str(self.path))
        page = f"<div>{html.escape(head)}</div>{html.table(['', *rows], cells)}{place}"
        try:
            return page + self.history.svg()
        except DistaffError:  # nothing was recorded, or the files are gone
            return page

    def figure(self) -> Any:
        """Returns the learning curves as a matplotlib Figure; see `History.figure`.

        Raises:
            MissingExtraError: matplotlib is not installed.
            MetricError: the run has not completed an epoch.
        """
        return self.history.figure()

    def __getattr__(self, name: str) -> Never:
        raise unknown_name(self, name, RESULTS)
