"""A residual network that reads handwritten digits, or the pictures of MNIST or CIFAR.

    .venv/bin/python examples/digits_resnet.py
    .venv/bin/python examples/digits_resnet.py --data cifar10 --folder ~/data --batch-size 128

It prints the test accuracy, and leaves learning curves and the confusion matrix as pictures in
`runs/resnet/<version>/figures`. MNIST, Fashion-MNIST (`mnist`) and CIFAR are read from a folder.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import tyro

import distaff
from distaff import data, tasks, zoo
from distaff.integrations import matplotlib as plots

RECIPE = distaff.OptimizerConfig("adamw", learning_rate=1e-2, warmup_steps=50, weight_decay=0.3)


class ShiftingClassifier(tasks.Classifier):
    """Moves each picture of training, in each step, by up to an eighth of its side."""

    monitor = distaff.Monitor("val/loss", mode="min")  # the accuracy is soon at its ceiling

    def loss_fn(self, params, batch, ctx):
        if ctx.train:
            batch = {**batch, "image": shifted(batch["image"], ctx.rng)}
        return super().loss_fn(params, batch, ctx)


def shifted(images: jax.Array, key: jax.Array) -> jax.Array:
    most = images.shape[1] // 8
    padded = jnp.pad(images, ((0, 0), (most, most), (most, most), (0, 0)))
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * most + 1)
    cut = jax.vmap(lambda image, yx: jax.lax.dynamic_slice(image, (*yx, 0), images.shape[1:]))
    return cut(padded, corners)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What can be set from the command line."""

    data: Literal["digits", "mnist", "cifar10", "cifar100"] = "digits"
    folder: Path = Path("data")
    num_epochs: int = 100
    batch_size: int = 32
    blocks: tuple[int, ...] = (1, 1, 1)
    optimizer: distaff.OptimizerConfig = RECIPE
    seed: int = 0
    root: str = "runs"


def main(options: Options) -> distaff.TrainResult:
    where = () if options.data == "digits" else (options.folder,)
    train, val, test = getattr(data, options.data)(*where, options.batch_size, options.seed)
    names = [str(label) for label in range(100 if options.data == "cifar100" else 10)]
    model = zoo.ResNet(len(names), options.blocks)
    run = {"name": "resnet", "root": options.root, "seed": options.seed, "save_curves": False}
    trainer = ShiftingClassifier(model, optimizer=options.optimizer, **run)
    result = trainer.train_model(train, val, test, num_epochs=options.num_epochs)
    if result.status == "interrupted":
        raise SystemExit(130)  # as Ctrl-C ends a program; run it again to resume
    guesses = trainer.predict(test).argmax(axis=-1)
    title = f"resnet/{result.path.name}: seed {options.seed}, test {len(guesses):,} examples"
    confusion = plots.confusion_matrix(test.arrays["label"], guesses, names, title=title)
    plots.save(result.figure(), result.path / "figures" / "learning_curves.png")
    plots.save(confusion, result.path / "figures" / "confusion_matrix.png")
    print(f"test accuracy {result.metrics['test/accuracy']:.4f}, figures in {result.path}/figures")
    return result


if __name__ == "__main__":
    main(tyro.cli(Options))
