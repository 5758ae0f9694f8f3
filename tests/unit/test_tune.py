"""A study: its trials are runs, it prunes, refuses, goes on, and tests the best model once."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optuna
import pytest
from optuna import pruners

import distaff
from distaff import Callback, EarlyStopping, Monitor, OptimizerConfig, data
from distaff.core.config.encoding import override
from distaff.errors import (
    ConfigError,
    MetricError,
    NonFiniteError,
    RunDirectoryError,
    StateError,
)
from distaff.loggers import MemoryLogger
from distaff.tune import Choice, Float, Int, study

RATE = "optimizer.learning_rate"
SPACE = {RATE: Float(1e-3, 0.5, log=True)}
SGD = OptimizerConfig("sgd", learning_rate=0.1, schedule="constant")


@dataclasses.dataclass(frozen=True)
class Config:
    optimizer: OptimizerConfig = SGD
    batch_size: int = 8


class Line(distaff.TrainerModule):
    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])


class Scripted(Line):
    """Its validation scores are written beforehand, by the number of the trial."""

    monitor = Monitor("val/score")
    scores: tuple[tuple[float, ...], ...] = ()

    def on_validation_epoch_end(self, epoch, metrics, val_loader):
        metrics["val/score"] = self.scores[self.config.seed - 42][epoch - 1]


class AtStep(Callback):
    """Raises an exception after a step."""

    def __init__(self, step: int, exception: BaseException) -> None:
        self.step, self.exception = step, exception

    def on_step_end(self, info):
        if info.step == self.step:
            raise self.exception


class Counted:
    """A loader that counts how often it is gone through."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.count = loader, 0

    def __iter__(self) -> Iterator[Any]:
        self.count += 1
        return iter(self.loader)


def loader(seed: int, **options: Any) -> data.ArrayLoader:
    x = np.random.default_rng(seed).normal(size=(16, 3)).astype(np.float32)
    y = x @ np.float32([1.0, -2.0, 0.5])
    return data.ArrayLoader({"x": x, "y": y}, batch_size=8, **options)


def loaders(config: Config) -> tuple[Any, Any, Any]:
    return loader(0, shuffle=True), loader(1), loader(2)


def trainer(config: Config, cls: type[Any] = Line, **options: Any) -> Any:
    defaults = {"name": "line", "enable_progress_bar": False}
    return cls(nn.Dense(1), optimizer=config.optimizer, **{**defaults, **options})


def search(
    make_trainer: Any = trainer, space: Any = None, config: Any = None, **options: Any
) -> Any:
    make_loaders = options.pop("make_loaders", loaders)
    counts = {"num_trials": 3, "num_epochs": 2, **options}
    return study(make_trainer, space or SPACE, config or Config(), make_loaders, **counts)


def scripted(scores: Any, mode: str = "min", **options: Any) -> Any:
    """Runs a study whose scores are given by trial and epoch."""

    def make_trainer(config: Config) -> Any:
        made = trainer(config, Scripted)
        made.scores, made.monitor = scores, Monitor("val/score", mode)
        return made

    counts = {"num_trials": len(scores), "num_epochs": len(scores[0])}
    return search(make_trainer, **counts, **options)


def runs() -> list[str]:
    return sorted(path.name for path in Path("runs/line").iterdir())


