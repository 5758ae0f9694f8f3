"""A process that trains batches of trials is killed: they resume, and each trial counts once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

NUM_TRIALS = 8

# A process that finds a file `kill-n` removes it after a save of the n-th epoch, and kills itself.
RECIPE = """
import os, signal
from pathlib import Path
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import distaff
from distaff import data, tune
from distaff.tune.population.directory import PopulationDirectory
from distaff.tune.population.training import PopulationRun

SPACE = {"rate": tune.Float(1e-3, 0.3, log=True), "width": tune.Choice(1, 2)}
save, train = PopulationDirectory.save, PopulationRun._train_epoch

def save_and_die(self, *, is_last):
    save(self, is_last=True)
    token = Path(f"kill-{self._run.epoch}")
    if token.exists():
        self._recording.store.wait()
        try:
            token.unlink()
        except FileNotFoundError:  # another process was first
            return
        os.kill(os.getpid(), signal.SIGKILL)

def train_epoch(self, epoch):
    train(self, epoch)
    with open("epochs.txt", "a") as file:
        seeds = [member.seed for member in self.members]
        file.write("".join(f"{seed} {epoch}" + chr(10) for seed in seeds))

if save.__module__.startswith("distaff."):  # this file is read twice
    PopulationDirectory.save, PopulationRun._train_epoch = save_and_die, train_epoch

class Line(distaff.TrainerModule):
    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])

def main(rate: float = 0.1, width: int = 1):
    x = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    arrays = {"x": x, "y": x.sum(axis=1)}
    sgd = distaff.OptimizerConfig("sgd", learning_rate=rate)
    model = nn.Sequential([nn.Dense(width), nn.Dense(1)])
    trainer = Line(model, optimizer=sgd, name="line", save_curves=False)
    train = data.ArrayLoader(arrays, 8, shuffle=True)
    return trainer.train_model(train, data.ArrayLoader(arrays, 8), num_epochs=4)
"""


def start(name: str, *words: str) -> subprocess.Popen[bytes]:
    code = "import sys; from distaff.cli import main; sys.exit(main(sys.argv[1:]))"
    command = ("tune", "mine.py:main", "--space", "mine.py:SPACE", "--trials", str(NUM_TRIALS))
    options = ("--pruner", "none", "--no-figures", "--name", name, "--batch", "4", *words)
    return subprocess.Popen([sys.executable, "-c", code, *command, *options])


def ended(name: str) -> list[optuna.trial.FrozenTrial]:
    file = f"runs/{name}.journal"
    backend = JournalFileBackend(file, JournalFileOpenLock(file))
    storage = optuna.storages.JournalStorage(backend)
    trials = optuna.load_study(study_name=name, storage=storage).trials
    found = [trial for trial in trials if trial.user_attrs.get("status") == "finished"]
    return sorted(found, key=lambda trial: trial.user_attrs["origin"])


@pytest.mark.slow
def test_killed_batches_resume_and_the_study_is_the_same():
    Path("mine.py").write_text(RECIPE)
    assert start("whole").wait(timeout=600) == 0
    Path("epochs.txt").unlink()
    for epoch in (1, 2, 3):
        Path(f"kill-{epoch}").touch()
    assert [start("cut").wait(timeout=600) for _ in range(4)] == [-9, -9, -9, 0]
    whole, cut = ended("whole"), ended("cut")
    assert [(x.params, x.value) for x in cut] == [(x.params, x.value) for x in whole]
    assert [x.user_attrs["origin"] for x in cut] == list(range(NUM_TRIALS))
    epochs = Counter(Path("epochs.txt").read_text().splitlines())
    assert epochs == dict.fromkeys([f"{42 + n} {e}" for n in range(8) for e in (1, 2, 3, 4)], 1)


@pytest.mark.slow
def test_killed_worker_leaves_its_batch_to_the_others():
    Path("mine.py").write_text(RECIPE)
    Path("kill-2").touch()
    workers = [start("study") for _ in range(2)]
    statuses = [worker.wait(timeout=600) for worker in workers]
    if sorted(statuses) == [-9, 0] and len(ended("study")) < NUM_TRIALS:
        statuses.append(start("study").wait(timeout=600))
    assert statuses.count(-9) == 1
    found = ended("study")
    assert [x.user_attrs["origin"] for x in found] == list(range(NUM_TRIALS))
    paths = {json.dumps(x.user_attrs["path"]) for x in found}
    assert len(paths) == NUM_TRIALS
