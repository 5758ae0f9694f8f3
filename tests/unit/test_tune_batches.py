"""Trials in batches: the same trials as one by one, with few programs, and through kills."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optuna import pruners, samplers

from distaff import Callback, Monitor, OptimizerConfig, TrainerModule, data, tasks, zoo
from distaff.core.config.encoding import override
from distaff.errors import ConfigError
from distaff.tune import Choice, Float, study, traced
from distaff.tune.batches.grouping import TrialGrouping
from distaff.tune.batches.loop import Batches
from distaff.tune.population import training
from distaff.tune.population.directory import PopulationDirectory
from distaff.tune.population.training import PopulationRun
from distaff.tune.recipe import RecipeTask
from distaff.tune.study import run_study
from distaff.tune.trial import FactoryTask

RATE, DECAY = "optimizer.learning_rate", "optimizer.weight_decay"
SPACE = {RATE: Float(1e-3, 0.3, log=True), DECAY: Float(1e-4, 0.1, log=True)}
X = np.random.default_rng(0).normal(size=(56, 4)).astype(np.float32)


MODEL = (
    lambda key, x: {"w": jax.random.normal(key, (4, 1)), "bias": jnp.zeros((1, 1))},
    lambda params, x: (x @ params["w"] + params["bias"])[:, 0],
)
OPTIMIZER = OptimizerConfig("adamw", learning_rate=0.02, weight_decay=0.01)


@dataclasses.dataclass(frozen=True)
class Config:
    optimizer: OptimizerConfig = OPTIMIZER
    smoothing: float = 0.0
    batch_size: int = 16


class Line(TrainerModule):
    def loss_fn(self, params: Any, batch: Any, ctx: Any) -> Any:
        return jnp.square(ctx.apply(params, batch["x"]) - batch["x"].sum(axis=1))


def line(config: Config, cls: type[Any] = Line, **options: Any) -> Any:
    options = {"name": "line", "enable_progress_bar": False, "save_curves": False, **options}
    return cls(MODEL, optimizer=config.optimizer, **options)


def loaders(config: Config) -> tuple[Any, Any, Any]:
    train = data.ArrayLoader({"x": X[:48]}, config.batch_size, shuffle=True, seed=5)
    return train, data.ArrayLoader({"x": X[48:]}, 8), None


def search(batch: int, make: Any = line, space: Any = None, **options: Any) -> Any:
    options = {"num_trials": 6, "num_epochs": 3, "sampler": "random", **options}
    options.setdefault("pruner", pruners.NopPruner())
    name = options.pop("study_name", f"by-{batch}")
    make_loaders = options.pop("make_loaders", loaders)
    parts = make, space or SPACE, Config(), make_loaders
    return study(*parts, batch=batch, study_name=name, **options)


def epochs(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(row) for row in (path / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if any(name.startswith("val/") for name in row)]


def summary(shown: str) -> str:
    return shown.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["in turn", "stacked"])
def test_trials_of_a_batch_are_those_trained_one_by_one(form: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(training, "choose_form", lambda *_: form)
    together, alone = search(4), search(1)
    for one, other in zip(together.trials, alone.trials, strict=True):
        assert one[:2] + one[3:5] == other[:2] + other[3:5]
        assert one.value == pytest.approx(other.value, rel=1e-5)
        for row, single in zip(epochs(one.path), epochs(other.path), strict=True):
            assert row == pytest.approx(single, rel=1e-5)
        loaded = [Line.load_from_checkpoint(x.path, model=MODEL) for x in (one, other)]
        weights = [trainer.state.params for trainer in loaded]
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), *weights)
    assert together.best.number == alone.best.number


@pytest.mark.slow
def test_programs_are_compiled_once_per_static_group(capsys: Any) -> None:
    space = {**SPACE, "optimizer.name": Choice("adamw", "lion")}
    found = search(4, lambda c: line(c, enable_progress_bar=True), space, num_trials=10)
    assert len({trial.values["optimizer.name"] for trial in found.trials}) == 2
    # Of batches of 4, 4 and 2, each has trials with both optimizers.
    assert summary(capsys.readouterr().out) == (
        "10 trials in 3 batches, 2 static groups, 4 programs compiled"
    )


@dataclasses.dataclass(frozen=True)
class Many:
    optimizer: OptimizerConfig = OPTIMIZER
    dropout: float = 0.1
    smoothing: float = 0.1
    shift: float = 0.1


class Shifted(tasks.Classifier):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(tasks.Classifier.Config):
        shift: float = traced(0.0)

    def loss_fn(self, params: Any, batch: Any, ctx: Any) -> Any:
        loss, metrics = super().loss_fn(params, batch, ctx)
        return (loss + 1 if self.config.shift > 0.5 else loss), metrics  # decides in Python


def classifier(config: Many, **options: Any) -> Shifted:
    options = {"name": "many", "save_curves": False, **options}
    model = zoo.MLP((4, 2), dropout=config.dropout)
    values = {"label_smoothing": config.smoothing, "shift": config.shift}
    return Shifted(model, optimizer=config.optimizer, **values, **options)


def classes(config: Many) -> tuple[Any, Any, Any]:
    arrays = {"x": X, "label": (X[:, 0] > 0).astype(np.int32)}
    return data.ArrayLoader(arrays, 14, shuffle=True, seed=5), data.ArrayLoader(arrays, 28), None


@pytest.mark.slow
def test_values_of_the_model_and_the_loss_share_programs(capsys: Any) -> None:
    ranges = {"dropout": Float(0.1, 0.5), "smoothing": Float(0.05, 0.2)}
    space = {**ranges, "optimizer.clip_norm": Float(0.5, 2.0), RATE: SPACE[RATE]}
    config = Many(OptimizerConfig("adamw", learning_rate=0.02, clip_norm=1.0))
    common = {"num_trials": 4, "num_epochs": 2, "sampler": "random", "pruner": pruners.NopPruner()}
    found = [
        study(classifier, space, config, classes, batch=size, study_name=f"by-{size}", **common)
        for size in (4, 1)
    ]
    assert "4 trials in 1 batch, 1 static group, 2 programs compiled" in capsys.readouterr().out
    for one, other in zip(*(each.trials for each in found), strict=True):
        assert one.values == other.values
        assert one.value == pytest.approx(other.value, rel=1e-5)


@pytest.mark.slow
def test_a_value_that_cannot_be_traced_forms_groups(capsys: Any) -> None:
    space = {"shift": Float(0.0, 1.0), RATE: SPACE[RATE]}
    common = {"num_trials": 3, "num_epochs": 1, "sampler": "random", "pruner": pruners.NopPruner()}
    found = study(classifier, space, Many(), classes, batch=3, study_name="shift", **common)
    shown = capsys.readouterr().out
    assert "shift is static, and its values form groups: it decides in Python" in shown
    assert "3 trials in 1 batch, 3 static groups, 6 programs compiled" in shown
    for each in found.trials:
        config = json.loads((each.path / "config.json").read_text())
        assert config["options"]["shift"] == each.values["shift"]
        assert each.status == "finished"


class Scripted(Line):
    """Its validation scores are given by the member's seed, and by epoch."""

    monitor = Monitor("val/score", "min")
    scores: ClassVar[list[list[float]]] = []

    def eval_model(self, *args: Any, **options: Any) -> Any:
        found = super().eval_model(*args, **options)
        epoch = self._workspace.epoch
        score = self.scores[self.config.seed - 42][epoch - 1] if epoch else 0.0
        return {**found, "val/score": score}


