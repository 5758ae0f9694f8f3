"""A second start of a run: what hooks and loggers of the user's are told of it."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest

from distaff import Callback, data, tasks, zoo
from distaff.loggers import MemoryLogger


class Told(Callback):
    """Keeps what `on_training_start` was told, and counts the epochs of the whole run."""

    def __init__(self):
        self.starts, self.epochs = [], 0

    def on_training_start(self, info):
        self.starts.append((info.step, info.epoch, int(info.state.step), self.epochs))
        self.epochs = 0  # a callback may forget an earlier run here

    def on_epoch_end(self, info):
        self.epochs += 1

    def get_state(self):
        return {"epochs": self.epochs}

    def set_state(self, state):
        self.epochs = state["epochs"]


class Service(MemoryLogger):
    """A logger with a run of its own at a service."""

    def __init__(self, name):
        super().__init__()
        self.name, self.calls = name, []

    def log_config(self, config):
        self.calls.append("log_config")

    def get_state(self):
        return {"id": self.name}

    def set_state(self, state):
        self.calls.append("set_state")
        self.name = state["id"]


class Model(tasks.Classifier):
    kind = "reads"

    def on_training_start(self):
        self.seen = (self.step, self.epoch)
        if self.kind == "changes":  # as one that loads weights where a training starts
            self.state = jax.tree.map(jnp.zeros_like, self.state)
        elif self.kind == "deletes":
            jax.tree.map(lambda leaf: leaf.delete(), self.state.params)


def trained(root, logger, *, fails=0):
    callback = Told()
    options = {"root": root, "name": "m", "enable_progress_bar": False, "steps_per_call": 1}
    trainer = Model(zoo.MLP((2, 10)), loggers=[logger], callbacks=[callback], **options)
    trainer.on_validation_epoch_end = lambda epoch, *_: 1 / (fails - epoch)
    train, val, _ = data.digits(batch_size=512)
    result = None
    try:
        result = trainer.train_model(train, val, num_epochs=4, steps_per_epoch=2)
    except ZeroDivisionError:
        status = trainer.last_run.path / "status.json"
        facts = {**json.loads(status.read_text()), "status": "running"}  # as if it was killed
        status.write_text(json.dumps(facts))
    return trainer, callback, result


def lines(path):
    rows = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name != "time"} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    return lines(trained(root, MemoryLogger(), fails=9)[2].path)


@pytest.mark.slow_but("changes")
@pytest.mark.parametrize("kind", ["reads", "changes", "deletes"])
def test_training_start_of_a_resumed_run_has_its_step_and_changes_nothing(
    kind, whole, tmp_path, monkeypatch
):
    trained(tmp_path, MemoryLogger(), fails=3)
    monkeypatch.setattr(Model, "kind", kind)
    trainer, callback, result = trained(tmp_path, MemoryLogger(), fails=9)
    assert result.path.name == "0001"
    assert trainer.seen == (4, 2)
    if kind == "reads":
        assert callback.starts == [(4, 2, 4, 0)]
    assert callback.epochs == 4  # what it remembers is given back after that hook
    assert lines(result.path) == whole


@pytest.mark.slow
def test_logger_continues_its_run_also_of_a_start_without_a_checkpoint(tmp_path):
    for fails, name in ((1, "first"), (3, "second"), (9, "third")):
        logger = Service(name)
        trainer, _, _ = trained(tmp_path, logger, fails=fails)
        assert trainer.last_run.path.name == "0001"
        assert logger.name == "first"
        assert logger.calls == (["set_state"] if name != "first" else []) + ["log_config"]
    trainer, _, _ = trained(tmp_path, fourth := Service("fourth"), fails=9)
    assert (trainer.last_run.path.name, fourth.name) == ("0002", "fourth")
