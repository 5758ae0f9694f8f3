"""A run is resumed by the same program only; what has changed begins a new one, and is named."""

from __future__ import annotations

import json
import logging
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distaff
from distaff import Callback, OptimizerConfig, data
from distaff.errors import CheckpointError
from distaff.zoo import MLP

X = np.linspace(-1, 1, 48, dtype=np.float32).reshape(16, 3)


class Line(distaff.TrainerModule):
    """Fits a line; what may change are attributes of the trainer."""

    goal = 1.0

    def print_tabulate(self, example_batch):
        pass  # it takes most of the time of a start

    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - self.goal * batch["y"])


class Several(Line):
    monitor = distaff.Monitor("val_a/loss")


class Shifted(Line):
    shift = 0.0

    def augment(self, batch, key):
        return {**batch, "x": batch["x"] + self.shift * jax.random.normal(key, batch["x"].shape)}


class End(Callback):
    """Ends a run after the training of its third epoch: by Ctrl-C, by an error, or not."""

    def __init__(self, how: BaseException | str) -> None:
        self.how = how

    def on_epoch_end(self, info):
        if info.epoch == 3 and isinstance(self.how, BaseException):
            raise self.how
        if info.epoch == 3 and self.how == "Ctrl-C":
            signal.raise_signal(signal.SIGINT)


def loader(x: np.ndarray = X, **options: Any) -> data.ArrayLoader:
    return data.ArrayLoader({"x": x, "y": x.sum(axis=1)}, 4, **options)


def line(
    cls: type[Line] = Line, model: Any = None, *, goal: float = 1.0, end: Any = "", **options: Any
) -> Line:
    options = {
        "callbacks": [End(end)],
        "optimizer": optax.sgd(0.05),
        "enable_progress_bar": False,
        **options,
    }
    trainer = cls(model or MLP((4, 1)), name="line", **options)
    trainer.goal = goal
    return trainer


def train(trainer: Line, train_loader: Any = None, val_loader: Any = None, epochs: int = 4) -> Any:
    return trainer.train_model(
        loader() if train_loader is None else train_loader,
        val_loader or loader(),
        num_epochs=epochs,
    )


@pytest.fixture
def cut(request: Any) -> None:
    """Leaves a run that Ctrl-C has ended after its third epoch."""
    assert train(line(end="Ctrl-C")).status == "interrupted"


class ByHand(Line):
    """A step of its own, with a number in it."""

    def create_functions(self):
        _, eval_step = super().create_functions()

        def train_step(state, batch):
            loss, grads = jax.value_and_grad(
                lambda params: jnp.square(state.apply_fn({"params": params}, batch["x"])).mean()
            )(state.params)
            return state.apply_gradients(grads=grads), {"loss": loss * self.goal}

        return train_step, eval_step


OTHER = {
    "loss": ({"goal": 2.0}, "loss differs"),
    "rate": ({"optimizer": optax.sgd(0.06)}, r"optimizer differs.*-0.05 -> -0.06"),
    "factory": ({"optimizer": lambda steps: optax.sgd(0.07)}, "optimizer: "),
    "injected": (
        {"optimizer": optax.inject_hyperparams(optax.sgd)(learning_rate=0.05)},
        "optimizer",
    ),
    "config": ({"optimizer": OptimizerConfig("adam", learning_rate=0.1)}, "optimizer"),
    "augment": ({"cls": Shifted}, "trainer"),
    "step": ({"cls": ByHand}, "trainer"),
    "seed": ({"seed": 7}, "options.seed: 42 -> 7"),
}


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.slow
def test_other_program_begins_a_new_run_and_names_what_changed(cut: None, name: str) -> None:
    options, text = OTHER[name]
    result = train(line(**options))
    assert (result.path.name, result.first_step, result.step) == ("0002", 0, 16)
    log = (result.path / "log.txt").read_text()
    (remark,) = [each for each in log.splitlines() if "is a new run instead of 0001" in each]
    assert re.search(text, remark)


@pytest.mark.slow_but("loaders0-train data differs: other values")
@pytest.mark.parametrize(
    ("loaders", "text"),
    [
        ((loader(X + 1), None), "train data differs: other values"),
        ((loader(X[::-1]), None), "train data differs"),
        ((loader(shuffle=True, seed=1), None), "train data differs: shuffle 0 -> 1"),
        ((list(loader()), None), "train data differs: kind ArrayLoader -> Stream"),
        ((None, loader(X * 2)), "val data differs"),
        ((None, {"a": loader(X * 2), "b": loader()}), "val data differs: removed"),
    ],
)
def test_other_data_begin_a_new_run(cut: None, loaders: Any, text: str) -> None:
    trainer = line(Several if isinstance(loaders[1], dict) else Line)
    result = train(trainer, *loaders)
    assert (result.path.name, result.first_step) == ("0002", 0)
    assert text in (result.path / "log.txt").read_text()


def test_list_of_other_batches_is_other_data() -> None:
    train(line(end="Ctrl-C"), list(loader()))
    later = list(loader())
    later[2] = {**later[2], "x": later[2]["x"] + 1}  # not the first one
    result = train(line(), later)
    assert (result.path.name, result.first_step) == ("0002", 0)
    assert train(line(end="Ctrl-C"), list(loader())).first_step == 12


