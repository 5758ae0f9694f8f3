"""Trains one MLP on digits with several seeds, in one process, and prints the seconds as JSON.

    python benchmarks/scripts/seeds.py SYSTEM NUM_SEEDS NUM_EPOCHS FOLDER

Each system trains the same layers with the same optimizer, batch size and data, validates after
each epoch, and tests the best weights of each seed. The clock starts after the imports, with the
data in memory, so it includes what the process compiles.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

BATCH = 64


@functools.cache
def splits() -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns images `[n, 64]` and labels `[n]` for training, validation and test."""
    digits = load_digits()
    images, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    return [(images[rows], labels[rows]) for rows in np.split(order, [19 * BATCH, 1437])]


def loaders() -> Any:
    """Returns the splits as loaders of Distaff."""
    from distaff import data

    arrays = [{"image": x, "label": y} for x, y in splits()]
    train = data.ArrayLoader(arrays[0], BATCH, shuffle=True)
    return [train, *(data.ArrayLoader(each, BATCH) for each in arrays[1:])]


def trainer(root: Path, seed: int = 0) -> Any:
    """Returns a trainer of Distaff."""
    from distaff import OptimizerConfig, tasks, zoo

    optimizer = OptimizerConfig("adam", learning_rate=1e-3, schedule="constant")
    return tasks.Classifier(
        zoo.MLP((128, 10)), optimizer=optimizer, root=root, seed=seed, enable_progress_bar=False
    )


def population(num_seeds: int, num_epochs: int, folder: Path) -> list[float]:
    """All seeds in one program, with logs and checkpoints."""
    from distaff import tune

    found = tune.multi_seed(trainer(folder), *loaders(), seeds=num_seeds, num_epochs=num_epochs)
    return [member.metrics["test/accuracy"] for member in found.members]


def distaff(num_seeds: int, num_epochs: int, folder: Path) -> list[float]:
    """One run after the other, with logs and checkpoints."""
    runs = (
        trainer(folder, seed).train_model(*loaders(), num_epochs=num_epochs)
        for seed in range(num_seeds)
    )
    return [run.metrics["test/accuracy"] for run in runs]


def by_hand(num_seeds: int, num_epochs: int, folder: Path) -> list[float]:
    """A hand-written loop, one run per seed, whose function makes the programs of its run."""
    return [_trained_by_hand(_programs_by_hand(), seed, num_epochs) for seed in range(num_seeds)]


def by_hand_once(num_seeds: int, num_epochs: int, folder: Path) -> list[float]:
    """The same loop with programs that are compiled once for all seeds."""
    programs = _programs_by_hand()
    return [_trained_by_hand(programs, seed, num_epochs) for seed in range(num_seeds)]


