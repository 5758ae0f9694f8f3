"""Augmentation: few digits, each shifted in another way in every step.

    .venv/bin/python examples/augmentation.py

The same network learns 200 digits, as they are and shifted by up to a pixel. It prints the accuracy
on 360 test digits, for each seed and on average.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import tyro

from distaff import Monitor, OptimizerConfig, augment, data, tasks, zoo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    num_examples: int = 200
    num_epochs: int = 100
    seeds: tuple[int, ...] = (0, 1, 2)
    root: str = "runs"


class Plain(tasks.Classifier):
    monitor = Monitor("val/loss")  # 180 examples: the accuracy is too coarse to choose by


class Shifted(Plain):
    def augment(self, batch, key):
        # No flips: the mirror image of a digit is no digit.
        images = augment.random_crop(key, batch["image"], padding=1, mode="constant")
        return {**batch, "image": images}


def main(options: Options) -> dict[str, list[float]]:
    train, val, test = data.digits()
    few = {name: leaf[: options.num_examples] for name, leaf in train.arrays.items()}
    model = zoo.CNN(features=(16, 32, 32), dropout=0.2)
    adam = OptimizerConfig("adamw", learning_rate=3e-3, weight_decay=0.1)
    quiet = {"check_val_every_n_epoch": 10, "enable_progress_bar": False, "root": options.root}
    scores: dict[str, list[float]] = {}
    for task in (Plain, Shifted):
        name = task.__name__.lower()
        for seed in options.seeds:
            trainer = task(model, optimizer=adam, name=name, seed=seed, **quiet)
            loader = data.ArrayLoader(few, batch_size=50, shuffle=True, seed=seed)
            result = trainer.train_model(loader, val, test, num_epochs=options.num_epochs)
            if result.status == "interrupted":
                raise SystemExit(130)  # as Ctrl-C ends a program; run it again to resume
            scores.setdefault(name, []).append(result.metrics["test/accuracy"])
    print("seed   ", *(f"{seed:6}" for seed in options.seeds), "  mean")
    for name, values in scores.items():
        print(f"{name:7}", *(f"{value:.4f}" for value in [*values, np.mean(values)]))
    return scores


if __name__ == "__main__":
    main(tyro.cli(Options))
