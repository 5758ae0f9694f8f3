"""One member of a population: what it has recorded, and whether it still trains."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from distaff.callbacks import StepInfo
from distaff.callbacks.callbacks import Callbacks
from distaff.core.views.brief import brief
from distaff.execution.dispatch.packed_metrics import BadStep, MetricWindows, WindowEnd
from distaff.loggers.history import ColumnLogger, History
from distaff.metrics import Metric, compute
from distaff.metrics.accumulators import Named
from distaff.metrics.monitor import Monitor
from distaff.run.result import Best
from distaff.run.run_state import EpochProgress
from distaff.step.guard import FLAGS, RecoveryOptions, shown
from distaff.step.logged_rates import without_rates
from distaff.step.state import TrainState


class TrainedMember(NamedTuple):
    """A member of a population after its training.

    Attributes:
        seed: its seed.
        settings: the values by which it differs from the trainer, by path; empty if only the seed
            differs.
        status: `"finished"`; `"stopped"` by early stopping; or `"diverged"`.
        reason: why it was stopped, or where it diverged; empty otherwise.
        step: completed optimizer updates.
        epoch: completed epochs.
        metrics: metrics of the last training epoch (`train/`), the best validation (`val/`) and the
            test (`test/`).
        best: the best model; None without validation.
        state: its best state; the last one without a validation.
        history: the metrics of all epochs as arrays by name, such as `history["val/loss"]`.
    """

    seed: int
    settings: Mapping[str, Any]
    status: str
    reason: str
    step: int
    epoch: int
    metrics: Mapping[str, Any]
    best: Best | None
    state: TrainState
    history: History

    def __repr__(self) -> str:
        settings = [f"{name}={value!r}" for name, value in self.settings.items()]
        return brief(self, f"seed {self.seed}", *settings, self.status, self.reason)


class RunningMember:
    """Records the metrics of a member while it trains.

    Args:
        seed: its seed.
        monitor: ranks its models.
        callbacks: copied; its early stopping.
        options: say which of its flags are shown.

    Attributes:
        status: `"running"`, until it ends.
        best_state: the state of its best model.
        windows: reads the metrics of the current epoch; set by the loop.
    """

    windows: MetricWindows

    def __init__(
        self, seed: int, monitor: Monitor, callbacks: Callbacks, options: RecoveryOptions
    ) -> None:
        self.seed, self.monitor, self._options = seed, monitor, options
        self.callbacks = Callbacks(copy.deepcopy(callbacks.callbacks))
        self.callbacks.judge_by(monitor)
        self.status, self.reason = "running", ""
        self.step = self.epoch = 0
        self.last_metrics: dict[str, Any] = {}
        self.best: Best | None = None
        self.state: TrainState | None = None
        self._columns, self._progress = ColumnLogger(), EpochProgress(1)

    @property
    def is_running(self) -> bool:
        """Whether it still trains."""
        return self.status == "running"

    def begin_epoch(self, epoch: int) -> None:
        """Begins an epoch."""
        self.epoch, self._progress = epoch, EpochProgress(epoch)

    def window(self, event: WindowEnd) -> None:
        """Records the metrics of a window; a bad step ends the member."""
        if not self.is_running:
            return
        if event.bad is not None:
            self.diverge(event.bad)
            return
        self._progress = self._progress.with_window(event)
        self._log(compute(self._shown(event.metrics), "step/"), event.step)

    def diverge(self, bad: BadStep) -> None:
        """Ends the member at a bad step."""
        what = "is a spike" if bad.is_spike else "became NaN or infinite"
        self.end("diverged", f"the loss {what} at step {bad.step} (epoch {self.epoch})", bad.step)

    def end(self, status: str, reason: str, step: int) -> None:
        """Ends the member."""
        self.status, self.reason, self.step = status, reason, step

    def end_steps(self, step: int) -> dict[str, Any]:
        """Ends the steps of an epoch; returns their metrics as `train/...`."""
        self.step = step
        return compute(self._shown(without_rates(self._progress.total or {})), "train/")

    def record(self, metrics: Mapping[str, Any]) -> None:
        """Records the metrics of an epoch."""
        self.last_metrics = dict(metrics)
        self._log(metrics, self.step)

    def notify(self, event: str, metrics: Mapping[str, Any], *, is_best: bool = False) -> None:
        """Calls the member's early stopping."""
        if self.callbacks.callbacks:
            info = StepInfo(self.step, self.epoch, None, metrics, is_best)
            self.callbacks.emit(event, info)

    def finished(
        self, last: TrainState, tested: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> TrainedMember:
        """Returns the member after its training.

        Args:
            last: its last state.
            tested: the metrics of its test.
            settings: the values by which it differs from the trainer.
        """
        self._log(tested, self.step)
        best = {} if self.best is None else self.best.metrics
        of_best = {name: x for name, x in best.items() if not name.startswith("train/")}
        return TrainedMember(
            seed=self.seed,
            settings=dict(settings),
            status="finished" if self.is_running else self.status,
            reason=self.reason,
            step=self.step,
            epoch=self.epoch,
            metrics=Named({**self.last_metrics, **of_best, **tested}),
            best=self.best,
            state=last if self.state is None else self.state,
            history=History(self._columns, best_epoch=self.best and self.best.epoch),
        )

    def _shown(self, metrics: dict[str, Metric]) -> dict[str, Metric]:
        return shown(metrics, self._options) if FLAGS in metrics else metrics

    def _log(self, metrics: Mapping[str, Any], step: int) -> None:
        scalars = {name: x for name, x in metrics.items() if np.ndim(x) == 0}
        self._columns.log_metrics(scalars, step=step, epoch=self.epoch)
