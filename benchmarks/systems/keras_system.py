"""Keras 3 on JAX: `model.fit` with its defaults, the progress bar among them.

A round is one epoch, from `on_epoch_begin` to `on_epoch_end`, where Keras has read the epoch's
metrics. It shuffles by itself, so that its batches are the same examples in another order. Its log
is a `CSVLogger`, one line per epoch: it knows no line per 50 steps. It writes no checkpoints.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import keras
from keras import layers, ops

from benchmarks.worker import Rounds
from benchmarks.workloads import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, Workload, make_arrays


class Shortcut(layers.Layer):
    """The shortcut of a residual block: every `stride`-th pixel, and zeros in new channels."""

    def __init__(self, stride: int, new_channels: int) -> None:
        super().__init__()
        self.stride, self.new_channels = stride, new_channels

    def call(self, x: Any) -> Any:
        """Returns the shortcut."""
        shortcut = x[:, :: self.stride, :: self.stride]
        return ops.pad(shortcut, ((0, 0), (0, 0), (0, 0), (0, self.new_channels)))


class Attention(layers.Layer):
    """Causal attention with rotary positions."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.join = (
            layers.Dense(features, use_bias=False) for _ in range(4)
        )

    def build(self, shape: Any) -> None:
        """Makes the weights."""
        for layer in (self.query, self.key, self.value, self.join):
            layer.build(shape)
        self.built = True

    def call(self, x: Any) -> Any:
        """Returns what is added to the residual stream."""
        heads = (-1, x.shape[1], self.heads, x.shape[2] // self.heads)
        query, key, value = (ops.reshape(f(x), heads) for f in (self.query, self.key, self.value))
        h = ops.dot_product_attention(rotary(query), rotary(key), value, is_causal=True)
        return self.join(ops.reshape(h, (-1, *x.shape[1:])))


def rotary(x: Any) -> Any:
    """Turns queries or keys `[batch, length, heads, features]` by their positions."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-ops.arange(half, dtype="float32") / half)
    angles = ops.outer(ops.arange(x.shape[1], dtype="float32"), frequencies)
    cos, sin = ops.cos(angles)[None, :, None], ops.sin(angles)[None, :, None]
    first, second = x[..., :half], x[..., half:]
    return ops.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def make_resnet() -> keras.Model:
    """Returns ResNet-8."""

    def conv(x: Any, features: int, stride: int = 1) -> Any:
        x = layers.ZeroPadding2D(1)(x)
        x = layers.Conv2D(features, 3, strides=stride, use_bias=False)(x)
        return layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)

    inputs = keras.Input((32, 32, 3))
    x, channels = layers.ReLU()(conv(inputs, 16)), 16
    for features, stride in ((16, 1), (32, 2), (64, 2)):
        residual = conv(layers.ReLU()(conv(x, features, stride)), features)
        x = layers.ReLU()(Shortcut(stride, features - channels)(x) + residual)
        channels = features
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def make_gpt() -> keras.Model:
    """Returns the byte GPT."""
    inputs = keras.Input((128,), dtype="int32")
    x = layers.Embedding(256, 128, embeddings_initializer=keras.initializers.RandomNormal(0, 0.02))(
        inputs
    )
    for _ in range(4):
        x = x + Attention(128, 4)(layers.RMSNormalization()(x))
        h = layers.Dense(512, use_bias=False)(layers.RMSNormalization()(x))
        h = layers.Activation(lambda h: keras.activations.gelu(h, approximate=True))(h)
        x = x + layers.Dense(128, use_bias=False)(h)
    x = layers.RMSNormalization()(x)
    return keras.Model(inputs, layers.Dense(256, use_bias=False)(x))


def make_model(workload: Workload) -> keras.Model:
    """Returns the model of a workload."""
    if workload.name == "W1":
        return keras.Sequential(
            [keras.Input((64,)), layers.Dense(128, activation="relu"), layers.Dense(10)]
        )
    if workload.name == "W2":
        blocks = [
            layer
            for features in (32, 64)
            for layer in (
                layers.Conv2D(features, 3, padding="same", activation="relu"),
                layers.MaxPooling2D(2),
            )
        ]
        head = [layers.Flatten(), layers.Dense(128, activation="relu"), layers.Dense(10)]
        return keras.Sequential([keras.Input((28, 28, 1)), *blocks, *head])
    return make_resnet() if workload.name == "W3" else make_gpt()


def make_optimizer(workload: Workload) -> keras.optimizers.Optimizer:
    """Returns the optimizer of a workload."""
    if workload.optimizer == "momentum":
        return keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM)
    if workload.optimizer == "adamw":
        return keras.optimizers.AdamW(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    return keras.optimizers.Adam(LEARNING_RATE)


class Conversation(keras.callbacks.Callback):
    """Stops the clock at the end of each epoch, and waits for the coordinator."""

    def __init__(self, rounds: Rounds) -> None:
        super().__init__()
        self._rounds = rounds

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Starts the clock."""
        self._rounds.start()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Stops the clock."""
        self._rounds.done(logs["loss"])
        if not self._rounds.asked():
            self.model.stop_training = True


def run(workload: Workload, rounds: Rounds, folder: Path, *, steps_per_execution: int = 1) -> None:
    """Trains rounds."""
    keras.utils.set_random_seed(0)
    model, (inputs, labels) = make_model(workload), make_arrays(workload)
    model.compile(
        make_optimizer(workload),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        steps_per_execution=min(steps_per_execution, workload.steps),
    )
    log = keras.callbacks.CSVLogger(folder / "metrics.csv")
    if rounds.asked():
        model.fit(
            inputs,
            labels,
            batch_size=workload.batch_size,
            epochs=10_000,
            callbacks=[log, Conversation(rounds)],
        )
