"""Each of the twenty names of the source documents, overridden in plain code, without `super()`.

An override takes effect, and the run around it is complete: it ends as finished, its best model is
what `monitor` says, and where the override computes what the default does, the results are equal
bit for bit. `tests/golden/test_order.py` pins when each is called.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff import Monitor, TrainState, metrics
from distaff.errors import ConfigError, LossError
from line import (
    BATCH,
    NUM_EPOCHS,
    NUM_STEPS,
    PARAMS,
    STEPS_PER_EPOCH,
    Line,
    Trained,
    X,
    apply,
    loader,
    squared_error,
    trained,
)

SEEDS_NAMES = (
    *("init_logger", "save_model", "load_model", "save_metrics", "init_model", "run_model_init"),
    *("print_tabulate", "init_optimizer", "train_model", "train_epoch", "eval_model"),
    *("create_functions", "create_jitted_functions", "is_new_model_better", "on_training_start"),
    *("on_training_epoch_end", "on_validation_epoch_end", "tracker", "load_from_checkpoint"),
    "bind_model",
)


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The run without any override."""
    return trained(Line, root=tmp_path_factory.mktemp("default"))


class InitLogger(Line):
    def init_logger(self):
        self.called.append("init_logger")
        self.logs = [Log()]
        return self.logs[0]


class InitLoggers(Line):
    def init_logger(self):
        self.called.append("init_logger")
        self.logs = [Log(), Log()]
        return self.logs


