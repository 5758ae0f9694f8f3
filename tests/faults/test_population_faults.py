"""A population whose process is killed, and started again: all members end as if it never was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

# Run by the test, and by a process that it starts, which stops in its third epoch until it is
# killed: after the steps of all members, and before the metrics of the second one are written.
POPULATION = """
import os, sys, time
from pathlib import Path
import jax
import jax.numpy as jnp
import numpy as np
from distaff import EarlyStopping, OptimizerConfig, data, tasks, tune, zoo

events = []

class Blocking(EarlyStopping):
    def on_epoch_end(self, info):
        events.append(info.epoch)
        if os.environ.get("BLOCKS") and events.count(3) == 2:
            while not list(Path("runs").rglob("population/0001/checkpoints/step_*/*manifest.json")):
                time.sleep(0.01)
            print("blocked", flush=True)
            sys.stdin.read()
        super().on_epoch_end(info)

class Noisy(tasks.Classifier):
    def augment(self, batch, key):
        x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
        return {**batch, "x": x}

def train(form, root="runs"):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 100).astype(np.int32)
    x = (rng.normal(size=(100, 8)) + y[:, None]).astype(np.float32)
    loader = data.ArrayLoader({"x": x[:72], "y": y[:72]}, 12, shuffle=True, seed=3)
    val = data.ArrayLoader({"x": x[72:], "y": y[72:]}, 12)
    optimizer = OptimizerConfig("adamw", learning_rate=1e-3, warmup_steps=2, accumulate=4)
    trainer = Noisy(zoo.MLP((8, 3), dropout=0.3, batch_norm=True), optimizer=optimizer, ema=0.9,
                    callbacks=[Blocking(patience=2)], root=root, name="noisy",
                    on_bad_numbers="skip", log_every_n_steps=4, enable_progress_bar=False)
    vary = {"optimizer.learning_rate": [1e-3, 1e-2]}
    return tune.train_population(trainer, loader, val, val, vary=vary, seeds=2, num_epochs=5,
                                 form=form), loader.get_state()
"""


def start(form: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", f"{POPULATION}print(train({form!r})[1], flush=True)"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def train(form: str) -> Any:
    names: dict[str, Any] = {}
    exec(compile(POPULATION, "population", "exec", dont_inherit=True), names)
    return names["train"](form, "clean")


def logs(root: str) -> list[Any]:
    files = sorted(Path(root).rglob("members/*/metrics.jsonl"))
    rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    return [[{n: x for n, x in row.items() if n != "time"} for row in each] for each in rows]


def arrays(root: str) -> dict[str, np.ndarray]:
    """Returns the arrays of the last checkpoint of the population, and of those of its members."""
    folder, found = Path(root) / "noisy/population/0001", {}
    for place in (folder, *sorted(folder.glob("members/*"))):
        step = max((place / "checkpoints").iterdir())
        for path, leaf in jax.tree.leaves_with_path(ocp.load(str(step.absolute()))):
            if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            found[f"{place.name} {step.name} {jax.tree_util.keystr(path)}"] = np.asarray(leaf)
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")
@pytest.mark.parametrize("form", ["stacked", "in turn"])
def test_a_killed_population_ends_as_if_it_never_was(form: str) -> None:
    with start(form, BLOCKS="1") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "blocked\n"
        process.kill()
    folder = Path("runs/noisy/population/0001")
    assert json.loads((folder / "status.json").read_text())["status"] == "running"
    with start(form) as process:
        position = process.communicate(timeout=600)[0]
    assert "resuming" in (folder / "log.txt").read_text()
    found, own_position = train(form)
    assert position == f"{own_position}\n"
    assert {each.status for each in found.members} == {"finished", "stopped"}
    assert len(logs("runs")) == 4
    assert logs("runs") == logs("clean")
    mine, its = arrays("runs"), arrays("clean")
    assert mine.keys() == its.keys()
    for name, leaf in its.items():
        np.testing.assert_array_equal(mine[name], leaf, err_msg=name)
