"""The recipe `digits`: trains on real data, and draws figures of the finished run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np

from distaff import data, tasks
from distaff.core import optional
from distaff.core.paths import shown
from distaff.mesh.config import MeshName
from distaff.metrics.monitor import Monitor
from distaff.optim import OptimizerConfig
from distaff.run.display import make_display
from distaff.run.result import TrainResult
from distaff.zoo import CNN

_SPLITS = ("train", "val", "test")


def _default_optimizer() -> OptimizerConfig:
    return OptimizerConfig(
        "adamw", learning_rate=5e-3, warmup_steps=50, end_fraction=0.0, weight_decay=1e-2
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits:
    """Trains a small CNN on the 1,797 handwritten digits of scikit-learn.

    Args:
        num_epochs: epochs to train.
        batch_size: examples per step.
        seed: seed of the parameters, dropout, and the order of the examples.
        features: channels of the CNN's blocks.
        dropout: dropout rate of the last block.
        optimizer: the optimizer and its schedule.
        mesh: devices to train on; the first one by default.
        simulate_devices: number of CPU devices to simulate.
        root: folder of all runs.
        figures: whether to draw learning curves, confusion matrix and worst mistakes.
        progress_bar: whether to show progress.
    """

    num_epochs: int = 20
    batch_size: int = 32
    seed: int = 0
    features: tuple[int, ...] = (32, 32, 64)
    dropout: float = 0.5
    optimizer: OptimizerConfig = dataclasses.field(default_factory=_default_optimizer)
    mesh: MeshName | None = None
    simulate_devices: int | None = None
    root: str = "runs"
    figures: bool = True
    progress_bar: bool = True

    def run(self) -> TrainResult:
        """Trains, validates, tests, draws figures, and prints the paths of the files.

        Raises:
            DistaffError: an option is invalid, or an extra is missing.
        """
        # Loaded first, so that a missing package raises before the training.
        plots = optional.load("matplotlib", extra="plots") if self.figures else None
        train, val, test = data.digits(self.batch_size, self.seed)
        trainer = tasks.Classifier(
            CNN(features=self.features, dropout=self.dropout),
            optimizer=self.optimizer,
            name="digits",
            root=self.root,
            seed=self.seed,
            mesh=self.mesh,
            simulate_devices=self.simulate_devices,
            enable_progress_bar=self.progress_bar,
            save_curves=False,  # drawn by matplotlib below
        )
        # With 180 validation examples, the accuracy saturates, but the loss does not.
        trainer.monitor = Monitor("val/loss", mode="min")
        result = trainer.train_model(train, val, test, num_epochs=self.num_epochs)
        path = Path(str(result.path))
        if result.status == "interrupted":
            print(f"{result.status} by {result.reason} run={shown(path)}")
            return result
        if plots is not None:
            plots.save(result.figure(), path / "figures" / "learning_curves.png")
            name = f"digits/{path.name}: seed {self.seed}, test {test.num_examples:,} examples"
            _draw_test(plots, trainer, test, path / "figures", name)
        make_display(trainer.config.enable_progress_bar).print(_written(path))
        metrics = result.metrics
        print(
            f"test/accuracy={metrics['test/accuracy']:.4f} test/loss={metrics['test/loss']:.4f} "
            f"run={shown(path)}"
        )
        return result


def _draw_test(
    plots, trainer: tasks.Classifier, test: data.ArrayLoader, folder: Path, title: str
) -> None:
    probabilities = np.asarray(jax.jit(jax.nn.softmax)(trainer.predict(test)))
    images, labels = test.arrays["image"], test.arrays["label"]
    names = [str(digit) for digit in range(probabilities.shape[1])]
    confusion = plots.confusion_matrix(labels, probabilities.argmax(axis=1), names, title=title)
    plots.save(confusion, folder / "confusion_matrix.png")
    mistakes = plots.worst_mistakes(images, labels, probabilities, names, title=title)
    plots.save(mistakes, folder / "worst_mistakes.png")


def _written(path: Path) -> str:
    files = [path / name for name in ("config.json", "metrics.jsonl", "model.txt", "log.txt")]
    files += sorted((path / "figures").glob("*.png")) + sorted((path / "checkpoints").iterdir())
    return "written:\n" + "\n".join(f"  {file}" for file in map(shown, files))
