"""The MLflow logger against a real server on this machine, for `make test-peers`."""

from __future__ import annotations

import itertools
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
import pytest
from matplotlib.figure import Figure

from distaff import OptimizerConfig
from distaff.data import ArrayLoader
from distaff.loggers import Logger, MemoryLogger, MlflowLogger, Record
from distaff.testing.loggers import LoggerContract
from scripted import CtrlC, Regression

pytestmark = pytest.mark.peer("flask", "mlflow")  # without flask, mlflow is the client alone


LARGEST = sys.float_info.max
INFINITE = {LARGEST: np.inf, -LARGEST: -np.inf}
"""What MLflow's databases store for infinity."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Runs MLflow's own server on the loopback address; yields its address."""
    directory, port = tmp_path_factory.mktemp("mlflow"), free_port()
    options = {
        "backend-store-uri": f"sqlite:///{directory}/runs.db",
        "artifacts-destination": str(directory / "artifacts"),
        "host": "127.0.0.1",
        "port": str(port),
        "workers": "1",
    }
    command = [f"--{name}={value}" for name, value in options.items()]
    address, log = f"http://127.0.0.1:{port}", directory / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *command],
            stdout=output,
            stderr=output,
            cwd=directory,
        )
    try:
        deadline = time.monotonic() + 240
        while not answers(address):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def client_of(server: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=server)


def runs_of(server: str, experiment: str) -> list[Any]:
    client = client_of(server)
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id]) if found else []


def content(server: str, run: Any, path: str) -> bytes:
    return Path(client_of(server).download_artifacts(run.info.run_id, path)).read_bytes()


class TestMlflowServer(LoggerContract):
    address = ""

    @pytest.fixture(autouse=True)
    def use(self, server: str) -> None:
        self.address = server

    def make_logger(self, directory: Path) -> Logger:
        clock = itertools.count(1).__next__
        return MlflowLogger(tracking_uri=self.address, experiment=str(directory), clock=clock)

    def read_records(self, logger: Logger, directory: Path) -> list[Record]:
        client, calls = client_of(self.address), dict[int, dict[str, Any]]()
        for run in runs_of(self.address, str(directory)):
            for name in run.data.metrics:
                for metric in client.get_metric_history(run.info.run_id, name):
                    call = calls.setdefault(metric.timestamp, {"step": metric.step})
                    call[name] = INFINITE.get(metric.value, metric.value)
        return [
            Record(step=call.pop("step"), epoch=int(call.pop("epoch")), metrics=call)
            for _, call in sorted(calls.items())
        ]


def test_server_keeps_config_media_many_metrics_and_status(server: str) -> None:
    logger = MlflowLogger(tracking_uri=server, experiment="media", run_name="first")
    config = {
        "seed": 0,
        "optimizer": {"name": "adamw", "betas": [0.9, 0.999], "groups": {"head/bias$": None}},
        "long": "x" * 9000,
        **{f"option_{i}": i for i in range(120)},
    }
    logger.log_config(config)
    logger.log_metrics({f"val/f1@{i}": i / 2 for i in range(1500)}, step=1, epoch=1)
    figure = Figure(figsize=(1, 2))
    figure.subplots().plot([1, 2])
    logger.log_figure("val/curve", figure, step=5)
    logger.log_image("val/image", np.linspace(0, 1, 12).reshape(3, 4), step=5)
    logger.log_text("sample", "a <b>", step=5)
    logger.close("interrupted")
    [run] = runs_of(server, "media")
    assert (run.info.run_name, run.info.status) == ("first", "KILLED")
    assert len(run.data.params) == 125
    assert run.data.params["optimizer.groups.head_bias_"] == "null"
    assert run.data.params["long"] == "x" * 6000
    assert run.data.metrics["val/f1_1499"] == 749.5
    assert json.loads(content(server, run, "config.json")) == config
    assert content(server, run, "texts/sample_5.txt") == b"a <b>"
    for name in ("figures/val/curve_5.png", "images/val/image_5.png"):
        assert content(server, run, name).startswith(b"\x89PNG")


def test_another_logger_continues_the_run_at_the_server(server: str) -> None:
    def logger() -> MlflowLogger:
        return MlflowLogger(tracking_uri=server, experiment="continued")

    first, second = logger(), logger()
    first.log_config({"a": 1, "b": 2})
    first.log_metrics({"loss": 2.0}, step=1, epoch=1)
    state = json.loads(json.dumps(first.get_state()))
    first.close("failed")
    second.set_state(state)
    second.log_config({"a": 1, "b": 3, "c": 4})
    second.log_metrics({"loss": 1.0}, step=2, epoch=2)
    second.close("finished")
    [run] = runs_of(server, "continued")
    assert (run.info.status, run.data.params) == ("FINISHED", {"a": "1", "b": "2", "c": "4"})
    history = client_of(server).get_metric_history(run.info.run_id, "loss")
    assert [(each.step, each.value) for each in history] == [(1, 2.0), (2, 1.0)]

    client_of(server).delete_run(run.info.run_id)
    third = logger()
    third.set_state(state)
    third.log_metrics({"loss": 3.0}, step=3, epoch=3)
    third.close("finished")
    assert third.get_state() is None
    [other] = runs_of(server, "continued")
    assert other.info.run_id != run.info.run_id

    gone = logger()
    gone.set_state({"run_id": "0" * 32})
    gone.log_metrics({"loss": 3.0}, step=3, epoch=3)
    gone.close("finished")
    assert len(runs_of(server, "continued")) == 2


def line(root: Path, memory: MemoryLogger, logger: Any, **options: Any) -> Regression:
    return Regression(
        nn.Dense(1),
        optimizer=OptimizerConfig("sgd", learning_rate=0.1),
        root=root,
        loggers=[logger, memory],
        on_failed_log="raise",
        log_every_n_steps=2,
        enable_progress_bar=False,
        **options,
    )


def loader() -> ArrayLoader:
    x = np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32)
    return ArrayLoader({"x": x, "y": x.sum(1)}, 4)


def test_interrupted_run_is_one_run_at_the_server(server: str, tmp_path: Path) -> None:
    memory = MemoryLogger()

    def train(**options: Any) -> Any:
        logger = MlflowLogger(tracking_uri=server, experiment="training")
        return line(tmp_path, memory, logger, **options).train_model(loader(), num_epochs=3)

    assert train(callbacks=[CtrlC(6)]).status == "interrupted"
    [run] = runs_of(server, "training")
    assert run.info.status == "KILLED"
    assert train(callbacks=[CtrlC(6)]).status == "finished"
    [run] = runs_of(server, "training")
    assert run.info.status == "FINISHED"
    history = client_of(server).get_metric_history(run.info.run_id, "train/loss")
    records = [each for each in memory.records if "train/loss" in each.metrics]
    logged = sorted((each.step, each.metrics["train/loss"]) for each in records)
    assert sorted((each.step, each.value) for each in history) == logged
    config = json.loads(content(server, run, "config.json"))
    assert config == memory.config
