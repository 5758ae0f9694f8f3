"""One call of `log_metrics` as a row: step, epoch and time, then the metrics."""

from __future__ import annotations

from typing import Any

import numpy as np

from distaff.core.typing import Values
from distaff.errors import MetricError
from distaff.metrics import as_json

COLUMNS = ("step", "epoch", "time")


def as_row(metrics: Values, *, step: int, epoch: int, time: float) -> dict[str, Any]:
    """Returns a row as strict JSON, with NaN and infinity as text; see `metrics.as_json`.

    Raises:
        MetricError: a metric is not a number, or has a reserved name: `step`, `epoch`, `time`.
    """
    _check_names(metrics)
    return {"step": int(step), "epoch": int(epoch), "time": time, **as_json(metrics)}


def as_arrays(metrics: Values) -> dict[str, np.ndarray]:
    """Returns the metrics as float64 arrays; a scalar has shape `[]`.

    Raises:
        MetricError: see `as_row`.
    """
    _check_names(metrics)
    return {name: np.asarray(value, np.float64) for name, value in as_json(metrics).items()}


def _check_names(metrics: Values) -> None:
    for name in metrics.keys() & set(COLUMNS):
        raise MetricError(
            f"The names {', '.join(COLUMNS)} are reserved for columns of the log; a metric is "
            f"named {name!r}. Rename it, for example to 'train/{name}'."
        )
