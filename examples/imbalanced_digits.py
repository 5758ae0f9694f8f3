"""A rare class: of the digit 8, only five images are left to train on, of all others over 100.

    .venv/bin/python examples/imbalanced_digits.py

Class weights give each digit the same weight in the loss; with `--no-balanced` every eight of the
test is missed. The Keras form takes 24 lines.
"""

from __future__ import annotations

import numpy as np
import tyro

from distaff import data, metrics, tasks, zoo

RARE = 8


def main(
    num_epochs: int = 30, seed: int = 42, balanced: bool = True, root: str = "runs"
) -> dict[str, np.ndarray]:
    train, val, test = (loader.arrays for loader in data.digits())
    dropped = np.flatnonzero(train["label"] == RARE)[5:]
    train = {name: np.delete(array, dropped, axis=0) for name, array in train.items()}
    weights = tasks.balanced_weights(train["label"]) if balanced else None
    where = {"name": "imbalanced", "root": root, "seed": seed}
    trainer = tasks.Classifier(zoo.MLP((64, 10)), class_weights=weights, **where)
    trainer.train_model(train, val, num_epochs=num_epochs)
    pair = test["label"], trainer.predict(test).argmax(axis=1)
    recall = metrics.Recall.per_example(*pair, num_classes=10, average=None).compute()
    balanced_accuracy = metrics.BalancedAccuracy.per_example(*pair, num_classes=10).compute()
    print(f"balanced accuracy {balanced_accuracy:.3f}, of the rare digit {recall[RARE]:.3f}")
    return {"balanced_accuracy": balanced_accuracy, "recall": recall}


if __name__ == "__main__":
    tyro.cli(main)
