"""The models of `golden/torch/make.py` in Flax Linen, Flax NNX and Equinox, and their names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import distaff
from distaff import TorchRules

EPS = 1e-5  # of PyTorch; LayerNorm of Flax has 1e-6


def first(x: jax.Array) -> jax.Array:
    """Puts the channels of PyTorch's images first."""
    return jnp.moveaxis(x, -1, 1)


class LinenLayer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(EPS)(x + nn.MultiHeadDotProductAttention(2)(x))
        y = nn.relu(nn.Dense(16)(x))
        return nn.LayerNorm(EPS)(x + nn.Dense(8)(y))


class LinenEncoder(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8)
        x = embed(tokens)
        for _ in range(2):
            x = LinenLayer()(x)
        return embed.attend(nn.LayerNorm(EPS)(x))


class NnxLayer(nnx.Module):
    def __init__(self, rngs):
        self.self_attn = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.linear1 = nnx.Linear(8, 16, rngs=rngs)
        self.linear2 = nnx.Linear(16, 8, rngs=rngs)
        self.norm1 = nnx.LayerNorm(8, epsilon=EPS, rngs=rngs)
        self.norm2 = nnx.LayerNorm(8, epsilon=EPS, rngs=rngs)

    def __call__(self, x):
        x = self.norm1(x + self.self_attn(x))
        return self.norm2(x + self.linear2(nnx.relu(self.linear1(x))))