def scripted(config: Config) -> Any:
    return line(config, Scripted)


@pytest.mark.parametrize("form", ["in turn", pytest.param("stacked", marks=pytest.mark.slow)])
def test_pruned_trial_ends_and_the_others_go_on(form: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(training, "choose_form", lambda *_: form)
    Scripted.scores = [[1.0, 0.9, 0.8], [2.0, 5.0, 5.0], [9.0, 0.7, 0.6], [1.0, 0.5, 0.4]]
    pruner = pruners.ThresholdPruner(upper=4.0)
    found = search(3, scripted, num_trials=4, pruner=pruner)
    assert [trial.status for trial in found.trials] == ["finished", "pruned", "pruned", "finished"]
    assert [trial.value for trial in found.trials] == [0.8, 5.0, 9.0, 0.4]
    assert [len(epochs(trial.path)) for trial in found.trials] == [3, 2, 1, 3]
    for trial in found.trials:
        assert json.loads((trial.path / "status.json").read_text())["status"] == trial.status


@pytest.mark.slow
def test_trial_that_diverges_counts_as_failed() -> None:
    values = [{RATE: rate, DECAY: 1e-3} for rate in (0.02, 0.03, 1e38)]
    space = {RATE: Choice(0.02, 0.03, 1e38), DECAY: Float(1e-4, 0.1)}
    sampler = samplers.GridSampler({RATE: [0.02, 0.03, 1e38], DECAY: [1e-3]}, seed=0)
    found = search(3, space=space, sampler=sampler, num_trials=3)
    assert sorted(trial.values[RATE] for trial in found.trials) == [x[RATE] for x in values]
    failed = {trial.values[RATE] for trial in found.trials if trial.status == "failed"}
    assert failed == {1e38}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["in turn", "stacked"])
