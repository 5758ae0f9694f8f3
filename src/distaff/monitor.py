"""Monitor: which metric makes a model better, and in which direction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from distaff.errors import ConfigError, MetricError, nearest


@dataclass(frozen=True)
class Monitor:
    """The metric a model is judged by.

    Args:
        name: as logged, with its prefix: `"val/loss"`.
        mode: whether smaller (`"min"`) or larger (`"max"`) is better.

    Raises:
        ConfigError: `mode` is neither.
    """

    name: str
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise ConfigError(f"Monitor({self.name!r}): mode is 'min' or 'max'; got {self.mode!r}.")

    def check(self, known: Iterable[str]) -> None:
        """Checks that the metric exists.

        Raises:
            MetricError: it does not; the known names are listed.
        """
        names = list(known)
        if self.name not in names:
            raise MetricError(
                f"The monitored metric {self.name!r} is not among the validation metrics. "
                f"{nearest(self.name, names)} "
                "Return it from the loss function, or set monitor = Monitor(...) to a known one."
            )

    def value(self, metrics: Mapping[str, Any]) -> float:
        """Returns the monitored value.

        Raises:
            MetricError: it is missing, or is not one number.
        """
        self.check(metrics)
        value = metrics[self.name]
        if np.ndim(value) != 0:
            raise MetricError(
                f"A monitored metric is one number; {self.name!r} has shape {np.shape(value)}."
            )
        return float(value)

    def better(self, new: float, old: float | None, min_delta: float = 0.0) -> bool:
        """Tells whether `new` is better than `old` by more than `min_delta`.

        Anything is better than nothing; a number is better than NaN; a tie keeps the older.
        """
        if old is None:
            return True
        if math.isnan(new):
            return False
        if math.isnan(old):
            return True
        return (old - new if self.mode == "min" else new - old) > min_delta
