"""RunState: the progress of a run without its arrays, as one immutable value."""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

import distaff.metrics as metrics_lib
from distaff.core.config.cadence import Count, Unit
from distaff.execution.dispatch.packed_metrics import MetricLayout, WindowEnd
from distaff.execution.feed.skipped import SkippedBatches
from distaff.metrics import Metric, as_json, as_numbers
from distaff.run.ranking import retain
from distaff.run.result import Best


class EpochProgress(NamedTuple):
    """The progress within one epoch.

    Attributes:
        epoch: the epoch, counted from 1; 0 before the first.
        steps: completed steps of the epoch.
        is_trained: whether all steps of the epoch are completed.
        total: merged metrics of the complete windows, on the host; None before the first.
        rows: metrics of an incomplete window at a pause, uint32 `[rows, width]`.
        validated: completed steps of the epoch at the last validation within it; None before.
    """

    epoch: int = 0
    steps: int = 0
    is_trained: bool = False
    total: dict[str, Metric] | None = None
    rows: np.ndarray | None = None
    validated: int | None = None

    @property
    def is_validated(self) -> bool:
        """Whether the last step was validated, within the epoch."""
        return self.validated == self.steps and not self.is_trained

    def with_window(self, window: WindowEnd) -> EpochProgress:
        """Returns the progress after a window, whose metrics are merged into `total`."""
        total = self.total
        total = metrics_lib.merge(total, window.metrics) if total else window.metrics
        return self._replace(total=total)

    def to_json(self) -> dict[str, Any]:
        """Returns strict JSON, in which numbers are bit-exact."""
        total = None if self.total is None else [_pack(x) for x in jax.tree.leaves(self.total)]
        rows = None if self.rows is None else _pack(self.rows)
        place = {"epoch": self.epoch, "steps": self.steps, "is_trained": self.is_trained}
        validated = {} if self.validated is None else {"validated": self.validated}
        return {**place, "total": total, "rows": rows, **validated}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], layout: MetricLayout) -> EpochProgress:
        """Restores the value from the result of `to_json`.

        Args:
            value: the JSON.
            layout: layout of the metrics of a step.

        Raises:
            ValueError, TypeError, KeyError: the JSON is invalid, or the layout differs.
        """
        try:
            total, rows = _metrics(value, layout)
        except ValueError:  # saved under another policy for bad steps
            before = layout.with_guard_toggled()
            total, rows = _metrics(value, before)
            rows = None if rows is None else layout.convert(rows, before)
            total = total and layout.completed(total)
        place = int(value["epoch"]), int(value["steps"]), bool(value["is_trained"])
        validated = value.get("validated")
        return cls(*place, total, rows, None if validated is None else int(validated))


