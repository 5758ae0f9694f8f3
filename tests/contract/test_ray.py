"""Workers of Ray Train train one model, with the real Ray, for `make test-peers`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.peer("ray")

PROGRAM = """
import json, sys
from pathlib import Path

def train(config):
    import jax
    import numpy as np
    from distaff import data, distributed, tasks, zoo

    distributed.initialize()
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int32)
    options = {"batch_size": 16, "root": config["root"], "enable_progress_bar": False}
    trainer = tasks.Classifier(zoo.MLP((8, 2)), mesh="dp", **options)
    result = trainer.train_model((x, y), (x, y), num_epochs=2)
    found = {"loss": result.metrics["val/loss"], "path": str(result.path)}
    index, count = jax.process_index(), jax.process_count()
    Path(config["root"], f"{index}-of-{count}.json").write_text(json.dumps(found))

if __name__ == "__main__":
    root, num_workers = sys.argv[1], int(sys.argv[2])
    if num_workers == 1:
        train({"root": root})
    else:
        import ray
        from ray.train import RunConfig, ScalingConfig
        from ray.train.v2.jax import JaxTrainer

        ray.init(num_cpus=num_workers, include_dashboard=False)
        scaling = ScalingConfig(num_workers=num_workers)
        files = RunConfig(storage_path=f"{root}/ray")
        options = {"train_loop_config": {"root": root}, "run_config": files}
        JaxTrainer(train, scaling_config=scaling, **options).fit()
"""


def train(folder: Path, num_workers: int) -> dict[str, dict]:
    folder.mkdir()
    program = folder / "program.py"
    program.write_text(PROGRAM)
    quiet = {"RAY_AUTH_MODE": "disabled", "RAY_TRAIN_V2_ENABLED": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(program), str(folder), str(num_workers)]
    subprocess.run(command, env={**os.environ, **quiet}, check=True, timeout=600)
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*-of-*.json")}


def test_workers_train_one_model(tmp_path: Path) -> None:
    found = train(tmp_path / "two", 2)
    assert sorted(found) == ["0-of-2", "1-of-2"]
    first, second = found.values()
    assert first == second
    alone = train(tmp_path / "one", 1)
    assert first["loss"] == pytest.approx(alone["0-of-1"]["loss"], rel=2e-6)
