"""How a run may end: stopped, interrupted, failed; and what is left of it then."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

import distaff
from distaff import Callback, EarlyStopping, Monitor, OptimizerConfig, StopTraining, data
from distaff.errors import NonFiniteError
from distaff.loggers import MemoryLogger
from scripted import Regression, Scripted


class AtStep(Callback):
    """Raises an exception after a step."""

    def __init__(self, step: int, exception: BaseException) -> None:
        self.step, self.exception = step, exception

    def on_step_end(self, info):
        if info.step == self.step:
            raise self.exception


def loader(seed: int = 0) -> data.ArrayLoader:
    x = np.random.default_rng(seed).normal(size=(16, 3))
    return data.ArrayLoader({"x": x, "y": x @ [1.0, -2.0, 0.5]}, batch_size=4)


def make(cls: type[Any] = Regression, **options: Any) -> Any:
    defaults = {"optimizer": OptimizerConfig("sgd", learning_rate=0.1), "name": "line"}
    return cls(nn.Dense(1), **{**defaults, "enable_progress_bar": False, **options})


def read(path: Path | str, name: str) -> Any:
    return json.loads((Path(path) / name).read_text())


def test_early_stopping_ends_the_run_as_stopped():
    stopping = EarlyStopping(Monitor("val/score"), patience=2)
    trainer = make(Scripted, callbacks=[stopping])
    trainer.scores = (2.0, 1.0, 1.5, 1.0, 0.0)
    result = trainer.train_model(loader(), loader(1), loader(2), num_epochs=5)
    assert (result.status, result.epoch, result.best.epoch) == ("stopped", 4, 2)
    assert "val/score has not improved on 1 for 2 validations" in result.reason
    status = read(result.path, "status.json")
    assert (status["status"], status["reason"]) == ("stopped", result.reason)
    assert "test/loss" in result.metrics


def test_early_stopping_forgets_an_earlier_run():
    trainer = make(Scripted, callbacks=[EarlyStopping(Monitor("val/score"), patience=2)], root=None)
    trainer.scores = (1.0, 2.0, 3.0, 9.0, 8.0, 7.0)
    assert trainer.train_model(loader(), loader(1), num_epochs=3).status == "stopped"
    trainer.scores = trainer.scores[3 - trainer.epoch :]
    assert trainer.train_model(loader(), loader(1), num_epochs=3).status == "finished"


def test_stop_before_the_first_step_trains_nothing():
    class Never(Callback):
        def on_training_start(self, info):
            raise StopTraining("not today")

    result = make(callbacks=[Never()]).train_model(loader(), loader(1), loader(2), num_epochs=2)
    assert (result.status, result.reason, result.step) == ("stopped", "not today", 0)
    assert "test/loss" in result.metrics


def test_number_in_the_state_of_ones_own_is_trained_along():
    class Counting(distaff.TrainState):
        epoch: int = 0

    trainer = make(root=None)
    trainer.state_class = Counting
    trainer.train_model(loader(), num_epochs=1)
    assert int(trainer.state.epoch) == 0


def test_stop_in_the_middle_of_an_epoch_keeps_and_tests_the_last_state():
    trainer = make(callbacks=[AtStep(6, StopTraining("enough"))])
    result = trainer.train_model(loader(), None, loader(2), num_epochs=3)
    assert (result.status, result.reason, result.step) == ("stopped", "enough", 6)
    assert (result.path / "checkpoints" / "step_00000006").is_dir()
    assert int(trainer.state.step) == 6
    assert "test/loss" in result.metrics


class NanLoss(Regression):
    def loss_fn(self, params, batch, ctx):
        loss = super().loss_fn(params, batch, ctx)
        return jnp.where(ctx.state.step == 5, jnp.nan, loss)


class NanGradient(Regression):
    def loss_fn(self, params, batch, ctx):
        loss = super().loss_fn(params, batch, ctx)
        zero = 0 * params["bias"]
        return loss + 0 * jnp.sqrt(jnp.where(ctx.state.step == 7, zero, 1.0))


@pytest.mark.parametrize(("cls", "step"), [(NanLoss, 6), (NanGradient, 8)])
@pytest.mark.parametrize("log_every_n_steps", [1, 50])
@pytest.mark.slow
def test_loss_that_is_no_number_ends_the_run_with_its_good_checkpoint(cls, step, log_every_n_steps):
    logger = MemoryLogger()
    trainer = make(cls, name="nan", loggers=[logger], log_every_n_steps=log_every_n_steps)
    with pytest.raises(
        NonFiniteError, match=rf"at step {step}\b.*checkpoint is of step 4, in .*runs"
    ):
        trainer.train_model(loader(), loader(1), num_epochs=3)
    path = Path("runs/nan/0001")
    assert [entry.name for entry in (path / "checkpoints").iterdir()] == ["step_00000004"]
    status = read(path, "status.json")
    assert (status["status"], status["epoch"], logger.status) == ("failed", 2, "failed")
    assert status["reason"].startswith("NonFiniteError: ")
    assert logging.getLogger("distaff").handlers == []


@pytest.mark.parametrize(
    ("exception", "status"),
    [(KeyboardInterrupt("^C"), "interrupted"), (ZeroDivisionError("mine"), "failed")],
)
@pytest.mark.parametrize("root", ["runs", None])
def test_exception_of_a_callback_closes_everything_and_is_raised_again(exception, status, root):
    logger = MemoryLogger()
    callbacks = [AtStep(6, exception)]
    trainer = make(name="line", root=root, callbacks=callbacks, loggers=[logger])
    with pytest.raises(type(exception)) as caught:
        trainer.train_model(loader(), loader(1), num_epochs=3)
    assert caught.value is exception
    assert logger.status == status
    assert logging.getLogger("distaff").handlers == []
    if root:
        written = read("runs/line/0001", "status.json")
        assert (written["status"], written["step"], written["epoch"]) == (status, 6, 2)
        assert written["reason"] == f"{type(exception).__name__}: {exception}"
        assert Path("runs/line/0001/checkpoints/step_00000004").is_dir()


def test_logger_that_fails_at_the_start_leaves_no_running_run():
    class Unreachable(MemoryLogger):
        def log_config(self, config):
            raise ConnectionError("no network")

    loggers = [MemoryLogger(), Unreachable()]
    trainer = make(name="line", loggers=loggers, on_failed_log="raise")
    with pytest.raises(ConnectionError):
        trainer.train_model(loader(), num_epochs=1)
    assert [logger.status for logger in loggers] == ["failed", "failed"]
    assert read("runs/line/0001", "status.json")["status"] == "failed"
    assert logging.getLogger("distaff").handlers == []
