"""Loggers that fail: a gap there, and the run goes its way; or an error, if that is asked for."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest

from distaff import data, tasks, zoo
from distaff.errors import ConfigError, RunDirectoryError
from distaff.loggers import JsonlLogger, ManyLoggers, MemoryLogger, TolerantLogger


class Failing(MemoryLogger):
    """Fails at the named calls: `log_metrics 2` is the second call of that method."""

    def __init__(self, *calls):
        super().__init__()
        self.calls, self.counts = calls, {}

    def _count(self, name):
        self.counts[name] = self.counts.get(name, 0) + 1
        if f"{name} {self.counts[name]}" in self.calls or name in self.calls:
            raise ConnectionError("the server is away.")

    def log_metrics(self, metrics, *, step, epoch):
        self._count("log_metrics")
        super().log_metrics(metrics, step=step, epoch=epoch)

    def log_config(self, config):
        self._count("log_config")
        super().log_config(config)

    def log_text(self, name, text, *, step):
        self._count("log_text")

    def position(self):
        self._count("position")
        return super().position()

    def close(self, status):
        self._count("close")
        super().close(status)


def log(logger, *steps):
    for step in steps:
        logger.log_metrics({"a": 1.0}, step=step, epoch=1)


def steps(logger):
    return [record.step for record in logger.records]


def test_tolerant_logger_warns_once_of_failures_in_a_row_and_tries_each_call(caplog):
    failing = Failing("log_metrics 2", "log_metrics 3")
    logger = TolerantLogger(failing, "on_failed_log")
    with caplog.at_level(logging.INFO), pytest.warns(UserWarning, match="ConnectionError") as found:
        log(logger, 1, 2, 3, 4)
    assert (len(found), steps(failing)) == (1, [1, 4])
    assert "on_failed_log='raise'" in str(found[0].message)
    assert "works again; 2 calls are missing" in caplog.text


def test_tolerant_logger_hands_the_configuration_over_once_that_works():
    failing = Failing("log_config 1", "log_config 2")
    logger = TolerantLogger(failing, "on_failed_log")
    with pytest.warns(UserWarning, match="log_config failed"):
        logger.log_config({"a": 1})
    log(logger, 1, 2, 3)
    assert failing.config == {"a": 1}
    assert (failing.counts["log_config"], steps(failing)) == (3, [1, 2, 3])


def test_tolerant_logger_has_the_methods_of_its_logger_and_no_others():
    logger = TolerantLogger(Failing("position", "log_text"), "on_failed_log")
    with pytest.warns(UserWarning, match="position failed"):
        assert logger.position() is None
    logger.log_text("a", "b", step=1)  # the second failure in a row
    assert not hasattr(logger, "get_state")
    assert list(ManyLoggers(logger, MemoryLogger()).position()) == ["0:Failing", "1:MemoryLogger"]


def trained(tmp_path, logger, **options):
    train, val, _ = data.digits(batch_size=512)
    trainer = tasks.Classifier(
        zoo.MLP((2, 10)), root=tmp_path, enable_progress_bar=False, loggers=[logger], **options
    )
    return trainer, lambda: trainer.train_model(train, val, num_epochs=2, steps_per_epoch=1)


@pytest.mark.slow_but("log_metrics", "close")
@pytest.mark.parametrize(
    "call", ["log_config", "log_metrics", "log_metrics 2", "position", "close"]
)
def test_run_with_a_logger_that_fails_ends_as_ever(call, tmp_path):
    logger = Failing(call)
    trainer, train = trained(tmp_path, logger)
    with pytest.warns(UserWarning, match=r"Failing\.\w+ failed: ConnectionError"):
        result = train()
    assert result.status == "finished"
    assert json.loads((result.path / "status.json").read_text())["status"] == "finished"
    assert len((result.path / "metrics.jsonl").read_text().splitlines()) >= 2
    assert steps(logger)[-1:] == ([] if call == "log_metrics" else [2])
    assert trainer.best.step in (1, 2)


@pytest.mark.slow_but("log_metrics-failed")
@pytest.mark.parametrize(("call", "status"), [("log_metrics", "failed"), ("close", "finished")])
def test_logger_that_fails_is_an_error_where_that_is_asked_for(call, status, tmp_path):
    trainer, train = trained(tmp_path, Failing(call), on_failed_log="raise")
    with pytest.raises(ConnectionError):
        train()
    path = trainer.last_run.path
    assert json.loads((path / "status.json").read_text())["status"] == status


def test_error_of_a_run_stays_the_first_one_where_a_logger_cannot_be_closed(tmp_path):
    trainer, train = trained(tmp_path, Failing("close"), on_failed_log="raise")
    trainer.on_training_epoch_end = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError) as caught:
        train()
    assert "ConnectionError: the server is away" in caught.value.__notes__[0]


def test_on_failed_log_has_two_values():
    with pytest.raises(ConfigError, match="on_failed_log has no value 'ignore'"):
        tasks.Classifier(zoo.MLP((2, 10)), on_failed_log="ignore")


def test_jsonl_logger_writes_what_a_full_disk_did_not_take_with_the_next_line(
    tmp_path, monkeypatch
):
    logger = JsonlLogger(tmp_path / "metrics.jsonl", clock=lambda: 0.0)
    log(logger, 1)
    file = logger._file

    class Full:
        """The file on a disk that takes half a line more."""

        def write(self, content):
            if len(content) < 20:
                raise OSError(28, "No space left on device")
            return file.write(content[:20])

        def __getattr__(self, name):
            return getattr(file, name)

    logger._file = Full()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    for step in (2, 3):
        with pytest.raises(RunDirectoryError, match="No space left"):
            log(logger, step)
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
    logger._file = file
    assert logger.position() > len(before)
    log(logger, 4)
    logger.close("finished")
    assert steps(MemoryLogger.read(tmp_path / "metrics.jsonl")) == [1, 2, 3, 4]
    assert np.isfinite(MemoryLogger.read(tmp_path / "metrics.jsonl").records[0].metrics["a"])