def test_same_program_resumes_and_says_so_in_one_line(cut: None) -> None:
    moved = loader()
    next(iter(moved))  # a cell that is run again finds its loader elsewhere
    result = train(line(log_every_n_steps=1), moved)
    assert (result.path.name, result.first_step, result.step) == ("0001", 12, 16)
    log = (result.path / "log.txt").read_text()
    assert log.count("runs/line/0001 from its checkpoint of step 12, epoch 3") == 1
    assert "could not be compared" not in log


@pytest.mark.slow
def test_longer_run_is_the_same_though_its_schedule_is_stretched() -> None:
    cosine = OptimizerConfig("sgd", learning_rate=0.05, schedule="cosine")
    train(line(end="Ctrl-C", optimizer=cosine))
    result = train(line(optimizer=cosine), epochs=5)
    assert (result.path.name, result.first_step, result.step) == ("0001", 12, 20)
    (result.path / "status.json").write_text('{"status": "interrupted"}')
    other = OptimizerConfig("sgd", learning_rate=0.06, schedule="cosine")
    assert train(line(optimizer=other), epochs=6).first_step == 0


@pytest.mark.slow
def test_must_names_all_changes_and_takes_them_only_where_allowed(cut: None) -> None:
    changed = {"goal": 2.0, "optimizer": optax.sgd(0.06), "resume": "must"}
    with pytest.raises(
        CheckpointError, match=r"(?s)loss differs.*optimizer differs.*allow_changes"
    ):
        train(line(**changed))
    with pytest.warns(UserWarning, match="with the weights of another run: loss differs"):
        result = train(line(**changed, allow_changes=True))
    assert (result.path.name, result.first_step) == ("0001", 12)


@pytest.mark.slow
def test_run_of_an_older_version_is_compared_by_its_record(cut: None) -> None:
    file = Path("runs/line/0001/config.json")
    record = json.loads(file.read_text())
    del record["identity"]
    file.write_text(json.dumps(record))
    result = train(line(goal=3.0))
    assert result.first_step == 12
    assert "were not recorded and could not be compared" in (result.path / "log.txt").read_text()


@pytest.mark.slow
def test_newer_library_compares_what_does_not_depend_on_it(cut: None) -> None:
    file = Path("runs/line/0001/config.json")
    record = json.loads(file.read_text())
    record["identity"]["versions"]["jax"] = "0.9.0"
    record["identity"]["step"]["whole"] = "another"
    file.write_text(json.dumps(record))
    result = train(line())
    assert result.first_step == 12
    log = (result.path / "log.txt").read_text()
    assert f"the program could not be compared: jax 0.9.0 -> {jax.__version__}" in log
    (result.path / "status.json").write_text('{"status": "interrupted"}')
    assert train(line(), loader(X + 1)).first_step == 0


def multiplied(params: Any, x: Any) -> Any:
    return x @ params["w"]


@pytest.mark.slow
def test_start_weights_that_are_given_are_compared() -> None:
    def given(scale: float) -> Any:
        weights = {"w": jnp.full((3, 1), scale)}
        return lambda key, x: weights, multiplied

    train(line(model=given(0.5), end="Ctrl-C"))
    result = train(line(model=given(2.0)))
    assert (result.path.name, result.first_step) == ("0002", 0)
    assert "start weights differ" in (result.path / "log.txt").read_text()


class TrialPruned(Exception):  # noqa: N818 - the name counts
    """As Optuna has it."""


@pytest.mark.parametrize(
    ("error", "status", "resumes"),
    [
        (RuntimeError("boom"), "failed", False),
        (TrialPruned("no good"), "pruned", False),
        (KeyboardInterrupt(), "interrupted", True),
        (OSError(28, "No space left on device"), "failed", True),
        (CheckpointError("The checkpoint cannot be written."), "failed", True),
    ],
)
@pytest.mark.slow
def test_run_that_the_users_own_code_has_ended_has_ended(
    error: BaseException, status: str, resumes: bool
) -> None:
    with pytest.raises(type(error)):
        train(line(end=error))
    assert json.loads(Path("runs/line/0001/status.json").read_text())["status"] == status
    result = train(line())
    assert result.path.name == ("0001" if resumes else "0002")
    assert result.first_step == (8 if resumes else 0)
    if not resumes:
        log = (result.path / "log.txt").read_text()
        assert "resume='must' resumes that one" in log
        shutil.rmtree(result.path)
        assert train(line(resume="must")).path.name == "0001"


@pytest.mark.slow
def test_cell_that_is_corrected_and_run_again_trains_the_corrected_loss() -> None:
    result = train(line(end="Ctrl-C", goal=-1.0))
    assert result.status == "interrupted"
    clean = train(line(root=None))
    again = train(line())
    assert again.first_step == 0
    assert again.metrics == clean.metrics


def test_resume_with_nothing_left_says_that_nothing_was_trained() -> None:
    result = train(line())
    (result.path / "status.json").write_text('{"status": "running"}')
    again = train(line())
    assert (again.path, again.step, again.first_step) == (result.path, 16, 16)
    assert again.reason == "nothing was left to train after step 16"
    assert "nothing was left to train" in (again.path / "log.txt").read_text()
    assert again.metrics.keys() >= {"val/loss"}


def test_lines_reach_the_programs_own_logging(cut: None) -> None:
    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda entry: lines.append(entry.getMessage())
    logger = logging.getLogger("distaff")
    logger.addHandler(handler)
    try:
        train(line(goal=2.0))
    finally:
        logger.removeHandler(handler)
    assert any("loss differs" in each for each in lines)
