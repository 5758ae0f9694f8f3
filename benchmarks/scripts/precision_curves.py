"""Losses of a small ResNet on the digits in bfloat16 beside float32, over three seeds.

python benchmarks/scripts/precision_curves.py --steps 300
"""

from __future__ import annotations

import argparse

import numpy as np

from distaff import OptimizerConfig, data, tasks, zoo

SEEDS = (0, 1, 2)
LAST = 50
"""Steps at the end whose training losses are averaged."""


def losses(precision: str, seed: int, steps: int) -> tuple[float, float]:
    """Returns the mean training loss of the last steps, and the validation loss at the end."""
    train, val, _ = data.digits(batch_size=64)
    trainer = tasks.Classifier(
        zoo.ResNet(blocks=(1, 1), features=(8, 16)),
        precision=precision,
        seed=seed,
        root=None,
        log_every_n_steps=10,
        optimizer=OptimizerConfig("adamw", learning_rate=3e-3),
        enable_progress_bar=False,
        val_every=f"{steps} steps",
    )
    result = trainer.train_model(train, val, num_epochs=f"{steps} steps")
    return result.history["step/loss"][-LAST // 10 :].mean(), result.metrics["val/loss"]


def main() -> None:
    """Prints the losses in both precisions, and the spread of the seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    found = {
        name: np.array([losses(name, seed, steps) for seed in SEEDS])
        for name in ("float32", "bf16")
    }
    for column, what in enumerate((f"training loss, last {LAST} steps", "validation loss")):
        single, half = (found[name][:, column] for name in ("float32", "bf16"))
        apart, spread = np.abs(half - single).max(), np.ptp(single)
        print(f"{what}: float32 {single.round(4)}, bf16 {half.round(4)}")
        print(f"  apart at most {apart:.5f} with the same seed; seeds differ by {spread:.5f}")


if __name__ == "__main__":
    main()
