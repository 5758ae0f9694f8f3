"""Independence: which programs keep the examples of a batch apart, read from their jaxprs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff import zoo
from distaff.step.independence import keeps_apart

SIZE = 6
RNG = np.random.default_rng(0)
BATCH = {
    "x": RNG.normal(size=(SIZE, 4)).astype(np.float32),
    "y": RNG.normal(size=SIZE).astype(np.float32),
    "label": RNG.integers(0, 4, SIZE),
    "seq": RNG.normal(size=(SIZE, 7, 4)).astype(np.float32),
    "tokens": RNG.integers(0, 10, (SIZE, 7)),
    "image": RNG.normal(size=(SIZE, 8, 8, 3)).astype(np.float32),
}

APART: dict[str, Callable[..., Any]] = {
    "entry by entry": lambda b: jnp.where(b["y"] > 0, b["y"] / 7.0, jnp.tanh(b["y"])),
    "the batch's size by chance": lambda b: b["y"] / 6.0,
    "cross entropy": lambda b: optax.softmax_cross_entropy_with_integer_labels(b["x"], b["label"]),
    "indices of its own": lambda b: b["x"][jnp.arange(len(b["x"])), b["label"]],
    "a column": lambda b: b["x"][:, 2],
    "one hot": lambda b: jnp.zeros((SIZE, 4)).at[jnp.arange(SIZE), b["label"]].set(1.0),
    "folded into the batch": lambda b: (
        optax.softmax_cross_entropy_with_integer_labels(
            b["seq"].reshape(-1, 4), b["tokens"].reshape(-1) % 4
        )
        .reshape(-1, 7)
        .mean(1)
    ),
    "transposed": lambda b: (b["x"].T / jnp.linalg.norm(b["x"].T, axis=0, keepdims=True)).T,
    "sorted within": lambda b: jnp.sort(b["x"], axis=1),
    "summed up within": lambda b: jnp.cumsum(b["x"], axis=1),
    "attention within": lambda b: jnp.einsum("btd,bsd->bts", b["seq"], b["seq"]),
    "embedding": lambda b: jnp.ones((10, 3))[b["tokens"]].mean(1),
    "a map over examples": lambda b: jax.lax.map(lambda row: jnp.sum(row * row[0]), b["x"]),
    "a scan over time": lambda b: jax.lax.scan(
        lambda carry, x: (carry + x, carry), jnp.zeros((SIZE, 4)), b["seq"].swapaxes(0, 1)
    )[0],
    "per-example gradients": lambda b: jax.vmap(jax.grad(lambda row: (row**2).sum()))(b["x"]),
    "random numbers": lambda b: b["x"] + jax.random.normal(jax.random.key(0), b["x"].shape),
    "matrices": lambda b: jnp.linalg.eigh(b["x"][:, :, None] * b["x"][:, None, :])[0],
    "a transform": lambda b: jnp.abs(jnp.fft.fft(b["seq"], axis=1)),
    "several outputs": lambda b: {"best": jax.lax.top_k(b["x"], 2), "one": jnp.ones(SIZE)},
}

MIXED: dict[str, Callable[..., Any]] = {
    "in-batch negatives": lambda b: optax.softmax_cross_entropy_with_integer_labels(
        b["x"] @ b["x"].T, jnp.arange(len(b["x"]))
    ),
    "nothing but zeros": lambda b: jax.nn.logsumexp((0 * b["x"]) @ b["x"].T, axis=1),
    "normalised by the batch": lambda b: b["x"] - b["x"].mean(0, keepdims=True),
    "the largest": lambda b: b["x"] / jnp.abs(b["x"]).max(),
    "the first": lambda b: b["x"] - b["x"][:1],
    "the neighbour": lambda b: jnp.roll(b["x"], 1, axis=0),
    "ranks": lambda b: jnp.argsort(jnp.argsort(b["y"])),
    "pairs": lambda b: (b["y"][:, None] - b["y"][None, :]).mean(1),
    "summed up over examples": lambda b: jnp.cumsum(b["y"]),
    "carried from example to example": lambda b: jax.lax.scan(
        lambda carry, x: (carry + x, carry), jnp.zeros(4), b["x"]
    )[1],
    "until all are done": lambda b: jax.vmap(
        lambda y: jax.lax.while_loop(lambda c: c < 3, lambda c: 1.1 * c + 1, y)
    )(b["y"]),
    "a branch for all": lambda b: jax.lax.cond(b["y"].sum() > 0, jnp.sin, jnp.cos, b["y"]),
    "shuffled": lambda b: b["x"][jax.random.permutation(jax.random.key(0), SIZE)],
    "groups": lambda b: jax.ops.segment_sum(b["y"], b["label"], SIZE),
    "halves": lambda b: b["x"].reshape(2, -1, 4).sum(0).repeat(2, axis=0),
    "the size of the batch": lambda b: b["y"] / len(b["y"]),
    "its place in the batch": lambda b: b["y"] * jnp.linspace(0.0, 1.0, len(b["y"])),
    "one number": lambda b: b["y"].mean(),
}


def is_apart(function: Callable[..., Any], state: Any = None) -> bool:
    def run(state: Any, batch: Any) -> Any:
        return function(batch) if state is None else function(state, batch)

    return keeps_apart(jax.make_jaxpr(run), state, BATCH)


@pytest.mark.parametrize("name", APART)
def test_programs_that_keep_examples_apart(name):
    assert is_apart(APART[name])


@pytest.mark.parametrize("name", MIXED)
def test_programs_that_mix_examples(name):
    assert not is_apart(MIXED[name])


MODELS = {
    "mlp": (zoo.MLP((5, 3)), "x"),
    "cnn": (zoo.CNN(4), "image"),
    "gpt": (zoo.GPT(vocab_size=10, num_layers=1, num_heads=2, features=8), "tokens"),
    "rnn": (nn.RNN(nn.GRUCell(3)), "seq"),
    "attention": (nn.MultiHeadDotProductAttention(num_heads=2, deterministic=True), "seq"),
    "batch norm that runs": (nn.BatchNorm(use_running_average=True), "x"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_keep_examples_apart(name):
    model, entry = MODELS[name]
    options = {"train": False} if entry == "image" else {}
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), BATCH[entry], **options))
    assert is_apart(lambda variables, b: model.apply(variables, b[entry], **options), variables)


def test_batch_normalization_in_training_mixes_examples():
    norm = nn.BatchNorm(use_running_average=False)
    variables = jax.eval_shape(lambda: norm.init(jax.random.key(0), BATCH["x"]))
    apply = lambda variables, b: norm.apply(variables, b["x"], mutable=["batch_stats"])[0]  # noqa: E731
    assert not is_apart(apply, variables)


def test_one_example_and_what_is_not_traced_count_as_mixed():
    one = {"y": np.ones(1)}
    assert not keeps_apart(jax.make_jaxpr(lambda state, b: b["y"]), None, one)
    assert not keeps_apart(lambda state, b: None, None, BATCH)
