"""The loggers of third parties, read back from what they leave on the disk; nothing is online."""

from __future__ import annotations

import itertools
import json
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
import wandb
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from tensorboardX.proto.event_pb2 import Event  # ty: ignore[import-not-found] made at import
from wandb.proto.wandb_internal_pb2 import (
    Record as WandbRecord,  # ty: ignore[import-not-found] made at import
)

from distaff import Callback, OptimizerConfig, TrainerModule
from distaff.data import ArrayLoader
from distaff.errors import ConfigError, MetricError
from distaff.loggers import (
    CsvLogger,
    Logger,
    ManyLoggers,
    MemoryLogger,
    MlflowLogger,
    Record,
    TensorBoardLogger,
    WandbLogger,
)
from distaff.testing.loggers import LoggerContract

QUIET = wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True)


@pytest.fixture(autouse=True)
def own_places(tmp_path_factory, monkeypatch):
    """Keeps the caches of Weights & Biases out of the home directory."""
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path_factory.mktemp("wandb")))
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)


def events(directory: Path) -> list[Any]:
    """Reads event files, in the order in which they were made: length, check, data, check."""
    found = []
    files = sorted(directory.rglob("events*"), key=lambda path: int(path.suffix[1:]))
    for content in map(Path.read_bytes, files):
        position = 0
        while position < len(content):
            [length] = struct.unpack_from("<Q", content, position)
            found.append(Event.FromString(content[position + 12 : position + 12 + length]))
            position += 16 + length
    return found


def tensorboard_values(directory: Path) -> list[tuple[int, Any]]:
    return [(event.step, value) for event in events(directory) for value in event.summary.value]


def read_tensorboard(directory: Path) -> list[Record]:
    records: list[Record] = []
    for step, value in tensorboard_values(directory):
        if value.tag == "epoch":
            metrics: dict[str, float] = {}
            records.append(Record(step=step, epoch=int(value.simple_value), metrics=metrics))
        elif value.HasField("simple_value"):
            metrics[value.tag] = value.simple_value
    return records


def wandb_records(directory: Path) -> list[WandbRecord]:
    """Reads the runs below a directory, each once its end is in its file, shortly after `close`."""
    found = []
    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        deadline = time.monotonic() + 20
        records = leveldb_log(path)
        while not any(record.HasField("exit") for record in records):
            assert time.monotonic() < deadline, f"{path} has no end"
            time.sleep(0.02)
            records = leveldb_log(path)
        found += records
    return found


def leveldb_log(path: Path) -> list[WandbRecord]:
    """Reads the records of a LevelDB log: blocks of 32 KiB, after a header of seven bytes."""
    found, data = [], b""
    content, position = path.read_bytes(), 7
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        data += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(WandbRecord.FromString(data))
            data = b""
    return found


def wandb_rows(directory: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for record in wandb_records(directory):
        if record.HasField("history"):
            rows.append({})
            for item in record.history.item:
                value = json.loads(item.value_json)
                name, *member = item.nested_key or [item.key]
                if member:
                    rows[-1].setdefault(name, {})[member[0]] = value
                else:
                    rows[-1][name] = value
    return rows


def read_wandb(directory: Path) -> list[Record]:
    return [
        Record(
            step=row["step"],
            epoch=row["epoch"],
            metrics={
                name: float(value)
                for name, value in row.items()
                if name not in ("step", "epoch") and name[0] != "_" and not isinstance(value, dict)
            },
        )
        for row in wandb_rows(directory)
    ]


def mlflow_runs(directory: Path) -> tuple[MlflowClient, list[Any]]:
    client = MlflowClient(tracking_uri=str(directory))
    experiment = client.get_experiment_by_name("distaff")
    return client, client.search_runs([experiment.experiment_id]) if experiment else []


def read_mlflow(directory: Path) -> list[Record]:
    """Reads one run; what was logged by one call has one timestamp."""
    if not directory.exists():
        return []
    client, [run] = mlflow_runs(directory)
    calls: dict[int, dict[str, Any]] = {}
    for name in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, name):
            calls.setdefault(metric.timestamp, {"step": metric.step})[name] = metric.value
    return [
        Record(step=call.pop("step"), epoch=int(call.pop("epoch")), metrics=call)
        for _, call in sorted(calls.items())
    ]


