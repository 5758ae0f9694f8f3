"""`distaff fit --resume`: which run it resumes, and that it starts no other in its place."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distaff
from distaff import cli, data
from distaff.errors import CheckpointError
from distaff.run.identity.launch import close_all
from distaff.run.identity.request import resuming
from distaff.zoo import MLP

X = np.linspace(-1, 1, 48, dtype=np.float32).reshape(16, 3)


class Line(distaff.TrainerModule):
    """Fits a line, without the table of its model."""

    def print_tabulate(self, example_batch):
        pass

    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])


class Bug(distaff.Callback):
    def __init__(self, is_there: bool) -> None:
        self.is_there = is_there

    def on_epoch_end(self, info):
        if self.is_there and info.epoch == 2:
            raise RuntimeError("a bug")


def line(
    seeds: tuple[int, ...] = (0,), rate: float = 0.05, name: str = "line", bug: bool = False
) -> None:
    for seed in seeds:
        trainer = Line(
            MLP((4, 1)),
            name=name,
            seed=seed,
            optimizer=optax.sgd(rate),
            callbacks=[Bug(bug and seed == seeds[-1])],
            enable_progress_bar=False,
        )
        loader = data.ArrayLoader({"x": X, "y": X.sum(axis=1)}, 4, shuffle=True, seed=1)
        trainer.train_model(loader, num_epochs=3)


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs `distaff fit` with the recipe `line`; returns status, output and errors."""
    monkeypatch.setattr("distaff.cli.fit.find", lambda name: line)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["/bin/distaff", "fit", *words])
        close_all()  # as the program before has ended
        status = cli.main(("fit", *words))
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def cut(fit) -> Path:
    """Leaves the second run of two, which an error of the user's code has ended."""
    with pytest.raises(RuntimeError, match="a bug"):
        fit("line", "--seeds", "0", "1", "--bug")
    return Path("runs/line/0002")


def status_of(run: Path) -> str:
    return json.loads((run / "status.json").read_text())["status"]


def test_resume_resumes_the_newest_unfinished_run_with_its_options(fit, cut):
    assert status_of(cut) == "failed"
    status, out, _ = fit("line", "--resume", "--no-bug")
    assert status == 0
    command = "distaff fit line --seeds 0 1 --bug --no-bug"
    assert out.splitlines()[0] == f"resuming {cut}: {command}"
    assert status_of(cut) == "finished"
    assert sorted(Path("runs/line").iterdir()) == [cut.with_name("0001"), cut]
    first, *rest = fit("line", "--seeds", "1", "--name", "whole")
    assert first == 0, rest
    metrics = [
        [
            {name: value for name, value in json.loads(line).items() if name != "time"}
            for line in (run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in (cut, Path("runs/whole/0001"))
    ]
    assert metrics[0] == metrics[1] != []


def test_resume_takes_a_run_and_does_not_start_another_in_its_place(fit):
    with pytest.raises(RuntimeError, match="a bug"):
        fit("line", "--bug")
    cut = Path("runs/line/0001")
    runs = sorted(Path("runs/line").iterdir())
    before = (cut / "status.json").read_bytes()
    status, _, err = fit("--resume", str(cut), "--no-bug", "--rate", "0.06")
    assert status == 2
    assert "--resume resumes only the same run, but runs/line/0001 differs:" in err
    assert "optimizer" in err
    status, _, err = fit("--resume", str(cut), "--no-bug", "--name", "another")
    assert status == 2
    assert "did not resume runs/line/0001" in err
    assert sorted(Path("runs/line").iterdir()) == runs
    assert (cut / "status.json").read_bytes() == before
    assert fit(f"--resume={cut}", "--no-bug")[0] == 0
    assert status_of(cut) == "finished"
    status, _, err = fit("--resume", str(cut))
    assert status == 2
    assert "has finished" in err
    assert f"distaff fit --config {cut}" in err
    status, _, err = fit("line", "--resume")
    assert (status, "no unfinished run of 'line'" in err) == (2, True)


def test_resume_needs_a_run_of_this_program_where_it_was_started(fit, monkeypatch):
    status, _, err = fit("line", "--resume")
    assert (status, "no folder 'runs'" in err) == (1, True)
    status, _, err = fit("line", "--resume", "runs/gone/0001")
    assert (status, "no run directory" in err) == (1, True)
    run = Path("runs/line/0001").absolute()
    run.mkdir(parents=True)
    for name, value in {
        "config.json": {"options": {"root": "runs"}},
        "status.json": {"status": "interrupted"},
        "env.json": {"starts": [{"argv": ["train.py"]}]},
    }.items():
        (run / name).write_text(json.dumps(value))
    status, _, err = fit("--resume", str(run))
    assert (status, '["train.py"]' in err) == (2, True)
    status, _, err = fit("--resume")
    assert (status, "no unfinished run in" in err) == (2, True)
    (run / "env.json").write_text(json.dumps({"starts": [{"argv": ["distaff", "fit", "line"]}]}))
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    status, _, err = fit("--resume", str(run))
    assert (status, "must run where the run was started" in err) == (2, True)
    assert not Path("runs").exists()


def test_recipe_may_have_an_option_resume_of_its_own(monkeypatch, capsys):
    def own(resume: bool = False) -> None:
        print("own", resume)

    monkeypatch.setattr("distaff.cli.fit.find", lambda name: own)
    assert cli.main(("fit", "own", "--resume")) == 0
    assert capsys.readouterr().out == "own True\n"


def test_request_that_nothing_meets_is_an_error():
    with pytest.raises(CheckpointError, match="trains no run of that name"), resuming(Path("a")):
        pass