def _programs_by_hand() -> tuple[Any, ...]:
    """Returns what initializes a model and its optimizer, a training step, and an evaluation."""
    from functools import partial

    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax

    model = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(10)])
    tx = optax.adam(1e-3)

    def loss_fn(params: Any, x: Any, y: Any) -> Any:
        logits = model.apply(params, x)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, (logits.argmax(-1) == y).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, x: Any, y: Any) -> Any:
        metrics, grads = jax.value_and_grad(loss_fn, has_aux=True)(params, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, jnp.stack(metrics)

    return jax.jit(model.init), jax.jit(tx.init), step, jax.jit(loss_fn)


def epoch_by_hand(step: Any, state: Any, data: tuple[Any, Any], seed: list[int]) -> Any:
    """Trains an epoch in a random order, prints its mean metrics, and returns the state.

    Args:
        step: `(params, opt_state, x, y) -> (params, opt_state, metrics)`.
        state: parameters and the state of the optimizer.
        data: images `[n, 64]` and labels `[n]`.
        seed: seed and epoch; they decide the order.
    """
    import jax

    (params, opt_state), (x, y) = state, data
    rows, metrics = np.random.default_rng(seed).permutation(len(x)), []
    for first in range(0, len(rows), BATCH):
        batch = rows[first : first + BATCH]
        params, opt_state, last = step(params, opt_state, x[batch], y[batch])
        metrics.append(last)
    print(seed[-1], np.mean(jax.device_get(metrics), axis=0))
    return params, opt_state


def _trained_by_hand(programs: tuple[Any, ...], seed: int, num_epochs: int) -> float:
    """Trains one seed, and returns the test accuracy of its best weights."""
    import jax

    init, start, step, evaluate = programs
    (x, y), val, test = splits()
    params = init(jax.random.key(seed), x[:1])
    opt_state, best = start(params), (0.0, params)
    for epoch in range(num_epochs):
        params, opt_state = epoch_by_hand(step, (params, opt_state), (x, y), [seed, epoch])
        accuracy = float(evaluate(params, *val)[1])
        if accuracy > best[0]:
            best = accuracy, jax.tree.map(np.asarray, params)
    return float(evaluate(best[1], *test)[1])


def keras(num_seeds: int, num_epochs: int, folder: Path) -> list[float]:
    """Keras on JAX, with the callback that keeps the best weights."""
    import keras
    from keras import layers

    (x, y), val, test = splits()
    results = []
    for seed in range(num_seeds):
        keras.utils.set_random_seed(seed)
        hidden = layers.Dense(128, activation="relu")
        model = keras.Sequential([keras.Input((64,)), hidden, layers.Dense(10)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(1e-3), loss=loss, metrics=["accuracy"])
        best = folder / f"{seed}.weights.h5"
        saved = keras.callbacks.ModelCheckpoint(
            best, monitor="val_accuracy", mode="max", save_best_only=True, save_weights_only=True
        )
        model.fit(x, y, batch_size=BATCH, epochs=num_epochs, validation_data=val, callbacks=[saved])
        model.load_weights(best)
        results.append(model.evaluate(*test)[1])
    return results


def lightning(num_seeds: int, num_epochs: int, folder: Path) -> list[float]:
    """Lightning with its defaults, and the callback that keeps the best weights."""
    import torch
    from lightning import LightningModule, Trainer, seed_everything
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader, TensorDataset

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            layers = torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
            self.model = torch.nn.Sequential(*layers)

        def measures(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
            logits = self.model(batch[0])
            loss = torch.nn.functional.cross_entropy(logits, batch[1])
            return loss, (logits.argmax(-1) == batch[1]).float().mean()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            loss, accuracy = self.measures(batch)
            self.log_dict({"loss": loss, "accuracy": accuracy})
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_accuracy", self.measures(batch)[1])

        def test_step(self, batch: Any, index: int) -> None:
            self.log("test_accuracy", self.measures(batch)[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 1e-3)

    sets = [TensorDataset(torch.from_numpy(x), torch.from_numpy(y).long()) for x, y in splits()]
    results = []
    for seed in range(num_seeds):
        seed_everything(seed)
        train = DataLoader(sets[0], BATCH, shuffle=True)
        val, test = (DataLoader(each, BATCH) for each in sets[1:])
        saved = ModelCheckpoint(folder / str(seed), monitor="val_accuracy", mode="max")
        trainer = Trainer(
            max_epochs=num_epochs, callbacks=[saved], default_root_dir=folder, accelerator="cpu"
        )
        trainer.fit(Module(), train, val)
        results.append(trainer.test(dataloaders=test, ckpt_path="best")[0]["test_accuracy"])
    return results


_ALL = population, distaff, by_hand, by_hand_once, keras, lightning
SYSTEMS = {each.__name__: each for each in _ALL}
_IMPORTS = {
    "population": "distaff.tasks",
    "distaff": "distaff.tasks",
    "by_hand": "flax.linen",
    "by_hand_once": "flax.linen",
    "keras": "keras",
    "lightning": "lightning",
}


def main(system: str, num_seeds: int, num_epochs: int, folder: Path) -> None:
    """Trains one system, and prints its seconds and accuracies."""
    import importlib

    os.environ["KERAS_BACKEND"] = "jax"
    importlib.import_module(_IMPORTS[system])
    folder.mkdir(parents=True, exist_ok=True)
    splits()
    start = time.perf_counter()
    accuracies = SYSTEMS[system](num_seeds, num_epochs, folder)
    seconds = time.perf_counter() - start
    print("\n" + json.dumps({"seconds": seconds, "accuracies": [float(x) for x in accuracies]}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
