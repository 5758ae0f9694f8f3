"""Cross-validates a small network on scikit-learn's diabetes data: 442 patients, 10 features.

    .venv/bin/python examples/diabetes_folds.py

Each fold is a run, `runs/diabetes/<version>`. If the program is started again, finished folds are
loaded. The features are standardized by the training part of each fold alone. The learning rate
and the number of epochs were chosen from a few on these folds, so their error is optimistic.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import tyro
from sklearn.datasets import load_diabetes

from distaff import OptimizerConfig, data, tasks, zoo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What can be set from the command line."""

    num_epochs: int = 15
    num_folds: int = 5
    root: str = "runs"


def rows() -> tuple[np.ndarray, np.ndarray]:
    x, y = load_diabetes(return_X_y=True, scaled=False)
    return x, y[:, None] / 100  # the disease's progression in a year


def main(options: Options) -> list[float]:
    errors = []
    for i, (train, val) in enumerate(data.k_fold(rows(), options.num_folds, seed=0)):
        trainer = tasks.Regressor(
            zoo.MLP((32, 1)),
            optimizer=OptimizerConfig("adamw", learning_rate=3e-2, weight_decay=0.1),
            standardize=data.Standardize.fit(train),
            name="diabetes",
            root=options.root,
        )
        result = trainer.train_model(train, val, num_epochs=options.num_epochs, key=f"fold-{i}")
        if result.status == "interrupted":
            raise SystemExit(130)  # as Ctrl-C ends a program; start it again to resume
        errors.append(result.history["val/loss"][-1])  # the best epoch would flatter
    print(f"mean squared error of {len(errors)} folds: {np.mean(errors):.3f}")
    return errors


if __name__ == "__main__":
    main(tyro.cli(Options))
