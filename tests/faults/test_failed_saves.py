"""Runs whose checkpoints cannot be written: what ends them, what they say, what is left."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distaff
from distaff import Callback, data
from distaff.checkpoint import CheckpointStore, arrays, find
from distaff.checkpoint.writer import Save
from distaff.errors import CheckpointError, NonFiniteError
from scripted import Scripted

X = {"x": np.zeros(3, np.float32)}
NOT_WRITTEN = r"not (be )?written"  # is in each of the warnings
CHECKPOINTS = Path("runs/run/0001/checkpoints")


class Snapshots(Callback):
    """Keeps the parameters after each epoch."""

    def __init__(self) -> None:
        self.params: dict[int, Any] = {}

    def on_epoch_end(self, info):
        self.params[info.step] = jax.tree.map(np.array, info.state.params)


class InTheWay(Callback):
    """Puts a file where checkpoints should go, and takes it away again."""

    def __init__(self, path: Path, gone_after: int | None = None) -> None:
        self.path, self.gone_after = path, gone_after

    def on_training_start(self, info):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("in the way")

    def on_step_end(self, info):
        if info.step == self.gone_after:
            self.path.unlink()


class AtStep(Callback):
    """Does something after a step."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.step, self.act = step, act

    def on_step_end(self, info):
        if info.step == self.step:
            self.act()


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def loader() -> data.ArrayLoader:
    x = np.linspace(-1, 1, 48, dtype=np.float32).reshape(16, 3)
    return data.ArrayLoader({"x": x, "y": x.sum(1)}, batch_size=4)


def make(
    *callbacks: Callback, scores: tuple[float, ...], cls: Any = Scripted, **options: Any
) -> Any:
    defaults = {"name": "run", "keep_last": 1, "steps_per_call": 1, "tune_process": False}
    options = {**defaults, "enable_progress_bar": False, **options}
    trainer = cls(nn.Dense(1), callbacks=callbacks, **options)
    trainer.scores = scores
    return trainer


def train(trainer: Any) -> distaff.TrainResult:
    return trainer.train_model(loader(), loader(), loader(), num_epochs=len(trainer.scores))


def read(path: Path, name: str) -> Any:
    return json.loads((path / name).read_text())


def on_disk() -> list[int]:
    return [int(folder.name[-8:]) for folder in sorted(CHECKPOINTS.iterdir())]


def assert_same(params: Any, others: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, params, others)


@pytest.fixture
def prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has each save written, or failed, before the run goes on; it is not told yet."""
    save = CheckpointStore.save

    def saved(self: CheckpointStore, *args: Any) -> Path:
        path = save(self, *args)
        self._writer.wait()
        return path

    monkeypatch.setattr(CheckpointStore, "save", saved)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Returns a function that has the disk be full for the saves of some steps, n times each."""
    write = arrays.write

    def fill(*steps: int, times: int = 1000) -> None:
        left = dict.fromkeys(steps, times)

        def refuse(path: Path, *args: Any) -> None:
            step = int(path.name[-8:])
            if left.get(step, 0) > 0:
                left[step] -= 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            write(path, *args)

        monkeypatch.setattr(arrays, "write", refuse)

    return fill


@pytest.mark.usefixtures("prompt")
def test_failed_save_ends_a_run_within_one_step(full_disk):
    full_disk(8)
    trainer = make(scores=(3.0, 1.0, 2.0))
    with pytest.raises(
        CheckpointError, match=r"0001/checkpoints/step_00000008 was not written.*The disk is full"
    ):
        train(trainer)
    assert trainer.step == 9
    assert on_disk() == [4]
    status = read(CHECKPOINTS.parent, "status.json")
    assert (status["status"], status["best"]) == ("failed", None)


