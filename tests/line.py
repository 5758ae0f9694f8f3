"""A run of a tiny model with all that a run leaves behind, for tests of the trainer as a whole."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distaff import Monitor, TrainerModule, TrainResult, checkpoint, data

NUM_EPOCHS, STEPS_PER_EPOCH, BATCH = 2, 4, 4
NUM_STEPS = NUM_EPOCHS * STEPS_PER_EPOCH

X = np.random.default_rng(0).normal(size=(STEPS_PER_EPOCH * BATCH, 3)).astype(np.float32)
PARAMS = {"w": np.full(3, 0.5, np.float32)}


def init(key, x):
    return jax.tree.map(jnp.asarray, PARAMS)


def apply(params, x):
    return x @ params["w"]


def squared_error(params, batch):
    return jnp.square(apply(params, batch["x"]) - batch["y"])


def loader(x: np.ndarray = X) -> data.ArrayLoader:
    arrays = {"x": x, "y": X.sum(1).astype(np.float32)}
    return data.ArrayLoader(arrays, batch_size=BATCH, shuffle=False)


class Line(TrainerModule):
    """Its best model is that of the first epoch, so that the last one is not taken for it."""

    monitor = Monitor("val/loss", mode="max", insist=True)

    def __init__(self, **options: Any) -> None:
        self.called: list[str] = []
        defaults = {"optimizer": optax.sgd(0.05), "root": "runs", "name": "line"}
        fixed = {"steps_per_call": 2, "log_every_n_steps": 2, "enable_progress_bar": False}
        super().__init__((init, apply), **{**defaults, **fixed, **options})

    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"]) - batch["y"])


class Trained(NamedTuple):
    """What a run leaves behind.

    Attributes:
        trainer: that has run.
        result: of its run.
        saved: the steps of its checkpoints.
        files: of the run directory, without those of checkpoints.
        logged: the lines of its log, without their time.
    """

    trainer: Any
    result: TrainResult
    saved: list[int]
    files: set[str]
    logged: list[dict[str, Any]]

    @property
    def params(self) -> np.ndarray:
        """The weights at its end."""
        return np.asarray(self.trainer.state.params["w"])


def trained(cls: type[Line], x: np.ndarray = X, **options: Any) -> Trained:
    """Trains, validates and tests, and reads what there is afterwards."""
    trainer = cls(example_batch=loader().peek(), **options)
    result = trainer.train_model(loader(x), loader(), loader(), num_epochs=NUM_EPOCHS)
    if result.path is None:
        return Trained(trainer, result, [], set(), [])
    saved = checkpoint.CheckpointStore(result.path / "checkpoints").steps()
    paths = [each.relative_to(result.path) for each in result.path.rglob("*")]
    files = {str(each) for each in paths if each.parts[0] != "checkpoints"}
    lines = map(json.loads, (result.path / "metrics.jsonl").read_text().splitlines())
    logged = [{name: x for name, x in line.items() if name != "time"} for line in lines]
    return Trained(trainer, result, list(saved), files, logged)
