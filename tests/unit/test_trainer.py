"""What a user's own model and loss become: trained, validated, judged, tested and written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distaff
from distaff import Callback, Monitor, OptimizerConfig, data, metrics
from distaff.errors import ConfigError, StateError
from distaff.loggers import MemoryLogger
from scripted import ScriptedScores


class Line(nn.Module):
    features: int = 1

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features)(x)


class Regression(distaff.TrainerModule):
    monitor = Monitor("val/loss")

    def loss_fn(self, params, batch, ctx):
        error = ctx.apply(params, batch["x"])[:, 0] - batch["y"]
        return jnp.square(error), {"error": jnp.abs(error)}


class Scripted(ScriptedScores, Regression):
    """With the error among its metrics."""


class Snapshots(Callback):
    """Keeps the parameters after each epoch."""

    def __init__(self) -> None:
        self.params: dict[int, Any] = {}

    def on_epoch_end(self, info):
        self.params[info.epoch] = jax.tree.map(np.array, info.state.params)


def arrays(examples: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    x = random.normal(size=(examples, 3)).astype(np.float32)
    noise = random.normal(size=examples) / 10
    return {"x": x, "y": (x @ [1.0, -2.0, 0.5] + 0.3 + noise).astype(np.float32)}


def loader(seed: int = 0) -> data.ArrayLoader:
    return data.ArrayLoader(arrays(16, seed), batch_size=4)


def make(cls: type[Any] = Regression, **options: Any) -> Any:
    optimizer = OptimizerConfig("sgd", learning_rate=0.1, schedule="constant")
    defaults = {"optimizer": optimizer, "enable_progress_bar": False}
    return cls(Line(), **{**defaults, **options})


def scripted(*scores: float, mode: Any = "min", **options: Any) -> Any:
    attributes = {"scores": scores, "monitor": Monitor("val/score", mode=mode)}
    return make(type("Scripted", (Scripted,), attributes), **options)


def read(path: Path | None, name: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{name} holds {constant}, which is not strict JSON")

    return json.loads((Path(str(path)) / name).read_text(), parse_constant=refuse)


def epochs_of(logger: MemoryLogger, name: str) -> list[int]:
    return [record.epoch for record in logger.records if name in record.metrics]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Any, distaff.TrainResult]:
    optimizer = OptimizerConfig("sgd", learning_rate=0.1, schedule="linear", end_fraction=0.1)
    options = {"optimizer": optimizer, "root": str(tmp_path_factory.mktemp("runs"))}
    trainer = make(name="line", log_every_n_steps=3, **options)
    return trainer, trainer.train_model(loader(), loader(1), loader(2), num_epochs=30)


@pytest.mark.slow
def test_model_and_loss_of_ones_own_reach_the_least_squares_loss(finished):
    trainer, result = finished
    train, test = arrays(16), arrays(16, 2)
    design = np.column_stack([train["x"], np.ones(16)])
    solution, (least, *_), *_ = np.linalg.lstsq(design, train["y"], rcond=None)
    assert result.metrics["train/loss"] < 1.1 * least / 16
    tested = np.column_stack([test["x"], np.ones(16)]) @ solution - test["y"]
    np.testing.assert_allclose(result.metrics["test/loss"], np.square(tested).mean(), rtol=0.2)
    assert (result.status, result.step, result.epoch) == ("finished", 120, 30)
    assert trainer.step == result.best.step


def test_run_directory_holds_the_whole_record(finished):
    _, result = finished
    names = {entry.name for entry in result.path.iterdir()}
    assert names == {
        *("config.json", "env.json", "status.json", "metrics.jsonl", "metrics", "checkpoints"),
        *("log.txt", "model.txt", "throughput.jsonl", "figures"),
    }
    config = read(result.path, "config.json")
    assert config["optimizer"]["name"] == "sgd"
    assert config["optimizer"]["learning_rate"] == 0.1
    assert config["model"] == {"$class": f"{__name__}:Line", "features": 1}
    assert config["options"]["log_every_n_steps"] == 3
    assert (config["options"]["seed"], config["num_epochs"]) == (42, 30)
    assert config["monitor"] == {"name": "val/loss", "mode": "min"}
    status = read(result.path, "status.json")
    assert (status["status"], status["step"], status["reason"]) == ("finished", 120, "")
    assert status["best"]["step"] == result.best.step
    steps = {116, 120, result.best.step}
    folders = {f"step_{step:08d}" for step in steps}
    assert {entry.name for entry in (result.path / "checkpoints").iterdir()} == folders
    assert read(result.path, "metrics/test.json")["test/loss"] == result.metrics["test/loss"]
    assert len(list((result.path / "metrics").glob("val_epoch_*.json"))) == 30
    assert "Dense_0/kernel" in (result.path / "model.txt").read_text()
    assert "epoch 30/30 step 120" in (result.path / "log.txt").read_text()


def test_metrics_log_has_every_window_and_every_epoch(finished):
    _, result = finished
    rows = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    epochs = [row for row in rows if "train/loss" in row]
    assert [row["epoch"] for row in epochs] == list(range(1, 31))
    assert [row["step"] for row in epochs] == list(range(4, 121, 4))
    names = {"train/loss", "train/error", "val/loss", "val/error"}
    assert all(names <= row.keys() for row in epochs)
    windows = [row["step"] for row in rows if "step/loss" in row]
    assert windows == sorted({*range(3, 121, 3), *range(4, 121, 4)})
    rates = [row["step/learning_rate"] for row in rows if "step/loss" in row]
    used = [0.1 * (1 - 0.9 * (step - 1) / 120) for step in windows]
    np.testing.assert_allclose(rates, used, rtol=1e-5)


@pytest.mark.parametrize("has_val", [False, True])
@pytest.mark.parametrize("has_test", [False, True])
@pytest.mark.slow
def test_training_needs_neither_validation_nor_test(has_val, has_test):
    result = make().train_model(
        loader(), loader(1) if has_val else None, loader(2) if has_test else None, num_epochs=2
    )
    splits = {name.split("/")[0] for name in result.metrics}
    assert splits == {"train", *["val"] * has_val, *["test"] * has_test}
    assert (result.best is not None) == has_val
    assert (result.path / "checkpoints" / "step_00000008").is_dir()


@pytest.mark.parametrize("root", ["runs", None])
@pytest.mark.parametrize(
    ("mode", "scores", "best"),
    [
        ("max", (1.0, 3.0, 2.0), 2),
        ("min", (3.0, 1.0, 2.0), 2),
        ("min", (2.0, 2.0, 2.0), 1),
        ("max", (float("nan"), 1.0, float("nan")), 2),
    ],
)
@pytest.mark.slow
def test_test_set_sees_the_best_weights(mode, scores, best, root):
    snapshots = Snapshots()
    trainer = scripted(*scores, mode=mode, root=root, callbacks=[snapshots])
    result = trainer.train_model(loader(), loader(1), loader(2), num_epochs=3)
    assert (result.best.epoch, result.best.step) == (best, 4 * best)
    assert (trainer.epoch, trainer.step) == (best, 4 * best)
    jax.tree.map(np.testing.assert_array_equal, trainer.state.params, snapshots.params[best])
    assert trainer.eval_model(loader(2), "test/") == {
        name: value for name, value in result.metrics.items() if name.startswith("test/")
    }
    assert Path("runs").exists() == (root is not None)


def test_is_new_model_better_decides_alone():
    class Newest(Regression):
        monitor = Monitor("val/nothing")

        def is_new_model_better(self, new_metrics, old_metrics):
            seen.append((new_metrics["val/loss"], old_metrics and old_metrics["val/loss"]))
            return True

    seen: list[Any] = []
    result = make(Newest).train_model(loader(), loader(1), num_epochs=3)
    assert result.best.epoch == 3
    (first, none), (second, old), (_, older) = seen
    assert (none, old, older) == (None, first, second)


def test_metric_of_ones_own_is_logged_saved_and_monitored():
    logger = MemoryLogger()
    result = scripted(2.0, 1.0, loggers=[logger]).train_model(loader(), loader(1), num_epochs=2)
    assert epochs_of(logger, "val/score") == [1, 2]
    assert read(result.path, "metrics/val_epoch_0001.json")["val/score"] == 2.0
    assert result.metrics["val/score"] == 1.0


def test_validation_comes_every_n_epochs_and_at_the_end():
    logger = MemoryLogger()
    trainer = make(check_val_every_n_epoch=2, loggers=[logger])
    result = trainer.train_model(loader(), loader(1), num_epochs=5)
    assert epochs_of(logger, "val/loss") == [2, 4, 5]
    assert epochs_of(logger, "train/loss") == [1, 2, 3, 4, 5]
    assert (result.path / "checkpoints" / "step_00000020").is_dir()


def test_second_training_goes_on_in_a_directory_of_its_own():
    logger = MemoryLogger()
    trainer = make(loggers=[logger], name="line")
    first = trainer.train_model(loader(), num_epochs=2)
    second = trainer.train_model(loader(), num_epochs=1)
    assert [first.path, second.path] == [Path(f"runs/line/000{n}").absolute() for n in (1, 2)]
    assert (second.epoch, second.step, int(trainer.state.step)) == (3, 12, 12)
    assert epochs_of(logger, "train/loss") == [1, 2, 3]
    assert [read(run.path, "status.json")["step"] for run in (first, second)] == [8, 12]
    assert second.metrics["train/loss"] < first.metrics["train/loss"]


def test_second_training_without_files_forgets_the_first_ones_checkpoints():
    snapshots = Snapshots()
    trainer = scripted(0.0, 1.0, 2.0, root=None, callbacks=[snapshots])
    trainer.train_model(loader(), loader(1), num_epochs=3)
    assert trainer.step == 4
    trainer.scores = (0.0, 0.0, 1.0)
    # Its first checkpoint has the step of the last one of the run before.
    trainer.train_model(loader(3), loader(1), num_epochs=2, steps_per_epoch=8, repeat=True)
    assert trainer.step == 12
    jax.tree.map(np.testing.assert_array_equal, trainer.state.params, snapshots.params[2])


@pytest.mark.parametrize("endless", [False, True])
@pytest.mark.slow
def test_batches_may_come_from_a_generator(endless):
    def batches():
        yield from loader()
        while endless:
            yield from loader()

    result = make().train_model(batches, num_epochs=2, steps_per_epoch=3 if endless else None)
    assert (result.step, result.epoch) == (6 if endless else 8, 2)


def test_schedule_over_a_run_of_unknown_length_asks_for_steps_per_epoch(tmp_path):
    def batches():
        yield from loader()

    trainer = make(optimizer=OptimizerConfig("sgd", schedule="cosine"))
    with pytest.raises(ConfigError, match=r"'cosine' needs .*Pass steps_per_epoch to train_model"):
        trainer.train_model(batches, num_epochs=2)
    assert list(tmp_path.iterdir()) == []
    assert trainer.train_model(batches, num_epochs=2, steps_per_epoch=4).step == 8


@pytest.mark.slow
def test_debug_runs_plain_python_with_the_same_numbers():
    class Reader(Regression):
        def loss_fn(self, params, batch, ctx):
            loss, metrics = super().loss_fn(params, batch, ctx)
            if self.config.debug and loss.mean() > 0:
                seen.append((loss.mean().item(), ctx.state.step.item(), float(batch["y"][0])))
            return loss, metrics

    seen: list[Any] = []
    runs = [make(Reader, debug=debug) for debug in (False, True)]
    results = [run.train_model(loader(), loader(1), loader(2), num_epochs=2) for run in runs]
    for name, value in results[0].metrics.items():
        np.testing.assert_allclose(results[1].metrics[name], value, rtol=1e-5)
    assert {step for _, step, _ in seen} == set(range(9))
    assert seen[0][0] > seen[-1][0]
    assert seen[0][2] == loader().arrays["y"][0]


def test_progress_bar_switched_off_prints_nothing(capfd):
    trainer = make(scripted(1.0).__class__)
    trainer.train_model(loader(), loader(1), loader(2), num_epochs=1)
    trainer.predict(loader())
    assert capfd.readouterr() == ("", "")


def test_each_loss_is_traced_once_over_a_whole_run():
    class Counting(Regression):
        def loss_fn(self, params, batch, ctx):
            traces.append("train" if ctx.train else "evaluation")
            return super().loss_fn(params, batch, ctx)

    traces: list[str] = []
    ragged = data.ArrayLoader(arrays(10), batch_size=4)
    make(Counting, optimizer=OptimizerConfig("adamw", warmup_steps=2)).train_model(
        loader(), ragged, ragged, num_epochs=3
    )
    assert sorted(traces) == ["evaluation", "train"]


class TwoNetworks(distaff.TrainState):
    critic: Any = None
    critic_opt_state: Any = None


class Duel(distaff.TrainerModule):
    """The critic learns to predict the line's squared error, with an optimizer of its own."""

    state_class = TwoNetworks
    critic, critic_tx = Line(), optax.adam(0.05)

    def init_model(self, example_batch):
        super().init_model(example_batch)
        self.state = self.state.replace(
            critic=self.critic.init(jax.random.key(7), jnp.ones((1, 4)))
        )

    def init_optimizer(self, total_steps):
        super().init_optimizer(total_steps)
        self.state = self.state.replace(critic_opt_state=self.critic_tx.init(self.state.critic))

    def create_functions(self):
        def losses(params, critic, state, batch):
            line = state.apply_fn({"params": params}, batch["x"])[:, 0]
            error = jnp.square(line - batch["y"])
            seen = jnp.column_stack([batch["x"], batch["y"]])
            guess = self.critic.apply(critic, seen)[:, 0]
            return error.mean(), jnp.square(guess - jax.lax.stop_gradient(error)).mean()

        def train_step(state, batch):
            loss, grads = jax.value_and_grad(lambda p: losses(p, state.critic, state, batch)[0])(
                state.params
            )
            critic_loss, critic_grads = jax.value_and_grad(
                lambda critic: losses(state.params, critic, state, batch)[1]
            )(state.critic)
            updates, opt_state = self.critic_tx.update(critic_grads, state.critic_opt_state)
            critic = optax.apply_updates(state.critic, updates)
            state = state.apply_gradients(grads=grads, critic=critic, critic_opt_state=opt_state)
            return state, {"loss": loss, "critic": critic_loss}

        def eval_step(state, batch):
            loss, critic_loss = losses(state.params, state.critic, state, batch)
            return {"loss": loss, "critic": critic_loss}

        return train_step, eval_step


