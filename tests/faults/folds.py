"""A program of several trainings: folds, then a second call on the last trainer.

    python folds.py ROOT '{"kill_in": 2}'

It prints one line for each training, and `training` when one begins. With `kill_in`, the process
kills itself within that training.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff import Callback, OptimizerConfig, TrainerModule, TrainResult, data
from distaff.zoo import MLP

X = np.random.default_rng(0).normal(size=(48, 5)).astype(np.float32)
NUM_FOLDS = 3


class Noisy(TrainerModule):
    """A regression with noise on the device."""

    def print_tabulate(self, example_batch):
        pass  # it takes most of the time of a start

    def loss_fn(self, params, batch, ctx):
        x = batch["x"]
        if ctx.train:
            x = x + 0.1 * jax.random.normal(ctx.rng, x.shape)
        return jnp.square(ctx.apply(params, x)[:, 0] - batch["y"])


class Kill(Callback):
    """Kills the process in the second epoch; or slows epochs down, so that a test can meet them."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_training_start(self, info):
        print("training", flush=True)

    def on_epoch_end(self, info):
        if self.how == "slow":
            time.sleep(0.1)
        if self.how == "kill" and info.epoch % 3 == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "error" and info.epoch % 3 == 2:
            raise RuntimeError("boom")


def loaders(fold: int) -> tuple[data.ArrayLoader, data.ArrayLoader]:
    """Returns what is trained and validated on."""
    is_out = np.arange(len(X)) % NUM_FOLDS == fold
    arrays = [{"x": X[rows], "y": X[rows].sum(axis=1)} for rows in (~is_out, is_out)]
    return data.ArrayLoader(arrays[0], 8, shuffle=True, seed=3), data.ArrayLoader(arrays[1], 8)


def program(
    root: str, *, kill_in: int = -1, how: str = "kill", rate: float = 0.02, **more: Any
) -> Iterator[tuple[TrainResult, Noisy]]:
    """Trains the folds, and the last one further."""
    keyed, rerun = more.pop("keyed", False), more.pop("rerun", False)
    for number in range(NUM_FOLDS + 1):
        fold = min(number, NUM_FOLDS - 1)
        callback = Kill(how if number == kill_in or how == "slow" else "")
        if number < NUM_FOLDS:
            train, val = loaders(fold)
            trainer = Noisy(
                MLP((8, 1)),
                optimizer=OptimizerConfig("adam", learning_rate=rate),
                root=root,
                name="fold",
                callbacks=[callback],
                enable_progress_bar=False,
                **more,
            )
        else:
            trainer.callbacks.callbacks[0].how = callback.how
        key = f"part-{number}" if keyed else None
        yield trainer.train_model(train, val, num_epochs=3, key=key, rerun=rerun), trainer


def summary(result: TrainResult, trainer: Noisy) -> dict[str, Any]:
    """Returns what a training has led to, all bits of it."""
    leaves = jax.tree.leaves(trainer.state.params)
    bits = [np.asarray(leaf).tobytes().hex() for leaf in leaves]
    metrics = {name: float(value).hex() for name, value in result.metrics.items()}
    best = None if result.best is None else [result.best.step, result.best.epoch]
    return {"step": result.step, "best": best, "metrics": metrics, "bits": bits}


def main() -> None:
    """Runs the program."""
    for result, trainer in program(sys.argv[1], **json.loads(sys.argv[2])):
        found = summary(result, trainer)
        print(
            json.dumps({**found, "path": result.path.name, "first": result.first_step}), flush=True
        )


if __name__ == "__main__":
    main()
