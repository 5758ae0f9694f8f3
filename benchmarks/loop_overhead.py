"""What the loop costs: Distaff beside a hand-written loop, the same model, data and optimizer.

    .venv/bin/python benchmarks/loop_overhead.py

Both run in one process, in turn, and the median of the rounds is printed. The hand-written loop is
jitted, donates its state, feeds NumPy batches from the same loader, and reads the losses once per
epoch; Distaff logs, averages every metric, and looks for NaN besides.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
import optax

import distaff
from distaff import data, tasks, zoo

_EXAMPLES, _BATCH, _EPOCHS, _ROUNDS = 32_000, 32, 3, 7


def make_data(width: int) -> data.ArrayLoader:
    """Returns random examples: what is learned does not matter here."""
    rng = np.random.default_rng(0)
    arrays = {
        "image": rng.normal(size=(_EXAMPLES, width)).astype(np.float32),
        "label": rng.integers(0, 10, _EXAMPLES).astype(np.int32),
    }
    return data.ArrayLoader(arrays, _BATCH, shuffle=True)


def by_hand(model: zoo.MLP, loader: data.ArrayLoader) -> Callable[[], float]:
    """Returns a function that trains some epochs and gives the seconds per step."""
    tx = optax.adam(1e-3)

    def loss_fn(params, batch):
        logits = model.apply({"params": params}, batch["image"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses.mean(), (logits.argmax(-1) == batch["label"]).mean()

    @jax.jit
    def step(params, opt_state, batch):
        (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, (loss, accuracy)

    step = jax.jit(step, donate_argnums=(0, 1))
    params = model.init(jax.random.key(0), next(iter(loader))["image"])["params"]
    state = [params, tx.init(params)]

    def run() -> float:
        start, count = time.perf_counter(), 0
        for _ in range(_EPOCHS):
            metrics = []
            for batch in loader:
                *state[:], last = step(*state, batch)
                metrics.append(last)
                count += 1
            np.mean(jax.device_get(metrics), axis=0)
        return (time.perf_counter() - start) / count

    return run


def by_distaff(model: zoo.MLP, loader: data.ArrayLoader) -> Callable[[], float]:
    """Returns a function that trains some epochs and gives the seconds per step."""

    class Clocked(tasks.Classifier):
        def train_epoch(self, train_loader, epoch):
            start = time.perf_counter()
            metrics = super().train_epoch(train_loader, epoch)
            self.seconds += time.perf_counter() - start
            return metrics

    trainer = Clocked(model, optimizer=optax.adam(1e-3), root=None, enable_progress_bar=False)

    def run() -> float:
        trainer.seconds, before = 0.0, trainer.step
        trainer.train_model(loader, num_epochs=_EPOCHS)
        return trainer.seconds / (trainer.step - before)

    return run


def main() -> None:
    """Prints one line per model."""
    print(f"distaff {distaff.__name__}, jax {jax.__version__}, {jax.devices()[0].platform}")
    for width, features in ((64, (64,)), (64, (512, 512))):
        model = zoo.MLP((*features, 10))
        loader = make_data(width)
        hand, ours = by_hand(model, loader), by_distaff(model, loader)
        hand(), ours()
        rounds = [(hand(), ours()) for _ in range(_ROUNDS)]
        ratio = statistics.median(b / a for a, b in rounds)
        times = [1e6 * statistics.median(column) for column in zip(*rounds, strict=True)]
        print(
            f"MLP {width}-{'-'.join(map(str, features))}-10, batch {_BATCH}: by hand "
            f"{times[0]:.0f} us/step, Distaff {times[1]:.0f} us/step, ratio {ratio:.3f}"
        )


if __name__ == "__main__":
    main()