class Log:
    """A logger of one's own: the three methods of the protocol, and no more."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.config: Any = None
        self.status = ""

    def log_metrics(self, values, *, step, epoch):
        self.lines.append({"step": step, "epoch": epoch, **values})

    def log_config(self, config):
        self.config = config

    def close(self, status):
        self.status = status


class SaveModel(Line):
    def save_model(self, metrics, is_best):
        self.called.append("save_model")
        self.last = jax.tree.map(np.array, self.state.params)
        self.kept = self.last if is_best else getattr(self, "kept", self.last)

    def load_model(self):
        self.called.append("load_model")
        self.state = self.state.replace(params=jax.tree.map(jnp.asarray, self.kept))


class SaveMetrics(Line):
    def save_metrics(self, name, metrics):
        self.called.append("save_metrics")
        Path(f"mine_{name}.json").write_text(json.dumps(metrics))


class InitModel(Line):
    def init_model(self, example_batch):
        self.called.append("init_model")
        params = jax.tree.map(jnp.asarray, PARAMS)
        self.state = TrainState.create(
            apply_fn=self.model.apply_fn, params=params, rng=jax.random.key(self.config.seed)
        )


class RunModelInit(Line):
    def run_model_init(self, example_batch, key):
        self.called.append("run_model_init")
        return {"params": jax.tree.map(jnp.asarray, PARAMS)}


class PrintTabulate(Line):
    def print_tabulate(self, example_batch):
        self.called.append("print_tabulate")


class InitOptimizer(Line):
    def init_optimizer(self, total_steps):
        self.called.append("init_optimizer")
        tx = optax.sgd(0.05)
        self.state = self.state.replace(tx=tx, opt_state=tx.init(self.state.params))


class TrainEpoch(Line):
    def train_epoch(self, train_loader, epoch):
        total = None
        for batch in train_loader:
            self.called.append("train_epoch")
            self.state, measured = self.train_step(self.state, batch)
            measured = metrics.to_host(measured)
            total = measured if total is None else metrics.merge(total, measured)
        return metrics.compute(total, "train/")


class EvalModel(Line):
    def eval_model(self, loader, prefix=""):
        self.called.append("eval_model")
        measured = [metrics.to_host(self.eval_step(self.state, batch)) for batch in loader]
        total = measured[0]
        for each in measured[1:]:
            total = metrics.merge(total, each)
        return metrics.compute(total, prefix)


class CreateFunctions(Line):
    def create_functions(self):
        self.called.append("create_functions")

        def train_step(state, batch):
            def mean(params):
                losses = squared_error(params, batch)
                return losses.mean(), losses

            (_, losses), grads = jax.value_and_grad(mean, has_aux=True)(state.params)
            return state.apply_gradients(grads=grads), {"loss": losses}

        def eval_step(state, batch):
            return {"loss": squared_error(state.params, batch)}

        return train_step, eval_step


class JittedFunctions(Line):
    """The form of the source document: what it sets adds a metric, so that one sees it run."""

    def create_jitted_functions(self, train_step, eval_step):
        self.called.append("create_jitted_functions")

        def training(state, batch):
            state, measured = train_step(state, batch)
            return state, {**measured, "mine": jnp.float32(1)}

        self.train_step = jax.jit(training, donate_argnums=0)
        self.eval_step = jax.jit(lambda state, batch: {**eval_step(state, batch), "mine": 1.0})


class OwnTrainStep(Line):
    """The default programs, and another one in the place of the training step."""

    def create_jitted_functions(self, train_step, eval_step):
        super().create_jitted_functions(train_step, eval_step)
        jitted = jax.jit(train_step)

        def mine(state, batch):
            if not isinstance(state.step, jax.core.Tracer):
                self.called.append("create_jitted_functions")
            return jitted(state, batch)

        self.train_step = mine


class IsNewModelBetter(Line):
    monitor = Monitor("val/loss", mode="min")

    def is_new_model_better(self, new_metrics, old_metrics):
        self.called.append("is_new_model_better")
        return old_metrics is None or new_metrics["val/loss"] > old_metrics["val/loss"]


class OnTrainingStart(Line):
    def on_training_start(self):
        self.called.append("on_training_start")


class OnTrainingEpochEnd(Line):
    def on_training_epoch_end(self, epoch, metrics):
        self.called.append("on_training_epoch_end")
        metrics["train/mine"] = float(epoch)


class OnValidationEpochEnd(Line):
    def on_validation_epoch_end(self, epoch, metrics, val_loader):
        self.called.append("on_validation_epoch_end")
        metrics["val/mine"] = float(epoch)


class Tracker(Line):
    def tracker(self, iterable, *, description, total=None):
        self.called.append("tracker")
        return iter(list(iterable))


class TrainModel(Line):
    """A loop of one's own around the step, without the trainer's."""

    def train_model(self, train_loader, val_loader=None, test_loader=None, *, num_epochs):
        self.called.append("train_model")
        self.init_optimizer(num_epochs * len(train_loader))
        for _ in range(num_epochs):
            for batch in train_loader:
                self.state, _measured = self.train_step(self.state, batch)
        return self.eval_model(val_loader, "val/")


class LoadFromCheckpoint(Line):
    @classmethod
    def load_from_checkpoint(cls, path, model=None, *, example_batch=None, **options):
        trainer = cls(example_batch=loader().peek(), root=None)
        trainer.called.append("load_from_checkpoint")
        trainer.load_weights(path)
        return trainer


class BindModel(Line):
    def bind_model(self):
        self.called.append("bind_model")
        params = self.state.params
        return lambda x: apply(params, x)


PASSES = NUM_EPOCHS + 1  # validations and the test
CALLS: dict[type[Line], int] = {
    RunModelInit: 1,
    InitModel: 1,
    PrintTabulate: 1,
    CreateFunctions: 1,
    JittedFunctions: 1,
    OwnTrainStep: NUM_STEPS,
    InitLogger: 1,
    InitLoggers: 1,
    InitOptimizer: 1,
    TrainEpoch: NUM_STEPS,
    EvalModel: PASSES,
    Tracker: PASSES,
    SaveMetrics: PASSES,
    IsNewModelBetter: NUM_EPOCHS,
    OnTrainingStart: 1,
    OnTrainingEpochEnd: NUM_EPOCHS,
    OnValidationEpochEnd: NUM_EPOCHS,
}
"""How often a run calls the code of an override."""


def test_default_run_loads_the_best_model_and_not_the_last_one(default):
    losses = [line["val/loss"] for line in default.logged if "val/loss" in line]
    assert losses[0] > losses[1]
    assert default.result.best.metrics == {"val/loss": losses[0]}
    assert default.result.metrics["test/loss"] == losses[0]  # of the same data


def assert_same(run: Trained, default: Trained) -> None:
    """Asserts that a run came to the results of another one, bit for bit; it may have more."""
    assert (run.result.status, run.result.reason) == ("finished", "")
    assert (run.result.step, run.result.epoch) == (default.result.step, default.result.epoch)
    assert run.result.metrics.items() >= default.result.metrics.items()
    assert run.result.best is not None, "the best model is lost"
    assert run.result.best[:2] == default.result.best[:2] == (STEPS_PER_EPOCH, 1)
    assert run.result.best.metrics.items() >= default.result.best.metrics.items()
    np.testing.assert_array_equal(run.params, default.params)  # the best model is loaded


@pytest.mark.parametrize("cls", CALLS)
@pytest.mark.slow
def test_plain_override_takes_effect_and_the_run_is_complete(cls, default):
    run = trained(cls)
    assert len(run.trainer.called) == CALLS[cls]
    assert_same(run, default)
    assert run.saved == default.saved == [STEPS_PER_EPOCH, NUM_STEPS]
    EFFECTS.get(cls, lambda run, default: None)(run, default)


def mine_are(*names: str) -> Callable[[Trained, Trained], None]:
    """Returns a check that a run has metrics of the override's own, which are not 0."""

    def check(run: Trained, default: Trained) -> None:
        assert not [name for name in names if not run.result.metrics.get(name)]

    return check


