"""Before a training: which learning rate, and how large a batch.

    .venv/bin/python examples/finder.py

The range test is drawn as `runs/finder/learning_rate.png`. Then a network is trained with its
suggestion, and another with a tenth of it. The Keras form takes 29 lines, and finds no batch size.
"""

from __future__ import annotations

from pathlib import Path

import tyro

from distaff import OptimizerConfig, data, tasks, tune, zoo


def main(num_epochs: int = 20, root: str = "runs") -> dict[str, float]:
    train, val, test = data.digits(batch_size=64)
    trainer = tasks.Classifier(zoo.MLP((64, 10)), root=root)
    found = tune.find_learning_rate(trainer, train)
    print(found)
    path = Path(root) / "finder" / "learning_rate.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    found.figure().savefig(path)
    print(tune.find_batch_size(trainer, train, limit_bytes=2**20).table())
    accuracy = {}
    for name, rate in {"suggested": found.suggestion, "a tenth": found.suggestion / 10}.items():
        adamw = OptimizerConfig("adamw", learning_rate=rate)
        result = trainer.variant(optimizer=adamw, name=name).train_model(
            train, val, test, num_epochs=num_epochs
        )
        accuracy[name] = result.metrics["test/accuracy"]
        print(f"learning rate {rate:.4f}, {name}: test accuracy {accuracy[name]:.4f}")
    return accuracy


if __name__ == "__main__":
    tyro.cli(main)
