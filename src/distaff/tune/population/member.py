"""One member of a population: what it has recorded, and whether it still trains."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from distaff.callbacks import StepInfo
from distaff.callbacks.callbacks import Callbacks
from distaff.core.views.brief import brief
from distaff.execution.dispatch.packed_metrics import BadStep, MetricWindows, WindowEnd
from distaff.loggers import JsonlLogger
from distaff.loggers.history import ColumnLogger, History, read_rows
from distaff.metrics import Metric, as_json, as_numbers, compute
from distaff.metrics.accumulators import Named
from distaff.metrics.monitor import Monitor
from distaff.run.result import Best
from distaff.run.run_state import EpochProgress, best_json
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
        path: its run directory; None if nothing is written.
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
    path: Path | None = None

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
        has_state: whether a state of it is kept: that of its best model, or its last one.
        windows: reads the metrics of the current epoch; set by the loop.
        log: writes its metrics to a file; None if nothing is written.
        values: values by path that change while it trains; logged with each epoch.
    """

    windows: MetricWindows
    log: JsonlLogger | None = None
    values: Mapping[str, float] = MappingProxyType({})

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
        self.has_state = False
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

    def revive(self) -> None:
        """Lets the member train on, from another state."""
        self.status, self.reason = "running", ""

    def end_steps(self, step: int) -> dict[str, Any]:
        """Ends the steps of an epoch; returns their metrics as `train/...`."""
        self.step = step
        return compute(self._shown(without_rates(self._progress.total or {})), "train/")

    def record(self, metrics: Mapping[str, Any]) -> None:
        """Records the metrics of an epoch."""
        self.last_metrics = dict(metrics)
        self._log({**metrics, **self.values}, self.step)

    def is_best(
        self,
        metrics: Mapping[str, Any],
        validation: Mapping[str, Any],
        is_better: Callable[..., bool],
    ) -> bool:
        """Notes a validation; returns whether it is the best so far.

        Args:
            metrics: the metrics of the training epoch.
            validation: the metrics of the validation.
            is_better: see `TrainerModule.is_new_model_better`.
        """
        if validation:
            self.notify("on_validation_end", validation)
        judged = self.monitor.judged(metrics, validation)
        old = None if self.best is None else self.best.metrics
        if not judged or not is_better(judged, old):
            return False
        self.best = Best(self.step, self.epoch, dict(judged))
        return True

    def notify(self, event: str, metrics: Mapping[str, Any], *, is_best: bool = False) -> None:
        """Calls the member's early stopping."""
        if self.callbacks.callbacks:
            info = StepInfo(self.step, self.epoch, None, metrics, is_best)
            self.callbacks.emit(event, info)

    def to_json(self) -> dict[str, Any]:
        """Returns what a resume needs at the end of an epoch, as strict JSON."""
        callbacks = self.callbacks
        return {
            "status": self.status,
            "reason": self.reason,
            "step": self.step,
            "epoch": self.epoch,
            "last_metrics": as_json(self.last_metrics),
            "best": None if self.best is None else best_json(self.best),
            "has_state": self.has_state,
            "stop": [callbacks.stop_reason, callbacks.stop_status],
            "callbacks": [each.get_state() for each in callbacks.callbacks],
            "log": None if self.log is None else self.log.position(),
        }

    def restore(self, value: Mapping[str, Any]) -> None:
        """Restores a member from the result of `to_json`."""
        self.status, self.reason = str(value["status"]), str(value["reason"])
        self.step, self.epoch = int(value["step"]), int(value["epoch"])
        self.has_state = bool(value["has_state"])
        self.last_metrics = dict(as_numbers(value["last_metrics"]))
        best, callbacks = value["best"], self.callbacks
        if best is not None:
            metrics = dict(as_numbers(best["metrics"]))
            self.best = Best(int(best["step"]), int(best["epoch"]), metrics)
        callbacks.stop_reason, callbacks.stop_status = value["stop"]
        for callback, saved in zip(callbacks.callbacks, value["callbacks"], strict=True):
            callback.set_state(saved)

    def read_log(self, directory: Path) -> None:
        """Reads the metrics that an earlier process has written, except test metrics."""
        for row in read_rows(directory):
            self._columns.add({n: x for n, x in row.items() if not n.startswith("test")})

    def finished(
        self, state: TrainState, tested: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> TrainedMember:
        """Returns the member after its training.

        Args:
            state: the state that was kept of it.
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
            state=state,
            history=History(self._columns, best_epoch=self.best and self.best.epoch),
        )

    def _shown(self, metrics: dict[str, Metric]) -> dict[str, Metric]:
        return shown(metrics, self._options) if FLAGS in metrics else metrics

    def _log(self, metrics: Mapping[str, Any], step: int) -> None:
        scalars = {name: x for name, x in metrics.items() if np.ndim(x) == 0}
        self._columns.log_metrics(scalars, step=step, epoch=self.epoch)
        if self.log is not None:
            self.log.log_metrics(scalars, step=step, epoch=self.epoch)
            self.log.close(self.status)  # a process may not open a file for each of many members
