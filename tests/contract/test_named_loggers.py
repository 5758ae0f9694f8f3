"""Loggers by name: each is built inside the run directory, and is like the object."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
import wandb

from distaff import TrainerModule
from distaff.data import ArrayLoader
from distaff.errors import ConfigError
from distaff.loggers import MemoryLogger
from distaff.loggers.protocol import as_loggers
from scripted import CtrlC


class Line(TrainerModule):
    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])


def loader() -> ArrayLoader:
    x = np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32)
    return ArrayLoader({"x": x, "y": x.sum(1)}, 4)


def line(tmp_path, **options: Any) -> Line:
    quiet: dict[str, Any] = {"root": tmp_path, "enable_progress_bar": False}
    return Line(nn.Dense(1), **{**quiet, **options})


@pytest.fixture(autouse=True)
def offline(tmp_path_factory, monkeypatch):
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path_factory.mktemp("wandb")))
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()  # an earlier run in this process has read the environment
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def test_names_and_objects_log_alongside_each_other_in_the_run_directory(tmp_path, capfd):
    memory = MemoryLogger()
    names = ["tensorboard", "wandb", "mlflow", "csv", "console"]
    trainer = line(tmp_path, loggers=[*names, memory], on_failed_log="raise")
    assert trainer.loggers == (*names, memory)
    result = trainer.train_model(loader(), num_epochs=2)
    loss = result.metrics["train/loss"]
    rows = (result.path / "metrics.csv").read_text().splitlines()
    assert f"{loss!r}" in rows[-1]
    assert memory.records[-1].metrics["train/loss"] == loss
    assert list((result.path / "tensorboard").glob("events*"))
    assert list((result.path / "wandb").glob("offline-run-*/*.wandb"))
    assert list((result.path / "mlruns").rglob("train/loss"))
    assert "train/loss" in capfd.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} <= {"line", ".launches"}


def test_resumed_run_has_each_row_of_a_named_logger_once(tmp_path):
    options: dict[str, Any] = {"loggers": ["csv"], "log_every_n_steps": 2}
    whole = line(tmp_path / "whole", **options).train_model(loader(), num_epochs=3)
    broken = line(tmp_path / "broken", callbacks=[CtrlC(6)], **options)
    assert broken.train_model(loader(), num_epochs=3).status == "interrupted"
    resumed = line(tmp_path / "broken", callbacks=[CtrlC(6)], **options).train_model(
        loader(), num_epochs=3
    )
    assert resumed.path == broken.last_run.path

    def rows(path) -> list[list[str]]:
        table = [each.split(",") for each in (path / "metrics.csv").read_text().splitlines()]
        time = table[0].index("time")
        return [cells[:time] + cells[time + 1 :] for cells in table]

    assert rows(resumed.path) == rows(whole.path)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["tensorbord"], "'tensorbord' is not the name of a logger. Did you mean 'tensorboard'?"),
        (["CSV"], "Did you mean 'csv'"),
        (["jsonl"], "Each run writes metrics.jsonl itself"),
        ("csv", r"loggers is a list; got one str. Write loggers=\['csv'\]"),
        (["csv", "csv"], "'csv' more than once"),
    ],
)
def test_wrong_name_is_an_error_with_the_remedy(given, text):
    with pytest.raises(ConfigError, match=text):
        as_loggers(given)


def test_named_logger_needs_a_run_directory_except_in_a_dry_run(tmp_path, capfd):
    with pytest.raises(ConfigError, match=r"'csv' writes into the run directory.*root=None"):
        line(tmp_path, root=None, loggers=["csv"]).train_model(loader(), num_epochs=1)
    dry = line(tmp_path, loggers=["csv", "console"], fast_dev_run=True)
    dry.train_model(loader(), num_epochs=1)
    assert list(tmp_path.iterdir()) == []
    assert "train/loss" in capfd.readouterr().err


def test_name_of_a_missing_package_says_what_to_install():
    code = (
        "import sys; sys.modules['tensorboardX'] = None\n"
        "from distaff.loggers.protocol import as_loggers\n"
        "try: as_loggers(['tensorboard'])\n"
        "except ImportError as error: print(error)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert 'pip install "distaff[tensorboard]"' in output
