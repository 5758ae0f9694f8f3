"""The first source document, TrainStep: each of its questions, answered by code.

What other files prove is not repeated here:

    function or class           golden/test_step.py: every_form_of_a_step_gives_the_same_bits
    forward, loss, gradient,    golden/test_step.py: step_is_ten_lines_of_plain_optax_bit_for_bit
      update in one step        unit/test_step.py: step_takes_the_gradient_of_the_mean_loss
    one trace for many steps    unit/test_step.py: the_loss_is_traced_once_for_many_steps
    a loss of the wrong shape   unit/test_step.py: step_refuses_a_wrong_loss_and_names_the_remedy
      in a whole run            unit/test_bad_input.py: LOSSES
"""

from __future__ import annotations

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distaff
from distaff import OptimizerConfig, TrainState, TrainStep, data, train_step
from distaff.errors import LossError, StateError

X = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
LABELS = np.arange(16) % 4
BATCH = {"images": X, "labels": np.eye(4, dtype=np.float32)[LABELS]}


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.tanh(nn.Dense(8)(x)))


MODEL = Model()
PARAMS = MODEL.init(jax.random.key(0), X)["params"]
softmax_ce = optax.softmax_cross_entropy


def new_state() -> Any:
    return TrainState.create(apply_fn=MODEL.apply, params=PARAMS, tx=optax.adam(1e-2))


def loss_fn(params: Any, batch: Any, ctx: distaff.Context) -> Any:
    return softmax_ce(ctx.apply(params, batch["images"]), batch["labels"])


def assert_same_bits(tree: Any, other: Any) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def step_of_the_document(state: Any, batch: Any) -> Any:
    """Its example, with the loss averaged, the gradient named, and the state returned."""

    def loss_fn(params):
        x, y = batch["images"], batch["labels"]
        logits = state.apply_fn({"params": params}, x=x)
        loss = softmax_ce(logits, y).mean()
        return loss, logits

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (_, _logits), grads = grad_fn(state.params)
    return state.apply_gradients(grads=grads)


def test_one_step_lowers_a_convex_loss_and_leaves_the_old_state_as_it_was():
    model = nn.Dense(4)  # softmax regression is convex
    variables = model.init(jax.random.key(1), X)
    state = TrainState.create(apply_fn=model.apply, tx=optax.sgd(0.1), **variables)
    before = jax.tree.map(np.array, state)
    after, metrics = train_step(loss_fn)(state, BATCH)
    _, later = train_step(loss_fn)(after, BATCH)
    assert later["loss"].compute() < metrics["loss"].compute()
    assert_same_bits(jax.tree.map(np.array, state), before)
    assert (int(state.step), int(after.step)) == (0, 1)


def test_should_train_step_be_a_function_or_a_class_it_gives_the_bits_of_the_document():
    class Interface(TrainStep):
        def loss_fn(self, params, batch, ctx):
            return loss_fn(params, batch, ctx)

    expected, function, interface = new_state(), new_state(), new_state()
    steps = [jax.jit(step) for step in (step_of_the_document, train_step(loss_fn), Interface())]
    for _ in range(10):
        expected = steps[0](expected, BATCH)
        function, _ = steps[1](function, BATCH)
        interface, _ = steps[2](interface, BATCH)
    assert_same_bits(function.params, expected.params)
    assert_same_bits(interface.params, expected.params)
    assert_same_bits(interface.opt_state, expected.opt_state)


def test_why_is_the_loss_defined_inside_the_step_outside_it_takes_argnums():
    state = new_state()

    def outside(params, state, batch):
        return softmax_ce(state.apply_fn({"params": params}, batch["images"]), batch["labels"])

    def closure(params):
        return outside(params, state, BATCH).mean()

    by_argnums = jax.grad(lambda *args: outside(*args).mean(), argnums=0)(PARAMS, state, BATCH)
    assert_same_bits(by_argnums, jax.grad(closure)(PARAMS))
    trained, _ = train_step(loss_fn)(state, BATCH)
    assert_same_bits(trained.params, state.apply_gradients(grads=by_argnums).params)
    with pytest.raises(TypeError, match="'argnum'"):  # as the document spells it
        jax.grad(closure, argnum=0)  # ty: ignore[unknown-argument]


def test_why_not_grad_it_is_equal_and_the_forward_pass_runs_once_in_either():
    passes: list[str] = []

    def loss(params, name):
        passes.append(name)
        logits: Any = MODEL.apply({"params": params}, BATCH["images"])
        return softmax_ce(logits, BATCH["labels"]).mean()

    grads = jax.grad(loss)(PARAMS, "grad")
    value, same = jax.value_and_grad(loss)(PARAMS, "value_and_grad")
    assert_same_bits(grads, same)
    assert passes == ["grad", "value_and_grad"]
    assert value == loss(PARAMS, "alone")


def test_forward_and_loss_may_be_two_functions_called_inside_a_third():
    def forward(params, batch, ctx):
        return ctx.apply(params, batch["images"])

    def cross_entropy(logits, batch):
        return softmax_ce(logits, batch["labels"])

    def third(params, batch, ctx):
        return cross_entropy(forward(params, batch, ctx), batch)

    state = new_state()
    assert_same_bits(train_step(third)(state, BATCH), train_step(loss_fn)(state, BATCH))


