"""The clock decides no number: a process whose clock runs at random ends with the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import hashlib, json, random, sys, time

ways = json.loads(sys.argv[1])
if ways["distorted"]:
    now = {name: getattr(time, name)() for name in ("perf_counter", "monotonic")}
    for name in now:
        def clock(name=name, jump=random.Random(1).random):
            now[name] += 10 ** (-6 * jump())
            return now[name]
        setattr(time, name, clock)

import jax
import numpy as np
import distaff
from distaff import data, tasks, zoo

found = {}
rng = np.random.default_rng(0)
arrays = {
    "image": rng.normal(size=(96, 8, 8, 1)).astype(np.float32),
    "label": rng.integers(10, size=96).astype(np.int32),
}
# Convolutions round otherwise in a loop, and in one of another length.
models = {
    "cnn": (zoo.CNN(), "auto"),
    "cnn in a loop": (zoo.CNN(), 4),
    "mlp": (zoo.MLP((8, 10)), "auto"),
}
for name, (model, steps_per_call) in models.items():
    trainer = tasks.Classifier(
        model,
        name=name,
        steps_per_call=steps_per_call,
        save_every=ways["save_every"],
        enable_progress_bar=False,
    )
    train = data.ArrayLoader(arrays, 8, shuffle=True)
    result = trainer.train_model(train, data.ArrayLoader(arrays, 40), num_epochs=2)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves((trainer.state.params, trainer.state.opt_state)):
        digest.update(np.asarray(leaf).tobytes())
    found[name] = [digest.hexdigest(), trainer.last_run.forms.facts(), result.metrics]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_with_other_clocks_end_with_the_same_bits(tmp_path: Path) -> None:
    def start(folder: str, **ways: Any) -> subprocess.Popen[str]:
        (tmp_path / folder).mkdir()
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(ways)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path / folder,
        )

    pair = [
        start("right", distorted=False, save_every="10m"),
        start("wrong", distorted=True, save_every=1e-3),
    ]
    ends = [process.communicate(timeout=300) for process in pair]
    right, wrong = (json.loads(out.splitlines()[-1]) if out else err for out, err in ends)
    assert right == wrong
    assert right["cnn"][0] != right["cnn in a loop"][0]  # or the comparison would notice nothing
    assert right["cnn"][1]["num_steps"] == 1
    assert right["mlp"][1]["num_steps"] > 1
