"""Workers of one study are killed while they train: no trial is lost, doubled or restarted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

NUM_TRIALS, NUM_KILLS, NUM_WORKERS = 8, 4, 3

# A worker that finds a file `kill-n`, and has a checkpoint, removes the file and kills itself.
RECIPE = """
import contextlib, json, os, signal
from pathlib import Path
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import distaff
from distaff import data, tune
from distaff.trainer.trials import path_of

SPACE = {"optimizer.learning_rate": tune.Float(1e-3, 0.3, log=True)}

class Line(distaff.TrainerModule):
    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])

class Killing(distaff.Callback):
    trainer = None
    def on_training_start(self, info):
        with open("starts.txt", "a") as file:
            file.write(json.dumps([str(path_of(self.trainer)), info.step]) + chr(10))
    def on_step_end(self, info):
        for token in Path().glob("kill-*") if info.step in (3, 7) else ():
            self.trainer.last_run.checkpointer.store.wait()
            with contextlib.suppress(FileNotFoundError):
                token.unlink()
                with open("kills.txt", "a") as file:
                    file.write(str(path_of(self.trainer)) + chr(10))
                os.kill(os.getpid(), signal.SIGKILL)

SGD = distaff.OptimizerConfig("sgd", learning_rate=0.1)

def main(num_epochs: int = 5, optimizer: distaff.OptimizerConfig = SGD):
    x = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    arrays = {"x": x, "y": x.sum(axis=1)}
    killing = Killing()
    trainer = Line(nn.Dense(1), optimizer=optimizer, name="line", callbacks=[killing])
    killing.trainer = trainer
    train = data.ArrayLoader(arrays, 8, shuffle=True)
    return trainer.train_model(train, data.ArrayLoader(arrays, 8), num_epochs=6)
"""


def start() -> subprocess.Popen[bytes]:
    code = "import sys; from distaff.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ("tune", "mine.py:main", "--space", "mine.py:SPACE", "--trials", str(NUM_TRIALS))
    options = ("--pruner", "none", "--no-figures", "--name", "study")
    return subprocess.Popen([sys.executable, "-c", code, *words, *options])


@pytest.mark.slow
def test_each_trial_ends_once_though_workers_are_killed():
    Path("mine.py").write_text(RECIPE)
    for number in range(NUM_KILLS):
        Path(f"kill-{number}").touch()
    workers = [start() for _ in range(NUM_WORKERS)]
    statuses = []
    while workers:
        statuses.append(workers.pop(0).wait(timeout=600))
        if statuses[-1] == -9:
            workers.append(start())
    assert Counter(statuses) == {-9: NUM_KILLS, 0: NUM_WORKERS}

    backend = JournalFileBackend("runs/study.journal", JournalFileOpenLock("runs/study.journal"))
    study = optuna.load_study(study_name="study", storage=optuna.storages.JournalStorage(backend))
    ended = [trial for trial in study.trials if trial.user_attrs.get("status")]
    origins = [trial.user_attrs.get("origin", trial.number) for trial in ended]
    assert len(origins) == len(set(origins)) == NUM_TRIALS
    assert {trial.state.name for trial in ended} == {"COMPLETE"}
    lost = [trial for trial in study.trials if "status" not in trial.user_attrs]
    assert all("withdrawn" in trial.user_attrs for trial in lost[NUM_KILLS:])
    assert len({trial.params["optimizer.learning_rate"] for trial in ended}) == NUM_TRIALS

    killed = Counter(Path("kills.txt").read_text().splitlines())
    begun = [json.loads(line) for line in Path("starts.txt").read_text().splitlines()]
    assert sum(killed.values()) == NUM_KILLS
    assert len({path for path, _ in begun}) == NUM_TRIALS
    for path in {path for path, _ in begun}:
        first, *again = [step for each, step in begun if each == path]
        assert first == 0
        assert len(again) == killed[path]
        assert all(step > 0 for step in again)
