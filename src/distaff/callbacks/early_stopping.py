"""Early stopping on a metric of validation or training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from distaff.callbacks.callback import Callback, StepInfo, StopTraining
from distaff.core.config.checks import as_float, whole
from distaff.core.config.other_frameworks import STOPPING, spelled
from distaff.core.warnings import warn
from distaff.errors import ConfigError
from distaff.metrics import as_json
from distaff.metrics.monitor import Monitor, as_monitor


class EarlyStopping(Callback):
    """Stops training when a metric has not improved for `patience` checks in a row.

    A validation metric is checked after each validation, a training metric (`train/...`) after
    each epoch.

    Args:
        monitor: the metric, such as `"val/loss"` or a `Monitor`; None for the trainer's.
        patience: number of checks without improvement to tolerate before stopping.
        min_delta: minimum change that counts as an improvement.
        min_epochs: minimum number of epochs before stopping; 0 for no minimum.
        stopping_threshold: stop when the metric is better than this; None to disable.
        divergence_threshold: stop when the metric is worse than this; None to disable.
        check_finite: stop when the metric is NaN or infinite; False counts that as no improvement.

    Raises:
        ConfigError: an argument is out of its range.

    >>> stopping = EarlyStopping("val/loss", patience=10)  # pass callbacks=[stopping] to a trainer
    """

    @spelled(STOPPING)
    def __init__(
        self,
        monitor: Monitor | str | None = None,
        *,
        patience: int = 5,
        min_delta: float = 0.0,
        min_epochs: int = 0,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_finite: bool = True,
    ) -> None:
        whole("patience", patience)
        whole("min_epochs", min_epochs, least=0)
        if not 0 <= as_float(min_delta) < math.inf:
            raise ConfigError(
                f"EarlyStopping needs a finite min_delta >= 0; got min_delta={min_delta}."
            )
        thresholds = (stopping_threshold, divergence_threshold)
        if any(each is not None and math.isnan(as_float(each)) for each in thresholds):
            raise ConfigError(
                "A threshold of EarlyStopping is a number or None; got stopping_threshold="
                f"{stopping_threshold!r}, divergence_threshold={divergence_threshold!r}."
            )
        self.own = None if monitor is None else as_monitor(monitor)
        self.monitor = self.own
        self.patience, self.min_delta, self.min_epochs = patience, min_delta, min_epochs
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.check_finite = check_finite
        self.best: float | None = None
        self.waited = self.looked = self.begun = 0

    def judge_by(self, monitor: Monitor) -> None:
        """Uses the trainer's monitor unless it has its own; called before each run.

        Raises:
            ConfigError: it monitors the trainer's metric in the other direction.
        """
        if self.own is not None and self.own.name == monitor.name and self.own != monitor:
            raise ConfigError(
                f"EarlyStopping monitors {self.own.name!r} with mode {self.own.mode!r}, and the "
                f"trainer with mode {monitor.mode!r}. Write EarlyStopping() to use the trainer's "
                "monitor, or correct one of the two."
            )
        self.monitor = self.own or monitor

    def on_training_start(self, info: StepInfo) -> None:
        """Resets the state of an earlier run."""
        self.best, self.waited, self.looked, self.begun = None, 0, 0, info.epoch

    def on_epoch_end(self, info: StepInfo) -> None:
        """Checks a training metric; raises `StopTraining` if a condition to stop is met."""
        if self._watched.is_of_training:
            self._check(info)

    def on_validation_end(self, info: StepInfo) -> None:
        """Checks a validation metric; raises `StopTraining` if a condition to stop is met."""
        if not self._watched.is_of_training:
            self._check(info)

    def on_training_end(self, info: StepInfo) -> None:
        """Warns if a finished run never reported the metric."""
        if info.status == "finished" and not self.looked:
            warn(
                f"EarlyStopping never saw {self._watched.name!r}, and did nothing in this run. "
                "Validate at least once, or monitor a training metric such as 'train/loss'.",
                stacklevel=2,
            )

    def get_state(self) -> dict[str, Any]:
        """Returns the best value, the numbers of checks since then and in total, and the start."""
        # JSON has no NaN, which is the best value if the first one is NaN.
        best = None if self.best is None else as_json({"best": self.best})["best"]
        facts = {"waited": self.waited, "looked": self.looked, "begun": self.begun}
        return {"best": best, **facts}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores the state that `get_state` returned."""
        self.best = None if state["best"] is None else float(state["best"])
        self.waited, self.looked = state["waited"], state.get("looked", 1)
        self.begun = state.get("begun", 0)

    @property
    def _watched(self) -> Monitor:
        if self.monitor is None:
            raise ConfigError(
                "EarlyStopping has no monitor outside of a trainer. Pass one: "
                "EarlyStopping('val/loss')."
            )
        return self.monitor

    def _check(self, info: StepInfo) -> None:
        monitor = self._watched
        value = monitor.value(info.metrics)
        self.looked += 1
        if monitor.better(value, self.best, self.min_delta):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        reason = self._reason(value)
        if reason and info.epoch - self.begun >= self.min_epochs:
            raise StopTraining(reason)

    def _reason(self, value: float) -> str:
        """Returns the reason to stop; empty to continue."""
        monitor, best = self._watched, self.best
        if self.check_finite and not math.isfinite(value):
            return f"{monitor.name} is {value:g}; EarlyStopping(check_finite=False) tolerates it"
        if self._is_beyond(value, self.stopping_threshold, better=True):
            return f"{monitor.name} of {value:.6g} is better than {self.stopping_threshold:g}"
        if self._is_beyond(value, self.divergence_threshold, better=False):
            return f"{monitor.name} of {value:.6g} is worse than {self.divergence_threshold:g}"
        if self.waited < self.patience:
            return ""
        checks = "epochs" if monitor.is_of_training else "validations"
        return f"{monitor.name} has not improved on {best:.6g} for {self.waited} {checks}"

    def _is_beyond(self, value: float, threshold: float | None, *, better: bool) -> bool:
        if threshold is None or math.isnan(value):
            return False
        first, second = (value, threshold) if better else (threshold, value)
        return self._watched.better(first, second)