def offline(directory: Path) -> WandbLogger:
    return WandbLogger("distaff-tests", mode="offline", directory=directory, settings=QUIET)


class TestTensorBoardLogger(LoggerContract):
    number = np.float32

    def make_logger(self, directory: Path) -> Logger:
        return TensorBoardLogger(directory / "events")

    def read_records(self, logger: Logger, directory: Path) -> list[Record]:
        return read_tensorboard(directory / "events")


class TestWandbLogger(LoggerContract):
    def make_logger(self, directory: Path) -> Logger:
        return offline(directory / "here")

    def read_records(self, logger: Logger, directory: Path) -> list[Record]:
        return read_wandb(directory / "here")


class TestMlflowLogger(LoggerContract):
    def make_logger(self, directory: Path) -> Logger:
        return MlflowLogger(directory / "my runs", clock=itertools.count().__next__)

    def read_records(self, logger: Logger, directory: Path) -> list[Record]:
        return read_mlflow(directory / "my runs")


def log_media(logger: Any) -> None:
    figure = Figure(figsize=(1, 2))
    figure.subplots().plot([1, 2])
    many = ManyLoggers(logger)
    many.log_figure("val/curve", figure, step=5)
    many.log_image("val/image", np.linspace(0, 1, 12).reshape(3, 4), step=5)
    many.log_histogram("weights", [1.0, 2.0, np.nan, 2.0], step=5)
    many.log_text("sample", "a <b>", step=5)
    logger.close("finished")


def test_tensorboard_logger_writes_media(tmp_path):
    log_media(TensorBoardLogger(tmp_path))
    values = {value.tag.split("/text")[0]: value for _, value in tensorboard_values(tmp_path)}
    assert {step for step, _ in tensorboard_values(tmp_path)} == {5}
    figure, image = values["val/curve"].image, values["val/image"].image
    assert (figure.width, figure.height) == (150, 300)
    assert (image.width, image.height) == (4, 3)
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert (values["weights"].histo.num, values["weights"].histo.sum) == (3, 5.0)
    assert values["sample"].tensor.string_val == [b"a <b>"]


def test_tensorboard_logger_writes_the_config_and_no_file_twice(tmp_path):
    logger = TensorBoardLogger(lambda: tmp_path)
    for seed in (1, 2):
        logger.log_config({"seed": seed})
        logger.close("finished")
    texts = [value.tensor.string_val[0].decode() for _, value in tensorboard_values(tmp_path)]
    assert [json.loads(text) for text in texts] == [{"seed": 1}, {"seed": 2}]


