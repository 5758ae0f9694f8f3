"""The fourth source document, TrainerModule: its tracker, and what it saves and loads.

What other files prove is not repeated here:

    each display by itself        unit/test_display.py
    load_from_checkpoint          unit/test_inference.py: the same bits, best and last, a moved
      and bind_model                folder, a new process, hostile records, training on
    a state saved by load_model   test_seed_001.py
"""

from __future__ import annotations

import builtins
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distaff
from distaff import data
from distaff.checkpoint import CheckpointStore
from distaff.errors import ConfigError, StateError

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


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class ZMQInteractiveShell:
    """What a notebook's `get_ipython()` is an instance of."""


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, enabled: bool = True) -> str:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", stream)
    trainer = make(root=None, enable_progress_bar=enabled)
    trainer.train_model(loader(), loader(), loader(), num_epochs=2)
    assert list(trainer.tracker("abc", description="val", total=3)) == ["a", "b", "c"]
    return stream.getvalue()


def assert_plain(text: str) -> None:
    assert all(char == "\n" or char.isprintable() for char in text)
    lines = text.splitlines()
    assert [line[:9] for line in lines if line.startswith("epoch")] == ["epoch 1/2", "epoch 2/2"]
    assert any("val, epoch" in line and "test" in line for line in lines)


def test_tracker_on_a_terminal_is_a_bar_that_leaves_the_lines(monkeypatch):
    text = shown(monkeypatch, FakeTerminal())
    hidden, visible = "\x1b[?25l", "\x1b[?25h"
    assert text.count(hidden) == text.count(visible) == 2  # the run, and the tracker alone
    assert text.rindex(visible) > text.rindex(hidden)
    assert "epoch 2/2" in text


def test_tracker_in_a_notebook_writes_plain_lines_into_the_cell(monkeypatch):
    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    assert_plain(shown(monkeypatch, io.StringIO()))


def test_tracker_in_a_log_file_writes_plain_lines(monkeypatch):
    assert_plain(shown(monkeypatch, io.StringIO()))


def test_tracker_switched_off_is_silent(monkeypatch):
    assert shown(monkeypatch, FakeTerminal(), enabled=False) == ""


def snapshot(folder: Path) -> dict[str, Any]:
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            path.is_file() and path.read_bytes(),
        )
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("method", ["save_model", "load_model", "save_metrics"])
def test_before_a_run_there_is_nothing_to_save_or_load(method, tmp_path):
    trainer = make(example_batch=next(iter(loader())))
    arguments = {"save_model": ({}, True), "save_metrics": ("mine", {"x": 1.0})}.get(method, ())
    with pytest.raises(StateError, match=r"no run yet.*Call train_model first"):
        getattr(trainer, method)(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_refused_is_no_run(tmp_path):
    trainer = make(optimizer=distaff.OptimizerConfig(warmup_steps=99))
    with pytest.raises(ConfigError, match="99"):
        trainer.train_model(loader(), num_epochs=1)
    with pytest.raises(StateError, match="Call train_model first"):
        trainer.save_model({}, True)
    assert list(tmp_path.iterdir()) == []


def test_a_relative_root_stays_where_it_was_when_the_program_goes_elsewhere(tmp_path, monkeypatch):
    class Wandering(Regression):
        def on_training_epoch_end(self, epoch, metrics):
            monkeypatch.chdir(elsewhere)

        def on_validation_epoch_end(self, epoch, metrics, val_loader):
            self.last_run.logger.log_text("note", "hello", step=self.step)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    trainer = make(Wandering, root="runs")
    result = trainer.train_model(loader(), loader(), loader(), num_epochs=2)
    trainer.save_metrics("mine", {"score": 1.0})
    best = host(trainer.state.params)
    trainer.state = trainer.state.replace(params=jax.tree.map(jnp.zeros_like, best))
    trainer.load_model()
    assert_same_bits(host(trainer.state.params), best)
    assert list(elsewhere.iterdir()) == []
    assert result.path == tmp_path / "runs/line/0001"
    run = tmp_path / result.path
    kept = {path.name for path in (run / "metrics").iterdir()}
    assert kept == {"mine.json", "test.json", "val_epoch_0001.json", "val_epoch_0002.json"}
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    assert list(run.glob("texts/note*"))
    for path in ("../runs/line/0001", Path("..", "runs/line/0001/checkpoints"), str(run) + "/"):
        loaded = Regression.load_from_checkpoint(path)
        assert_same_bits(host(loaded.state.params), best)


def test_a_moved_read_only_folder_is_loaded_bound_and_left_alone(tmp_path):
    trainer = make(model=Net())
    result = trainer.train_model(loader(), loader(), num_epochs=2)
    moved = Path(shutil.move(result.path, tmp_path / "archive"))
    folders = [moved, *(path for path in moved.rglob("*") if path.is_dir())]
    before = snapshot(moved)
    for folder in folders:
        folder.chmod(0o555)
    loaded = Regression.load_from_checkpoint(moved)
    np.testing.assert_array_equal(loaded.predict(loader()), trainer.predict(loader()))
    bound = loaded.bind_model()(X, train=False)
    np.testing.assert_allclose(bound, trainer.predict(loader()), rtol=1e-5, atol=1e-6)
    for folder in folders:
        folder.chmod(0o755)
    assert snapshot(moved) == before


@pytest.mark.slow
def test_only_weights_are_loaded_for_inference_and_for_a_new_start(tmp_path):
    trainer = make(model=Net(), optimizer=optax.adam(0.05))
    result = trainer.train_model(loader(), loader(), num_epochs=2)
    loaded = Regression.load_from_checkpoint(result.path)
    assert (loaded.state.tx, loaded.state.opt_state) == (None, None)
    # Nothing but one checkpoint folder is left of the run.
    *_, folder = sorted((result.path / "checkpoints").iterdir())
    shutil.move(folder, tmp_path / "weights" / folder.name)
    shutil.rmtree(tmp_path / "runs")
    tuned = make(model=Net(), optimizer=optax.sgd(0.1, momentum=0.9), seed=1, name="tuned")
    tuned._set_up(next(iter(loader())))
    key = jax.random.key_data(tuned.state.rng)
    weights = CheckpointStore(tmp_path / "weights")
    with pytest.deprecated_call(match="load_weights, or init_from"):
        tuned.restore(weights, trainer.step, ["params", "batch_stats"])
    assert_same_bits(tuned.state.params, trainer.state.params)
    np.testing.assert_array_equal(tuned.predict(loader()), trainer.predict(loader()))
    assert (jax.random.key_data(tuned.state.rng) == key).all()
    assert tuned.train_model(loader(), num_epochs=1).path == Path("runs/tuned/0001").absolute()
