"""A trained model in other hands: loaded, bound, asked, evaluated, trained on."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distaff
from distaff import Monitor, OptimizerConfig, data
from distaff.checkpoint import CheckpointStore
from distaff.errors import BatchError, CheckpointError, ConfigError

SCRIPT = """
import flax.linen as nn
import jax.numpy as jnp

import distaff


class Net(nn.Module):
    width: int = 4

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(self.width)(x))
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


class Regression(distaff.TrainerModule):
    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])
"""

PREDICT = """
import sys

import numpy as np
from net_script import Regression

np.save("loaded.npy", Regression.load_from_checkpoint(sys.argv[1]).predict([*np.load("x.npy")]))
"""

# A test run that was killed may have left half an entry in the compile cache.
STRICT = ("-W", "error", "-W", "ignore:Error reading persistent compilation cache entry")


class Run:
    """A finished run of the script's model, whose best step is not its last."""

    def __init__(self, folder: Path) -> None:
        self.script = folder / "net_script.py"
        self.script.write_text(SCRIPT)
        self.module = load_module(self.script)

        def score(trainer: Any, epoch: int, metrics: dict[str, Any], val_loader: Any) -> None:
            metrics["val/score"] = (0.0, 2.0, 1.0)[epoch - 1]

        members = {"on_validation_epoch_end": score, "monitor": Monitor("val/score", mode="max")}
        self.trainer = type("Scored", (self.module.Regression,), members)(
            self.module.Net(),
            optimizer=OptimizerConfig("adamw", learning_rate=0.05),
            root=str(folder / "runs"),
            seed=7,
            name="net",
        )
        self.result = self.trainer.train_model(loader(), loader(1), loader(2), num_epochs=3)
        self.path = folder / "runs" / "net" / "0001"
        self.predictions = self.trainer.predict(loader(2))

    def load(self, path: Path | str | None = None, **arguments: Any) -> Any:
        return self.module.Regression.load_from_checkpoint(path or self.path, **arguments)


def load_module(script: Path) -> ModuleType:
    spec: Any = importlib.util.spec_from_file_location("net_script", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arrays(seed: int) -> dict[str, np.ndarray]:
    x = np.random.default_rng(seed).normal(size=(10, 3)).astype(np.float32)
    return {"x": x, "y": x.sum(axis=1)}


def loader(seed: int = 0, batch_size: int = 4) -> data.ArrayLoader:
    return data.ArrayLoader(arrays(seed), batch_size=batch_size)


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("inference"))


@pytest.fixture
def copied(run: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run.path, tmp_path / "elsewhere" / "renamed"))


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.slow_but("checkpoints/step_00000006")
@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/step_00000006"])
def test_loaded_model_predicts_the_same_bits_and_touches_nothing(run, inside):
    before = snapshot(run.path)
    loaded = run.load(str(run.path / inside))
    np.testing.assert_array_equal(loaded.predict(loader(2)), run.predictions)
    assert (loaded.step, loaded.epoch, int(loaded.state.step)) == (6, 2, 6)
    assert jnp.array_equal(loaded.state.rng, run.trainer.state.rng)
    assert loaded.eval_model(loader(2), "test/") == {
        name: value for name, value in run.result.metrics.items() if name.startswith("test/")
    }
    assert snapshot(run.path) == before
    assert list(Path().iterdir()) == []


def test_checkpoint_asked_for_by_its_step_is_the_one_loaded(run):
    last = run.load(run.path / "checkpoints" / "step_00000009")
    assert (last.step, last.epoch) == (9, 3)
    assert not np.array_equal(last.predict(loader(2)), run.predictions)


def test_folder_may_be_moved(run, copied, monkeypatch):
    monkeypatch.chdir(copied.parent)
    np.testing.assert_array_equal(run.load("renamed").predict(loader(2)), run.predictions)


