from __future__ import annotations

import json
import math
import os
from pathlib import Path

import jax.numpy as jnp
import pytest

from distaff.errors import MetricError, RunDirectoryError
from distaff.loggers import JsonlLogger, Logger, ManyLoggers, MemoryLogger, NullLogger, Record
from distaff.testing.loggers import LoggerContract


def read_jsonl(path: Path) -> list[Record]:
    """Reads strictly: a bare NaN or a torn line is an error."""
    if not path.exists():
        return []
    rows = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    return [
        Record(
            step=row.pop("step"),
            epoch=row.pop("epoch"),
            metrics={name: float(value) for name, value in row.items() if name != "time"},
        )
        for row in rows
    ]


class TestJsonlLogger(LoggerContract):
    def make_logger(self, directory: Path) -> Logger:
        return JsonlLogger(directory / "run" / "metrics.jsonl")

    def read_records(self, logger: Logger, directory: Path) -> list[Record]:
        return read_jsonl(directory / "run" / "metrics.jsonl")


class TestMemoryLogger(LoggerContract):
    def make_logger(self, directory: Path) -> Logger:
        return MemoryLogger()

    def read_records(self, logger: Logger, directory: Path) -> list[Record]:
        assert isinstance(logger, MemoryLogger)
        return logger.records


class TestManyLoggers(LoggerContract):
    def make_logger(self, directory: Path) -> Logger:
        return ManyLoggers(MemoryLogger(), JsonlLogger(directory / "metrics.jsonl"), MemoryLogger())

    def read_records(self, logger: Logger, directory: Path) -> list[Record]:
        assert isinstance(logger, ManyLoggers)
        first, _, last = logger.loggers
        assert isinstance(first, MemoryLogger)
        assert isinstance(last, MemoryLogger)
        assert len(first.records) == len(last.records)
        return read_jsonl(directory / "metrics.jsonl")


class TestNullLogger(LoggerContract):
    def make_logger(self, directory: Path) -> Logger:
        return NullLogger()


def test_jsonl_logger_writes_the_documented_line(tmp_path):
    logger = JsonlLogger(tmp_path / "metrics.jsonl", clock=lambda: 1767225600.0)
    logger.log_metrics({"train/loss": 0.5, "val/loss": math.nan}, step=60, epoch=3)
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 60, "epoch": 3, "time": 1767225600.0, "train/loss": 0.5, "val/loss": "nan"}\n'
    )
    logger.close("finished")


def test_jsonl_logger_touches_the_disk_with_the_first_line_only(tmp_path):
    logger = JsonlLogger(tmp_path / "run" / "metrics.jsonl")
    logger.log_config({"seed": 0})
    with pytest.raises(MetricError, match="'loss' is 'high'"):
        logger.log_metrics({"loss": "high"}, step=1, epoch=1)  # ty: ignore[invalid-argument-type]
    logger.close("failed")
    assert os.listdir(tmp_path) == []


def test_jsonl_logger_appends_after_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "epoch": 1, "time": 0.0}\n{"step": 2, "ep')
    logger = JsonlLogger(path)
    logger.log_metrics({}, step=2, epoch=1)
    logger.close("finished")
    logger.log_metrics({}, step=3, epoch=1)
    logger.close("finished")
    assert [record.step for record in read_jsonl(path)] == [1, 2, 3]


def test_jsonl_logger_asks_for_its_path_whenever_it_opens(tmp_path):
    paths = iter([tmp_path / "0001.jsonl", tmp_path / "0002.jsonl"])
    logger = JsonlLogger(lambda: next(paths))
    for step in (1, 2):
        logger.log_metrics({}, step=step, epoch=1)
        logger.close("finished")
    assert [record.step for record in read_jsonl(tmp_path / "0002.jsonl")] == [2]


def test_jsonl_logger_writes_one_number_per_run_of_a_population(tmp_path):
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    losses = jnp.array([0.5, jnp.inf])
    logger.log_metrics({"loss": losses}, step=1, epoch=1)  # ty: ignore[invalid-argument-type]
    logger.close("finished")
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == [0.5, "inf"]


@pytest.mark.parametrize("name", ["step", "epoch", "time"])
def test_jsonl_logger_refuses_a_metric_named_like_its_own_columns(tmp_path, name):
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    with pytest.raises(MetricError, match=f"a metric is named '{name}'"):
        logger.log_metrics({name: 1.0}, step=1, epoch=1)


def test_jsonl_logger_names_a_path_it_cannot_write(tmp_path):
    (tmp_path / "run").write_text("a file where a directory is needed")
    logger = JsonlLogger(tmp_path / "run" / "metrics.jsonl")
    with pytest.raises(RunDirectoryError, match=r"run/metrics\.jsonl' cannot be written"):
        logger.log_metrics({"loss": 1.0}, step=1, epoch=1)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_jsonl_logger_reports_a_full_disk_in_write_and_close():
    logger = JsonlLogger("/dev/full")
    with pytest.raises(RunDirectoryError, match=r"'/dev/full'.*No space left"):
        logger.log_metrics({"loss": 1.0}, step=1, epoch=1)
    with pytest.raises(RunDirectoryError, match="'/dev/full'"):
        logger.close("failed")
    logger.close("failed")


def test_memory_logger_keeps_config_and_first_status():
    logger = MemoryLogger()
    logger.log_config({"seed": 7})
    logger.close("stopped")
    logger.close("failed")
    assert (logger.config, logger.status) == ({"seed": 7}, "stopped")


def test_many_loggers_close_all_then_raise_the_first_failure():
    class Broken(NullLogger):
        def __init__(self, name: str):
            self.name = name

        def close(self, status: str) -> None:
            raise ValueError(self.name)

    last = MemoryLogger()
    with pytest.raises(ValueError, match="first"):
        ManyLoggers(Broken("first"), Broken("second"), last).close("finished")
    assert last.status == "finished"