def test_why_is_params_an_argument_the_gradient_of_a_loss_that_ignores_it_is_zero():
    state = new_state()

    def stale(params):
        logits = state.apply_fn({"params": state.params}, BATCH["images"])
        return softmax_ce(logits, BATCH["labels"]).mean()

    grads = jax.grad(stale)(state.params)
    assert all(not leaf.any() for leaf in jax.tree.leaves(grads))
    step = train_step(lambda params, batch, ctx: loss_fn(ctx.state.params, batch, ctx))
    with pytest.raises(LossError, match=r"state\.params, whose gradient is zero.*Write ctx\.apply"):
        jax.jit(step)(state, BATCH)


class Own(distaff.TrainerModule):
    """A step of one's own; `stale` makes its loss read `state.params`."""

    stale = True

    def model_inputs(self, batch):
        return (batch["images"],)

    def create_functions(self):
        def step(state, batch):
            def loss(params):
                params = state.params if self.stale else params
                logits = state.apply_fn({"params": params}, batch["images"])
                return softmax_ce(logits, batch["labels"]).mean()

            value, grads = jax.value_and_grad(loss)(state.params)
            return state.apply_gradients(grads=grads), {"loss": value}

        return step, lambda state, batch: {}


class Working(Own):
    stale = False


def train(trainer: type[Own], optimizer: Any, batch_size: int = 4, **options: Any) -> Any:
    loader = data.ArrayLoader(BATCH, batch_size=batch_size)
    made = trainer(
        MODEL, optimizer=optimizer, root=None, enable_progress_bar=False, log_every_n_steps=1
    )
    return made.train_model(loader, num_epochs=3, **options)


ZERO_GRADIENTS = r"in the first \d steps\..*reads state\.params instead has zero gradients"


@pytest.mark.slow_but("optimizer0-No parameter has changed")
@pytest.mark.parametrize(
    ("optimizer", "what"),
    [
        (optax.sgd(0.1), "No parameter has changed"),
        (OptimizerConfig("adam"), "No parameter has changed"),
        (optax.adamw(0.1, weight_decay=0.1), "Every gradient has been zero"),
        (
            OptimizerConfig("adamw", weight_decay=0.1, warmup_steps=2),
            "Every gradient has been zero",
        ),
    ],
)
def test_a_step_of_ones_own_that_ignores_params_is_reported_in_the_first_steps(optimizer, what):
    with pytest.warns(UserWarning, match=f"{what} {ZERO_GRADIENTS}") as caught:
        train(Own, optimizer)
    assert len(caught) == 1


@pytest.mark.slow_but("optimizer0-4")
@pytest.mark.parametrize(
    ("optimizer", "batch_size"),
    [
        (optax.sgd(0.1), 4),
        (OptimizerConfig("sgd", warmup_steps=2), 16),  # one step an epoch, the first of rate 0
        (optax.chain(optax.sgd(0.1), optax.ema(0.5)), 4),
        (optax.inject_hyperparams(optax.sgd)(learning_rate=0.1), 4),
    ],
)
def test_a_step_that_learns_is_not_reported(optimizer, batch_size, recwarn):
    train(Working, optimizer, batch_size)
    assert recwarn.list == []


def test_gradients_that_cancel_each_other_are_not_taken_for_none(recwarn):
    class Opposed(Working):
        def init_model(self, example_batch):
            super().init_model(example_batch)
            threes = jax.tree.map(lambda leaf: jnp.full_like(leaf, 3.0), self.state.params)
            self.state = self.state.replace(params=threes)

        def create_functions(self):
            def step(state, batch):
                signs = jax.tree.map(
                    lambda leaf: (jnp.arange(leaf.size).reshape(leaf.shape) % 2) * 2.0 - 1.0,
                    state.params,
                )
                return state.apply_gradients(grads=signs), {"loss": jnp.float32(0)}

            return step, super().create_functions()[1]

    train(Opposed, optax.sgd(0.1))
    assert recwarn.list == []


def test_a_loss_that_is_a_vector_is_an_error_with_its_shape():
    state = new_state()

    def as_the_document_has_it(params):
        logits = state.apply_fn({"params": params}, x=BATCH["images"])
        loss = softmax_ce(logits, BATCH["labels"])
        return loss, logits

    with pytest.raises(TypeError, match=re.escape("Output had shape: (16,)")):
        jax.value_and_grad(as_the_document_has_it, has_aux=True)(state.params)
    with pytest.raises(LossError, match=r"shape \(16, 4\)\. Average it first: loss\.mean"):
        train_step(lambda params, batch, ctx: ctx.apply(params, batch["images"]))(state, BATCH)


def test_apply_gradients_as_the_document_calls_it_names_the_right_form():
    with pytest.raises(StateError, match=re.escape("Write state.apply_gradients(grads=grads).")):
        new_state().apply_gradients(PARAMS)
