"""Validation within an epoch: training is bit for bit that without it, and so is a resumed run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from distaff import (
    Callback,
    EarlyStopping,
    History,
    Monitor,
    OptimizerConfig,
    TrainerModule,
    data,
)
from distaff.checkpoint import CheckpointStore
from distaff.errors import ConfigError
from distaff.zoo import MLP
from scripted import InterruptError

X = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
Y = (X[:, :1] * 2 + X[:, 1:2]).astype(np.float32)
PER_EPOCH = 10


class Dropped(TrainerModule):
    """A regression with dropout, and everything that a validation does, in order."""

    def __init__(self, **options: Any) -> None:
        self.called: list[str] = []
        defaults = {"root": None, "log_every_n_steps": 3, "optimizer": OptimizerConfig("adam")}
        fixed = {"enable_progress_bar": False, "tune_process": False}
        super().__init__(MLP((8, 3, 1), dropout=0.3), **{**defaults, **fixed, **options})

    def loss_fn(self, params, batch, ctx):
        return ((ctx.apply(params, batch["x"]) - batch["y"]) ** 2)[:, 0]

    def eval_model(self, loader, prefix="", **weights):
        self.called.append(f"eval_model {self.step}")
        return super().eval_model(loader, prefix, **weights)

    def on_validation_epoch_end(self, epoch, metrics, val_loader):
        self.called.append(f"on_validation_epoch_end {epoch}")

    def save_metrics(self, name, metrics):
        self.called.append(f"save_metrics {name}")
        super().save_metrics(name, metrics)

    def is_new_model_better(self, new_metrics, old_metrics):
        self.called.append("is_new_model_better")
        return super().is_new_model_better(new_metrics, old_metrics)

    def save_model(self, metrics, is_best):
        self.called.append(f"save_model {self.step}")
        super().save_model(metrics, is_best)

    def on_training_epoch_end(self, epoch, metrics):
        self.called.append(f"on_training_epoch_end {epoch}")


class Witness(Callback):
    """Notes the steps and the events, with the metrics."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int]] = []

    def on_epoch_end(self, info):
        self.heard.append(("epoch", info.step))

    def on_validation_end(self, info):
        assert set(info.metrics) == {"val/loss"}
        self.heard.append(("validation", info.step))

    def on_checkpoint(self, info):
        self.heard.append(("checkpoint", info.step))


def train_loader() -> data.ArrayLoader:
    return data.ArrayLoader({"x": X, "y": Y}, 4, shuffle=True, seed=3)


def val_loader() -> data.ArrayLoader:
    return data.ArrayLoader({"x": X[:9], "y": Y[:9]}, 4)


def train(loader: Any = None, num_epochs: int = 3, **options: Any) -> Dropped:
    trainer = Dropped(**options)
    loader = train_loader() if loader is None else loader
    trainer.result = trainer.train_model(loader, val_loader(), num_epochs=num_epochs)
    return trainer


def log_of(root: Path) -> list[dict[str, Any]]:
    lines = (root / "metrics.jsonl").read_text().splitlines()
    return [{n: x for n, x in json.loads(line).items() if n != "time"} for line in lines]