def test_interrupted_batch_resumes_from_its_checkpoint(form: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(training, "choose_form", lambda *_: form)
    whole = search(3, study_name="whole")
    save = PopulationDirectory.save

    def save_and_end(self: Any, *, is_last: bool) -> None:
        save(self, is_last=True)
        if self._run.epoch == 2 and self._recording.path.name == "0004":  # the second batch
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PopulationDirectory, "save", save_and_end)
        with pytest.raises(KeyboardInterrupt):
            search(3, study_name="cut")
    trained = []
    train = PopulationRun._train_epoch

    def train_epoch(self: Any, epoch: int) -> None:
        trained.append(epoch)
        train(self, epoch)

    monkeypatch.setattr(PopulationRun, "_train_epoch", train_epoch)
    cut = search(3, study_name="cut")
    assert trained == [3]
    assert [x.status for x in cut.trials] == ["finished"] * 6
    for one, other in zip(cut.trials, whole.trials, strict=True):
        assert (one.values, one.value, one.seed) == (other.values, other.value, other.seed)
    folders = sorted(path.name for path in Path("runs/line/population").iterdir())
    assert folders == ["0001", "0002", "0003", "0004"]


@pytest.mark.slow
def test_batch_with_more_trials_than_the_stacked_program_takes_turns(
    monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(training, "choose_form", lambda *_: "stacked")
    sizes, asked = iter([2, 5]), Batches._asked
    monkeypatch.setattr(Batches, "_asked", lambda self, _, most: asked(self, next(sizes, 1), most))
    found = search(5, partial(line, enable_progress_bar=True), num_trials=7)
    assert [trial.status for trial in found.trials] == ["finished"] * 7
    assert summary(capsys.readouterr().out) == (
        "7 trials in 2 batches, 1 static group, 2 programs compiled"
    )


class Watching(Callback):
    def on_step_end(self, info: Any) -> None: ...


@pytest.mark.parametrize(
    "options",
    [{"callbacks": [Watching()]}, {"max_time": "1h"}, {"mesh": "dp"}],
    ids=lambda options: next(iter(options)),
)
def test_what_a_batch_does_not_support_names_the_remedy(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="batch=1"):
        search(2, lambda config: line(config, **options))
    assert not Path("runs").exists()


def grouping() -> Any:
    task = FactoryTask(make_trainer=line, make_loaders=loaders, num_epochs=2)
    return task, TrialGrouping(task, Config())


def test_values_that_change_one_traced_field_only_share_programs() -> None:
    task, found = grouping()

    def kind(**values: Any) -> Any:
        values = {RATE: 0.1, DECAY: 0.1, "smoothing": 0.1, **values}
        return found.kind_of(values, task.trainer(override(Config(), values)))

    first = kind()
    assert first.traced == {RATE: RATE, DECAY: DECAY}
    assert first.static == {"smoothing": 0.1}
    assert kind(**{RATE: 0.2, DECAY: 0.3}).key == first.key
    assert kind(smoothing=0.2).key != first.key
    assert kind(**{"optimizer.name": "lion"}).key != first.key


def test_value_that_is_used_twice_is_static() -> None:
    def twice(config: Config) -> Any:
        return line(config, spike_threshold=2 + config.optimizer.learning_rate)

    task = FactoryTask(make_trainer=twice, make_loaders=loaders, num_epochs=2)
    found = TrialGrouping(task, Config()).kind_of({RATE: 0.02}, twice(Config()))
    assert found.static == {RATE: 0.02}


@pytest.mark.slow
def test_recipe_is_tuned_in_batches_by_an_argument_of_any_name() -> None:
    def recipe(config: dict[str, Any]) -> None:
        trainer = line(Config(OptimizerConfig("adamw", learning_rate=config["lr"])))
        train, val, _ = loaders(Config())
        trainer.train_model(train, val, num_epochs=2)

    space = {"lr": Float(1e-3, 0.1, log=True)}
    options = {"sampler": "random", "pruner": pruners.NopPruner()}
    task = RecipeTask(recipe, "recipe")
    found = run_study(task, space, {"lr": 0.01}, num_trials=4, batch=2, options=options)
    places = [path.relative_to(Path.cwd()).parts[-4:] for path in (x.path for x in found.trials)]
    assert places == [
        ("population", f"000{n}", "members", f"000{index}") for n in (1, 2) for index in (0, 1)
    ]


def test_arrays_are_not_shared_by_the_trials_of_a_batch() -> None:
    def recipe(config: dict[str, Any]) -> None:
        trainer = line(Config(OptimizerConfig("adamw", learning_rate=config["lr"])))
        trainer.train_model({"x": X[:48]}, {"x": X[48:]}, num_epochs=2)

    task, space = RecipeTask(recipe, "recipe"), {"lr": Float(1e-3, 0.1, log=True)}
    with pytest.raises(ConfigError, match=r"shuffled by the seed of each trial.*batch=1"):
        run_study(task, space, {"lr": 0.01}, num_trials=4, batch=2, options={})