def shows_no_table(run: Trained, default: Trained) -> None:
    assert run.files <= default.files


def writes_its_own_files(run: Trained, default: Trained) -> None:
    names = {each.name for each in Path.cwd().glob("mine_*.json")}
    assert names == {f"mine_{each}.json" for each in ("val_epoch_0001", "val_epoch_0002", "test")}
    assert not [each for each in run.files if each.startswith("metrics/")]


def logs_all(run: Trained, default: Trained) -> None:
    for log in run.trainer.logs:
        assert log.lines == default.logged
        assert (log.config["options"]["seed"], log.status) == (42, "finished")


EFFECTS: dict[type[Line], Callable[[Trained, Trained], None]] = {
    JittedFunctions: mine_are("train/mine", "val/mine", "test/mine"),
    OnTrainingEpochEnd: mine_are("train/mine"),
    OnValidationEpochEnd: mine_are("val/mine"),
    PrintTabulate: shows_no_table,
    SaveMetrics: writes_its_own_files,
    InitLogger: logs_all,
    InitLoggers: logs_all,
}
"""What an override has done besides, which the default does not."""


def test_best_model_is_what_the_monitor_says_whoever_saves_it(default):
    run = trained(SaveModel)
    assert run.trainer.called.count("save_model") >= NUM_EPOCHS
    assert run.trainer.called.count("load_model") == 1
    assert_same(run, default)


def test_optimizer_of_ones_own_goes_with_a_policy_for_bad_steps():
    x = X.copy()
    x[2 * BATCH : 3 * BATCH] = np.nan
    default = trained(Line, x, on_bad_numbers="skip", root="default")
    run = trained(InitOptimizer, x, on_bad_numbers="skip")
    assert len(run.trainer.called) == 1
    assert_same(run, default)
    assert run.saved == default.saved


def test_train_model_of_ones_own_runs_the_trainers_step(default):
    trainer = TrainModel(example_batch=loader().peek())
    found = trainer.train_model(loader(), loader(), num_epochs=1)
    assert trainer.called == ["train_model"]
    assert found == default.result.best.metrics
    np.testing.assert_array_equal(trainer.state.params["w"], default.params)


def test_load_from_checkpoint_of_ones_own_gives_the_same_model(default):
    loaded = LoadFromCheckpoint.load_from_checkpoint(default.result.path)
    assert loaded.called == ["load_from_checkpoint"]
    np.testing.assert_array_equal(loaded.state.params["w"], default.params)
    assert loaded.eval_model(loader(), "val/") == default.result.best.metrics


def test_bind_model_of_ones_own_is_what_one_gets(default):
    trainer = BindModel(example_batch=loader().peek(), root=None)
    trainer.load_weights(default.result.path)
    outputs = trainer.bind_model()(X)
    assert trainer.called == ["bind_model"]
    np.testing.assert_array_equal(outputs, default.trainer.bind_model()(X))


def test_every_name_of_the_source_documents_is_overridden_here():
    classes = [each for each in globals().values() if isinstance(each, type)]
    own = [vars(each) for each in classes if issubclass(each, Line) and each is not Line]
    assert {name for each in own for name in each if name in SEEDS_NAMES} == set(SEEDS_NAMES)
    assert len(SEEDS_NAMES) == len(set(SEEDS_NAMES)) == 20


def sets_nothing(self, train_step, eval_step):
    """Forgets the programs."""


def sets_half_a_step(self, train_step, eval_step):
    self.train_step = jax.jit(lambda state, batch: state)
    self.eval_step = jax.jit(eval_step)


@pytest.mark.parametrize(
    ("name", "method", "error", "said"),
    [
        ("init_logger", lambda self: "csv", ConfigError, "a list of loggers; got 'csv'"),
        ("create_jitted_functions", sets_nothing, ConfigError, r"self\.train_step is not set"),
        ("create_jitted_functions", sets_half_a_step, LossError, "returns .state, metrics."),
        ("train_epoch", lambda self, train_loader, epoch: None, LossError, "a dict of metrics"),
        ("eval_model", lambda self, loader, prefix="": [1], LossError, "a dict of metrics"),
        ("init_optimizer", lambda self, total_steps: None, ConfigError, "must set the optimizer"),
    ],
)
def test_override_that_falls_short_is_told_what_is_wrong(name, method, error, said):
    with pytest.raises(error, match=said):
        trained(type("Own", (Line,), {name: method}))