def without_validation(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = [{n: x for n, x in line.items() if n[:4] != "val/"} for line in lines]
    return [line for line in kept if any("/" in name for name in line)]


class Last(Callback):
    """Keeps the state at the last step."""

    def on_training_end(self, info):
        self.arrays = jax.tree.map(np.asarray, {**info.state.arrays(), "rng": None})


@pytest.mark.parametrize("steps_per_call", [1, 4])
@pytest.mark.slow
def test_training_is_bit_for_bit_that_without_validation_within(steps_per_call):
    def run(**options: Any) -> tuple[Any, Any]:
        last = Last()
        options = {"root": f"runs-{len(options)}", **options}
        trainer = train(callbacks=[last], steps_per_call=steps_per_call, **options)
        return last.arrays, log_of(trainer.result.path)

    (plain, plain_log), (within, within_log) = run(), run(val_every="7 steps")
    jax.tree.map(np.testing.assert_array_equal, plain, within)
    assert without_validation(plain_log) == without_validation(within_log)
    steps = [line["step"] for line in within_log if "val/loss" in line]
    assert steps == [7, 14, 21, 28, 30]
    curves, x_label, _ = History.read(Path("runs-1/dropped/0001")).curves()
    assert x_label == "step"
    assert [step for step, _ in curves["val/loss"]] == steps
    assert [step for step, _ in curves["train/loss"]] == [10, 20, 30]


@pytest.mark.parametrize("steps_per_call", [1, 4])
@pytest.mark.slow
def test_all_that_follows_a_validation_happens_within_an_epoch(steps_per_call, tmp_path):
    witness = Witness()
    options = {"steps_per_call": steps_per_call, "root": tmp_path, "keep_last": 9}
    trainer = train(
        num_epochs=2, val_every="5 steps", callbacks=[witness], save_every=None, **options
    )

    def at(step: int) -> list[tuple[str, int]]:
        return [("validation", step), ("checkpoint", step)]

    first, second = [*at(5), ("epoch", 10), *at(10)], [*at(15), ("epoch", 20), *at(20)]
    assert witness.heard == [*first, *second]
    within = ["eval_model 5", "on_validation_epoch_end 1", "save_metrics val_step_00000005"]
    end = ["eval_model 10", "on_validation_epoch_end 1", "save_metrics val_epoch_0001"]
    rank = ["is_new_model_better", "save_model 5"]
    assert trainer.called[:5] == [*within, *rank]
    assert [x for x in trainer.called[5:] if x != "is_new_model_better"][:5] == [
        *("on_training_epoch_end 1", *end, "save_model 10"),
    ]
    path = trainer.result.path
    assert (path / "metrics/val_step_00000015.json").is_file()
    assert sorted(int(each.name[5:]) for each in (path / "checkpoints").iterdir()) == [
        5,
        10,
        15,
        20,
    ]
    assert trainer.result.history.steps["val/loss"].tolist() == [5, 10, 15, 20]
    losses = trainer.result.history["val/loss"]
    assert trainer.best.step == 5 * (1 + int(np.argmin(losses)))


class Killed(Callback):
    """Raises at the n-th event of a kind."""

    def __init__(self, event: str | None, step: int) -> None:
        self.event, self.step = event, step
        self.looked: list[int] = []

    def _meet(self, event: str, info: Any) -> None:
        if (event, info.step) == (self.event, self.step):
            raise InterruptError

    def on_step_end(self, info):
        self._meet("step", info)

    def on_validation_end(self, info):
        self._meet("validation", info)
        self.looked.append(info.step)

    def on_checkpoint(self, info):
        self._meet("checkpoint", info)

    def get_state(self):
        return {"looked": self.looked}

    def set_state(self, state):
        self.looked = list(state["looked"])


def resumable(root: str, event: str | None = None, step: int = 0, **options: Any) -> Any:
    killed, last = Killed(event, step), Last()
    options = {"root": root, "name": "run", "val_every": "7 steps", **options}
    trainer = Dropped(callbacks=[killed, last], **options)
    result = trainer.train_model(train_loader(), val_loader(), num_epochs=3)
    assert killed.looked == [7, 14, 21, 28, 30]
    return last.arrays, log_of(result.path), result.best, result.metrics


@pytest.mark.parametrize(
    ("event", "step"),
    [("step", 14), ("validation", 14), ("checkpoint", 14), ("step", 15), ("step", 24)],
)
@pytest.mark.parametrize("options", [{}, {"steps_per_call": 4, "save_every": "4 steps"}])
@pytest.mark.slow
def test_killed_around_a_validation_within_an_epoch_it_resumes_bit_for_bit(event, step, options):
    whole = resumable("whole", **options)
    with pytest.raises(InterruptError):
        resumable("cut", event, step, **options)
    resumed = resumable("cut", **options)
    assert len(list(Path("cut/run").iterdir())) == 1
    jax.tree.map(np.testing.assert_array_equal, whole[0], resumed[0])
    assert whole[1:] == resumed[1:]


@pytest.mark.slow
def test_interrupted_during_a_validation_within_an_epoch_it_validates_again(monkeypatch):
    whole = resumable("whole", save_every=None, steps_per_call=1)

    class Stops(Dropped):
        def eval_model(self, loader, prefix="", **weights):
            if self.step == 14:
                self.last_run.supervisor._interruption._handle(15, None)
            return super().eval_model(loader, prefix, **weights)

    options = {"root": "cut", "name": "run", "val_every": "7 steps", "save_every": None}
    stops = Stops(callbacks=[Killed(None, 0), Last()], steps_per_call=1, **options)
    monkeypatch.setattr("distaff.run.supervision.interruption._send_again", lambda number: None)
    ended = stops.train_model(train_loader(), val_loader(), num_epochs=3)
    assert (ended.status, ended.step) == ("interrupted", 14)
    assert stops.called[-1] == "eval_model 14"
    resumed = resumable("cut", save_every=None, steps_per_call=1)
    jax.tree.map(np.testing.assert_array_equal, whole[0], resumed[0])
    assert whole[1:] == resumed[1:]


def test_a_validation_within_an_epoch_may_stop_the_run_at_its_step():
    stop = EarlyStopping(Monitor("val/loss"), stopping_threshold=1e9)
    for steps_per_call in (1, 4):
        witness = Witness()
        callbacks, options = [stop, witness], {"steps_per_call": steps_per_call}
        trainer = train(val_every="6 steps", callbacks=callbacks, **options)
        assert (trainer.result.status, trainer.result.step) == ("stopped", 6)
        assert witness.heard == [("validation", 6), ("checkpoint", 6), ("epoch", 6)]
        assert "train/loss" in trainer.result.metrics


def test_a_state_that_a_hook_changes_within_an_epoch_is_trained_on():
    class Resets(Dropped):
        def on_validation_epoch_end(self, epoch, metrics, val_loader):
            if self.step == 7:
                zeros = jax.tree.map(jax.numpy.zeros_like, self.state.params)
                self.state = self.state.replace(params=zeros)

    last = Last()
    reset = Resets(val_every="7 steps", callbacks=[last], optimizer=optax.sgd(0.1))
    reset.train_model(train_loader(), val_loader(), num_epochs=1)
    kernels = [x for x in jax.tree.leaves(last.arrays["params"]) if x.ndim == 2]
    assert not any(np.any(x) for x in kernels)  # their gradients are 0, too


@pytest.mark.slow
def test_a_loader_of_unknown_length_that_ends_at_a_validation_validates_once():
    def ten():
        yield from list(data.ArrayLoader({"x": X, "y": Y}, 4))

    witness = Witness()
    train(ten, 2, val_every="5 steps", callbacks=[witness], optimizer=optax.sgd(0.1))
    steps = [step for event, step in witness.heard if event == "validation"]
    assert steps == [5, 10, 15, 20]


@pytest.mark.slow
def test_a_train_epoch_that_makes_its_steps_itself_cannot_be_interrupted():
    class Own(Dropped):
        def train_epoch(self, train_loader, epoch):
            for batch in train_loader:
                self.state, _ = self.train_step(self.state, batch)
            return {}

    with pytest.raises(ConfigError, match=r"Own.train_epoch makes its steps itself.*every 5 steps"):
        Own(val_every="5 steps").train_model(train_loader(), val_loader(), num_epochs=1)
    own = Own(val_every="2 epochs").train_model(train_loader(), val_loader(), num_epochs=2)
    assert own.step == 20


def test_models_are_not_ranked_within_epochs_by_a_metric_of_epochs():
    class ByTraining(Dropped):
        monitor = Monitor("train/loss")

    with pytest.raises(ConfigError, match=r"'train/loss' has a value at the ends of epochs only"):
        ByTraining(val_every="5 steps").train_model(train_loader(), val_loader(), num_epochs=1)


@pytest.mark.slow
def test_val_every_of_epochs_is_check_val_every_n_epoch():
    def steps(**options: Any) -> list[tuple[str, int]]:
        witness = Witness()
        train(callbacks=[witness], **options)
        return witness.heard

    assert steps(val_every="2 epochs") == steps(check_val_every_n_epoch=2)
    assert ("validation", 10) not in steps(val_every="2 epochs")
    with pytest.raises(ConfigError, match="both say when to validate"):
        Dropped(val_every="2 epochs", check_val_every_n_epoch=2)
    with pytest.raises(ConfigError, match="would not be reproducible"):
        Dropped(val_every="10m")
    with pytest.raises(ConfigError, match="Write the unit"):
        Dropped(val_every=500)


@pytest.mark.parametrize("steps_per_call", [1, 4])
@pytest.mark.slow
def test_saves_every_so_many_steps_or_epochs(steps_per_call, tmp_path, monkeypatch):
    saved: list[int] = []
    original = CheckpointStore.save

    def save(self, step, arrays, info):
        saved.append(step)
        original(self, step, arrays, info)

    monkeypatch.setattr(CheckpointStore, "save", save)
    options = {"check_val_every_n_epoch": 3, "steps_per_call": steps_per_call, "root": tmp_path}
    train(save_every="6 steps", **options)
    assert saved == [6, 12, 18, 24, 30, 30]
    saved.clear()
    train(save_every="2 epochs", name="other", **options)
    assert saved == [20, 30]


def run_of(num_epochs: Any, root: str, killed: Callback | None = None, **options: Any) -> Any:
    last, witness = Last(), Witness()
    callbacks = [last, witness, *([killed] if killed else [])]
    trainer = Dropped(root=root, name="run", callbacks=callbacks, **options)
    result = trainer.train_model(train_loader(), val_loader(), num_epochs=num_epochs)
    return last.arrays, witness.heard, result, trainer


@pytest.mark.slow
def test_a_run_of_so_many_steps_ends_within_an_epoch_validated_and_saved():
    options = {"optimizer": OptimizerConfig("adam", schedule="linear", end_fraction=0.0)}
    _, heard, result, trainer = run_of("23 steps", "few", **options)
    assert (result.status, result.step, result.epoch) == ("finished", 23, 3)
    assert heard[-3:] == [("epoch", 23), ("validation", 23), ("checkpoint", 23)]
    assert trainer.last_run.plan.total_steps == 23
    config = json.loads((result.path / "config.json").read_text())
    assert (config["num_epochs"], config["identity"]["total_steps"]) == ("23 steps", 23)
    rates = [line["step/learning_rate"] for line in log_of(result.path) if "step/loss" in line]
    assert rates[-1] == pytest.approx(1e-3 / 23)
    whole = {"optimizer": optax.adam(1e-3)}
    few, three = run_of("30 steps", "thirty", **whole), run_of("3 epochs", "three", **whole)
    jax.tree.map(np.testing.assert_array_equal, few[0], three[0])
    assert few[1] == three[1]


@pytest.mark.slow
def test_a_run_of_so_many_steps_resumes_bit_for_bit_and_may_be_longer():
    options = {"save_every": "4 steps", "optimizer": optax.adam(1e-3)}
    whole = run_of("23 steps", "whole", **options)
    with pytest.raises(InterruptError):
        run_of("17 steps", "cut", Killed("step", 14), **options)
    resumed = run_of("23 steps", "cut", Killed(None, 0), **options)
    jax.tree.map(np.testing.assert_array_equal, whole[0], resumed[0])
    assert len(list(Path("cut/run").iterdir())) == 1
    assert log_of(whole[2].path) == log_of(resumed[2].path)


def test_a_budget_needs_a_length_and_is_no_time():
    def endless():
        while True:
            yield {"x": X[:4], "y": Y[:4]}

    trainer = Dropped(optimizer=optax.sgd(0.1))
    with pytest.raises(ConfigError, match="'25 steps' needs the length of an epoch"):
        trainer.train_model(endless, num_epochs="25 steps")
    result = trainer.train_model(endless, num_epochs="25 steps", steps_per_epoch=10)
    assert (result.step, result.epoch) == (25, 3)
    with pytest.raises(ConfigError, match=r"'cosine' needs.*the run ends after a time"):
        Dropped().train_model(train_loader(), num_epochs="2h")


@pytest.mark.slow
def test_a_rollback_returns_to_a_validation_within_an_epoch():
    x = X.copy()
    x[33] = np.nan  # in the ninth batch of each epoch
    witness = Witness()
    options = {"on_bad_numbers": "rollback", "steps_per_call": 1, "on_bad_input": "ignore"}
    back = Dropped(val_every="2 steps", callbacks=[witness], root="runs", keep_last=9, **options)
    result = back.train_model(data.ArrayLoader({"x": x, "y": Y}, 4), val_loader(), num_epochs=1)
    assert result.status == "finished"
    [skipped] = back.last_run.state.skipped
    assert (skipped.start, skipped.stop, skipped.back_to) == (6, 11, 6)
    assert [step for event, step in witness.heard if event == "validation"] == [2, 4, 6, 8]
    assert result.history.steps["val/loss"].tolist() == [2, 4, 6]
    assert (result.step, result.best.step) == (6, back.best.step)


@pytest.mark.slow
def test_checkpoints_to_keep_and_log_lines_are_given_in_steps(tmp_path):
    options = {"log_every_n_steps": "6 steps", "keep_every": "10 steps", "keep_last": 1}
    trainer = train(val_every="5 steps", root=tmp_path, **options)
    path = trainer.result.path
    kept = {int(each.name[5:]) for each in (path / "checkpoints").iterdir()}
    assert kept == {10, 20, 30, trainer.last_run.best_models[0].step}
    lines = [line["step"] for line in log_of(path) if "step/loss" in line]
    assert lines == [6, 10, 12, 18, 20, 24, 30]
