"""Trains 100 small networks at once, each on its own bootstrap sample, and draws what they know.

After W. Whitney, "Parallelizing neural networks on one GPU with JAX" (2021).
"""

import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tyro

from distaff import OptimizerConfig, tasks, tune, zoo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What can be set from the command line."""

    num_networks: int = 100
    num_epochs: int = 100
    root: str = "runs"


class Bootstrapped(tasks.Classifier):
    def loss_fn(self, params, batch, ctx):
        if ctx.train:  # a bootstrap sample: each point k times, k ~ Poisson(1), by the root key
            keys = jax.vmap(jax.random.fold_in, (None, 0))(ctx.state.rng, batch["number"])
            batch = {**batch, "weight": jax.vmap(lambda key: jax.random.poisson(key, 1.0))(keys)}
        return super().loss_fn(params, batch, ctx)


def moons(number: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    angle, label = rng.uniform(0, np.pi, number), rng.integers(0, 2, number)
    half = np.stack([np.cos(angle), np.sin(angle)]) * (1 - 2 * label)
    x = half + np.stack([label, label / 2]) + rng.normal(0, 0.15, half.shape)
    return {"x": x.T.astype(np.float32), "label": label, "number": np.arange(number)}


def main(options: Options) -> tune.Population:
    train, val, side = moons(200, seed=0), moons(1000, seed=1), np.linspace(-3, 4, 60)
    model, seeds, length = zoo.MLP((32, 32, 2)), options.num_networks, options.num_epochs
    fast = OptimizerConfig(learning_rate=1e-2)
    trainer = Bootstrapped(model, optimizer=fast, batch_size=50, name="ensemble", root=options.root)
    found = tune.multi_seed(trainer, train, val, seeds=seeds, num_epochs=length)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(x.state.params for x in found.members))
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    logits = jax.vmap(lambda params: model.apply({"params": params}, grid))(stacked)
    deviation = jax.nn.softmax(logits)[..., 1].std(axis=0).reshape(len(side), -1)
    plt.colorbar(plt.contourf(side, side, deviation, 20), label="deviation of the networks")
    plt.scatter(*train["x"].T, c=train["label"], cmap="bwr", s=8)
    plt.savefig(f"{options.root}/ensemble/ensemble.png")
    print(f"val/accuracy {found.summary()['val/accuracy']}")
    return found


if __name__ == "__main__":
    main(tyro.cli(Options))
