"""A small run with all that a resume must bring back; the tests kill it, and start it again.

    python resumed_run.py ROOT '{"steps_per_call": 4}'

It prints `training`, then its status, step and test loss.
"""

from __future__ import annotations

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distaff import Callback, EarlyStopping, Monitor, data, zoo
from distaff.metrics import Sum
from distaff.optim import accumulate
from distaff.tasks import Classifier

NUM_EPOCHS = 8


class Noisy(Classifier):
    """Augments on the device, and logs which examples each step has seen, in their order."""

    monitor = Monitor("val/loss")

    def loss_fn(self, params, batch, ctx):
        images = batch["image"]
        if ctx.train:
            images = images + 0.1 * jax.random.normal(ctx.rng, images.shape)
        loss, metrics = super().loss_fn(params, {**batch, "image": images}, ctx)
        places = jnp.arange(1, len(images) + 1)
        order = (batch["id"] * places % 65_521).astype(jnp.float32)
        return loss, {**metrics, "order": Sum.per_example(order)}


class Announce(Callback):
    """Says that training has begun, and slows it down so that a test can meet it."""

    def on_training_start(self, info):
        print("training", flush=True)

    def on_epoch_end(self, info):
        time.sleep(0.1)


def arrays(size: int, first: int) -> dict[str, np.ndarray]:
    """Returns examples of ten classes, `[size, 16]`."""
    rng = np.random.default_rng(first)
    label = rng.integers(0, 10, size).astype(np.int32)
    image = rng.normal(size=(size, 16)).astype(np.float32) + label[:, None] / 3
    return {"image": image, "label": label, "id": np.arange(first, first + size, dtype=np.int32)}


class Forgetful(data.ArrayLoader):
    """Drops its position, as the loader of a trainer does that cannot resume."""

    def set_state(self, state):
        """Does nothing."""


def main() -> None:
    """Trains."""
    options = json.loads(sys.argv[2])
    loader = Forgetful if options.pop("forget", False) else data.ArrayLoader
    train = loader(arrays(16 * 60, 0), 16, shuffle=True, seed=3)
    val, test = (data.ArrayLoader(arrays(100, first), 16) for first in (5_000, 6_000))
    trainer = Noisy(
        zoo.MLP((32, 10), dropout=0.3, batch_norm=True),
        optimizer=accumulate(optax.contrib.schedule_free_adamw(3e-3), 3),
        callbacks=[Announce(), EarlyStopping(Monitor("val/loss"), patience=3)],
        root=sys.argv[1],
        name="run",
        log_every_n_steps=7,
        enable_progress_bar=False,
        **options,
    )
    result = trainer.train_model(train, val, test, num_epochs=NUM_EPOCHS)
    print(result.status, result.step, result.metrics.get("test/loss"), flush=True)


if __name__ == "__main__":
    main()