@pytest.mark.slow
def test_new_process_predicts_the_same_bits(run):
    before = snapshot(run.path)
    batches = arrays(2)["x"].reshape(2, 5, 3)
    np.save("x.npy", batches)
    finished = subprocess.run(
        [sys.executable, *STRICT, "-c", PREDICT, str(run.path)],
        env=os.environ | {"PYTHONPATH": str(run.script.parent)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")
    np.testing.assert_array_equal(np.load("loaded.npy"), run.trainer.predict([*batches]))
    assert snapshot(run.path) == before


@pytest.mark.parametrize("as_class", [True, False])
@pytest.mark.slow
def test_model_or_its_class_may_be_passed_instead_of_found(run, copied, as_class):
    edit(copied, model={"$class": "gone:Net", "width": 4})
    loaded = run.load(copied, model=run.module.Net if as_class else run.module.Net())
    np.testing.assert_array_equal(loaded.predict(loader(2)), run.predictions)
    with pytest.raises(ConfigError, match="Got the class int"):
        run.load(model=int)


@pytest.mark.slow
def test_recorded_hyperparameters_make_the_model(run, tmp_path):
    options = {"name": "wide", "enable_progress_bar": False, "seed": 3}
    trainer = run.module.Regression(run.module.Net(width=6), **options)
    result = trainer.train_model(loader(), num_epochs=1)
    loaded = run.load(result.path)
    assert loaded.model.module == run.module.Net(width=6)
    assert (loaded.config.name, loaded.config.seed) == ("wide", 3)
    np.testing.assert_array_equal(loaded.predict(loader(2)), trainer.predict(loader(2)))
    assert run.load(result.path, seed=4).config.seed == 4


def test_model_of_another_size_is_refused_by_its_first_leaf(run):
    with pytest.raises(CheckpointError) as caught:
        run.load(model=run.module.Net(width=5))
    for part in ("another model", "batch_stats/BatchNorm_0/mean", "float32[4]", "float32[5]"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": {"$class": "gone:Net", "width": 4}}, "'gone:Net'"),
        ({"model": {"$class": "os:system", "command": "touch hacked"}}, "'os:system'"),
        ({"model": {"$class": "subprocess:Popen", "args": ["touch", "hacked"]}}, "Popen"),
        ({"model": {"$class": "net_script:Regression"}}, "net_script:Regression"),
        ({"model": {"$class": "net_script:Net", "width": "wide"}}, "wide"),
        ({"model": {"$class": "net_script:Net", "widths": 4}}, "'widths'"),
        ({"model": [1]}, "'None'"),
        ({"options": {"seed": "seven"}}, "seed must be int"),
        ({"options": {"sed": 7}}, "'seed'"),
        ({"options": {"name": "../up"}}, "'../up'"),
        ({"options": None}, "NoneType"),
        ({"example_batch": None}, "Pass example_batch"),
        ({"example_batch": {"x": {"$array": 3}}}, "Pass example_batch"),
        ({"example_batch": {"x": {"$array": {"shape": [4, 3], "dtype": "os"}}}}, "'os'"),
        ({"example_batch": {"x": {"$array": {"shape": "ab", "dtype": "int8"}}}}, "'ab'"),
        ({"example_batch": {"x": {"$array": {"shape": [4], "dtype": "object"}}}}, "object"),
        ({"example_batch": {"z": {"$array": {"shape": [4], "dtype": "int8"}}}}, "input"),
    ],
)
def test_hostile_record_is_refused_and_runs_nothing(run, copied, changes, named, tmp_path):
    edit(copied, **changes)
    with pytest.raises(CheckpointError) as caught:
        run.load(copied)
    assert named in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["elsewhere"]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"model": 1}', "[" * 100_000, "\x00", '{"model": '],
    ids=["empty", "list", "nothing", "incomplete", "deep", "binary", "cut"],
)
@pytest.mark.slow
def test_record_that_is_none_is_replaced_by_that_of_the_checkpoint(run, copied, text, caplog):
    (copied / "config.json").write_text(text)
    np.testing.assert_array_equal(run.load(copied).predict(loader(2)), run.predictions)
    assert "config.json" in caplog.text


