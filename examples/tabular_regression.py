"""Regression on a table: the diabetes data of scikit-learn, 442 patients with ten numbers each.

    .venv/bin/python examples/tabular_regression.py

Whole arrays go in, and whole arrays come out. The run `runs/diabetes-table` keeps the means and the
deviations of the inputs with the model. The Keras form takes 18 lines.
"""

from __future__ import annotations

import tyro
from sklearn.datasets import load_diabetes

from distaff import OptimizerConfig, data, metrics, tasks, zoo


def main(num_epochs: int = 100, root: str = "runs") -> dict[str, float]:
    x, y = load_diabetes(return_X_y=True)
    train, val, test = data.split((x, y[:, None]), (0.7, 0.15, 0.15), seed=0)
    scale, adamw = data.Standardize.fit(train), OptimizerConfig("adamw", learning_rate=2e-2)
    trainer = tasks.Regressor(
        zoo.MLP((32, 1)), standardize=scale, optimizer=adamw, name="diabetes-table", root=root
    )
    trainer.train_model(train, val, num_epochs=num_epochs)
    inputs, targets = test
    outputs = trainer.predict(inputs)
    kinds = {"R2": metrics.R2, "MAE": metrics.MAE}
    scores = {name: each.per_example(targets, outputs).compute() for name, each in kinds.items()}
    print(f"{len(targets)} test patients: R2 {scores['R2']:.3f}, MAE {scores['MAE']:.1f}")
    return scores


if __name__ == "__main__":
    tyro.cli(main)
