"""Early stopping on a validation metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distaff.callbacks.callback import Callback, StepInfo, StopTraining
from distaff.errors import ConfigError
from distaff.metrics import as_json
from distaff.monitor import Monitor


class EarlyStopping(Callback):
    """Stops when a metric has not improved for `patience` validations.

    Args:
        monitor: the metric to watch, such as `Monitor("val/loss")`.
        patience: number of validations without improvement that are borne.
        min_delta: by how much a value must be better to count as an improvement.

    Raises:
        ConfigError: an argument is out of its range.
    """

    def __init__(self, monitor: Monitor, *, patience: int = 5, min_delta: float = 0.0) -> None:
        if patience < 1 or not min_delta >= 0:
            raise ConfigError(
                f"EarlyStopping needs patience >= 1 and min_delta >= 0; "
                f"got patience={patience}, min_delta={min_delta}."
            )
        self.monitor, self.patience, self.min_delta = monitor, patience, min_delta
        self.best: float | None = None
        self.waited = 0

    def on_training_start(self, info: StepInfo) -> None:
        """Forgets an earlier run."""
        self.best, self.waited = None, 0

    def on_validation_end(self, info: StepInfo) -> None:
        """Compares the monitored metric with the best so far.

        Raises:
            MetricError: the validation has no such metric.
            StopTraining: patience is used up.
        """
        value = self.monitor.value(info.metrics)
        if self.monitor.better(value, self.best, self.min_delta):
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            raise StopTraining(
                f"{self.monitor.name} has not improved on {self.best:.6g} "
                f"for {self.waited} validations"
            )

    def get_state(self) -> dict[str, Any]:
        """Returns the best value and the number of validations since."""
        # JSON has no NaN, which is the best value after a first validation that failed.
        best = None if self.best is None else as_json({"best": self.best})["best"]
        return {"best": best, "waited": self.waited}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Takes back what `get_state` returned."""
        self.best = None if state["best"] is None else float(state["best"])
        self.waited = state["waited"]
