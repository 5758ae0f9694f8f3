"""Contract tests for loggers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from distaff.core.typing import Values
from distaff.loggers import Logger, Record


class LoggerContract(ABC):
    """Tests for a logger.

    Subclass it under a name that starts with `Test`, and define `make_logger`. If the log can be
    read back, define `read_records` too, which is called after the logger is closed.

    Attributes:
        number: the type in which the backend stores metrics, such as `np.float32`.
    """

    number: type[np.floating] = np.float64

    @abstractmethod
    def make_logger(self, directory: Path) -> Logger:
        """Returns a new logger that may write below `directory`."""

    def read_records(self, logger: Logger, directory: Path) -> list[Record] | None:
        """Returns the records of the logger, in order; None if they cannot be read."""
        return None

    def _close_and_read(self, logger: Logger, directory: Path) -> list[Record] | None:
        logger.close("finished")
        return self.read_records(logger, directory)

    def test_logger_touches_nothing_before_its_first_call(self, tmp_path: Path) -> None:
        """A run that fails before it starts leaves no files."""
        logger = self.make_logger(tmp_path)
        logger.close("failed")
        assert list(tmp_path.iterdir()) == []

    def test_log_metrics_keeps_every_record_in_order(self, tmp_path: Path) -> None:
        """Steps, epochs and values are exact, even if a metric is not in every record."""
        logger = self.make_logger(tmp_path)
        expected = [
            Record(step=20, epoch=1, metrics={"train/loss": 0.1 + 0.2, "val/loss": 0.5}),
            Record(step=40, epoch=2, metrics={"train/loss": 1e-12}),
            Record(step=40, epoch=2, metrics={"test/loss": -3.0}),
        ]
        for record in expected:
            logger.log_metrics(record.metrics, step=record.step, epoch=record.epoch)
        records = self._close_and_read(logger, tmp_path)
        assert records is None or records == [
            replace(record, metrics=self._kept(record.metrics)) for record in expected
        ]

    def test_log_metrics_keeps_nan_and_infinity(self, tmp_path: Path) -> None:
        """NaN and infinite metrics are recorded."""
        logger = self.make_logger(tmp_path)
        logger.log_metrics({"a": math.nan, "b": math.inf, "c": -math.inf}, step=1, epoch=1)
        logger.close("failed")
        records = self.read_records(logger, tmp_path)
        if records is not None:
            [record] = records
            assert math.isnan(record.metrics["a"])
            assert (record.metrics["b"], record.metrics["c"]) == (math.inf, -math.inf)

    def test_log_metrics_takes_numpy_scalars(self, tmp_path: Path) -> None:
        """The results of `jax.device_get` can be logged without conversion."""
        logger = self.make_logger(tmp_path)
        scalars = {"loss": np.float32(0.1), "count": np.int32(3), "zero_rank": np.array(0.5)}
        logger.log_metrics(scalars, step=1, epoch=1)
        records = self._close_and_read(logger, tmp_path)
        expected = self._kept(scalars)
        assert records is None or records[0].metrics == expected

    def test_log_metrics_does_not_keep_the_callers_mapping(self, tmp_path: Path) -> None:
        """The caller may reuse its dict for the next record."""
        logger = self.make_logger(tmp_path)
        metrics = {"loss": 1.0}
        logger.log_metrics(metrics, step=1, epoch=1)
        metrics["loss"] = 2.0
        records = self._close_and_read(logger, tmp_path)
        assert records is None or records[0].metrics == {"loss": 1.0}

    def test_log_config_takes_nested_json_and_adds_no_record(self, tmp_path: Path) -> None:
        """A configuration is not a record of metrics."""
        logger = self.make_logger(tmp_path)
        logger.log_config({"seed": 0, "optimizer": {"name": "adamw", "betas": [0.9, 0.999]}})
        logger.log_metrics({"loss": 1.0}, step=1, epoch=1)
        records = self._close_and_read(logger, tmp_path)
        assert records is None or len(records) == 1

    def test_log_metrics_takes_arrays(self, tmp_path: Path) -> None:
        """Arrays, such as a confusion matrix, do not affect the other metrics."""
        logger = self.make_logger(tmp_path)
        logger.log_metrics({"matrix": np.eye(2), "loss": 0.5}, step=1, epoch=1)
        logger.log_metrics({"all_bad": np.array([math.nan, math.inf])}, step=2, epoch=1)
        records = self._close_and_read(logger, tmp_path)
        assert records is None or records[0].metrics["loss"] == 0.5

    def test_log_metrics_may_go_back_to_an_earlier_step(self, tmp_path: Path) -> None:
        """The test of the best model is logged at the best model's step."""
        logger = self.make_logger(tmp_path)
        for step in (40, 20):
            logger.log_metrics({"loss": 1.0}, step=step, epoch=step // 20)
        records = self._close_and_read(logger, tmp_path)
        assert records is None or [record.step for record in records] == [40, 20]

    def test_loggers_made_at_once_keep_apart(self, tmp_path: Path) -> None:
        """Several loggers in one process, created within a second, do not mix their records."""
        first, second = (self.make_logger(tmp_path / name) for name in ("first", "second"))
        for step in (1, 2):
            first.log_metrics({"loss": 1.0}, step=step, epoch=1)
            second.log_metrics({"loss": 2.0}, step=step, epoch=1)
        first.close("finished")
        second.close("failed")
        for logger, name, loss in ((first, "first", 1.0), (second, "second", 2.0)):
            records = self.read_records(logger, tmp_path / name)
            assert records is None or [each.metrics["loss"] for each in records] == [loss, loss]

    def test_close_twice_keeps_the_records(self, tmp_path: Path) -> None:
        """A second `close`, for example from an error handler, does nothing."""
        logger = self.make_logger(tmp_path)
        logger.log_metrics({"loss": 1.0}, step=1, epoch=1)
        logger.close("interrupted")
        logger.close("failed")
        records = self.read_records(logger, tmp_path)
        assert records is None or len(records) == 1

    def test_close_before_any_metrics_is_allowed(self, tmp_path: Path) -> None:
        """A run may fail before its first epoch ends."""
        logger = self.make_logger(tmp_path)
        logger.close("failed")
        assert not self.read_records(logger, tmp_path)

    def test_resume_drops_what_came_after_a_position(self, tmp_path: Path) -> None:
        """Records of the checkpoint's step are kept before the position and dropped after it."""
        logger: Any = self.make_logger(tmp_path)
        if not (hasattr(logger, "resume") and hasattr(logger, "position")):
            return
        logger.log_metrics({"loss": 3.0}, step=20, epoch=1)
        start = logger.position()
        logger.close("interrupted")
        assert logger.position() == start
        logger.log_metrics({"late": 2.0}, step=20, epoch=1)
        logger.log_metrics({"loss": 9.0}, step=40, epoch=2)
        logger.resume(20, start)
        logger.log_metrics({"loss": 1.0}, step=20, epoch=1)
        assert logger.position() != start
        records = self._close_and_read(logger, tmp_path)
        assert records is None or [each.metrics for each in records] == [
            {"loss": 3.0},
            {"loss": 1.0},
        ]

    def test_resume_without_a_position_drops_later_steps(self, tmp_path: Path) -> None:
        """Steps need not be in order; records of the step itself are kept."""
        logger: Any = self.make_logger(tmp_path)
        if not (hasattr(logger, "resume") and hasattr(logger, "position")):
            return
        logger.resume(0)
        assert list(tmp_path.iterdir()) == []
        for step in (20, 60, 40, 10):
            logger.log_metrics({"loss": 1.0, f"late/{step}": 1.0}, step=step, epoch=1)
        logger.resume(40)
        logger.resume(40)
        logger.log_metrics({"loss": 2.0}, step=60, epoch=1)
        records = self._close_and_read(logger, tmp_path)
        assert records is None or [each.step for each in records] == [20, 40, 10, 60]

    def _kept(self, metrics: Values) -> dict[str, float]:
        return {name: float(self.number(value)) for name, value in metrics.items()}