def read(path: Path, name: str) -> Any:
    return json.loads((path / name).read_text())


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_trials_are_ordinary_runs_and_only_the_best_is_tested():
    test = Counted(loader(2))
    space = {**SPACE, "optimizer.name": Choice("sgd", "adam")}
    result = search(space=space, make_loaders=lambda config: (*loaders(config)[:2], test))
    assert [trial.number for trial in result.trials] == [0, 1, 2]
    assert result.front == (result.best,)
    assert [trial.path for trial in result.trials] == [
        Path(f"runs/line/000{n}").absolute() for n in (1, 2, 3)
    ]
    for trial in result.trials:
        recorded = read(trial.path, "config.json")
        assert trial.status == read(trial.path, "status.json")["status"] == "finished"
        assert trial.seed == recorded["options"]["seed"] == 42 + trial.number
        used = {path: recorded["optimizer"][path.split(".")[1]] for path in space}
        assert used == trial.values
        losses = [line["val/loss"] for line in lines(trial.path) if "val/loss" in line]
        assert trial.value == min(losses)
        loaded = Line.load_from_checkpoint(trial.path)
        assert loaded.eval_model(loader(1), "val/")["val/loss"] == trial.value
        assert (trial.path / "metrics" / "test.json").exists() == (trial == result.best)
    assert test.count == 1
    assert result.best == min(result.trials, key=lambda trial: trial.value)
    assert result.config == override(Config(), result.best.values)
    tested = Line.load_from_checkpoint(result.best.path).eval_model(loader(2), "test/")
    assert result.metrics == tested == read(result.best.path, "metrics/test.json")
    assert isinstance(result.study, optuna.Study)
    assert isinstance(result.study.sampler, optuna.samplers.TPESampler)
    assert isinstance(result.study.pruner, pruners.MedianPruner)
    assert Path("runs/study.journal").exists()


@pytest.mark.slow
def test_config_s_own_values_come_first():
    result = search(num_trials=2, num_epochs=1)
    first, second = (trial.values[RATE] for trial in result.trials)
    assert first == 0.1
    assert 1e-3 <= second <= 0.5


@pytest.mark.slow
def test_config_s_own_values_are_left_out_where_the_space_lacks_them():
    result = search(space={RATE: Float(0.2, 0.3)}, num_trials=1, num_epochs=1)
    assert 0.2 <= result.best.values[RATE] <= 0.3


@pytest.mark.slow
def test_trial_is_trained_again_by_hand_bit_for_bit():
    trial = search(num_trials=2).trials[1]
    by_hand = trainer(override(Config(), trial.values), seed=trial.seed, root="by_hand")
    result = by_hand.train_model(*loaders(Config())[:2], num_epochs=2)
    for epoch in (1, 2):
        name = f"metrics/val_epoch_{epoch:04d}.json"
        assert read(result.path, name) == read(trial.path, name)
    assert by_hand.best.metrics["val/loss"] == trial.value
    params = Line.load_from_checkpoint(trial.path).state.params
    jax.tree.map(np.testing.assert_array_equal, by_hand.state.params, params)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["min", "max"])
def test_pruning_goes_by_the_monitored_metric_at_every_validation(mode):
    sign = 1 if mode == "min" else -1
    scores = [[sign * score for score in trial] for trial in ((4.0, 3.0, 2.0), (1.0, -9.0, 0.0))]
    pruner = pruners.ThresholdPruner(lower=-5.0, upper=5.0)
    result = scripted(scores, mode, pruner=pruner)
    assert [trial.status for trial in result.trials] == ["finished", "pruned"]
    for trial, stored, num_epochs in zip(result.trials, result.study.trials, (3, 2), strict=True):
        logged = [line["val/score"] for line in lines(trial.path) if "val/score" in line]
        assert logged == scores[trial.number][:num_epochs]
        assert stored.intermediate_values == dict(enumerate(logged, 1))
    assert [trial.value for trial in result.trials] == [2 * sign, -9 * sign]
    assert result.best == result.trials[0]  # however good the pruned one was
    assert result.study.direction.name == {"min": "MINIMIZE", "max": "MAXIMIZE"}[mode]


def test_pruned_trial_is_a_normal_end():
    loggers: list[MemoryLogger] = []

    class Grouped(MemoryLogger):
        group: str | None = None

        def set_group(self, group: str) -> None:
            self.group = group

    def make_trainer(config: Config) -> Any:
        loggers.append(Grouped())
        return trainer(config, loggers=loggers[-1:])

    with pytest.raises(StateError, match=r"No trial has finished: 0 pruned, 1 pruned"):
        search(make_trainer, num_trials=2, num_epochs=5, pruner=pruners.ThresholdPruner(upper=0.0))
    assert [logger.status for logger in loggers if logger.records] == ["pruned", "pruned"]
    assert [logger.group for logger in loggers if logger.records] == ["study", "study"]
    for run in Path("runs/line").iterdir():
        status = read(run, "status.json")
        assert (status["status"], status["epoch"], status["step"]) == ("pruned", 1, 2)
        assert status["reason"].startswith("pruned after epoch 1 with val/loss ")
        assert status["ended"] is not None
        loaded = Line.load_from_checkpoint(run)
        assert loaded.eval_model(loader(1), "val/")["val/loss"] == lines(run)[-1]["val/loss"]


