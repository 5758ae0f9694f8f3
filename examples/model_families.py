"""One classifier of handwritten digits in each way to write a model, from equal parameters.

    .venv/bin/python examples/model_families.py

All losses must be equal, to rounding. Haiku is one of the families where it is installed.
"""

import importlib.util

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from distaff import OptimizerConfig, data, models, tasks


class Linen(nn.Module):
    @nn.compact
    def __call__(self, image):
        x = nn.relu(nn.Dense(128, name="hidden")(image.reshape(len(image), -1)))
        return nn.Dense(10, name="logits")(x)


class Nnx(nnx.Module):
    def __init__(self, *, rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.logits = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, image):
        return self.logits(nnx.relu(self.hidden(image.reshape(len(image), -1))))


def equinox(key):  # of one example; it is mapped over the batch
    return eqx.nn.Sequential([eqx.nn.Lambda(jnp.ravel), eqx.nn.MLP(64, 10, 128, 1, key=key)])


def init(key, image):
    return Linen().init(key, image)["params"]  # any arrays will do


def apply(params, image):
    hidden, logits = params["hidden"], params["logits"]
    x = jax.nn.relu(image.reshape(len(image), -1) @ hidden["kernel"] + hidden["bias"][None])
    return x @ logits["kernel"] + logits["bias"][None]


ADAM = OptimizerConfig("adamw", learning_rate=3e-3)
FAMILIES = {"Flax Linen": Linen(), "Flax NNX": Nnx, "Equinox": equinox, "functions": (init, apply)}
if importlib.util.find_spec("haiku"):
    from haiku import nets, transform

    FAMILIES["Haiku"] = transform(lambda x: nets.MLP([128, 10])(x.reshape(len(x), -1)))


def main(num_epochs: int = 50) -> dict[str, float]:
    args = jax.random.key(0), np.ones((1, 8, 8, 1), np.float32)
    leaves, losses = jax.tree.leaves(init(*args)), {}
    row = "{:<12}{:>11}{:>12}{:>10}{:>13}"
    print(row.format("family", "parameters", "test loss", "accuracy", "us per step"))
    for name, model in FAMILIES.items():
        own = jax.eval_shape(models.as_model(model).init, *args).params
        equal = [x.T if name == "Equinox" else x for x in leaves]  # whose kernels are [out, in]
        start = jax.tree.unflatten(jax.tree.structure(own), equal)
        options = {"init_from": start, "root": None, "enable_progress_bar": False}
        trainer = tasks.Classifier(model, optimizer=ADAM, **options)
        tested = trainer.train_model(*data.digits(batch_size=64), num_epochs=num_epochs).metrics
        losses[name], accuracy = tested["test/loss"], tested["test/accuracy"]
        time = 1e6 * sum(trainer.last_run.report.facts()["seconds_per_step"].values())
        size = sum(leaf.size for leaf in leaves)
        print(row.format(name, size, f"{losses[name]:.6f}", f"{accuracy:.4f}", f"{time:.0f}"))
    np.testing.assert_allclose(list(losses.values()), losses["Flax Linen"], rtol=1e-4)
    return losses


if __name__ == "__main__":
    tyro.cli(main)