@pytest.mark.usefixtures("prompt")
@pytest.mark.parametrize(
    ("scores", "best", "left"),
    [
        # The best model is lost; the next best is one that comes later, or one that came before.
        ((3.0, 1.0, 2.0, 4.0), 12, [12, 16]),
        ((2.0, 1.0, 3.0, 4.0), 4, [4, 16]),
    ],
)
@pytest.mark.slow
def test_run_goes_on_after_a_failed_save_and_ends_with_the_best_that_was_written(
    full_disk, scores, best, left
):
    full_disk(8)
    snapshots = Snapshots()
    trainer = make(snapshots, scores=scores, on_failed_save="warn")
    with pytest.warns(UserWarning, match=NOT_WRITTEN) as warned:
        result = train(trainer)
    texts = [str(warning.message) for warning in warned]
    assert "checkpoints/step_00000008 was not written: [Errno 28]" in texts[0]
    assert "The newest whole checkpoint is of step 4. Training continues" in texts[0]
    assert on_disk() == left
    assert (result.status, result.step, result.best.step) == ("finished", 16, best)
    assert result.metrics["val/score"] == scores[best // 4 - 1]
    assert_same(trainer.state.params, snapshots.params[best])
    assert find(result.path)[1] == best
    status = read(result.path, "status.json")
    assert (status["status"], status["best"]["step"]) == ("finished", best)
    log = (result.path / "log.txt").read_text()
    assert [text in log for text in texts] == [True] * len(texts)


@pytest.mark.usefixtures("prompt")
@pytest.mark.parametrize("times", [1, 1000])
@pytest.mark.slow
def test_last_save_is_tried_again_at_the_end(full_disk, times):
    full_disk(12, times=times)
    snapshots = Snapshots()
    trainer = make(snapshots, scores=(3.0, 2.0, 1.0), on_failed_save="warn")
    with pytest.warns(UserWarning, match=NOT_WRITTEN) as warned:
        result = train(trainer)
    texts = [str(warning.message) for warning in warned]
    best = 12 if times == 1 else 8
    assert (result.best.step, find(result.path)[1], on_disk()) == (best, best, [best])
    assert_same(trainer.state.params, snapshots.params[best])
    replaced = "of step 12, could not be written. The best model that was written, of step 8"
    assert [replaced in text for text in texts] == ([False] if times == 1 else [False, False, True])
    assert read(result.path, "status.json")["best"]["step"] == best


def test_run_without_any_checkpoint_keeps_its_last_weights():
    snapshots = Snapshots()
    trainer = make(
        snapshots, InTheWay(CHECKPOINTS), scores=(1.0, 2.0), on_failed_save="warn", keep_best=2
    )
    with pytest.warns(UserWarning, match=NOT_WRITTEN) as warned:
        result = train(trainer)
    texts = [str(warning.message) for warning in warned]
    assert "Not a directory" in texts[0]
    assert "0001/checkpoints" in texts[0]
    assert "There is no whole checkpoint yet" in texts[0]
    assert "nor any other validated model" in texts[-2]
    assert "The weights of step 8 could not be written. They are kept" in texts[-1]
    assert (result.status, result.best, trainer.step) == ("finished", None, 8)
    assert_same(trainer.state.params, snapshots.params[8])
    assert read(result.path, "status.json")["best"] is None
    assert "test/loss" in result.metrics


@pytest.mark.usefixtures("prompt")
def test_run_without_validation_does_not_go_back_to_an_older_checkpoint(full_disk):
    full_disk(8)
    snapshots = Snapshots()
    trainer = make(snapshots, scores=(), on_failed_save="warn")
    with pytest.warns(UserWarning, match=NOT_WRITTEN) as warned:
        trainer.train_model(loader(), num_epochs=2)
    assert "The weights of step 8 could not be written. They are kept" in str(warned[-1].message)
    assert (trainer.step, on_disk()) == (8, [4])
    assert_same(trainer.state.params, snapshots.params[8])


def test_file_in_place_of_a_checkpoint_ends_a_run_at_once():
    trainer = make(InTheWay(CHECKPOINTS / "step_00000004"), scores=(1.0, 2.0))
    with pytest.raises(CheckpointError, match=r"step_00000004 was not written.*move that away"):
        train(trainer)
    assert trainer.step == 4


@pytest.mark.usefixtures("prompt")
@pytest.mark.slow
def test_run_saves_again_where_the_way_is_free():
    blocked = InTheWay(CHECKPOINTS, gone_after=5)
    with pytest.warns(UserWarning, match=r"step_00000004 was not written.*Not a dir.*move it away"):
        result = train(make(blocked, scores=(2.0, 3.0, 1.0), on_failed_save="warn", keep_best=2))
    assert on_disk() == [8, 12]
    assert (result.status, result.best.step) == ("finished", 12)
    blocked = InTheWay(CHECKPOINTS.parents[1] / "0002/checkpoints/step_00000004")
    with pytest.warns(UserWarning, match=r"step_00000004 was not written.*move that away"):
        result = train(make(blocked, scores=(1.0, 2.0, 3.0), on_failed_save="warn"))
    assert (result.status, result.best.step) == ("finished", 8)


def test_interrupted_run_names_no_best_model_that_was_lost(full_disk):
    full_disk(8)
    trainer = make(AtStep(9, press_ctrl_c), scores=(2.0, 1.0, 3.0), on_failed_save="warn")
    with pytest.warns(UserWarning, match=NOT_WRITTEN) as warned:
        result = train(trainer)
    assert len(warned) == 2
    assert (result.status, result.step, result.best.step) == ("interrupted", 9, 4)
    assert read(result.path, "status.json")["best"]["step"] == 4
    again = make(AtStep(0, press_ctrl_c), scores=(2.0, 1.0, 3.0), on_failed_save="warn")
    assert (train(again).best.step, on_disk()) == (4, [4, 12])


def test_failed_run_names_no_best_model_that_was_lost(full_disk):
    full_disk(8)
    trainer = make(AtStep(9, lambda: 1 // 0), scores=(2.0, 1.0, 3.0), on_failed_save="warn")
    with pytest.warns(UserWarning, match=NOT_WRITTEN), pytest.raises(ZeroDivisionError):
        train(trainer)
    status = read(CHECKPOINTS.parent, "status.json")
    assert (status["status"], status["step"], status["best"]) == ("failed", 9, None)


def test_model_with_nan_is_an_error_whatever_becomes_of_failed_saves():
    class Broken(Scripted):
        def on_training_epoch_end(self, epoch, metrics):
            params = jax.tree.map(lambda leaf: leaf * jnp.nan, self.state.params)
            self.state = self.state.replace(params=params)

    with pytest.raises(NonFiniteError):
        train(make(cls=Broken, scores=(1.0,), on_failed_save="warn"))


def save(store: CheckpointStore, step: int, **info: Any) -> None:
    store.save(step, {"x": jnp.full(3, float(step))}, info)


@pytest.mark.parametrize("how", ["save", "wait", "close", "check_failure"])
def test_failed_save_is_warned_of_by_the_next_call(tmp_path, full_disk, how):
    full_disk(2)
    store = CheckpointStore(tmp_path, on_failed_save="warn")
    save(store, 1)
    store.wait()
    save(store, 2)
    store._writer.wait()
    with pytest.warns(UserWarning, match=r"step_00000002 was not written.*is of step 1\b"):
        save(store, 3) if how == "save" else getattr(store, how)()
    store.close()
    assert store.steps() == ((1, 3) if how == "save" else (1,))


def test_save_that_fails_takes_no_checkpoint_with_it(tmp_path, full_disk):
    full_disk(2)
    store = CheckpointStore(tmp_path, keep_last=1, keep_best=1, on_failed_save="warn")
    for step, best in ((1, [1]), (2, [2, 1]), (3, [2, 1])):
        store._writer.put(Save(step, X, {"best_steps": best}, 0), kept={step})
        store._writer.wait()
    assert (store.steps(), store.best()) == ((1, 3), 1)  # the next best has stayed
    with pytest.warns(UserWarning, match="step_00000002 was not written"):
        save(store, 4, best_steps=[4, 1])
    store.close()
    assert (store.steps(), store.best()) == ((4,), 4)


def test_step_can_be_saved_again_whose_failed_save_left_something(tmp_path, full_disk, monkeypatch):
    def busy(folder: Path, **options: bool) -> None:
        if "ignore_errors" not in options:
            raise OSError("busy")

    full_disk(1, times=1)
    store = CheckpointStore(tmp_path, on_failed_save="warn")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", busy)
        save(store, 1)
        store._writer.wait()
    with pytest.warns(UserWarning, match="step_00000001 was not written"):
        store.check_failure()
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000001.saving"]
    save(store, 1)
    store.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000001"]


def test_what_is_wrong_with_a_state_is_always_an_error(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, on_failed_save="warn")
    with pytest.raises(CheckpointError, match="'name' is a str"):
        store.save(1, {"name": "cnn"}, {})
    with pytest.raises(CheckpointError, match="'loss' is nan"):
        store.save(1, X, {"loss": float("nan")})

    def write(*_: Any) -> None:
        raise TypeError("no array of numbers")

    monkeypatch.setattr(arrays, "write", write)
    save(store, 1)
    with pytest.raises(CheckpointError, match="step_00000001 was not written: no array"):
        store.close()


@pytest.mark.parametrize("error", [ValueError("No space left on device"), PermissionError("no")])
def test_errors_of_the_storage_are_known_by_their_words(tmp_path, monkeypatch, error):
    def write(*_: Any) -> None:
        raise RuntimeError("not saved") from error

    store = CheckpointStore(tmp_path, on_failed_save="warn")
    with monkeypatch.context() as patched:
        patched.setattr(arrays, "write", write)
        save(store, 1)
        with pytest.warns(UserWarning, match="step_00000001 was not written: not saved"):
            store.close()
    assert store.steps() == ()
    save(store, 2)
    store.close()
    assert store.steps() == (2,)