def test_nothing_is_pruned_after_the_last_epoch():
    result = scripted(((1.0, 9.0),), pruner=pruners.ThresholdPruner(upper=5.0))
    assert (result.best.status, result.best.value) == ("finished", 1.0)


def test_early_stopping_is_an_end_like_any_other():
    def make_trainer(config: Config) -> Any:
        stopping = EarlyStopping(Monitor("val/score"), patience=1)
        made = trainer(config, Scripted, callbacks=[stopping])
        made.scores = ((1.0, 2.0, 0.0),)
        return made

    result = search(make_trainer, num_trials=1, num_epochs=3)
    assert (result.best.status, result.best.value) == ("stopped", 1.0)


class TwoScores(Line):
    """Has a second metric that a smaller learning rate makes better."""

    def loss_fn(self, params, batch, ctx):
        size = sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(params))
        return super().loss_fn(params, batch, ctx), {"size": size}


TWO = {"val/size": "min", "val/loss": "min"}


@pytest.mark.slow
def test_several_objectives_are_values_of_one_model_and_only_the_best_is_tested():
    test = Counted(loader(2))
    result = search(
        lambda config: trainer(config, TwoScores),
        make_loaders=lambda config: (*loaders(config)[:2], test),
        num_trials=4,
        objectives=TWO,
    )
    for trial in result.trials:
        found = TwoScores.load_from_checkpoint(trial.path).eval_model(loader(1), "val/")
        assert trial.objectives == {name: found[name] for name in TWO}
        assert trial.value == trial.objectives["val/loss"]
        stored = result.study.trials[trial.number]
        assert (stored.values, stored.intermediate_values) == ([*trial.objectives.values()], {})
        assert (trial.path / "metrics" / "test.json").exists() == (trial == result.best)
    assert test.count == 1
    assert result.best == min(result.trials, key=lambda trial: trial.value)
    assert result.best in result.front
    assert all(trial in result.trials for trial in result.front)
    again = search(lambda config: trainer(config, TwoScores), num_trials=4, objectives=TWO)
    assert again[:4] == result[:4]
    assert again.front == result.front


@pytest.mark.slow
def test_several_objectives_of_trials_in_batches():
    made = lambda config: trainer(config, TwoScores)  # noqa: E731
    result = search(made, num_trials=2, num_epochs=1, batch=2, objectives=TWO)
    for trial in result.trials:
        assert trial.objectives.keys() == TWO.keys()
        (line,) = (line for line in lines(trial.path) if "val/loss" in line)
        assert trial.objectives == {name: line[name] for name in TWO}


def refused(make_trainer: Any = trainer, error: type[Exception] = ConfigError, **options: Any):
    options.setdefault("complaint", "")
    return make_trainer, error, options


