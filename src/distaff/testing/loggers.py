"""The tests that every logger passes: subclass `LoggerContract` in a test file of your own."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from distaff.loggers import Logger, Record


class LoggerContract:
    """What a run relies on in a logger.

    Subclass it under a name that starts with `Test`, and define `make_logger`; define
    `read_records` too where the logger's target can be read back.
    """

    def make_logger(self, directory: Path) -> Logger:
        """Returns a new logger that may write below `directory`."""
        raise NotImplementedError

    def read_records(self, logger: Logger, directory: Path) -> list[Record] | None:
        """Returns what the logger has recorded, in order, or `None` where it cannot be read."""
        return None

    def test_log_metrics_keeps_every_record_in_order(self, tmp_path: Path) -> None:
        """Steps, epochs and values come back exactly, also where a name appears only sometimes."""
        logger = self.make_logger(tmp_path)
        expected = [
            Record(step=20, epoch=1, metrics={"train/loss": 0.1 + 0.2, "val/loss": 0.5}),
            Record(step=40, epoch=2, metrics={"train/loss": 1e-12}),
            Record(step=40, epoch=2, metrics={"test/loss": -3.0}),
        ]
        for record in expected:
            logger.log_metrics(record.metrics, step=record.step, epoch=record.epoch)
        records = self.read_records(logger, tmp_path)
        logger.close("finished")
        assert records is None or records == expected

    def test_log_metrics_keeps_nan_and_infinity(self, tmp_path: Path) -> None:
        """A loss that diverged is recorded as it is, not hidden."""
        logger = self.make_logger(tmp_path)
        logger.log_metrics({"a": math.nan, "b": math.inf, "c": -math.inf}, step=1, epoch=1)
        records = self.read_records(logger, tmp_path)
        logger.close("failed")
        if records is not None:
            [record] = records
            assert math.isnan(record.metrics["a"])
            assert (record.metrics["b"], record.metrics["c"]) == (math.inf, -math.inf)

    def test_log_metrics_takes_numpy_scalars(self, tmp_path: Path) -> None:
        """What `jax.device_get` returns may be logged without a conversion."""
        logger = self.make_logger(tmp_path)
        scalars = {"loss": np.float32(0.1), "count": np.int32(3), "zero_rank": np.array(0.5)}
        logger.log_metrics(scalars, step=1, epoch=1)  # ty: ignore[invalid-argument-type]
        records = self.read_records(logger, tmp_path)
        logger.close("finished")
        expected = {"loss": float(np.float32(0.1)), "count": 3, "zero_rank": 0.5}
        assert records is None or records[0].metrics == expected

    def test_log_metrics_does_not_keep_the_callers_mapping(self, tmp_path: Path) -> None:
        """The caller may reuse its dict for the next record."""
        logger = self.make_logger(tmp_path)
        metrics = {"loss": 1.0}
        logger.log_metrics(metrics, step=1, epoch=1)
        metrics["loss"] = 2.0
        records = self.read_records(logger, tmp_path)
        logger.close("finished")
        assert records is None or records[0].metrics == {"loss": 1.0}

    def test_log_config_takes_nested_json_and_adds_no_record(self, tmp_path: Path) -> None:
        """A configuration is not a row of metrics."""
        logger = self.make_logger(tmp_path)
        logger.log_config({"seed": 0, "optimizer": {"name": "adamw", "betas": [0.9, 0.999]}})
        logger.log_metrics({"loss": 1.0}, step=1, epoch=1)
        records = self.read_records(logger, tmp_path)
        logger.close("finished")
        assert records is None or len(records) == 1

    def test_close_twice_keeps_the_records(self, tmp_path: Path) -> None:
        """The second `close`, as an error handler may call it, does no harm."""
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