@pytest.mark.slow
def test_steps_of_ones_own_train_two_networks_with_two_optimizers():
    logger = MemoryLogger()
    trainer = make(Duel, loggers=[logger])
    ragged = data.ArrayLoader(arrays(10, 1), batch_size=4)
    result = trainer.train_model(loader(), ragged, loader(2), num_epochs=20)
    for name in ("train/loss", "train/critic", "val/loss"):
        values = [record.metrics[name] for record in logger.records if name in record.metrics]
        assert values[-1] < values[0] / 2, name
    assert {"test/loss", "test/critic"} < result.metrics.keys()
    again = trainer.eval_model(data.ArrayLoader(arrays(10, 1), batch_size=5))
    np.testing.assert_allclose(again["loss"], result.metrics["val/loss"], rtol=1e-5)


@pytest.mark.slow
def test_metrics_may_be_arrays_and_may_be_undefined():
    class Odd(Regression):
        def loss_fn(self, params, batch, ctx):
            loss = super().loss_fn(params, batch, ctx)[0]
            return loss, {
                "histogram": metrics.Sum.per_example(jax.nn.one_hot(jnp.int32(batch["y"] > 0), 2)),
                "undefined": jnp.full(loss.shape, jnp.nan),
            }

    trainer = make(Odd)
    result = trainer.train_model(loader(), loader(1), loader(2), num_epochs=2)
    positive = int((arrays(16, 2)["y"] > 0).sum())
    np.testing.assert_array_equal(result.metrics["test/histogram"], [16 - positive, positive])
    written = read(result.path, "metrics/test.json")
    assert written["test/histogram"] == [16 - positive, positive]
    assert np.isnan(float(written["test/undefined"]))
    assert read(result.path, "status.json")["status"] == "finished"


@pytest.mark.parametrize("method", ["predict", "eval_model", "bind_model"])
def test_model_without_parameters_says_where_they_come_from(method):
    arguments = () if method == "bind_model" else (loader(),)
    with pytest.raises(StateError, match=r"Call train_model first, .*example_batch"):
        getattr(make(), method)(*arguments)