@pytest.mark.parametrize("is_there", [True, False])
def test_record_that_is_nowhere_is_refused(run, copied, is_there, monkeypatch):
    info = CheckpointStore.info
    own = {"record": {"model": 1}} if is_there else {"record": None}
    monkeypatch.setattr(CheckpointStore, "info", lambda *each: {**info(*each), **own})
    (copied / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json.*Pass the path of a run directory"):
        run.load(copied)


def test_bound_model_answers_as_predict_does(run):
    bound = run.load().bind_model()
    np.testing.assert_allclose(
        bound(arrays(2)["x"], train=False), run.predictions, rtol=1e-5, atol=1e-6
    )


def test_predictions_come_in_order_from_any_batches(run):
    x = arrays(2)["x"]
    uneven = [x[:3], x[3:8], x[8:9], x[9:]]
    for batches in (uneven, iter(uneven), lambda: ({"image": part} for part in uneven)):
        predictions = run.trainer.predict(batches)
        assert isinstance(predictions, np.ndarray)
        np.testing.assert_allclose(predictions, run.predictions, rtol=1e-5, atol=1e-6)
    with pytest.raises(BatchError, match="at least one batch"):
        run.trainer.predict([])


def test_predict_fn_of_ones_own_may_return_a_tree(run):
    class Both(run.module.Regression):
        def predict_fn(self, params, batch, ctx):
            outputs = super().predict_fn(params, batch, ctx)
            return {"outputs": outputs, "error": outputs[:, 0] - batch["y"]}

    predictions = Both.load_from_checkpoint(run.path).predict(loader(2))
    np.testing.assert_array_equal(predictions["outputs"], run.predictions)
    assert predictions["error"].shape == (10,)


@pytest.mark.slow
def test_loaded_trainer_trains_on_in_a_new_directory(run, capfd):
    before = snapshot(run.path)
    loaded = run.load(root="mine", name="tuned")
    result = loaded.train_model(loader(), loader(1), num_epochs=2)
    assert (result.step, result.epoch, result.path) == (12, 4, Path("mine/tuned/0001").absolute())
    assert snapshot(run.path) == before
    assert capfd.readouterr().out == ""
    again = run.load(result.path)
    np.testing.assert_array_equal(again.predict(loader(2)), loaded.predict(loader(2)))


@pytest.mark.slow
def test_loaded_trainer_has_the_recorded_optimizer(run, tmp_path):
    config = distaff.OptimizerConfig("lion", learning_rate=0.25, schedule="constant")
    trainer = run.load(optimizer=config, root=str(tmp_path))
    result = trainer.train_model(loader(), num_epochs=1)
    assert run.load(result.path).optimizer == config
    plain = run.load(optimizer=optax.sgd(0.1), root=str(tmp_path))
    plain_result = plain.train_model(loader(), num_epochs=1)
    assert run.load(plain_result.path).optimizer == distaff.OptimizerConfig()


class Averaged(distaff.TrainState):
    average: Any = None


@pytest.mark.slow
def test_members_of_ones_own_state_are_loaded_too(run):
    class Averaging(run.module.Regression):
        state_class = Averaged

        def init_model(self, example_batch):
            super().init_model(example_batch)
            self.state = self.state.replace(average=jax.tree.map(jnp.zeros_like, self.state.params))

        def create_functions(self):
            step, eval_step = super().create_functions()

            def averaging_step(state, batch):
                state, metrics = step(state, batch)
                mean = jax.tree.map(lambda a, p: (a + p) / 2, state.average, state.params)
                return state.replace(average=mean), metrics

            return averaging_step, eval_step

        def predict_fn(self, params, batch, ctx):
            return super().predict_fn(ctx.state.average, batch, ctx)

    trainer = Averaging(run.module.Net(), name="mean", enable_progress_bar=False)
    result = trainer.train_model(loader(), num_epochs=1)
    loaded = Averaging.load_from_checkpoint(result.path)
    np.testing.assert_array_equal(loaded.predict(loader(2)), trainer.predict(loader(2)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    x: Any
    y: Any


@pytest.mark.slow
def test_batches_of_ones_own_class_and_inputs_of_ones_own_need_an_example(run):
    class Paired(run.module.Regression):
        def model_inputs(self, batch):
            return (batch.x,)

        def loss_fn(self, params, batch, ctx):
            return super().loss_fn(params, {"x": batch.x, "y": batch.y}, ctx)

    batches = [Pair(**batch) for batch in loader()]
    trainer = Paired(run.module.Net(), name="pair", enable_progress_bar=False)
    result = trainer.train_model(batches, num_epochs=1)
    with pytest.raises(
        CheckpointError, match="Pass what differs to load_from_checkpoint: model, example_batch"
    ):
        Paired.load_from_checkpoint(result.path)
    loaded = Paired.load_from_checkpoint(result.path, example_batch=batches[0])
    np.testing.assert_array_equal(loaded.predict(batches), trainer.predict(batches))
