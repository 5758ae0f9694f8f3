"""The way from 50,000 pictures in bytes to augmented batches on the device, in JAX.

Every form crops (after padding by 4) and flips at random inside a jitted step, which adds up the
pixels, so that nothing can be left out.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.systems.distaff_round import RoundedEpochs, train_rounds
from benchmarks.worker import Rounds
from benchmarks.workloads import Workload

_EXAMPLES, _PAD = 50_000, 4


def pictures() -> tuple[np.ndarray, np.ndarray]:
    """Returns uint8 `[50000, 32, 32, 3]` and int32 `[50000]`."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (_EXAMPLES, 32, 32, 3), dtype=np.uint8)
    return images, rng.integers(0, 10, _EXAMPLES).astype(np.int32)


def augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Crops and flips at random; returns float32 in [0, 1]."""
    key_crop, key_flip = jax.random.split(key)
    size = len(images)
    padded = jnp.pad(images, ((0, 0), (_PAD, _PAD), (_PAD, _PAD), (0, 0)))
    corners = jax.random.randint(key_crop, (size, 2), 0, 2 * _PAD + 1)
    cut = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), (32, 32, 3)))(
        padded, corners
    )
    flips = jax.random.bernoulli(key_flip, shape=(size, 1, 1, 1))
    return jnp.where(flips, cut[:, :, ::-1], cut).astype(jnp.float32) / 255


def on_device(workload: Workload, rounds: Rounds, folder: Path) -> None:
    """Pictures on the device once; the step gets the rows of its batch."""
    arrays = jax.device_put(pictures())

    @partial(jax.jit, donate_argnums=0)
    def step(total: jax.Array, arrays: Any, rows: jax.Array, number: Any) -> jax.Array:
        images, labels = (array[rows] for array in arrays)
        return total + _use(images, labels, number)

    _loop(workload, rounds, lambda total, rows, number: step(total, arrays, rows, number))


def numpy_batches(workload: Workload, rounds: Rounds, folder: Path) -> None:
    """Batches gathered by NumPy and handed to the step."""
    images, labels = pictures()

    @partial(jax.jit, donate_argnums=0)
    def step(total: jax.Array, images: jax.Array, labels: jax.Array, number: Any) -> jax.Array:
        return total + _use(images, labels, number)

    _loop(
        workload,
        rounds,
        lambda total, rows, number: step(total, images[rows], labels[rows], number),
    )


def _use(images: jax.Array, labels: jax.Array, number: Any) -> jax.Array:
    pixels = augment(jax.random.fold_in(jax.random.key(0), number), images)
    return pixels.mean() + 0.0 * labels.sum()


def _loop(workload: Workload, rounds: Rounds, step: Any) -> None:
    for epoch in rounds:
        order = np.random.default_rng([0, epoch]).permutation(_EXAMPLES).astype(np.int32)
        total = jnp.zeros(())
        for number in range(workload.steps):
            rows = order[number * workload.batch_size : (number + 1) * workload.batch_size]
            total = step(total, rows, np.int32(number))
        rounds.done(float(total))


class Brightness(nn.Module):
    """A model that costs next to nothing: a factor."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns `[batch]`."""
        return self.param("factor", nn.initializers.ones, ()) * x.mean(axis=(1, 2, 3))


class Augmented(RoundedEpochs):
    """Augments in the step, and trains next to nothing."""

    def loss_fn(self, params: Any, batch: Any, ctx: Any) -> Any:
        """Returns a loss that uses every pixel."""
        brightness = ctx.apply(params, augment(ctx.rng, batch["image"]))
        return jnp.square(brightness - 0.0 * batch["label"])

    def model_inputs(self, batch: Any) -> tuple[Any, ...]:
        """Returns pictures as floats."""
        return (batch["image"].astype(jnp.float32),)


def distaff_default(workload: Workload, rounds: Rounds, folder: Path) -> None:
    """Distaff's default: an `ArrayLoader`, whose arrays it keeps on the device."""
    _train(workload, rounds, folder, host=False)


def distaff_host(workload: Workload, rounds: Rounds, folder: Path) -> None:
    """Distaff with batches that the host gathers, as with any loader of your own."""
    _train(workload, rounds, folder, host=True)


def _train(workload: Workload, rounds: Rounds, folder: Path, *, host: bool) -> None:
    from distaff import data

    trainer = Augmented(Brightness(), root=str(folder))
    images, labels = pictures()
    arrays = {"image": images, "label": labels}
    loader: Any = data.ArrayLoader(arrays, workload.batch_size, shuffle=True)
    if host:
        loader = data.MappedLoader(loader, lambda batch: batch)
    train_rounds(trainer, rounds, loader, steps_per_epoch=workload.steps)
