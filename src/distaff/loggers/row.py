"""One call of `log_metrics` as a row of a table: the columns of the log's own, then the metrics."""

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
        MetricError: a metric is not a number, or has the name of a column of the log's own.
    """
    _check_names(metrics)
    return {"step": int(step), "epoch": int(epoch), "time": time, **as_json(metrics)}


def as_arrays(metrics: Values) -> dict[str, np.ndarray]:
    """Returns the metrics as float64 arrays, those that are one number with shape `[]`.

    Raises:
        MetricError: as `as_row` raises it.
    """
    _check_names(metrics)
    return {name: np.asarray(value, np.float64) for name, value in as_json(metrics).items()}


def _check_names(metrics: Values) -> None:
    for name in metrics.keys() & set(COLUMNS):
        raise MetricError(
            f"The names {', '.join(COLUMNS)} are the log's own columns; a metric is "
            f"named {name!r}. Rename it, for example to 'train/{name}'."
        )
