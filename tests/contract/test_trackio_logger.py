"""The trackio logger, read back from what trackio keeps in its directory, for `make test-peers`."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
import pytest
from matplotlib.figure import Figure

from distaff import loggers
from distaff.data import ArrayLoader
from distaff.errors import ConfigError, MetricError
from distaff.loggers import Logger, MemoryLogger, Record
from distaff.testing.loggers import LoggerContract
from scripted import CtrlC, Regression

pytestmark = pytest.mark.peer("trackio")

os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")  # read when trackio is imported


def make(directory: Path, **options: Any) -> Any:
    return loggers.TrackioLogger(project(directory), auto_log_cpu=False, **options)


def project(directory: Path) -> str:
    return "-".join(directory.parts[-2:])


def runs(name: str) -> list[str]:
    from trackio.sqlite_storage import SQLiteStorage

    return SQLiteStorage.get_runs(name)


def rows(name: str, run: str) -> list[dict[str, Any]]:
    from trackio.sqlite_storage import SQLiteStorage

    return SQLiteStorage.get_logs(name, run)


def read(directory: Path) -> list[Record]:
    found = []
    for run in runs(project(directory)):
        for row in rows(project(directory), run):
            metrics = {name: value for name, value in row.items() if isinstance(value, int | float)}
            step, epoch = metrics.pop("step"), metrics.pop("epoch")
            found.append(Record(step=int(step), epoch=int(epoch), metrics=metrics))
    return found


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(self: Any, address: Any) -> None:
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)


class TestTrackioLogger(LoggerContract):
    def make_logger(self, directory: Path) -> Logger:
        return make(directory)

    def read_records(self, logger: Logger, directory: Path) -> list[Record]:
        return read(directory)


def test_media_and_config_are_recorded(tmp_path: Path) -> None:
    logger = make(tmp_path, name="first")
    config = {"seed": 0, "optimizer": {"name": "adamw", "betas": [0.9, 0.999]}}
    logger.log_config(config)
    figure = Figure(figsize=(1, 2))
    figure.subplots().plot([1, 2])
    logger.log_figure("val/curve", figure, step=5)
    logger.log_image("val/image", np.linspace(0, 1, 12).reshape(3, 4), step=5)
    logger.log_histogram("weights", [1.0, 2.0, np.nan, 2.0], step=5)
    logger.log_text("sample", "a <b>", step=5)
    logger.close("finished")
    assert runs(project(tmp_path)) == ["first"]
    found = {name: value for row in rows(project(tmp_path), "first") for name, value in row.items()}
    assert found["step"] == 5
    kinds = {name: value["_type"] for name, value in found.items() if isinstance(value, dict)}
    assert kinds == {
        "val/curve": "trackio.image",
        "val/image": "trackio.image",
        "weights": "trackio.histogram",
        "sample": "trackio.html",
    }
    assert sum(found["weights"]["values"]) == 3
    media = Path(os.environ["TRACKIO_DIR"]) / "media"
    for name in ("val/curve", "val/image"):
        assert (media / found[name]["file_path"]).read_bytes().startswith(b"\x89PNG")
    assert "a &lt;b&gt;" in (media / found["sample"]["file_path"]).read_text()
    from trackio.sqlite_storage import SQLiteStorage

    kept = SQLiteStorage.get_run_config(project(tmp_path), "first")
    assert {name: kept[name] for name in config} == config


def test_resumed_logger_continues_its_run(tmp_path: Path) -> None:
    first = make(tmp_path)
    assert first.get_state() is None
    first.log_metrics({"loss": 2.0}, step=4, epoch=1)
    state = json.loads(json.dumps(first.get_state()))
    first.close("failed")
    second = make(tmp_path)
    second.set_state(state)
    second.log_metrics({"loss": 1.0}, step=2, epoch=2)
    assert second.get_state() == state
    second.close("finished")
    assert [(each.step, each.metrics) for each in read(tmp_path)] == [
        (4, {"loss": 2.0}),
        (2, {"loss": 1.0}),
    ]
    second.log_metrics({"loss": 3.0}, step=3, epoch=1)
    second.close("finished")
    assert len(runs(project(tmp_path))) == 2


def test_wrong_options_and_metrics_are_errors(tmp_path: Path, capfd: Any) -> None:
    with pytest.raises(ConfigError, match="got config, resume"):
        make(tmp_path, resume="must", config={})
    with pytest.raises(MetricError, match="a metric is named 'epoch'"):
        make(tmp_path).log_metrics({"epoch": 1.0}, step=1, epoch=1)
    assert runs(project(tmp_path)) == []


def test_name_of_the_logger_records_a_run_that_is_interrupted_and_resumed(
    tmp_path: Path, capfd: Any
) -> None:
    x = np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32)
    loader = ArrayLoader({"x": x, "y": x.sum(1)}, 4)
    memory, name = MemoryLogger(), project(tmp_path)

    def train(**options: Any) -> Any:
        trainer = Regression(
            nn.Dense(1),
            loggers=["trackio", memory],
            name=name,
            log_every_n_steps=2,
            on_failed_log="raise",
            enable_progress_bar=False,
            **options,
        )
        return trainer.train_model(loader, num_epochs=3).status

    assert train(root="runs", callbacks=[CtrlC(6)]) == "interrupted"
    assert train(root="runs", callbacks=[CtrlC(6)]) == "finished"
    logged = [(each.step, each.epoch, each.metrics) for each in memory.records]
    assert [(each.step, each.epoch, each.metrics) for each in read(tmp_path)] == logged
    assert len(runs(name)) == 1
    assert train(root=None, fast_dev_run=True) == "finished"
    assert len(runs(name)) == 1
    assert train(root=None) == "finished"
    assert len(runs(name)) == 2
    assert "rackio" not in capfd.readouterr().out
