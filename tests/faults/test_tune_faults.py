"""A study whose process is killed, and one that several processes are at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna import storages
from optuna.storages.journal import JournalFileOpenLock, JournalFileSymlinkLock

from distaff.integrations import optuna as integration
from distaff.integrations.studies import storages as opening

# Run by the test, and by processes that it starts. Each of these stops in the trial of its own that
# `block_at` counts, in the middle of an epoch, until it is killed or hears the end of its input.
STUDY = """
import dataclasses, json, os, sys
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import distaff
from distaff import data
from distaff.tune import Float, study

hits, begun, block_at = [], [], int(os.environ.get("BLOCK_AT", -1))
if block_at > 0:
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))

@dataclasses.dataclass(frozen=True)
class Config:
    optimizer: distaff.OptimizerConfig = distaff.OptimizerConfig("sgd", learning_rate=0.1)

class Line(distaff.TrainerModule):
    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])

class Blocking(distaff.Callback):
    def on_training_start(self, info):
        begun.append(hits.count("/jax/compilation_cache/cache_hits"))
        if block_at == 2 and len(begun) == 1:
            print("begun", flush=True)
    def on_step_end(self, info):
        if len(begun) == block_at and info.step == 3:
            hits_of_trial = [hits.count("/jax/compilation_cache/cache_hits") - begun[0]]
            print(json.dumps(hits_of_trial), flush=True)
            sys.stdin.read()

class Tested(data.ArrayLoader):
    def __iter__(self):
        with open("tested.txt", "a") as file:
            file.write(f"{os.getpid()}\\n")
        return super().__iter__()

def make_loaders(config):
    x = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    arrays = {"x": x, "y": x.sum(axis=1)}
    return data.ArrayLoader(arrays, 8, shuffle=True), data.ArrayLoader(arrays, 8), Tested(arrays, 8)

def make_trainer(config):
    return Line(nn.Dense(1), optimizer=config.optimizer, name="line", callbacks=[Blocking()],
                enable_progress_bar=False)

def search(num_trials, storage=None):
    space = {"optimizer.learning_rate": Float(1e-3, 0.5, log=True)}
    return study(make_trainer, space, Config(), make_loaders, num_trials=num_trials, num_epochs=2,
                 storage=storage)
"""


def start(num_trials: int, storage: str | None, block_at: int) -> subprocess.Popen[str]:
    """Starts a process at the study, with a compile cache of its own as a user has it."""
    ours = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    run = f"print(json.dumps(search({num_trials}, {storage!r}).metrics))"
    return subprocess.Popen(
        [sys.executable, "-c", STUDY + run],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**environment, "XDG_CACHE_HOME": str(Path.cwd()), "BLOCK_AT": str(block_at)},
    )


def search(num_trials: int, storage: str | None) -> Any:
    names: dict[str, Any] = {}
    exec(compile(STUDY, "study", "exec", dont_inherit=True), names)
    return names["search"](num_trials, storage)


def status(version: int) -> dict[str, Any]:
    return json.loads(Path(f"runs/line/{version:04d}/status.json").read_text())


def rate(version: int) -> float:
    config = json.loads(Path(f"runs/line/{version:04d}/config.json").read_text())
    return config["optimizer"]["learning_rate"]


@pytest.fixture
def databases(monkeypatch) -> Iterator[None]:
    """Closes the connections of databases, which nothing but the end of a program does."""
    opened = []

    class Recorded(storages.RDBStorage):
        def __init__(self, url: str) -> None:
            super().__init__(url)
            opened.append(self)

    monkeypatch.setattr(opening, "RDBStorage", Recorded)
    yield
    for database in opened:
        database.remove_session()
        database.engine.dispose()


@pytest.mark.slow
@pytest.mark.usefixtures("databases")
@pytest.mark.parametrize("storage", [None, "sqlite:///studies/study.db"])
def test_study_goes_on_after_a_kill_in_the_middle_of_a_trial(storage):
    with start(4, storage, block_at=3) as process:
        assert process.stdout is not None
        (cache_hits,) = json.loads(process.stdout.readline())
        process.kill()
    # The cache on disk serves the trials after the first, in the directory of the user's own.
    assert cache_hits > 0
    assert any(Path("distaff/jax").iterdir())
    assert (status(3)["status"], status(3)["ended"]) == ("running", None)
    result = search(4, storage)
    assert [trial.number for trial in result.trials] == [0, 1, 3, 4]
    assert [trial.status for trial in result.trials] == ["finished"] * 4
    assert result.trials[2].values == {"optimizer.learning_rate": rate(3)}
    assert [str(trial.path)[-1] for trial in result.trials] == ["1", "2", "4", "5"]
    assert Path("tested.txt").read_text() == f"{os.getpid()}\n"
    again = search(4, storage)
    assert (again.trials, again.metrics) == (result.trials, result.metrics)
    assert Path("tested.txt").read_text() == f"{os.getpid()}\n"


@pytest.mark.slow
def test_two_processes_share_a_study():
    with start(6, None, block_at=2) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "begun\n"
        here = search(6, None)
        assert len(here.trials) == 5
        assert here.metrics == {}  # the other process is at a trial, and tests
        assert not Path("tested.txt").exists()
        process.stdin.close()
        *_, metrics = process.stdout.read().splitlines()
    assert process.returncode == 0
    assert Path("tested.txt").read_text() == f"{process.pid}\n"
    result = search(6, None)
    assert json.loads(metrics) == result.metrics
    assert len(result.trials) == len(list(Path("runs/line").iterdir())) == 6
    rates = [trial.values["optimizer.learning_rate"] for trial in result.trials]
    assert len(set(rates)) == 6
    assert rates.count(0.1) == 1
    owners = {trial.user_attrs["owner"]["pid"] for trial in result.study.trials}
    assert owners == {process.pid, os.getpid()}


@pytest.mark.slow
def test_study_goes_on_after_a_kill_while_the_journal_was_locked(monkeypatch):
    def killed(lock: Any) -> None:
        raise SystemExit

    def opened() -> Any:
        options = {"first": None, "seed": 0, "root": "runs", "options": {}}
        return integration.OptunaSearch({}, {"mode": "min"}, **options)

    with monkeypatch.context() as patched:
        for kind in (JournalFileOpenLock, JournalFileSymlinkLock):
            patched.setattr(kind, "release", killed)
        with pytest.raises(SystemExit):
            opened()
    seconds = [0.0]
    clock = SimpleNamespace(
        monotonic=lambda: seconds[0], sleep=lambda s: seconds.append(seconds.pop() + s)
    )
    monkeypatch.setattr("optuna.storages.journal._file.time", clock)
    suggestion = opened().ask(1)
    assert 30 < seconds[0] < 60  # how long Optuna waits for a lock that nothing happens to
    assert suggestion is not None
    assert opened().tell(suggestion, "finished", 1.0).value == 1.0
