"""Loss curves in half precision are those of float32, up to the noise between seeds."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff import PrecisionConfig, TrainState, data, train_step, zoo
from distaff.models import as_model, in_precision, stored
from distaff.optim.precision import for_precision

SEEDS = (0, 1, 2)
PRECISIONS = {
    "float32": "float32",
    "bf16": "bf16",
    "bf16-params": PrecisionConfig("bf16-params", moments="bfloat16"),
    "fp16": PrecisionConfig("fp16", loss_scale=2.0**16),
}


def classify(params, batch, ctx):
    logits = ctx.apply(params, batch["image"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])


def next_token(params, batch, ctx):
    logits = ctx.apply(params, batch["tokens"])[:, :-1]
    labels = batch["tokens"][:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(-1)


def digits():
    train, _, _ = data.digits(batch_size=128)
    return zoo.MLP((64, 10)), list(train), classify


def images():
    train, _, _ = data.digits(batch_size=128)
    return zoo.ResNet(blocks=(1,), features=(8,)), list(train), classify


def text():
    """Sequences in which each token tells the next one, nine times out of ten."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 16, (512, 16))
    for n in range(1, 16):
        told = (5 * tokens[:, n - 1] + 3) % 16
        tokens[:, n] = np.where(rng.random(512) < 0.9, told, tokens[:, n])
    model = zoo.GPT(vocab_size=16, num_layers=1, num_heads=2, features=32, max_length=16)
    return model, [{"tokens": part} for part in np.split(tokens, 16)], next_token


@functools.cache
def curves(make, name):
    """Returns the training losses `[seeds, epochs]`."""
    precision = PRECISIONS[name]
    module, batches, loss_fn = make()
    model = in_precision(as_model(module), precision)
    step = jax.jit(train_step(loss_fn))
    tx = for_precision(optax.adamw(3e-3), precision)

    def state_of(seed):
        inputs = next(iter(batches[0].values()))
        variables = model.init(jax.random.key(seed), inputs)
        params = stored(variables.params, precision)
        members = variables._replace(params=params)._asdict()
        return TrainState.create(apply_fn=model.apply_fn, tx=tx, rng=jax.random.key(9), **members)

    found = []
    for seed in SEEDS:
        state, losses = state_of(seed), []
        for _ in range(6):
            for batch in batches:
                state, metrics = step(state, batch)
                losses.append(metrics["loss"].compute())
        found.append(np.reshape(np.asarray(jnp.stack(losses)), (6, -1)).mean(axis=1))
    return np.stack(found)


@pytest.mark.slow
@pytest.mark.parametrize("make", [digits, images, text])
@pytest.mark.parametrize("name", ["bf16", "bf16-params", "fp16"])
def test_curves_are_within_the_noise_between_seeds(make, name):
    reference, found = curves(make, "float32"), curves(make, name)
    assert (reference[:, -1] < 0.9 * reference[:, 0]).all()  # the model learns
    noise = reference.max(axis=0) - reference.min(axis=0)
    apart = np.abs(found - reference).mean(axis=0)
    print(make.__name__, name, "apart", apart.max().round(5), "noise", noise.min().round(5))
    assert (apart <= noise).all()
    assert not np.array_equal(found, reference)
