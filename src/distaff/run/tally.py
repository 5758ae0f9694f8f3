"""The tally of an epoch: what its steps have given so far, kept by checkpoints within the epoch."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from distaff import metrics as metrics_lib
from distaff.execution.dispatch.packed_metrics import Columns, WindowEnd
from distaff.metrics import Metric
from distaff.run.events import Pause


@dataclasses.dataclass
class Tally:
    """What the steps of one epoch have given so far.

    Attributes:
        epoch: counted from 1; 0 before the first.
        steps: completed steps of the epoch.
        is_trained: whether these are all.
        total: their metrics, but for those of `rows`; on the host; None before the first window.
        rows: of steps whose window was not full at a pause, uint32 `[rows, width]`.
    """

    epoch: int = 0
    steps: int = 0
    is_trained: bool = False
    total: dict[str, Metric] | None = None
    rows: np.ndarray | None = None

    def add(self, window: WindowEnd) -> None:
        """Adds the metrics of a window."""
        total = self.total
        self.total = metrics_lib.merge(total, window.metrics) if total else window.metrics

    def pause(self, event: Pause) -> None:
        """Takes the rows that are left at a pause."""
        self.rows = event.rows

    def to_json(self) -> dict[str, Any]:
        """Returns it as strict JSON; numbers keep their bits."""
        total = None if self.total is None else [_packed(x) for x in jax.tree.leaves(self.total)]
        rows = None if self.rows is None else _packed(self.rows)
        place = {"epoch": self.epoch, "steps": self.steps, "is_trained": self.is_trained}
        return {**place, "total": total, "rows": rows}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], columns: Columns) -> Tally:
        """Returns what `to_json` was made of.

        Args:
            value: what it returned.
            columns: of the metrics of a step.

        Raises:
            ValueError, TypeError, KeyError: it is something else.
        """
        try:
            total, rows = _metrics(value, columns)
        except ValueError:  # the run may have had another policy for bad steps
            before = columns.unlike()
            total, rows = _metrics(value, before)
            rows = None if rows is None else columns.translated(rows, before)
            total = total and columns.completed(total)
        return cls(int(value["epoch"]), int(value["steps"]), bool(value["is_trained"]), total, rows)


def _metrics(
    value: Mapping[str, Any], columns: Columns
) -> tuple[dict[str, Metric] | None, np.ndarray | None]:
    total, rows = value["total"], value["rows"]
    rows = None if rows is None else _unpacked(rows)
    if rows is not None and (rows.dtype, rows.shape[1:]) != (np.uint32, (columns.width,)):
        raise ValueError(f"a step has {columns.width} numbers, not {rows.shape[1:]}")
    return None if total is None else columns.like([_unpacked(leaf) for leaf in total]), rows


def _packed(array: Any) -> dict[str, Any]:
    array = np.asarray(array)
    bits = base64.b64encode(array.tobytes()).decode()
    return {"dtype": array.dtype.str, "shape": list(array.shape), "bits": bits}


def _unpacked(value: Mapping[str, Any]) -> np.ndarray:
    dtype = np.dtype(value["dtype"])
    if dtype.hasobject:
        raise ValueError(f"an array of numbers is not of {dtype}")
    bits = base64.b64decode(value["bits"], validate=True)
    return np.frombuffer(bits, dtype).reshape(value["shape"])
