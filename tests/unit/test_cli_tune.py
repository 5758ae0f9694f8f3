"""The command `distaff tune`: a recipe as a study, what it prints, and how it goes wrong."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import distaff.cli
from distaff.cli.tune import _recipe, _with_trials

RECIPE = '''
from pathlib import Path
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import distaff
from distaff import data, tune

RATE = {"optimizer.learning_rate": tune.Float(1e-3, 0.3, log=True)}
WITH_TUPLES = {**RATE, "widths": tune.Choice((4,), (4, 4))}
WRONG = {"optimizer.rate": tune.Float(0, 1)}
SGD = distaff.OptimizerConfig("sgd", learning_rate=0.1)
SAME = data.ArrayLoader({"x": np.ones((8, 3), np.float32), "y": np.ones(8, np.float32)}, 8)

def as_function(trial):
    return {"widths": (4,) * trial.suggest_int("depth", 1, 2)}

class Line(distaff.TrainerModule):
    def loss_fn(self, params, batch, ctx):
        size = sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(params))
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"]), {"size": size}

class Interrupting(distaff.Callback):
    def on_step_end(self, info):
        if info.step == 3 and Path("interrupt").exists():
            Path("interrupt").unlink()
            raise KeyboardInterrupt

def loader(seed, **options):
    x = np.random.default_rng(seed).normal(size=(16, 3)).astype(np.float32)
    return data.ArrayLoader({"x": x, "y": x.sum(axis=1)}, 8, **options)

class Net(nn.Module):
    widths: tuple[int, ...]
    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(1)(x)

def main(
    widths: tuple[int, ...] = (4,), num_epochs: int = 2, optimizer: distaff.OptimizerConfig = SGD,
    name: str = "line",
):
    """Trains a line."""
    trainer = Line(Net(widths), optimizer=optimizer, name=name, callbacks=[Interrupting()])
    train, val, test = loader(0, shuffle=True), loader(1), loader(2)
    trainer.train_model(train, val, test, num_epochs=num_epochs)
    Path("after.txt").touch()

def without_validation(optimizer: distaff.OptimizerConfig = SGD, widths: int = 1):
    Line(Net((4,)), optimizer=optimizer).train_model(loader(0), num_epochs=1)

def without_training(optimizer: distaff.OptimizerConfig = SGD, widths: int = 1):
    pass

def with_one_loader(optimizer: distaff.OptimizerConfig = SGD, widths: int = 1):
    Line(Net((4,)), optimizer=optimizer).train_model(SAME, SAME, num_epochs=1)
'''


class Printed(NamedTuple):
    status: int | str | None
    out: str
    err: str


def typed(*words: str) -> Printed:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = distaff.cli.main(["tune", *words])
        except SystemExit as end:
            status = end.code
    return Printed(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("tuned")
    (place / "tuned_line.py").write_text(RECIPE)
    return place


@pytest.fixture
def here(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tuned_line.py").write_text((folder / "tuned_line.py").read_text())


MAIN = ("tuned_line.py:main", "--space", "tuned_line.py:WITH_TUPLES", "--no-figures")


@pytest.fixture(scope="module")
def printed(folder: Path) -> Printed:
    """The result of a study of two trials."""
    with contextlib.chdir(folder):
        return typed(*MAIN, "--trials", "2", "--widths", "4", "4")


def test_study_of_a_recipe_prints_its_trials_and_the_best(printed, folder):
    assert (printed.status, printed.err) == (0, "")
    first, second, *rest = printed.out.splitlines()
    assert first.startswith("trial 0 (1 of 2)  val/loss ")
    assert "  finished  optimizer.learning_rate=0.1  widths=(4, 4)  " in first
    assert second.startswith("trial 1 (2 of 2)  val/loss ")
    assert rest[0] == "2 trials: 2 finished"
    assert rest[1].startswith("best: trial ")
    assert rest[-1] == (
        "To continue the study, run: distaff tune tuned_line.py:main --space "
        "tuned_line.py:WITH_TUPLES --no-figures --trials 4 --widths 4 4"
    )
    assert any(line.startswith("test/loss=") for line in rest)
    runs = sorted((folder / "runs/line").iterdir())
    assert [run.name for run in runs] == ["0001", "0002"]
    assert json.loads((runs[0] / "config.json").read_text())["options"]["seed"] == 42
    tested = [run for run in runs if (run / "metrics/test.json").exists()]
    assert len(tested) == 1  # by the study, at its end
    assert (folder / "runs/tuned_line-main.journal").exists()
    assert not (folder / "after.txt").exists()  # what follows the training is left out


@pytest.mark.slow
def test_same_command_again_trains_nothing(printed, folder, monkeypatch):
    monkeypatch.chdir(folder)
    again = typed(*MAIN, "--trials", "2", "--widths", "4", "4")
    assert again.out.splitlines() == printed.out.splitlines()[2:]
    assert len(list(Path("runs/line").iterdir())) == 2


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--space", "a.py:b", "digits"), "The recipe comes first; got '--space'"),
        (("nothing", "--space", "a.py:b"), "There is no recipe 'nothing'"),
        (("tuned_line.py:main",), "--space"),
        (("tuned_line.py:main", "--space", "a.py:b", "--trials", "0"), "trials"),
        (("tuned_line.py:main", "--space", "a.py:b", "--depth", "0"), "--depth"),
        (("tuned_line.py:main", "--space", "tuned_line.py"), "Write --space tuned_line.py:space"),
        (("tuned_line.py:main", "--space", "none.py:b"), "There is no file 'none.py'"),
        (("tuned_line.py:main", "--space", "tuned_line.py:RATES"), "Did you mean 'RATE'"),
        (("tuned_line.py:main", "--space", "tuned_line.py:WRONG"), "optimizer.rate"),
        (("tuned_line.py:without_validation", "--space", "tuned_line.py:RATE"), "val_loader"),
        (("tuned_line.py:without_training", "--space", "tuned_line.py:RATE"), "without a call"),
    ],
)
@pytest.mark.usefixtures("here")
def test_wrong_words_end_with_status_2_and_write_nothing(words, complaint):
    printed = typed(*words)
    assert printed.status == 2
    assert complaint in " ".join(printed.err.replace("│", " ").split())
    assert not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_loader_that_all_trials_would_share_is_an_error():
    printed = typed("tuned_line.py:with_one_loader", "--space", "tuned_line.py:RATE")
    assert printed.status == 2
    assert "used the same train loader twice" in printed.err


@pytest.mark.usefixtures("here")
def test_recipes_of_all_kinds_have_their_options_as_config():
    assert _recipe("digits", ["--num-epochs", "3"]).config.num_epochs == 3
    config = _recipe("tuned_line.py:main", ["--name", "other", "--widths", "1", "2"]).config
    assert (config["name"], config["widths"], config["num_epochs"]) == ("other", (1, 2), 2)
    Path("only.py").write_text(
        "import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass Options:\n    n: int = 1\n"
        "def main(options: Options): return options.n\n"
    )
    recipe = _recipe("only.py:main", ["--n", "7"])
    assert recipe.train(recipe.config) == 7


def test_command_that_continues_keeps_the_recipe_s_words():
    assert _with_trials(["a", "--trials", "3", "--", "--trials", "1"], 6) == (
        "distaff tune a --trials 6 -- --trials 1"
    )
    assert _with_trials(["a", "--trials=3"], 6) == "distaff tune a --trials=6"
    assert _with_trials(["a", "--", "--name", "b"], 6) == ("distaff tune a --trials 6 -- --name b")


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_interrupted_command_resumes_with_a_space_that_is_a_function():
    words = ("tuned_line.py:main", "--space", "tuned_line.py:as_function", "--trials", "2")
    more = ("--pruner", "hyperband", "--sampler", "random", "--", "--name", "named")
    Path("interrupt").touch()
    stopped = typed(*words, *more)
    assert stopped.status == 130
    assert f"run: distaff tune {' '.join((*words, *more))}" in stopped.err
    finished = typed(*words, *more)
    assert finished.status == 0
    assert "2 trials: 2 finished" in finished.out
    assert "history.png" in finished.out
    assert Path("runs/tuned_line-main.study/history.png").stat().st_size > 5_000
    starts = [
        json.loads((run / "status.json").read_text())["starts"]
        for run in sorted(Path("runs/named").iterdir())
    ]
    assert starts == [2, 1]
    assert not Path("runs/line").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_several_objectives_print_and_draw_the_front():
    words = ("tuned_line.py:main", "--space", "tuned_line.py:RATE", "--trials", "3")
    printed = typed(*words, "--objective", "val/loss", "val/size:min", "--name", "two")
    assert printed.status == 0, printed.err
    lines = printed.out.splitlines()
    assert "  val/size " in lines[0]
    (start,) = (place for place, line in enumerate(lines) if line == "Pareto front:")
    assert lines[start + 1].startswith("  trial ")
    assert "val/size=" in lines[start + 1]
    assert Path("runs/two.study/front.png").stat().st_size > 5_000
    assert Path("runs/two.study/history_val_size.png").exists()
    wrong = typed(*words, "--objective", "val/loss", "val/siz", "--name", "wrong")
    assert wrong.status == 2
    assert "Did you mean 'val/size'" in wrong.err
    pruned = typed(*words, "--objective", "val/loss", "val/size", "--pruner", "median")
    assert (pruned.status, "cannot be pruned" in pruned.err) == (2, True)


def process(*words: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from distaff.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "tune", *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ})


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_workers_share_the_trials():
    finished = process(*MAIN, "--trials", "4", "--workers", "2")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.count("To continue the study") == 1
    lines = finished.stdout.splitlines()
    assert len([line for line in lines if line.startswith("trial ")]) == 4
    assert "4 trials: 4 finished" in lines
    assert len(list(Path("runs/line").iterdir())) == 4
