"""What a trained model is loaded with: neither its optimizer nor the devices it was trained on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import distaff
from distaff import zoo

SCRIPT = """
import sys

import jax
import jax.numpy as jnp
import numpy as np

import distaff
from distaff import zoo


class Regression(distaff.TrainerModule):
    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])


assert jax.device_count() == 1, jax.devices()
loaded = Regression.load_from_checkpoint(sys.argv[1])
assert loaded.state.opt_state is None and loaded.state.tx is None
np.save("loaded.npy", loaded.predict([{"x": x} for x in np.load("x.npy")]))
"""

# A test run that was killed may have left half an entry in the compile cache.
STRICT = ("-W", "error", "-W", "ignore:Error reading persistent compilation cache entry")

X = np.random.default_rng(0).normal(size=(2, 8, 3)).astype(np.float32)


class Regression(distaff.TrainerModule):
    def print_tabulate(self, example_batch):
        pass  # it takes most of the time of a start

    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])


class Sharded(Regression):
    """Parameters in pieces, one for each of the devices; so is the optimizer's state."""

    def init_model(self, example_batch: Any) -> None:
        super().init_model(example_batch)
        mesh = Mesh(np.asarray(jax.devices()), ("model",))

        def placed(leaf: jax.Array) -> jax.Array:
            is_wide = leaf.ndim > 0 and leaf.shape[-1] % 8 == 0
            spec = PartitionSpec(*[None] * (leaf.ndim - 1), "model") if is_wide else PartitionSpec()
            return jax.device_put(leaf, NamedSharding(mesh, spec))

        self.state = jax.tree.map(placed, self.state)


def batches() -> list[dict[str, np.ndarray]]:
    return [{"x": x, "y": x.sum(axis=1)} for x in X]


def options(**others: Any) -> dict[str, Any]:
    return {"enable_progress_bar": False, "root": "runs", "name": "net", **others}


@pytest.mark.slow
def test_one_device_predicts_what_was_trained_on_eight(tmp_path: Path) -> None:
    trainer = Sharded(zoo.MLP((16, 1)), **options(optimizer=optax.adam(0.1), recompile="ignore"))
    path = trainer.train_model(batches(), num_epochs=1).path
    kernel = trainer.state.params["Dense_0"]["kernel"]
    assert len(kernel.sharding.device_set) == 8
    assert not kernel.sharding.is_fully_replicated
    np.save("x.npy", X)
    environment = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
    finished = subprocess.run(
        [sys.executable, *STRICT, "-c", SCRIPT, str(path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    expected = trainer.predict(batches())
    np.testing.assert_allclose(np.load("loaded.npy"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "recorded",
    [
        {"name": "of_another_version", "learning_rate": 0.1},
        {"$repr": "a transformation of a package that is not installed"},
    ],
)
def test_optimizer_that_cannot_be_built_is_not_needed(recorded: Any) -> None:
    trainer = Regression(zoo.MLP((4, 1)), **options(optimizer=optax.contrib.schedule_free_sgd(0.1)))
    path = trainer.train_model(batches(), batches(), num_epochs=1).path
    record = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**record, "optimizer": recorded}))
    loaded = Regression.load_from_checkpoint(path)
    assert loaded.state.opt_state is None
    np.testing.assert_array_equal(loaded.predict(batches()), trainer.predict(batches()))
    new = Regression(
        zoo.MLP((4, 1)), init_from=path, example_batch=batches()[0], **options(root=None)
    )
    np.testing.assert_array_equal(new.predict(batches()), trainer.predict(batches()))
    assert not any(leaf.committed for leaf in jax.tree.leaves(new.state.params))
