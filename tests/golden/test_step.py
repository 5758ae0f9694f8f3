"""Pins the step: it and ten lines of plain Optax, and all its forms, give the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from distaff import Context, TrainState, TrainStep, train_step
from distaff.execution.dispatch.dispatcher import single
from distaff.execution.dispatch.packed_metrics import MetricLayout, blank
from distaff.execution.execution import Compiled, Eager, Execution
from distaff.execution.feed.chunk import One
from distaff.step.normalise import measured

STEPS = 10
# A power of two: compilers may divide by it or multiply by its inverse, it is the same.
SIZE = 16
RNG = jax.random.key(7)
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        x = nn.Dense(16, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.25, deterministic=not train)(x)
        return nn.Dense(3)(x)


MODEL = Net()
COMPILED = Compiled()
random = np.random.default_rng(0)
BATCHES = [
    {"x": random.normal(size=(SIZE, 5)).astype(np.float32), "y": random.integers(0, 3, SIZE)}
    for _ in range(STEPS)
]
VARIABLES = jax.jit(MODEL.init)(jax.random.key(1), BATCHES[0]["x"])


def cross_entropy(params: Any, batch: Any, ctx: Context) -> jax.Array:
    logits = ctx.apply(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def trained(step: Any, execution: Execution = COMPILED) -> tuple[Any, np.ndarray]:
    """Returns parameters, statistics and optimizer state after ten steps, and the ten losses."""
    state = TrainState.create(apply_fn=MODEL.apply, tx=TX, rng=RNG, **VARIABLES)
    program, losses = execution.program(step), []
    for batch in BATCHES:
        state, metrics = program(state, batch)
        losses.append(metrics["loss"].compute())
    return (state.params, state.batch_stats, state.opt_state), np.array(losses)


def plain(apply_number: int = 1) -> tuple[Any, np.ndarray]:
    """The same ten steps without Distaff; its documented keys are derived by hand."""

    @jax.jit
    def step(params: Any, stats: Any, opt_state: Any, number: Any, batch: Any) -> Any:
        key = jax.random.fold_in(jax.random.fold_in(RNG, number), apply_number)
        rngs = {"params": jax.random.fold_in(key, 0), "dropout": jax.random.fold_in(key, 1)}

        def loss_fn(params: Any) -> Any:
            variables = {"params": params, "batch_stats": stats}
            logits, new = MODEL.apply(variables, batch["x"], rngs=rngs, mutable=["batch_stats"])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
            return loss.mean(), new["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = TX.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), loss

    carry = (VARIABLES["params"], VARIABLES["batch_stats"], TX.init(VARIABLES["params"]))
    losses = []
    for number, batch in enumerate(BATCHES):
        carry, loss = step(*carry, number, batch)
        losses.append(loss)
    return carry, np.array(losses)


def same_bits(first: Any, second: Any) -> bool:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def single_form() -> tuple[Any, np.ndarray]:
    """The step as the trainer runs it: metrics in rows of a table, the state donated."""
    state = TrainState.create(apply_fn=MODEL.apply, tx=TX, rng=RNG, **VARIABLES)
    state = jax.tree.map(lambda leaf: leaf.copy(), state)
    step = measured(train_step(cross_entropy))
    columns = MetricLayout(jax.eval_shape(step, state, BATCHES[0])[1])
    program = COMPILED.program(single(step, columns, watched=False), donate=0)
    table = blank(len(BATCHES), columns.width)
    for batch in BATCHES:
        state, table, _ = program(state, table, One(batch))
    losses = columns.metrics(np.asarray(table))["loss"].compute()
    return (state.params, state.batch_stats, state.opt_state), losses.astype(np.float32)


class CrossEntropy(TrainStep):
    def loss_fn(self, params: Any, batch: Any, ctx: Context) -> jax.Array:
        return cross_entropy(params, batch, ctx)


@pytest.fixture(scope="module")
def expected() -> tuple[Any, np.ndarray]:
    return trained(train_step(cross_entropy))


def test_step_is_ten_lines_of_plain_optax_bit_for_bit(expected):
    assert same_bits(expected, plain())


def test_step_would_differ_with_another_key(expected):
    assert not same_bits(expected, plain(apply_number=2))


@pytest.mark.slow_but("in rows and donated")
@pytest.mark.parametrize(
    "form",
    [
        lambda: trained(TrainStep(cross_entropy)),
        lambda: trained(CrossEntropy()),
        lambda: trained(train_step(lambda *args: cross_entropy(*args).mean())),
        lambda: trained(train_step(lambda *args: (cross_entropy(*args), {"one": 1}))),
        single_form,
    ],
    ids=["class", "subclass", "scalar loss", "with metrics", "in rows and donated"],
)
def test_every_form_of_a_step_gives_the_same_bits(form: Callable[[], Any], expected):
    assert same_bits(form(), expected)


@pytest.mark.slow
def test_debugging_gives_the_same_numbers(expected):
    debugged = trained(train_step(cross_entropy), Eager())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), debugged, expected
    )
