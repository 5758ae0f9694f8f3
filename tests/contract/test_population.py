"""A population of two: stacked states train through the loop and the dispatcher as they are.

What has to know of the axis of members, a guard and a ranking, does not take part.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff import TrainState, data
from distaff.execution.dispatch.dispatcher import Dispatcher, DispatchOptions, make_dispatcher
from distaff.execution.dispatch.packed_metrics import WindowEnd
from distaff.execution.dispatch.steps_per_call import Expected
from distaff.execution.execution import Compiled
from distaff.execution.feed.chunk import ChunkSize
from distaff.execution.feed.feed import Feed
from distaff.execution.placement import owned
from distaff.metrics import Mean, compute
from distaff.run import loop
from distaff.run.events import ChunkEnd
from distaff.step.context import Context
from distaff.step.normalise import StepFn, measured
from distaff.step.step import train_step
from distaff.zoo import MLP

MEMBERS, EPOCHS, STEPS = 2, 2, 7
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(4 * STEPS, 6)).astype(np.float32)
Y = RANDOM.integers(3, size=len(X)).astype(np.int32)
MODEL = MLP((8, 3))
TX = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2)


def loss_fn(params: Any, batch: Any, ctx: Context) -> Any:
    """Draws noise from the key of the member, and returns a metric per example."""
    noise = jax.random.normal(ctx.rng, batch["x"].shape)
    logits = ctx.apply(params, batch["x"] + 0.1 * noise)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return loss, {
        "accuracy": Mean.per_example((logits.argmax(-1) == batch["y"]).astype(np.float32))
    }


ONE = measured(train_step(loss_fn))


def at_once(state: TrainState, batch: Any) -> Any:
    """A step of all members as one: a product of matrices becomes one of stacked matrices."""
    return jax.vmap(ONE, in_axes=(0, None))(state, batch)


def in_turn(state: TrainState, batch: Any) -> Any:
    """A step of all members, one after the other: the operations are those of one member."""
    return jax.lax.map(lambda member: ONE(member, batch), state)


def member(seed: int) -> TrainState:
    """Returns the state of a member before its first step: weights, key and rate are its own."""
    init, key = jax.random.split(jax.random.key(seed))
    params = MODEL.init(init, X[:1], train=False)["params"]
    state = TrainState.create(params=params, tx=TX, apply_fn=MODEL.apply, rng=key)
    state.opt_state.hyperparams["learning_rate"] = jnp.float32(10.0 ** -(1 + seed))
    return state


def stacked() -> TrainState:
    """Returns the states of all members, each leaf `[members, ...]`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(member, range(MEMBERS)))


class Trained(NamedTuple):
    """What a run gives: the state, the metrics of each step, and those of each window."""

    state: TrainState
    steps: list[Any]
    windows: list[Any]


@cache
def programs(step: StepFn, steps_per_call: int) -> Dispatcher:
    options = DispatchOptions(steps_per_call=steps_per_call, log_every_n_steps=3)
    example = member(0) if step is ONE else stacked(), {"x": X[:4], "y": Y[:4]}
    return make_dispatcher(Compiled(), step, example, options, Expected(STEPS), watched=True)


def trained(step: StepFn, state: TrainState, steps_per_call: int) -> Trained:
    """Trains as a trainer does: fed, dispatched, looped, and read window by window."""
    loader = data.ArrayLoader({"x": X, "y": Y}, 4, shuffle=True, seed=5)
    feed = Feed(loader, name="train", resident=False)
    run, count = programs(step, steps_per_call), 0
    steps, windows, state = [], [], owned(state)
    for _ in range(EPOCHS):
        chunks = feed.epoch(lambda: ChunkSize(steps_per_call, steps_per_call))
        for event in loop.steps(run, state, chunks, step=count):
            if isinstance(event, ChunkEnd):
                state, count = event.state, event.step
                steps += [dict(compute(metrics)) for metrics in event.metrics]
            elif isinstance(event, WindowEnd):
                windows.append((event.step, dict(compute(event.metrics))))
    return Trained(state.replace(rng=None), steps, windows)


@cache
def together(step: StepFn, steps_per_call: int) -> Trained:
    return trained(step, stacked(), steps_per_call)


@cache
def alone(seed: int, steps_per_call: int) -> Trained:
    return trained(ONE, member(seed), steps_per_call)


def part(of: Trained, seed: int) -> Trained:
    """Returns what a member has of a population."""
    windows = [(step, {n: x[seed] for n, x in found.items()}) for step, found in of.windows]
    state, steps = jax.tree.map(lambda leaf: leaf[seed], (of.state, of.steps))
    return Trained(state, steps, windows)


def numbers(of: Trained) -> list[np.ndarray]:
    """Returns all numbers in double precision, which keeps every bit of a narrower float."""
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(of)]


def same_bits(one: Trained, other: Trained) -> bool:
    pairs = zip(numbers(one), numbers(other), strict=True)
    return all(a.tobytes() == b.tobytes() for a, b in pairs)


@pytest.mark.parametrize("steps_per_call", [1, 4])
@pytest.mark.parametrize("seed", range(MEMBERS))
def test_member_of_a_population_is_a_run_of_its_own(seed: int, steps_per_call: int) -> None:
    own = alone(seed, steps_per_call)
    assert [step for step, _ in own.windows] == [3, 6, 7, 9, 12, 14]
    assert [len(own.steps), int(own.state.step)] == [EPOCHS * STEPS] * 2
    for_each = part(together(in_turn, steps_per_call), seed)
    # Newer versions of XLA compile the body of a loop otherwise, and round the last bits otherwise.
    assert same_bits(for_each, own) or jax.__version_info__ >= (0, 11)
    # A product of stacked matrices sums in another order than that of one: the last bits differ.
    for_all = part(together(at_once, steps_per_call), seed)
    for mine in (for_each, for_all):
        for found, expected in zip(numbers(mine), numbers(own), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step", [in_turn, at_once])
def test_fused_steps_of_a_population_are_its_single_steps_bit_for_bit(step: StepFn) -> None:
    single, fused = together(step, 1), together(step, 4)
    assert [x.shape for _, found in single.windows for x in found.values()] == [(MEMBERS,)] * 12
    assert same_bits(fused, single)
    assert not same_bits(part(fused, 0), part(fused, 1))
