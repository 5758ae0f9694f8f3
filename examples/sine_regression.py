"""Fits y = sin(3x) on [-2, 2] with a small network, once for each seed.

    .venv/bin/python examples/sine_regression.py

Each seed is a run, `runs/sine/<version>`, with the curve and the errors by epoch in `sine.png`.
Points, network and epochs follow "Guide 4: Research Projects with JAX" by P. Lippe
(https://uvadlc-notebooks.readthedocs.io); the learning rate was chosen on the validation points.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import tyro
from matplotlib.figure import Figure

from distaff import History, OptimizerConfig, data, tasks


class SmoothMLP(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = nn.silu(nn.Dense(128)(x))
        return nn.Dense(1)(x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What can be set from the command line."""

    num_epochs: int = 50
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    root: str = "runs"


def points(number: int, seed: int) -> dict[str, np.ndarray]:
    x = np.random.default_rng(seed).uniform(-2, 2, size=(number, 1))
    return {"x": x, "y": np.sin(3 * x)}


def fit(seed: int, options: Options) -> float:
    train = data.ArrayLoader(points(1000, seed=42), batch_size=64, shuffle=True, seed=seed)
    val, test = (data.ArrayLoader(points(*which), 500) for which in ((200, 43), (500, 44)))
    optimizer = OptimizerConfig(learning_rate=2e-2, warmup_steps=50, clip_norm=1.0)
    where = {"name": "sine", "root": options.root}
    trainer = tasks.Regressor(SmoothMLP(), optimizer=optimizer, seed=seed, **where)
    result = trainer.train_model(train, val, test, num_epochs=options.num_epochs)
    if result.status == "interrupted":
        raise SystemExit(130)  # as Ctrl-C ends a program; run it again to resume
    draw(trainer, result.history).savefig(result.path / "sine.png", dpi=100)
    return result.metrics["test/loss"]


def draw(trainer: tasks.Regressor, history: History) -> Figure:
    curve, learning = Figure(figsize=(8, 3), layout="constrained").subplots(1, 2)
    x = np.linspace(-2, 2, 400)[:, None]
    curve.plot(x, np.sin(3 * x), color="#bbbbbb", linewidth=5, label="sin(3x)")
    curve.plot(x, trainer.bind_model()(x), color="#D55E00", label="network")
    for name in ("train/loss", "val/loss"):
        learning.semilogy(history.epochs[name], history[name], label=name)
    learning.set(xlabel="epoch", ylabel="mean squared error")
    curve.legend(loc="lower left")
    learning.legend()
    return curve.figure


def main(options: Options) -> dict[int, float]:
    errors = {seed: fit(seed, options) for seed in options.seeds}
    print("test MSE by seed:", {seed: f"{error:.2e}" for seed, error in errors.items()})
    return errors


if __name__ == "__main__":
    main(tyro.cli(Options))