SAME = loader(0)
REFUSED = {
    "unknown path": refused(space={"optimizer.rate": Float(0, 1)}, complaint="'optimizer.rate'"),
    "bound": refused(space={RATE: Float(-1, 1)}, complaint="cannot be searched"),
    "monitor": refused(
        lambda config: trainer(config, type("Other", (Line,), {"monitor": Monitor("val/losss")})),
        MetricError,
        complaint=r"Did you mean 'val/loss'\?",
    ),
    "no trainer": refused(lambda config: nn.Dense(1), complaint="returns a TrainerModule"),
    "a trainer": refused(Line(nn.Dense(1)), complaint="make_trainer must be a function"),
    "initialised": refused(
        lambda config: trainer(config, example_batch=next(iter(SAME))), complaint="initialized"
    ),
    "same trainer": refused(cache(lambda config: trainer(config)), complaint="initialized"),
    "no root": refused(lambda config: trainer(config, root=None), complaint="Set a root"),
    "never validated": refused(
        lambda config: trainer(config, check_val_every_n_epoch=3), complaint="validate more often"
    ),
    "within epochs": refused(
        lambda config: trainer(config, val_every="3 steps"), complaint="at the ends of epochs"
    ),
    "loaders": refused(make_loaders=loaders(Config()), complaint="function of the config"),
    "two loaders": refused(make_loaders=lambda config: loaders(config)[:2], complaint="train, val"),
    "no validation": refused(
        make_loaders=lambda config: (loader(0), None, loader(2)), complaint="val may not"
    ),
    "same loader": refused(
        make_loaders=lambda config: (SAME, loader(1), None), complaint="same train loader"
    ),
    "arrays": refused(
        make_loaders=lambda config: (np.ones((4, 3)), loader(1), None),
        error=distaff.errors.BatchError,
        complaint="whole dataset",
    ),
    "no trials": refused(num_trials=0, complaint="num_trials"),
    "no epochs": refused(num_epochs=0, complaint="num_epochs"),
    "option": refused(sampler=None, prune=None, complaint="option 'prune'.*'pruner'"),
    "sampler": refused(sampler="tpee", complaint=r"got 'tpee'\. Did you mean 'tpe'"),
    "pruner": refused(pruner=pruners.NopPruner, complaint="'pruner' of a study is a BasePruner"),
    "objective": refused(
        objectives=("val/loss", "val/accurracy"), error=MetricError, complaint="'val/accurracy'"
    ),
    "one objective": refused(objectives=("val/loss",), complaint="two or more"),
    "pruned objectives": refused(
        lambda config: trainer(config, TwoScores),
        objectives=TWO,
        pruner=pruners.MedianPruner(),
        complaint="cannot be pruned",
    ),
    "name": refused(study_name="", complaint="'study_name' of a study is a str; got ''"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.slow
def test_bad_input_fails_before_anything_is_written(case, tmp_path):
    make_trainer, error, options = REFUSED[case]
    options = dict(options)
    with pytest.raises(error, match=options.pop("complaint")):
        search(make_trainer, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_error_of_the_storage_names_it_without_its_password():
    Path("file").write_text("in the way")
    with pytest.raises(RunDirectoryError, match=r"'file/study.journal' cannot: .*file"):
        search(storage="file/study.journal")
    with pytest.raises(RunDirectoryError, match=r"'host/db' cannot: "):
        search(storage="nosuch://user:secret@host/db")


@pytest.mark.slow
def test_second_call_trains_what_is_missing_and_tests_once():
    test = Counted(loader(2))

    def make_loaders(config: Config) -> tuple[Any, Any, Any]:
        return *loaders(config)[:2], test

    def go_on(num_trials: int) -> Any:
        return search(num_trials=num_trials, num_epochs=1, make_loaders=make_loaders)

    first = go_on(2)
    again = go_on(2)
    assert (runs(), test.count) == (["0001", "0002"], 1)
    assert again[:4] == first[:4]
    more = go_on(3)
    assert more.trials[:2] == first.trials
    assert runs() == ["0001", "0002", "0003"]
    assert test.count == 1 + (more.best != first.best)


@pytest.mark.slow
def test_study_goes_on_where_its_root_was_moved():
    def make_trainer(root: str) -> Any:
        return lambda config: trainer(config, root=root)

    first = search(make_trainer("runs"), num_trials=1, num_epochs=1)
    Path("runs").rename("elsewhere")
    again = search(make_trainer("elsewhere"), num_trials=1, num_epochs=1)
    assert str(again.best.path) == str(Path("elsewhere/line/0001").absolute())
    assert again.best[:5] == first.best[:5]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"space": {RATE: Float(1e-3, 1.0, log=True)}}, rf"space.{RATE}.high: 0.5, now 1.0"),
        ({"space": {"batch_size": Int(4, 8)}}, "space.batch_size: absent, now {'kind': 'Int'"),
        ({"make_trainer": "max"}, "mode: 'min', now 'max'"),
        ({"num_epochs": 1}, "num_epochs: 2, now 1"),
        ({"steps_per_epoch": 1}, "steps_per_epoch: None, now 1"),
    ],
)
def test_study_does_not_go_on_as_another(change, complaint, begun):
    def maximizing(config: Config) -> Any:
        made = trainer(config)
        made.monitor = Monitor("val/loss", "max", insist=True)
        return made

    if "make_trainer" in change:
        change = {"make_trainer": maximizing}
    with pytest.raises(ConfigError, match=rf"was begun with .*{complaint}.*another study_name"):
        search(**change, storage=begun)


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A journal of a study that has begun, and holds no trial yet."""
    journal = tmp_path_factory.mktemp("begun") / "study.journal"

    checked = iter([trainer, trainer])

    def interrupted(config: Config) -> Any:
        for make in checked:
            return make(config)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(interrupted, storage=journal)
    return journal


@pytest.mark.slow
def test_other_config_under_the_same_name_is_warned_of():
    search(num_trials=1, num_epochs=1)
    other = Config(dataclasses.replace(SGD, learning_rate=0.2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # what varies anyway is no other config
        search(config=other, num_trials=1, num_epochs=1)
    assert [str(each.message) for each in caught] == []
    with pytest.warns(UserWarning, match=r"another config \(batch_size: 8, now 4\)"):
        search(config=Config(batch_size=4), num_trials=1, num_epochs=1)


def failing_at(rate: float, error: BaseException) -> Any:
    """Makes trainers of which those with a learning rate fail in the second epoch."""

    def make_trainer(config: Config) -> Any:
        fails = (config.optimizer.learning_rate == 0.1) == (rate == 0.1)
        return trainer(config, callbacks=[AtStep(3, error)] if fails else [])

    return make_trainer


@pytest.mark.slow
def test_interrupted_trial_is_tried_again_with_its_values():
    interrupted = failing_at(rate=0.5, error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt) as caught:
        search(interrupted)
    (note,) = caught.value.__notes__
    assert "trial 1 of a study" in note
    assert read(Path("runs/line/0002"), "status.json")["status"] == "interrupted"
    result = search(num_trials=2)
    assert [trial.number for trial in result.trials] == [0, 2]
    assert [trial.seed for trial in result.trials] == [42, 43]
    assert f"with {result.trials[1].values}." in note
    assert runs() == ["0001", "0002", "0003"]


class Once(AtStep):
    """Raises once, whichever trainer it belongs to."""

    def on_step_end(self, info):
        if (exception := self.exception) is not None and info.step == self.step:
            self.exception = None
            raise exception


def test_interrupted_trial_resumes_from_its_checkpoint():
    once = Once(3, KeyboardInterrupt())
    once.get_state, once.set_state = dict, lambda state: None
    with pytest.raises(KeyboardInterrupt):
        search(lambda config: trainer(config, callbacks=[once]), num_trials=1)
    result = search(lambda config: trainer(config, callbacks=[once]), num_trials=1)
    (resumed,) = result.trials
    assert (resumed.number, resumed.seed, resumed.status) == (1, 42, "finished")
    assert runs() == ["0001"]
    status = read(resumed.path, "status.json")
    assert (status["status"], status["starts"], status["key"]) == ("finished", 2, "study/trial-0")
    assert "from its checkpoint of step 2, epoch 1" in (resumed.path / "log.txt").read_text()
    by_hand = trainer(Config(), callbacks=[once], root="by_hand")
    by_hand.train_model(*loaders(Config())[:2], num_epochs=2)
    assert by_hand.best.metrics["val/loss"] == resumed.value
    assert result.study.trials[1].intermediate_values.keys() == {1, 2}


@pytest.mark.slow
def test_interrupted_study_equals_one_that_was_not():
    def results(name: str, result: Any) -> list[Any]:
        records = [lines(trial.path) for trial in result.trials]
        timeless = [[{n: x for n, x in line.items() if n != "time"} for line in r] for r in records]
        return [[trial[1:5] for trial in result.trials], timeless, result.best[1:5], result.metrics]

    options = {"num_trials": 6, "space": {**SPACE, "batch_size": Int(2, 8)}}
    whole = results("whole", search(**options, study_name="whole"))
    once = Once(3, KeyboardInterrupt())
    once.get_state, once.set_state = dict, lambda state: None
    search(**{**options, "num_trials": 3}, study_name="cut")
    with pytest.raises(KeyboardInterrupt):
        search(lambda config: trainer(config, callbacks=[once]), **options, study_name="cut")
    cut = search(lambda config: trainer(config, callbacks=[once]), **options, study_name="cut")
    assert [trial.number for trial in cut.trials] == [0, 1, 2, 4, 5, 6]
    assert results("cut", cut) == whole


@pytest.fixture
def exits_at_sigterm() -> Iterator[None]:
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    yield
    signal.signal(signal.SIGTERM, previous)


@pytest.mark.slow
@pytest.mark.usefixtures("exits_at_sigterm")
@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_signal_at_the_last_step_ends_the_study_and_the_trial_counts(number, error):
    class Pressing(Callback):
        pressed = False

        def on_training_end(self, info):
            if not Pressing.pressed:
                Pressing.pressed = True
                os.kill(os.getpid(), number)

    def go_on() -> Any:
        return search(lambda config: trainer(config, callbacks=[Pressing()]), num_trials=2)

    with pytest.raises(error):
        go_on()
    assert runs() == ["0001"]
    assert read(Path("runs/line/0001"), "status.json")["status"] == "finished"
    result = go_on()
    assert [trial.seed for trial in result.trials] == [42, 43]
    assert runs() == ["0001", "0002"]
    assert read(Path("runs/line/0001"), "status.json")["starts"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "is_counted"),
    [
        (MemoryError("out of memory"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory allocating"), True),
        (jax.errors.JaxRuntimeError("INTERNAL: another"), False),
    ],
    ids=["host", "device", "another"],
)
def test_trial_that_runs_out_of_memory_has_failed_and_the_study_goes_on(error, is_counted):
    make_trainer = failing_at(rate=0.1, error=error)
    if not is_counted:
        with pytest.raises(jax.errors.JaxRuntimeError, match="another"):
            search(make_trainer, num_trials=2, num_epochs=2)
        return
    first, second = search(make_trainer, num_trials=2, num_epochs=2).trials
    assert (first.status, first.value, second.status) == ("failed", None, "finished")


@pytest.mark.slow
def test_values_that_always_end_in_an_error_count_as_failed():
    make_trainer = failing_at(rate=0.1, error=ZeroDivisionError("mine"))
    for _ in range(3):
        with pytest.raises(ZeroDivisionError, match="mine"):
            search(make_trainer, num_trials=2)
    result = search(make_trainer, num_trials=2)
    failed, finished = result.trials
    assert (failed.number, failed.status, failed.value) == (2, "failed", None)
    assert (failed.values, failed.path) == ({RATE: 0.1}, Path("runs/line/0003").absolute())
    assert (finished.number, finished.status) == (3, "finished")
    assert read(failed.path, "status.json")["reason"] == "ZeroDivisionError: mine"


class NanLoss(Line):
    """Its loss is NaN in the third step."""

    def loss_fn(self, params, batch, ctx):
        return jnp.where(ctx.state.step == 2, jnp.nan, super().loss_fn(params, batch, ctx))


@pytest.mark.slow
def test_trial_whose_loss_is_nan_has_failed_and_the_study_goes_on():
    def make_trainer(config: Config) -> Any:
        return trainer(config, NanLoss if config.optimizer.learning_rate == 0.1 else Line)

    result = search(make_trainer, num_trials=2)
    first, second = result.trials
    assert (first.status, first.value, first.seed) == ("failed", None, 42)
    assert read(first.path, "status.json")["status"] == "failed"
    assert "NaN or infinite at step 3" in result.study.trials[0].user_attrs["reason"]
    assert result.best == second
    assert len(search(make_trainer, num_trials=2).trials) == 2


def test_trial_whose_metric_is_nan_has_failed():
    with pytest.raises(NonFiniteError, match=r"All 1 trials failed.*\(0 failed\)"):
        scripted(((float("nan"), float("nan")),), pruner=pruners.NopPruner())
    assert runs() == ["0001"]
