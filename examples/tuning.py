"""Optuna chooses dropout, weight decay and learning rate of an MLP on handwritten digits.

    .venv/bin/python examples/tuning.py --storage sqlite:///runs/tuning.db

Trials are runs below `runs/tuning/`, the pictures `runs/tuning/*.png`. Started again, the study
continues: of 25 trials it runs the `25 - len(study.trials)` that are left. The best one is tested.
"""

from __future__ import annotations

import dataclasses
import warnings

import matplotlib.pyplot as plt
import optuna
import tyro

import distaff
from distaff import data, tasks, tune, zoo

SPACE = {
    "dropout": tune.Float(0.0, 0.6),
    "optimizer.weight_decay": tune.Float(1e-6, 1e-2, log=True),
    "optimizer.learning_rate": tune.Float(1e-4, 1e-2, log=True),
}


@dataclasses.dataclass(frozen=True)
class Config:
    dropout: float
    optimizer: distaff.OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What can be set from the command line."""

    num_trials: int = 25
    num_epochs: int = 50
    storage: str | None = None  # the journal runs/tuning.journal
    root: str = "runs"


class Tuned(tasks.Classifier):
    monitor = distaff.Monitor("val/loss")  # finer than the accuracy on 180 digits


def draw(study: optuna.Study, folder: str) -> None:
    for name in ("intermediate_values", "param_importances", "contour"):
        with warnings.catch_warnings():  # Optuna calls its pictures by matplotlib experimental
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            getattr(optuna.visualization.matplotlib, f"plot_{name}")(study)
        plt.gcf().set_size_inches(9, 9)
        plt.savefig(f"{folder}/{name}.png", dpi=72, bbox_inches="tight")
        plt.close()


def main(options: Options) -> tune.StudyResult:
    def make_trainer(config: Config) -> Tuned:
        model = zoo.MLP((256, 256, 10), dropout=config.dropout, batch_norm=True)
        return Tuned(model, optimizer=config.optimizer, name="tuning", root=options.root)

    result = tune.study(
        make_trainer,
        SPACE,
        Config(0.2, distaff.OptimizerConfig("adamw", learning_rate=1e-3, weight_decay=1e-4)),
        lambda config: data.digits(batch_size=64),
        num_trials=options.num_trials,
        num_epochs=options.num_epochs,
        storage=options.storage,
        pruner=optuna.pruners.MedianPruner(n_warmup_steps=options.num_epochs // 2),
        study_name="tuning",
    )
    draw(result.study, f"{options.root}/tuning")
    print(f"{result.best}\ntest/accuracy={result.metrics['test/accuracy']:.4f}")
    return result


if __name__ == "__main__":
    main(tyro.cli(Options))
