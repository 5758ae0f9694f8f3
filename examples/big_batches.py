"""What a large model needs, in one call: accumulation, bfloat16, clipping, norms, an average.

    .venv/bin/python examples/big_batches.py

Four batches of 32 make one update, of 128 images. `runs/big-batches` has the norms of each logged
step, and two results: of the weights themselves, and of their average.
"""

from __future__ import annotations

import tyro

from distaff import OptimizerConfig, TrainResult, data, tasks, zoo


def main(num_epochs: int = 30, root: str = "runs") -> TrainResult:
    train, val, test = data.digits(batch_size=32)
    trainer = tasks.Classifier(
        zoo.MLP((64, 10)),
        optimizer=OptimizerConfig("adamw", learning_rate=1e-2, accumulate=4, clip_norm=1.0),
        precision="bf16",
        ema=0.99,
        log_norms=True,
        log_every_n_steps=13,  # three times in an epoch of 39 batches
        name="big-batches",
        root=root,
    )
    result = trainer.train_model(train, val, test, num_epochs=num_epochs)
    norms = result.history["step/grad_norm"]
    print(f"gradient norm from {norms[0]:.2f} to {norms[-1]:.2f}")
    for weights in ("test", "test_ema"):
        print(f"{weights}/accuracy {result.metrics[f'{weights}/accuracy']:.4f}")
    return result


if __name__ == "__main__":
    tyro.cli(main)
