"""Flax NNX as its tutorials write it: `nnx.jit` around model, `nnx.Optimizer` and metrics."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.log import MetricLog
from benchmarks.models import make_optimizer
from benchmarks.worker import Rounds
from benchmarks.workloads import LOG_EVERY, Workload, epoch_rows, make_arrays


class MLP(nnx.Module):
    """64-128-10."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden, self.out = nnx.Linear(64, 128, rngs=rngs), nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(nnx.relu(self.hidden(x)))


class CNN(nnx.Module):
    """Two convolutions with pooling, and two dense layers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), rngs=rngs)
        self.hidden = nnx.Linear(7 * 7 * 64, 128, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv in (self.conv1, self.conv2):
            x = nnx.max_pool(nnx.relu(conv(x)), (2, 2), strides=(2, 2))
        return self.out(nnx.relu(self.hidden(x.reshape(x.shape[0], -1))))


class ResidualBlock(nnx.Module):
    """Two convolutions and a shortcut without parameters."""

    def __init__(self, inputs: int, features: int, stride: int, rngs: nnx.Rngs) -> None:
        conv = partial(nnx.Conv, kernel_size=(3, 3), padding=1, use_bias=False, rngs=rngs)
        self.conv1 = conv(inputs, features, strides=stride)
        self.conv2 = conv(features, features)
        self.norm1 = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)
        self.norm2 = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)
        self.stride, self.new_channels = stride, features - inputs

    def __call__(self, x: jax.Array) -> jax.Array:
        residual = nnx.relu(self.norm1(self.conv1(x)))
        residual = self.norm2(self.conv2(residual))
        shortcut = x[:, :: self.stride, :: self.stride]
        return nnx.relu(
            jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (0, self.new_channels))) + residual
        )


class ResNet(nnx.Module):
    """ResNet-8 for pictures of 32 x 32 pixels."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 16, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        sizes = ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        self.blocks = nnx.List([ResidualBlock(*size, rngs=rngs) for size in sizes])
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return self.out(x.mean(axis=(1, 2)))


class GPTBlock(nnx.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, features: int, heads: int, rngs: nnx.Rngs) -> None:
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.norm1, self.norm2 = (nnx.RMSNorm(features, rngs=rngs) for _ in range(2))
        self.query, self.key, self.value, self.join = (linear(features, features) for _ in range(4))
        self.up, self.down = linear(features, 4 * features), linear(4 * features, features)
        self.heads = heads

    def __call__(self, x: jax.Array) -> jax.Array:
        from distaff.zoo.gpt import causal_attention, rotary

        h, shape = self.norm1(x), (*x.shape[:2], self.heads, -1)
        query, key, value = (f(h).reshape(shape) for f in (self.query, self.key, self.value))
        h = causal_attention(rotary(query), rotary(key), value)
        x = x + self.join(h.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class GPT(nnx.Module):
    """Four blocks of width 128 over bytes."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(256, 128, embedding_init=init, rngs=rngs)
        self.blocks = nnx.List([GPTBlock(128, 4, rngs) for _ in range(4)])
        self.norm = nnx.RMSNorm(128, rngs=rngs)
        self.head = nnx.Linear(128, 256, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


_MODELS = {"W1": MLP, "W2": CNN, "W3": ResNet, "W4": GPT}


def run(workload: Workload, rounds: Rounds, folder: Path) -> None:
    """Trains rounds; metrics are an `nnx.MultiMetric`, read and reset every 50 steps."""
    model = _MODELS[workload.name](nnx.Rngs(0))
    model.train()
    optimizer = nnx.Optimizer(model, make_optimizer(workload), wrt=nnx.Param)
    metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"), accuracy=nnx.metrics.Accuracy())
    inputs, labels = make_arrays(workload)
    log, done, last = MetricLog(folder), 0, 0

    def write() -> int:
        values = metrics.compute()
        steps = done - last
        log.add_sum([steps * float(values["loss"]), steps * float(values["accuracy"])], steps)
        metrics.reset()
        return done

    for epoch in rounds:
        for rows in epoch_rows(workload, epoch):
            _train_step(model, optimizer, metrics, inputs[rows], labels[rows])
            done += 1
            if done % LOG_EVERY == 0:
                last = write()
        if done > last:
            last = write()
        jax.block_until_ready(nnx.state(model))
        rounds.done(log.end_round())


@nnx.jit
def _train_step(
    model: Any, optimizer: nnx.Optimizer, metrics: nnx.MultiMetric, x: jax.Array, y: jax.Array
) -> None:
    def loss_fn(model: Any) -> tuple[jax.Array, jax.Array]:
        logits = model(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), logits

    (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    metrics.update(loss=loss, logits=logits, labels=y)
    optimizer.update(model, grads)
