"""The fourth source document, TrainerModule: its functionalities, its known issue, its to-do.

What other files prove is not repeated here:

    Logging
      hyperparameters, any kind     unit/test_config.py: to_json_records_hyperparameters_of_any_kind
      many loggers, none            contract/test_logger_integrations.py: a_failed_run_closes_...;
                                      unit/test_trainer.py: test_set_sees_the_best_weights[None]
      contract, media               contract/test_loggers.py, contract/test_logger_integrations.py
      a metric of one's own         unit/test_trainer.py: metric_of_ones_own_is_logged_saved_and_...
      new metrics                   unit/test_classification_metrics.py
    init_model, print_tabulate      golden/test_order.py; unit/test_model_table.py
    init_optimizer
      steps reach schedules         unit/test_optim.py: build_optimizer_hands_total_steps_...
      the learning rate is logged   unit/test_trainer.py: metrics_log_has_every_window_and_...
      groups                        unit/test_param_groups.py
      overridden                    unit/test_trainer.py: steps_of_ones_own_train_two_networks_...
    Training loop                   golden/test_order.py, unit/test_trainer.py:
      no validation, no test          training_needs_neither_validation_nor_test
      every n epochs                  validation_comes_every_n_epochs
      a second call                   second_training_goes_on_in_a_directory_of_its_own
      no length                       batches_may_come_from_a_generator, schedule_over_a_run_of_...
      max, min, NaN, ties             test_set_sees_the_best_weights; unit/test_monitor.py
      is_new_model_better             is_new_model_better_decides_alone
      an exception                    unit/test_trainer_endings.py
    hooks, order                    golden/test_order.py
      reconstructions               tests/test_examples.py: autoencoder_draws_every_n_epochs
    tracker, inference              test_seed_003_inference.py
    known issue                     unit/test_l2.py
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distaff
from distaff import Callback, OptimizerConfig, TrainerConfig, data
from distaff.core.config.encoding import from_json
from distaff.errors import ConfigError
from distaff.loggers import MemoryLogger
from distaff.models import Variables
from distaff.run.directory.protocol import NullRecording

X = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=not train)(x))


class Regression(distaff.TrainerModule):
    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])


def loader() -> data.ArrayLoader:
    return data.ArrayLoader({"x": X, "y": X.sum(1)}, batch_size=4)


def make(cls: type[Any] = Regression, model: nn.Module | None = None, **options: Any) -> Any:
    defaults = {"optimizer": optax.sgd(0.05), "name": "line", "enable_progress_bar": False}
    return cls(nn.Dense(1) if model is None else model, **{**defaults, **options})


def assert_same_bits(tree: Any, other: Any) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def host(tree: Any) -> Any:
    return jax.tree.map(np.array, tree)


class WithoutKey(Regression):
    def init_model(self, example_batch):
        super().init_model(example_batch)
        self.state = self.state.replace(rng=None)


def test_batch_stats_and_rng_may_be_none():
    trainer = make(WithoutKey)
    result = trainer.train_model(loader(), loader(), loader(), num_epochs=2)
    assert (trainer.state.batch_stats, trainer.state.rng) == (None, None)
    assert result.metrics["test/loss"] < np.square(X.sum(1)).mean()
    loaded = WithoutKey.load_from_checkpoint(result.path)
    np.testing.assert_array_equal(loaded.predict(loader()), trainer.predict(loader()))


@pytest.mark.slow
def test_statistics_move_in_training_only_and_evaluation_is_deterministic():
    class Watching(Regression):
        def on_training_epoch_end(self, epoch, metrics):
            stats.append(host(self.state.batch_stats))

        def on_validation_epoch_end(self, epoch, metrics, val_loader):
            assert_same_bits(host(self.state.batch_stats), stats[-1])
            again = self.eval_model(val_loader, "val/")
            assert again == {name: metrics[name] for name in again}
            assert_same_bits(self.predict(val_loader), self.predict(val_loader))
            whole = self.eval_model([{"x": X, "y": X.sum(1)}], "val/")  # statistics of no batch
            assert whole == pytest.approx(again, rel=1e-5)

    stats: list[Any] = []
    make(Watching, Net()).train_model(loader(), loader(), num_epochs=2)
    means = [each["BatchNorm_0"]["mean"] for each in stats]
    assert (means[0] != means[1]).all()


@dataclasses.dataclass(frozen=True)
class Stage:
    width: int
    activation: Callable[..., Any] = nn.gelu


class Staged(nn.Module):
    stages: tuple[Stage, ...]
    norm: type[nn.Module]
    dtype: Any
    scales: Mapping[str, Any]

    @nn.compact
    def __call__(self, x):
        for stage in self.stages:
            x = stage.activation(nn.Dense(stage.width, dtype=self.dtype)(x))
        return nn.Dense(1)(self.norm()(x)) * self.scales["output"]["factor"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnConfig(TrainerConfig):
    stage: Stage = Stage(3, nn.relu)
    tags: dict[str, list[int]] = dataclasses.field(default_factory=dict)


class Recording(Regression):
    Config = OwnConfig


@pytest.mark.slow
def test_hyperparameters_of_any_kind_are_recorded_and_the_callers_objects_stay_as_they_were():
    def given() -> tuple[dict[str, Any], dict[str, Any], dict[str, list[int]]]:
        hyperparameters: dict[str, Any] = {
            "stages": (Stage(4), Stage(2, jnp.tanh)),
            "norm": nn.LayerNorm,
            "dtype": jnp.float32,
            "scales": {"output": {"factor": 2.0}},
        }
        return hyperparameters, {"b1": 0.8}, {"fold": [1, 2]}

    hyperparameters, options, tags = given()
    model = Staged(**hyperparameters)
    optimizer = OptimizerConfig("adam", options=options)
    trainer = make(Recording, model, optimizer=optimizer, tags=tags)
    result = trainer.train_model(loader(), loader(), num_epochs=1)
    assert (hyperparameters, options, tags) == given()
    assert type(hyperparameters["scales"]["output"]) is dict
    assert trainer.model.module is model
    record = json.loads((result.path / "config.json").read_text())
    assert record["model"]["stages"][1] == {
        "width": 2,
        "activation": {"$function": "jax.numpy:tanh"},
    }
    assert record["model"]["norm"]["$type"].endswith(":LayerNorm")
    assert record["model"]["dtype"] == {"$dtype": "float32"}
    assert record["model"]["scales"] == {"output": {"factor": 2.0}}
    assert record["optimizer"]["options"] == {"b1": 0.8}
    assert record["options"]["tags"] == {"fold": [1, 2]}
    assert record["options"]["stage"]["activation"]["$function"].endswith(":relu")
    del record["options"]["stage"]  # a function is described, and never imported by its name
    assert from_json(OwnConfig, record["options"]) == trainer.config


def test_hyperparameters_are_saved_before_the_first_step():
    class First(Callback):
        def on_training_start(self, info):
            found.append((info.step, json.loads(Path("runs/line/0001/config.json").read_text())))

        def on_step_end(self, info):
            found.append((info.step, json.loads(Path("runs/line/0001/config.json").read_text())))

    found: list[Any] = []
    logger = MemoryLogger()
    make(callbacks=[First()], loggers=[logger]).train_model(loader(), num_epochs=1)
    assert [step for step, _ in found] == [0, 1, 2, 3]
    hyperparameters = [{n: x for n, x in each.items() if n != "identity"} for _, each in found]
    assert all(each == logger.config for each in hyperparameters)
    assert found[0][1]["model"]["features"] == 1


def test_init_logger_may_return_another_place():
    class Elsewhere(Regression):
        def init_logger(self):
            return NullRecording([logger])

    logger = MemoryLogger()
    make(Elsewhere).train_model(loader(), loader(), num_epochs=1)
    assert logger.records[-1].metrics.keys() == {"train/loss", "val/loss"}
    assert list(Path().iterdir()) == []


class TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, x, scale):
        return nn.Dense(1)(x) * scale


def test_run_model_init_may_be_written_anew():
    class Scaled(distaff.TrainerModule):
        def model_inputs(self, batch):
            return batch["x"], jnp.float32(3)

        def run_model_init(self, example_batch, key):
            variables = self.model.module.init(key, *self.model_inputs(example_batch))
            kernel = jnp.full_like(variables["params"]["Dense_0"]["kernel"], 7.0)
            bias = variables["params"]["Dense_0"]["bias"]
            return Variables({"Dense_0": {"kernel": kernel, "bias": bias}})

        def loss_fn(self, params, batch, ctx):
            return jnp.square(ctx.apply(params, *self.model_inputs(batch))[:, 0] - batch["y"])

    trainer = make(Scaled, TwoInputs(), example_batch=next(iter(loader())))
    np.testing.assert_allclose(trainer.predict(loader())[:, 0], 21 * X.sum(1), rtol=1e-5)
    result = trainer.train_model(loader(), num_epochs=1)
    loaded = Scaled.load_from_checkpoint(result.path)
    np.testing.assert_array_equal(loaded.predict(loader()), trainer.predict(loader()))


class Penalized(Regression):
    def loss_fn(self, params, batch, ctx):
        ctx.add_l2_loss(params, 0.5)
        return super().loss_fn(params, batch, ctx)


@pytest.mark.parametrize("optimizer", [optax.adamw(1e-3), OptimizerConfig(weight_decay=0.1)])
def test_known_issue_decay_in_loss_and_optimizer_is_refused_before_anything_is_written(optimizer):
    with pytest.raises(ConfigError, match="Decay is in one place, and here it is in two"):
        make(Penalized, optimizer=optimizer).train_model(loader(), loader(), num_epochs=1)
    assert list(Path().iterdir()) == []


def test_known_issue_the_loss_that_chooses_the_model_is_of_the_data_alone():
    trainer = make(Penalized, optimizer=optax.adam(0.05))
    result = trainer.train_model(loader(), loader(), num_epochs=3)
    plain = Regression.load_from_checkpoint(result.path)  # the same weights, no penalty
    assert plain.eval_model(loader(), "val/")["val/loss"] == result.best.metrics["val/loss"]
    assert result.metrics["train/penalty"] > 0


def test_known_issue_a_decay_that_is_not_given_is_none():
    with_default = make(Penalized, optimizer=OptimizerConfig("adamw", learning_rate=0.05))
    assert with_default.train_model(loader(), num_epochs=1).status == "finished"


def test_todo_one_interface_takes_a_config_a_transformation_and_a_function_of_the_steps():
    steps: list[int] = []

    def factory(total_steps):
        steps.append(total_steps)
        return optax.adam(0.05)

    config = OptimizerConfig("adam", learning_rate=0.05, schedule="constant")
    states = []
    for optimizer in (config, optax.adam(0.05), factory):
        trainer = make(optimizer=optimizer, root=None)
        trainer.train_model(loader(), num_epochs=2)
        states.append(trainer.state.params)
    assert steps == [6]
    assert_same_bits(states[0], states[1])
    assert_same_bits(states[0], states[2])


def test_todo_a_learned_optimizer_like_velo_is_given_the_loss_and_the_number_of_steps():
    def learned(total_steps):
        def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
            value = extra_args["value"]
            rate = 0.1 * (1 - state["step"] / total_steps) / (1 + value)
            seen = state["losses"].at[state["step"]].set(value)
            updates = jax.tree.map(lambda g: -rate * g, updates)
            return updates, {"step": state["step"] + 1, "losses": seen}

        def init(params):
            return {"step": jnp.int32(0), "losses": jnp.zeros(total_steps)}

        return optax.GradientTransformationExtraArgs(init, update)

    trainer = make(optimizer=learned)
    result = trainer.train_model(loader(), num_epochs=4)
    losses = np.asarray(trainer.state.opt_state["losses"])
    assert losses.shape == (12,)
    np.testing.assert_allclose(losses[-3:].mean(), result.metrics["train/loss"], rtol=1e-5)
    assert losses[-3:].mean() < losses[:3].mean()


def test_validation_every_more_epochs_than_there_are_comes_at_the_end():
    logger = MemoryLogger()
    trainer = make(check_val_every_n_epoch=5, loggers=[logger])
    result = trainer.train_model(loader(), loader(), loader(), num_epochs=3)
    validated = [record.epoch for record in logger.records if "val/loss" in record.metrics]
    assert (validated, result.best.epoch, result.step, trainer.step) == ([3], 3, 9, 9)
    assert result.metrics["test/loss"] == trainer.eval_model(loader())["loss"]
    assert (result.path / "checkpoints" / "step_00000009").is_dir()
    # Epochs are counted on: the second of the next call is the fifth.
    trainer.train_model(loader(), loader(), num_epochs=3)
    validated = [record.epoch for record in logger.records if "val/loss" in record.metrics]
    assert validated == [3, 5, 6]