class NnxEncoder(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.layers = nnx.List([NnxLayer(rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(8, epsilon=EPS, rngs=rngs)
        self.head = nnx.Linear(8, 11, use_bias=False, rngs=rngs)  # not tied

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class EqxLayer(eqx.Module):
    self_attn: eqx.nn.MultiheadAttention
    linear1: eqx.nn.Linear
    linear2: eqx.nn.Linear
    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm

    def __init__(self, key):
        a, b, c = jax.random.split(key, 3)
        biases = {f"use_{each}_bias": True for each in ("query", "key", "value", "output")}
        self.self_attn = eqx.nn.MultiheadAttention(2, 8, **biases, key=a)
        self.linear1, self.linear2 = eqx.nn.Linear(8, 16, key=b), eqx.nn.Linear(16, 8, key=c)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(8), eqx.nn.LayerNorm(8)

    def __call__(self, x):
        x = jax.vmap(self.norm1)(x + self.self_attn(x, x, x))
        y = jax.vmap(self.linear2)(jax.nn.relu(jax.vmap(self.linear1)(x)))
        return jax.vmap(self.norm2)(x + y)


class EqxEncoder(eqx.Module):
    embed: eqx.nn.Embedding
    layers: list[EqxLayer]
    norm: eqx.nn.LayerNorm

    def __init__(self, key):
        a, b, c = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(11, 8, key=a)
        self.layers, self.norm = [EqxLayer(b), EqxLayer(c)], eqx.nn.LayerNorm(8)

    def __call__(self, tokens):
        x = jax.vmap(self.embed)(tokens)
        for layer in self.layers:
            x = layer(x)
        return jax.vmap(self.norm)(x) @ self.embed.weight.T


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        conv = functools.partial(nn.Conv, 8, padding=1, use_bias=False)
        norm = functools.partial(nn.BatchNorm, not train)
        y = nn.relu(norm()(conv((3, 3), 2)(x)))
        y = norm()(conv((3, 3))(y))
        return nn.relu(y + norm()(nn.Conv(8, (1, 1), 2, padding=0)(x)))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        conv = functools.partial(nnx.Conv, padding=1, use_bias=False, rngs=rngs)
        self.conv1, self.conv2 = conv(4, 8, (3, 3), 2), conv(8, 8, (3, 3))
        self.bn1, self.bn2 = nnx.BatchNorm(8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        shortcut = nnx.Conv(4, 8, (1, 1), 2, padding=0, rngs=rngs)
        self.downsample = nnx.List([shortcut, nnx.BatchNorm(8, rngs=rngs)])

    def __call__(self, x):
        y = self.bn2(self.conv2(nnx.relu(self.bn1(self.conv1(x)))))
        for each in self.downsample:
            x = each(x)
        return nnx.relu(y + x)


class EqxBlock(eqx.Module):
    conv1: eqx.nn.Conv2d
    bn1: eqx.nn.BatchNorm
    conv2: eqx.nn.Conv2d
    bn2: eqx.nn.BatchNorm
    downsample: tuple[eqx.nn.Conv2d, eqx.nn.BatchNorm]

    def __init__(self, key):
        a, b, c = jax.random.split(key, 3)
        self.conv1 = eqx.nn.Conv2d(4, 8, 3, 2, 1, use_bias=False, key=a)
        self.conv2 = eqx.nn.Conv2d(8, 8, 3, 1, 1, use_bias=False, key=b)
        self.bn1 = eqx.nn.BatchNorm(8, "batch", mode="ema")
        self.bn2 = eqx.nn.BatchNorm(8, "batch", mode="batch")
        norm = eqx.nn.BatchNorm(8, "batch", mode="batch")
        self.downsample = eqx.nn.Conv2d(4, 8, 1, 2, key=c), norm

    def __call__(self, x, state):
        y, state = self.bn1(self.conv1(x), state)
        y, state = self.bn2(self.conv2(jax.nn.relu(y)), state)
        x, state = self.downsample[1](self.downsample[0](x), state)
        return jax.nn.relu(y + x), state


class LinenConvs(nn.Module):
    @nn.compact
    def __call__(self, x):  # [batch, height, width, channels]
        x = nn.Conv(4, (3,), name="one")(x.reshape(len(x), 16, 4)).reshape(x.shape)
        y = jnp.repeat(x[:, :, None], 2, axis=2)
        y = nn.Conv(4, (2, 2, 2), padding="VALID", name="three")(y)[:, :, 0]
        y = nn.Conv(4, (3, 3), feature_group_count=2, name="grouped")(y)
        y = nn.Conv(8, (3, 3), feature_group_count=4, name="depthwise")(y)
        return nn.ConvTranspose(8, (2, 2), (2, 2), name="up")(y)


class NnxConvs(nnx.Module):
    def __init__(self, rngs):
        self.one = nnx.Conv(4, 4, (3,), rngs=rngs)
        self.three = nnx.Conv(4, 4, (2, 2, 2), padding="VALID", rngs=rngs)
        self.grouped = nnx.Conv(4, 4, (3, 3), feature_group_count=2, rngs=rngs)
        self.depthwise = nnx.Conv(4, 8, (3, 3), feature_group_count=4, rngs=rngs)
        self.up = nnx.ConvTranspose(8, 8, (2, 2), (2, 2), transpose_kernel=True, rngs=rngs)

    def __call__(self, x):
        x = self.one(x.reshape(len(x), 16, 4)).reshape(x.shape)
        y = self.three(jnp.repeat(x[:, :, None], 2, axis=2))[:, :, 0]
        return self.up(self.depthwise(self.grouped(y)))


class EqxConvs(eqx.Module):
    one: eqx.nn.Conv1d
    three: eqx.nn.Conv3d
    grouped: eqx.nn.Conv2d
    depthwise: eqx.nn.Conv2d
    up: eqx.nn.ConvTranspose2d

    def __init__(self, key):
        self.one = eqx.nn.Conv1d(4, 4, 3, padding=1, key=key)
        self.three = eqx.nn.Conv3d(4, 4, 2, key=key)
        self.grouped = eqx.nn.Conv2d(4, 4, 3, padding=1, groups=2, key=key)
        self.depthwise = eqx.nn.Conv2d(4, 8, 3, padding=1, groups=4, key=key)
        self.up = eqx.nn.ConvTranspose2d(8, 8, 2, 2, key=key)

    def __call__(self, x):
        x = self.one(x.reshape(4, 16)).reshape(x.shape)
        y = self.three(jnp.repeat(x[:, :, None], 2, axis=2))[:, :, 0]
        return self.up(self.depthwise(self.grouped(y)))


class LinenLstm(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.RNN(nn.OptimizedLSTMCell(6))(x)
        return nn.Dense(3, name="head")(x)


class NnxLstm(nnx.Module):
    def __init__(self, rngs):
        cells = nnx.LSTMCell(6, 6, rngs=rngs), nnx.OptimizedLSTMCell(6, 6, rngs=rngs)
        self.lstm = nnx.List([nnx.RNN(cell) for cell in cells])
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.lstm:
            x = layer(x)
        return self.head(x)


def unrolled(cell: Any, x: jax.Array) -> jax.Array:
    """Returns the hidden states of a cell of Equinox, `[length, features]`."""
    zeros = jnp.zeros(cell.hidden_size)
    start = (zeros, zeros) if isinstance(cell, eqx.nn.LSTMCell) else zeros

    def step(carry, each):
        carry = cell(each, carry)
        return carry, carry[0] if isinstance(carry, tuple) else carry

    return jax.lax.scan(step, start, x)[1]


class EqxLstm(eqx.Module):
    lstm: list[eqx.nn.LSTMCell]
    head: eqx.nn.Linear

    def __init__(self, key):
        self.lstm = [eqx.nn.LSTMCell(6, 6, key=key) for _ in range(2)]
        self.head = eqx.nn.Linear(6, 3, key=key)

    def __call__(self, x):
        for cell in self.lstm:
            x = unrolled(cell, x)
        return jax.vmap(self.head)(x)


class LinenGru(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.GRUCell(6, name="cell"))(x)


class EqxGru(eqx.Module):
    cell: eqx.nn.GRUCell

    def __init__(self, key):
        self.cell = eqx.nn.GRUCell(5, 6, key=key)

    def __call__(self, x):
        return unrolled(self.cell, x)


class LinenGpt2(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8, name="wte")(tokens) + nn.Embed(5, 8, name="wpe")(jnp.arange(5))[None]
        norm = functools.partial(nn.LayerNorm, EPS)
        attention = nn.MultiHeadDotProductAttention(2, name="attn")
        x = x + attention(norm(name="ln_1")(x), mask=nn.make_causal_mask(tokens))
        y = nn.gelu(nn.Dense(32, name="c_fc")(norm(name="ln_2")(x)))
        return norm(name="ln_f")(x + nn.Dense(8, name="c_proj")(y))


class NnxGpt2(nnx.Module):
    def __init__(self, rngs):
        self.wte, self.wpe = nnx.Embed(11, 8, rngs=rngs), nnx.Embed(5, 8, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.c_fc = nnx.Linear(8, 32, rngs=rngs)
        self.c_proj = nnx.Linear(32, 8, rngs=rngs)
        norm = functools.partial(nnx.LayerNorm, 8, epsilon=EPS, rngs=rngs)
        self.ln_1, self.ln_2, self.ln_f = norm(), norm(), norm()

    def __call__(self, tokens):
        x = self.wte(tokens) + self.wpe(jnp.arange(5))[None]
        x = x + self.attn(self.ln_1(x), mask=nnx.make_causal_mask(tokens))
        return self.ln_f(x + self.c_proj(nnx.gelu(self.c_fc(self.ln_2(x)))))


class EqxGpt2(eqx.Module):
    wte: eqx.nn.Embedding
    wpe: eqx.nn.Embedding
    attn: eqx.nn.MultiheadAttention
    c_fc: eqx.nn.Linear
    c_proj: eqx.nn.Linear
    norms: dict[str, eqx.nn.LayerNorm]

    def __init__(self, key):
        self.wte, self.wpe = eqx.nn.Embedding(11, 8, key=key), eqx.nn.Embedding(5, 8, key=key)
        biases = {f"use_{each}_bias": True for each in ("query", "key", "value", "output")}
        self.attn = eqx.nn.MultiheadAttention(2, 8, **biases, key=key)
        self.c_fc, self.c_proj = eqx.nn.Linear(8, 32, key=key), eqx.nn.Linear(32, 8, key=key)
        self.norms = {name: eqx.nn.LayerNorm(8) for name in ("ln_1", "ln_2", "ln_f")}

    def __call__(self, tokens):
        x = jax.vmap(self.wte)(tokens) + self.wpe.weight
        y = jax.vmap(self.norms["ln_1"])(x)
        x = x + self.attn(y, y, y, mask=jnp.tril(jnp.ones((5, 5), bool)))
        y = jax.vmap(self.c_fc)(jax.vmap(self.norms["ln_2"])(x))
        return jax.vmap(self.norms["ln_f"])(x + jax.vmap(self.c_proj)(jax.nn.gelu(y)))


class Case(NamedTuple):
    """A model, its names in PyTorch, and whether its images have their channels last."""

    model: Callable[[], Any]
    rules: Any = "torch"
    channels_last: bool = True


TIED = {"head.weight": "embed.weight"}
LINEN_ENCODER = TorchRules(
    {
        "embed": "Embed_0",
        "layers.{}.self_attn": "LinenLayer_{}/MultiHeadDotProductAttention_0",
        "layers.{}.norm1": "LinenLayer_{}/LayerNorm_0",
        "layers.{}.norm2": "LinenLayer_{}/LayerNorm_1",
        "layers.{}.linear1": "LinenLayer_{}/Dense_0",
        "layers.{}.linear2": "LinenLayer_{}/Dense_1",
        "norm": "LayerNorm_0",
    },
    tied=TIED,
)
LINEN_BLOCK = TorchRules(
    {
        "conv1": "Conv_0",
        "conv2": "Conv_1",
        "downsample.0": "Conv_2",
        "bn1": "BatchNorm_0",
        "bn2": "BatchNorm_1",
        "downsample.1": "BatchNorm_2",
    }
)


def gpt2(query: str, out: str, norms: str = "") -> TorchRules:
    """Returns the names of GPT-2, given those of the last parts of attention."""
    names: dict[str, Any] = {
        "h.0.attn.c_attn": tuple(
            f"attn/{query.format(each)}" for each in ("query", "key", "value")
        ),
        "h.0.attn.c_proj": f"attn/{out}",
        "h.0.mlp.c_fc": "c_fc",
        "h.0.mlp.c_proj": "c_proj",
        **{f"h.0.{each}": f"{norms}{each}" for each in ("ln_1", "ln_2")},
        "ln_f": f"{norms}ln_f",
    }
    return TorchRules(names, inputs_first="h.*.c_*.weight")


CASES = {
    "encoder": {
        "linen": Case(LinenEncoder, LINEN_ENCODER),
        "nnx": Case(lambda: lambda rngs: NnxEncoder(rngs), TorchRules(tied=TIED)),
        "equinox": Case(lambda: lambda key: EqxEncoder(key), TorchRules(tied=TIED)),
    },
    "block": {
        "linen": Case(LinenBlock, LINEN_BLOCK),
        "nnx": Case(lambda: lambda rngs: NnxBlock(rngs)),
        "equinox": Case(lambda: lambda key: eqx.nn.make_with_state(EqxBlock)(key), "torch", False),
    },
    "convs": {
        "linen": Case(LinenConvs),
        "nnx": Case(lambda: lambda rngs: NnxConvs(rngs)),
        "equinox": Case(lambda: lambda key: EqxConvs(key), "torch", False),
    },
    "lstm": {
        "linen": Case(LinenLstm, TorchRules({"lstm.l{}": "OptimizedLSTMCell_{}"})),
        "nnx": Case(lambda: lambda rngs: NnxLstm(rngs), TorchRules({"lstm.l{}": "lstm/{}/cell"})),
        "equinox": Case(lambda: lambda key: EqxLstm(key), TorchRules({"lstm.l{}": "lstm/{}"})),
    },
    "gru": {
        "linen": Case(LinenGru, TorchRules({"gru.l0": "cell"})),
        "equinox": Case(lambda: lambda key: EqxGru(key), TorchRules({"gru.l0": "cell"})),
    },
    "gpt2": {
        "linen": Case(LinenGpt2, gpt2("{}", "out")),
        "nnx": Case(lambda: lambda rngs: NnxGpt2(rngs), gpt2("{}", "out")),
        "equinox": Case(lambda: lambda key: EqxGpt2(key), gpt2("{}_proj", "output_proj", "norms/")),
    },
}
"""Golden model, then kind of model."""


class Loss(distaff.TrainerModule):
    """A trainer, whose model takes `x`."""

    def print_tabulate(self, example_batch):
        pass  # it takes most of the time of a start

    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])).mean()
