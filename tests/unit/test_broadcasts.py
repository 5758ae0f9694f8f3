"""Losses that meet each prediction with each label: named with both shapes, before training."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distaff
from distaff import EvalStep, TrainState, data, train_step
from distaff.errors import LossError
from distaff.metrics import Mean
from distaff.step import broadcasts
from distaff.step.context import Context

SIZE = 6
RNG = np.random.default_rng(0)
BATCH = {
    "x": RNG.normal(size=(SIZE, 3)).astype(np.float32),
    "y": RNG.integers(0, 2, SIZE).astype(np.float32),
    "weight": np.ones(SIZE, np.float32),
}

Loss = Callable[[jax.Array, Any], Any]

WRONG: dict[str, Loss] = {
    "per example": lambda out, b: jnp.square(out - b["y"]),
    "mean": lambda out, b: jnp.square(out - b["y"]).mean(),
    "labels first": lambda out, b: jnp.abs(b["y"] - out).mean(),
    "one mean after the other": lambda out, b: jnp.square(out - b["y"]).mean(-1),
    "weighted": lambda out, b: (b["weight"] * (out - b["y"]) ** 2).mean(),
    "cross entropy": lambda out, b: optax.sigmoid_binary_cross_entropy(out, b["y"]).mean(),
    "huber": lambda out, b: optax.losses.log_cosh(out - b["y"]).mean(),
    "beside another loss": lambda out, b: jnp.square(out - b["y"]).mean() + 0.1 * (out**2).mean(),
    "clipped": lambda out, b: jnp.maximum(jnp.abs(out - b["y"]), 0.1).sum() / len(b["y"]),
    "in a function": lambda out, b: jax.jit(lambda p, y: ((p - y) ** 2).mean())(out, b["y"]),
}

RIGHT: dict[str, Loss] = {
    "one shape": lambda out, b: jnp.square(out[:, 0] - b["y"]),
    "every pair, written out": lambda out, b: jnp.square(out - b["y"][None, :]).mean(),
    "distances of embeddings": lambda out, b: (
        jnp.sum(out**2, 1, keepdims=True) + jnp.sum(b["x"] ** 2, 1) - 2 * out @ b["x"][:, :1].T
    ).mean(),
    "ranking": lambda out, b: jax.nn.softplus(out - out[:, 0]).mean(),
    "frequencies": lambda out, b: jnp.square(out * jnp.linspace(1.0, 2.0, SIZE)).mean(),
    "in-batch classes": lambda out, b: jax.nn.logsumexp(-((out - b["x"][:, 0]) ** 2), axis=1),
    "other pairs masked": lambda out, b: jnp.where(jnp.eye(SIZE) > 0, out - b["y"], 0.0).mean(),
    "a bias": lambda out, b: jnp.square(b["x"] * out + jnp.ones(3)).mean(),
}


def state() -> TrainState:
    return TrainState.create(
        params={"w": jnp.ones((3, 1))},
        apply_fn=lambda variables, x: x @ variables["params"]["w"],
        tx=optax.sgd(0.1),
    )


def loss_of(loss: Loss) -> Callable[..., Any]:
    return lambda params, batch, ctx: loss(ctx.apply(params, batch["x"]), batch)


def check_loss(loss_fn: Callable[..., Any]) -> None:
    current = state()
    arguments = (current.params, BATCH)
    closed = jax.make_jaxpr(lambda *each: loss_fn(*each, Context(current, train=True)))(*arguments)
    if broadcasts.has_pairs(closed, SIZE):
        broadcasts.check(loss_fn, arguments, lambda: Context(current, train=True), SIZE)


def check(loss: Loss) -> None:
    check_loss(loss_of(loss))


@pytest.fixture(autouse=True)
def as_users_have_it():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", WRONG)
def test_predictions_that_meet_every_label_are_an_error_with_both_shapes(name):
    for _ in range(2):  # JAX has traced its functions before
        with pytest.raises(LossError, match=re.escape(f"broadcast to [{SIZE}, {SIZE}]")) as found:
            check(WRONG[name])
        assert f"shape [{SIZE}, 1]" in str(found.value)
        assert f"shape [{SIZE}]" in str(found.value)
        assert ".mean(" not in str(found.value)


def test_a_trainer_looks_at_scalar_losses_before_it_trains():
    class Wrong(distaff.TrainerModule):
        def loss_fn(self, params, batch, ctx):
            return jnp.square(ctx.apply(params, batch["x"]) - batch["y"]).mean()

    for val in (None, data.ArrayLoader(BATCH, SIZE)):
        trainer = Wrong(nn.Dense(1), root=None, enable_progress_bar=False)
        with pytest.raises(LossError, match=r"each prediction with each label.*labels\[None, :\]"):
            trainer.train_model(data.ArrayLoader(BATCH, SIZE), val, num_epochs=1)
        assert trainer.step == 0


@pytest.mark.parametrize("make", [train_step, EvalStep])
def test_steps_name_both_shapes_of_a_square_loss(make):
    with pytest.raises(LossError, match=r"subtract gets arrays of shape \[6, 1\].* \[6\]"):
        jax.eval_shape(make(loss_of(WRONG["per example"])), state(), BATCH)


@pytest.mark.parametrize("name", RIGHT)
def test_pairs_that_are_meant_are_no_error(name):
    check(RIGHT[name])


@pytest.mark.parametrize(
    "metric",
    [
        lambda out, b: ((out > 0) == b["y"]).mean(),
        lambda out, b: jnp.sum(jnp.abs(out - b["y"])) / SIZE,
        lambda out, b: jnp.abs(out - b["y"]),
        lambda out, b: Mean.per_example(jnp.abs(out - b["y"])),
    ],
)
def test_metrics_are_looked_at_too(metric):
    def loss_fn(params: Any, batch: Any, ctx: Context) -> Any:
        out = ctx.apply(params, batch["x"])
        return jnp.square(out[:, 0] - batch["y"]), {"right": metric(out, batch)}

    with pytest.raises(LossError, match=r"The metric 'right' must.*\[6, 1\].*\[6\]"):
        check_loss(loss_fn)


def test_a_square_loss_is_not_told_to_average_the_mistake_away():
    with pytest.raises(LossError, match=r"often comes from a broadcast of \[6, 1\] with \[6\]"):
        jax.eval_shape(train_step(loss_of(lambda out, b: out - b["y"][None])), state(), BATCH)