class RunState(NamedTuple):
    """The progress of a run.

    Attributes:
        step: completed optimizer updates.
        epoch: the epoch of the last update.
        first_step: completed updates when this call of `train_model` began to train.
        begun_at: step and epoch at the start of the run, before any resume.
        in_epoch: progress within the current epoch.
        best_models: best first, each with a checkpoint.
        last_metrics: metrics of the last completed epoch.
        skipped: batches that are skipped after a rollback.
        num_skipped: number of skipped bad steps.
        interrupted_by: why the run ended early; empty otherwise.
        counts: the examples, tokens and seconds so far, by unit; of the units that the run uses.
    """

    step: int
    epoch: int
    first_step: int
    begun_at: tuple[int, int]
    in_epoch: EpochProgress = EpochProgress()
    best_models: tuple[Best, ...] = ()
    last_metrics: Mapping[str, Any] = {}
    skipped: tuple[SkippedBatches, ...] = ()
    num_skipped: int = 0
    interrupted_by: str = ""
    counts: Mapping[Unit, Count] = {}

    @classmethod
    def beginning(cls, step: int, epoch: int) -> RunState:
        """Returns the state at the start of a run."""
        return cls(step, epoch, step, (step, epoch), EpochProgress(epoch + 1))

    @property
    def best(self) -> Best | None:
        """The best model so far; None before the first."""
        return self.best_models[0] if self.best_models else None

    @property
    def validation_name(self) -> str:
        """Name of the file of the metrics of a validation: by epoch, or by step within an epoch."""
        is_end = self.in_epoch.is_trained
        return f"val_epoch_{self.epoch:04d}" if is_end else f"val_step_{self.step:08d}"

    def to_json(self, *, ended: int | None) -> dict[str, Any]:
        """Returns the part that a checkpoint stores, as strict JSON.

        Args:
            ended: the epoch just completed, whose metrics are in the log; None within an epoch.
        """
        in_epoch = self.in_epoch if ended is None else EpochProgress(ended)
        return {
            "best_steps": [model.step for model in self.best_models],
            "best_models": [best_json(model) for model in self.best_models],
            "tally": in_epoch.to_json(),
            "last_metrics": as_json(self.last_metrics),
            "begun_at": list(self.begun_at),
            "left_out": [list(stretch) for stretch in self.skipped],
            "num_skipped": self.num_skipped,
            **self._counts_json(),
        }

    def _counts_json(self) -> dict[str, Any]:
        counts = {unit: [*count] for unit, count in self.counts.items()}
        return {"counts": counts} if counts else {}

    def from_json(
        self,
        value: Mapping[str, Any],
        layout: MetricLayout,
        steps: Collection[int],
        keep_best: int,
    ) -> RunState:
        """Returns this state with the progress that a checkpoint has stored.

        Args:
            value: the facts of the checkpoint.
            layout: layout of the metrics of a step.
            steps: the steps of all checkpoints; best models without one are dropped.
            keep_best: how many of the best models to retain.

        Raises:
            ValueError, TypeError, KeyError: the facts are invalid.
        """
        is_end = ends_epoch(value)
        done = {"total": None, "rows": None} if is_end else {}
        in_epoch = EpochProgress.from_json({**value["tally"], **done}, layout)
        first_step, first_epoch = value["begun_at"]
        return self._replace(
            in_epoch=EpochProgress(in_epoch.epoch + 1) if is_end else in_epoch,
            num_skipped=int(value.get("num_skipped", 0)),
            skipped=tuple(SkippedBatches(*map(int, each)) for each in value.get("left_out", ())),
            begun_at=(int(first_step), int(first_epoch)),
            counts={unit: Count(*count) for unit, count in value.get("counts", {}).items()},
        ).with_results(value, steps, keep_best)

    def with_results(
        self, value: Mapping[str, Any], steps: Collection[int], keep_best: int
    ) -> RunState:
        """Returns this state with the best models and last metrics of a checkpoint."""
        saved = [model for model in _best_from_json(value) if model.step in steps]
        last_metrics = dict(as_numbers(value["last_metrics"]))
        return self._replace(best_models=retain(saved, keep_best), last_metrics=last_metrics)


def ends_epoch(facts: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is from the end of an epoch, which has been validated if it was due."""
    return facts["is_best"] is not None and "validated" not in facts["tally"]


def _metrics(
    value: Mapping[str, Any], layout: MetricLayout
) -> tuple[dict[str, Metric] | None, np.ndarray | None]:
    total, rows = value["total"], value["rows"]
    rows = None if rows is None else _unpack(rows)
    if rows is not None and (rows.dtype, rows.shape[1:]) != (np.uint32, (layout.width,)):
        raise ValueError(f"a row has shape {rows.shape[1:]}, not ({layout.width},)")
    return None if total is None else layout.like([_unpack(leaf) for leaf in total]), rows


def _pack(array: Any) -> dict[str, Any]:
    array = np.asarray(array)
    bits = base64.b64encode(array.tobytes()).decode()
    return {"dtype": array.dtype.str, "shape": list(array.shape), "bits": bits}


def _unpack(value: Mapping[str, Any]) -> np.ndarray:
    dtype = np.dtype(value["dtype"])
    if dtype.hasobject:
        raise ValueError(f"an array must be numeric; got the dtype {dtype}")
    bits = base64.b64decode(value["bits"], validate=True)
    return np.frombuffer(bits, dtype).reshape(value["shape"])


def best_json(model: Best) -> dict[str, Any]:
    """Returns a best model as strict JSON."""
    return {**model._asdict(), "metrics": as_json(model.metrics)}


def _best_from_json(info: Mapping[str, Any]) -> list[Best]:
    models = info.get("best_models")
    if models is None:  # an old checkpoint, with one best model only
        models = [] if info["best"] is None else [info["best"]]
    return [
        Best(int(model["step"]), int(model["epoch"]), dict(as_numbers(model["metrics"])))
        for model in models
    ]