def test_tensorboard_logger_that_resumes_hides_later_steps(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    for step in (20, 40):
        logger.log_metrics({"loss": 0.5}, step=step, epoch=1)
    logger.resume(20)
    logger.log_metrics({"loss": 0.25}, step=40, epoch=1)
    logger.close("finished")
    logger.log_config({})
    logger.close("finished")
    starts = [each.step for each in events(tmp_path) if each.HasField("session_log")]
    assert starts == [21]


def test_wandb_logger_records_media_and_config(tmp_path):
    logger = offline(tmp_path)
    logger.log_config({"optimizer": {"name": "adamw"}})
    log_media(logger)
    media = {name: value for row in wandb_rows(tmp_path) for name, value in row.items()}
    kinds = {name: value["_type"] for name, value in media.items() if isinstance(value, dict)}
    assert kinds == {
        "val/curve": "image-file",
        "val/image": "image-file",
        "weights": "histogram",
        "sample": "html-file",
    }
    assert (media["val/image"]["width"], media["val/image"]["height"]) == (4, 3)
    assert sum(media["weights"]["values"]) == 3
    [page] = tmp_path.rglob("*.html")
    assert page.read_text() == "<pre>a &lt;b&gt;</pre>"
    config = {
        update.key: json.loads(update.value_json)
        for record in wandb_records(tmp_path)
        for update in record.config.update
    }
    assert config["optimizer"] == {"name": "adamw"}


@pytest.mark.parametrize(
    ("status", "code", "mlflow_status"),
    [
        ("finished", 0, "FINISHED"),
        ("stopped", 0, "FINISHED"),
        ("pruned", 0, "FINISHED"),
        ("interrupted", 255, "KILLED"),
        ("failed", 1, "FAILED"),
    ],
)
def test_close_hands_the_status_on(tmp_path, status, code, mlflow_status):
    for logger in (offline(tmp_path), MlflowLogger(tmp_path / "runs")):
        logger.log_metrics({"loss": 0.5}, step=1, epoch=1)
        logger.close(status)
        logger.close("failed")
    exits = [each.exit.exit_code for each in wandb_records(tmp_path) if each.HasField("exit")]
    assert exits == [code]
    _, [run] = mlflow_runs(tmp_path / "runs")
    assert run.info.status == mlflow_status


def test_wandb_logger_refuses_options_of_its_own():
    with pytest.raises(ConfigError, match="got config, dir"):
        WandbLogger("p", dir="here", config={})


def test_mlflow_logger_records_config_and_media(tmp_path):
    logger = MlflowLogger(tmp_path / "runs", run_name="first")
    config = {
        "seed": 0,
        "optimizer": {"name": "adamw", "betas": [0.9, 0.999], "groups": {"head/bias$": None}},
        "long": "x" * 9000,
        **{f"option_{i}": i for i in range(120)},
    }
    logger.log_config(config)
    log_media(logger)
    _, [run] = mlflow_runs(tmp_path / "runs")
    params = run.data.params
    assert run.info.run_name == "first"
    assert params["seed"] == "0"
    assert params["optimizer.name"] == "adamw"
    assert params["optimizer.betas"] == "[0.9, 0.999]"
    assert params["optimizer.groups.head_bias_"] == "null"
    assert params["long"] == "x" * 6000
    assert len(params) == 125
    artifacts = Path(run.info.artifact_uri)
    assert json.loads((artifacts / "config.json").read_text()) == config
    assert (artifacts / "texts/sample_5.txt").read_text() == "a <b>"
    assert (artifacts / "figures/val/curve_5.png").exists()
    assert (artifacts / "images/val/image_5.png").exists()


def test_mlflow_logger_takes_any_name_and_number_of_metrics(tmp_path):
    logger = MlflowLogger(tmp_path / "runs")
    logger.log_metrics({f"val/f1@{i}": i / 2 for i in range(1500)}, step=1, epoch=1)
    logger.close("finished")
    _, [run] = mlflow_runs(tmp_path / "runs")
    assert run.data.metrics["val/f1_1499"] == 749.5
    assert len(run.data.metrics) == 1501


@pytest.mark.parametrize("make", [TensorBoardLogger, offline, MlflowLogger])
def test_integration_refuses_a_metric_named_epoch_and_opens_nothing(tmp_path, make):
    with pytest.raises(MetricError, match="a metric is named 'epoch'"):
        make(tmp_path / "here").log_metrics({"epoch": 1.0}, step=1, epoch=1)
    assert list(tmp_path.iterdir()) == []


class Regression(TrainerModule):
    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])


class FailsInTheSecondEpoch(Callback):
    def on_epoch_end(self, info):
        if info.epoch == 2:
            raise RuntimeError("out of luck")


