"""One small model for each kind that a trainer takes, with equal layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx


class LinenMLP(nn.Module):
    dropout: float = 0.0
    batch_norm: bool = False

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(8, name="first")(x)
        if self.batch_norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))
        return nn.Dense(1, name="last")(x)


class LinenCNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="first")(x))
        return nn.Dense(1, name="last")(x.mean(axis=(1, 2)))


class NnxMLP(nnx.Module):
    def __init__(self, dropout=0.0, batch_norm=False, *, rngs):
        self.first = nnx.Linear(3, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.5, rngs=rngs) if batch_norm else None
        self.drop = nnx.Dropout(dropout, rngs=rngs)
        self.last = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        x = self.first(x)
        x = x if self.norm is None else self.norm(x)
        return self.last(self.drop(nnx.relu(x)))


class NnxCNN(nnx.Module):
    def __init__(self, *, rngs):
        self.first = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.last = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)).mean(axis=(1, 2)))


class EquinoxMLP(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm | None
    drop: eqx.nn.Dropout
    last: eqx.nn.Linear

    def __init__(self, dropout=0.0, batch_norm=False, *, key):
        keys = jax.random.split(key)
        self.first = eqx.nn.Linear(3, 8, key=keys[0])
        self.norm = eqx.nn.BatchNorm(8, "batch", momentum=0.5, mode="ema") if batch_norm else None
        self.drop = eqx.nn.Dropout(dropout)
        self.last = eqx.nn.Linear(8, 1, key=keys[1])

    def __call__(self, x, state=None, *, key=None):
        x = self.first(x)
        if self.norm is not None:
            x, state = self.norm(x, state)
        x = self.last(self.drop(jax.nn.relu(x), key=key))
        return x if self.norm is None else (x, state)


class EquinoxCNN(eqx.Module):
    first: eqx.nn.Conv2d
    last: eqx.nn.Linear

    def __init__(self, *, key):
        keys = jax.random.split(key)
        self.first = eqx.nn.Conv2d(1, 4, 3, padding=1, key=keys[0])
        self.last = eqx.nn.Linear(4, 1, key=keys[1])

    def __call__(self, x):
        x = jax.nn.relu(self.first(x.transpose(2, 0, 1)))
        return self.last(x.mean(axis=(1, 2)))


def dense(layer, x):
    return x @ layer["kernel"] + layer["bias"][None]


def init_mlp(key, x):
    kernels = [jax.random.normal(k, shape) / 2 for k, shape in zip(
        jax.random.split(key), [(3, 8), (8, 1)], strict=True
    )]  # fmt: skip
    return {
        name: {"kernel": kernel, "bias": jnp.zeros(kernel.shape[1])}
        for name, kernel in zip(("first", "last"), kernels, strict=True)
    }


def functions_mlp(dropout=0.0, batch_norm=False):
    """With a state, in the form of `hk.transform_with_state`; without, with a keyword `key`."""

    def forward(params, x, key, train):
        if batch_norm:
            x = x * params["scale"][None]
        x = nn.relu(dense(params["first"], x))
        if train and dropout:
            x = x * jax.random.bernoulli(key, 1 - dropout, x.shape) / (1 - dropout)
        return dense(params["last"], x)

    def init_with_state(rng, x):
        return init_mlp(rng, x) | {"scale": jnp.ones(3)}, {"mean/~/ema": jnp.zeros(3)}

    def apply_with_state(params, state, rng, x, train):
        mean = x.mean(0) if train else state["mean/~/ema"]
        moved = {"mean/~/ema": (state["mean/~/ema"] + x.mean(0)) / 2} if train else state
        return forward(params, x - mean[None], rng, train), moved

    if batch_norm:
        return init_with_state, apply_with_state
    return init_mlp, lambda params, x, *, key, train: forward(params, x, key, train)


def functions_cnn():
    def init(key, x):
        first, last = jax.random.split(key)
        return {
            "first": {"kernel": jax.random.normal(first, (3, 3, 1, 4)), "bias": jnp.zeros(4)},
            "last": {"kernel": jax.random.normal(last, (4, 1)), "bias": jnp.zeros(1)},
        }

    def apply(params, x):
        dimensions = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, params["first"]["kernel"], (1, 1), "SAME", dimension_numbers=dimensions
        )
        x = nn.relu(x + params["first"]["bias"][None, None, None])
        return dense(params["last"], x.mean(axis=(1, 2)))

    return init, apply


def equinox_mlp(dropout=0.0, batch_norm=False):
    def make(key):
        made = eqx.nn.make_with_state(EquinoxMLP)(dropout, batch_norm, key=key)
        return made if batch_norm else made[0]

    return make


def as_equinox(params):
    """Returns Linen's parameters as Equinox has them: output channels first, no last axis."""

    def layer(arrays):
        kernel, bias = arrays["kernel"], arrays["bias"]
        if kernel.ndim == 4:
            return {"weight": kernel.transpose(3, 2, 0, 1), "bias": bias[:, None, None]}
        return {"weight": kernel.T, "bias": bias}

    return {name: layer(arrays) for name, arrays in params.items()}


def as_haiku(params):
    def layer(arrays):
        return {"w": arrays["kernel"], "b": arrays["bias"]}

    return {name: layer(arrays) for name, arrays in params.items()}


def haiku_mlp(dropout=0.0, batch_norm=False):
    import haiku as hk

    def forward(x, is_training):
        x = hk.Linear(8, name="first")(x)
        if batch_norm:
            x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.5)(x, is_training)
        x = nn.relu(x)
        if is_training and dropout:
            x = hk.dropout(hk.next_rng_key(), dropout, x)
        return hk.Linear(1, name="last")(x)

    return (hk.transform_with_state if batch_norm else hk.transform)(forward)


def haiku_cnn():
    import haiku as hk

    def forward(x):
        x = nn.relu(hk.Conv2D(4, 3, name="first")(x))
        return hk.Linear(1, name="last")(x.mean(axis=(1, 2)))

    return hk.transform(forward)


class Kind(NamedTuple):
    """Makers of equal models.

    Attributes:
        mlp: takes a rate of dropout, and whether to normalise batches.
        cnn: takes nothing.
        converted: turns Linen's parameters into those of the kind.
        kernels: shell pattern for the paths of its kernels.
    """

    mlp: Callable[..., Any]
    cnn: Callable[[], Any]
    converted: Callable[[Any], Any] = lambda params: params
    kernels: str = "*kernel"


def nnx_mlp(*options):
    return lambda rngs: NnxMLP(*options, rngs=rngs)


KINDS = {
    "linen": Kind(LinenMLP, LinenCNN),
    "nnx": Kind(nnx_mlp, lambda: NnxCNN),
    "equinox": Kind(equinox_mlp, lambda: EquinoxCNN, as_equinox, "*weight"),
    "functions": Kind(functions_mlp, functions_cnn),
    "haiku": Kind(haiku_mlp, haiku_cnn, as_haiku, "*/w"),
}

NAMES = [
    pytest.param(name, marks=pytest.mark.peer("haiku") if name == "haiku" else ()) for name in KINDS
]
"""The kinds as parameters of a test."""
