"""The Flax Linen models, losses and optimizers that Distaff and the hand-written loops share."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks.workloads import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, Workload


class CNN(nn.Module):
    """Two convolutions with pooling, and two dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """Returns the logits `[batch, 10]`."""
        for features in (32, 64):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


def without_distaff() -> None:
    """Makes single modules of Distaff importable without the rest of it.

    A hand-written loop that takes its model from the zoo then has no more of Distaff in its memory.
    """
    if "distaff" not in sys.modules:
        spec = importlib.util.find_spec("distaff")
        assert spec is not None, "Distaff is not installed"
        package = types.ModuleType("distaff")
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["distaff"] = package


def make_model(workload: Workload) -> nn.Module:
    """Returns the model of a workload."""
    from distaff import zoo

    models = {
        "W1": lambda: zoo.MLP((128, 10)),
        "W2": CNN,
        "W3": zoo.ResNet,
        "W4": lambda: zoo.GPT(vocab_size=256, num_layers=4, num_heads=4, features=128),
    }
    return models[workload.name]()


def make_optimizer(workload: Workload) -> optax.GradientTransformation:
    """Returns the optimizer of a workload."""
    if workload.optimizer == "momentum":
        return optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
    if workload.optimizer == "adamw":
        return optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    return optax.adam(LEARNING_RATE)


def initial_variables(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Returns the variables that all of these systems start from."""
    return jax.jit(model.init)(jax.random.key(0), inputs)


def losses(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns cross-entropy and accuracy of each example, float32 `[batch]`."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = (logits.argmax(-1) == labels).astype(jnp.float32)
    axes = tuple(range(1, labels.ndim))
    return loss.mean(axes), correct.mean(axes)