def test_a_failed_run_closes_every_logger(tmp_path):
    memory = MemoryLogger()
    loggers = [
        CsvLogger(tmp_path / "metrics.csv"),
        TensorBoardLogger(tmp_path / "events"),
        offline(tmp_path),
        MlflowLogger(tmp_path / "mlruns"),
        memory,
    ]
    trainer = Regression(
        nn.Dense(1),
        optimizer=OptimizerConfig("sgd", learning_rate=0.1),
        loggers=loggers,
        callbacks=[FailsInTheSecondEpoch()],
        enable_progress_bar=False,
    )
    x = np.random.default_rng(0).normal(size=(8, 3))
    loader = ArrayLoader({"x": x, "y": x.sum(axis=1)}, batch_size=4)
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.train_model(loader, loader, num_epochs=3)

    losses = [each.metrics["train/loss"] for each in memory.records if "train/loss" in each.metrics]
    assert memory.status == "failed"
    assert losses
    table = (tmp_path / "metrics.csv").read_text().splitlines()
    assert len(table) == 1 + len(memory.records)
    read = [read_tensorboard(tmp_path / "events"), read_wandb(tmp_path)]
    for records in read:
        kept = [each.metrics["train/loss"] for each in records if "train/loss" in each.metrics]
        assert kept == pytest.approx(losses, rel=1e-6)
    assert [each.exit.exit_code for each in wandb_records(tmp_path) if each.HasField("exit")] == [1]
    _, [run] = mlflow_runs(tmp_path / "mlruns")
    assert run.info.status == "FAILED"
    assert run.data.metrics["train/loss"] == losses[-1]
    assert json.loads((Path(run.info.artifact_uri) / "config.json").read_text()) == memory.config


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("TensorBoardLogger", "tensorboardX"),
        ("WandbLogger", "wandb"),
        ("MlflowLogger", "mlflow"),
        ("TrackioLogger", "trackio"),
    ],
)
@pytest.mark.slow
def test_missing_package_names_its_extra(name, package):
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        f"try: from distaff.loggers import {name}\n"
        "except ImportError as error: print(error)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    extra = name.removesuffix("Logger").lower()
    assert package in output
    assert f'pip install "distaff[{extra}]"' in output


@pytest.mark.parametrize("make", [offline, MlflowLogger])
def test_resumed_run_continues_its_run_at_the_service(make, tmp_path):
    first = make(tmp_path / "service")
    assert first.get_state() is None
    first.log_config({"a": 1, "b": 2})
    first.log_metrics({"loss": 2.0}, step=1, epoch=1)
    state = json.loads(json.dumps(first.get_state()))
    first.close("failed")
    second = make(tmp_path / "service")
    second.set_state(state)
    assert second.get_state() == state
    second.log_config({"a": 1, "b": 3, "c": 4})  # an option may differ, and MLflow changes none
    second.log_metrics({"loss": 1.0}, step=2, epoch=2)
    assert second.get_state() == state
    second.close("finished")
    second.log_metrics({"loss": 3.0}, step=3, epoch=1)
    assert second.get_state() != state  # another run, as after every close
    second.close("finished")
    if make is MlflowLogger:
        client, runs = mlflow_runs(tmp_path / "service")
        known = client.get_run(state["run_id"])
        assert (len(runs), known.info.status) == (2, "FINISHED")
        assert known.data.params == {"a": "1", "b": "2", "c": "4"}
        history = client.get_metric_history(state["run_id"], "loss")
        assert [(each.step, each.value) for each in history] == [(1, 2.0), (2, 1.0)]


def test_mlflow_logger_begins_another_run_where_the_one_to_continue_is_gone(tmp_path):
    logger = MlflowLogger(tmp_path / "runs")
    logger.set_state({"run_id": "0" * 32})
    logger.log_metrics({"loss": 1.0}, step=1, epoch=1)
    assert logger.get_state() != {"run_id": "0" * 32}
    logger.close("finished")


@pytest.mark.slow
def test_mlflow_call_to_a_server_that_is_down_is_tried_three_times():
    connections = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            with suppress(OSError):  # closed at the end of the test
                while True:
                    connection, _ = server.accept()
                    connections.append(connection.close())

        threading.Thread(target=hang_up, daemon=True).start()
        logger = MlflowLogger(tracking_uri=f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(MlflowException, match="failed with exception"):
            logger.log_metrics({"loss": 1.0}, step=1, epoch=1)
    assert len(connections) == 3
