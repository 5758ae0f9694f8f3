"""The optimizer slot of a state: what is offered, who takes it, and what it costs."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from distaff import OptimizerConfig, TrainState, train_step
from distaff.errors import StateError
from distaff.optim import ParamGroup, build_optimizer, decays, with_known_args

NORMALIZED_SGD = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
BACKTRACKING = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10))
PLATEAU = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1))
SAM = optax.contrib.sam(optax.sgd(0.05), NORMALIZED_SGD, opaque_mode=True)
BATCH = {
    "x": np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32),
    "y": np.random.default_rng(1).normal(size=16).astype(np.float32),
}
PARAMS = {"body": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2), "head": jnp.array([0.5, -1.0])}


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


def squares(params: Any, batch: Any, ctx: Any) -> jax.Array:
    return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])


def noisy_state(tx: Any) -> TrainState:
    variables = Noisy().init(jax.random.key(0), BATCH["x"], train=False)
    return TrainState.create(apply_fn=Noisy().apply, tx=tx, rng=jax.random.key(1), **variables)


def loss_of(params: Any) -> jax.Array:
    outputs = jnp.tanh(BATCH["x"] @ params["body"]) @ params["head"]
    return jnp.square(outputs - BATCH["y"]).mean()


def stepped(tx: Any, params: Any = PARAMS, value_fn: Any = loss_of, steps: int = 1) -> TrainState:
    state = TrainState.create(params=params, tx=tx)
    for _ in range(steps):
        value, grads = jax.value_and_grad(value_fn)(state.params)
        state = state.apply_gradients(grads=grads, value=value, value_fn=value_fn)
    return state


def assert_close(left: Any, right: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), left, right)


def same_bits(left: Any, right: Any) -> bool:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def asking() -> optax.GradientTransformationExtraArgs:
    """Slow SGD that keeps the loss, and what `value_fn` says of parameters here and elsewhere."""

    def update(updates: Any, state: Any, params: Any = None, *, value: Any, value_fn: Any) -> Any:
        moved = jax.tree.map(lambda leaf: leaf + 0.1, params)
        answers = jnp.stack([value, value_fn(params), value_fn(params), value_fn(moved)])
        return jax.tree.map(lambda leaf: -1e-6 * leaf, updates), answers

    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros([4]), update)


@pytest.mark.slow
def test_value_fn_is_the_loss_of_the_step_with_its_dropout_and_batch_statistics():
    state, step, answers = noisy_state(asking()), jax.jit(train_step(squares)), []
    for _ in range(3):
        state, _ = step(state, BATCH)
        answers.append(np.asarray(state.opt_state))
    loss, here, again, moved = np.transpose(answers)
    np.testing.assert_allclose(here, loss, rtol=1e-6)
    np.testing.assert_array_equal(here, again)
    assert (np.abs(moved - loss) > 1e-3).all()
    # Dropout draws other units in each step.
    assert np.ptp(loss) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("tx", [BACKTRACKING, SAM], ids=["backtracking", "sam"])
def test_more_evaluations_leave_batch_statistics_to_the_first(tx):
    step = jax.jit(train_step(squares))
    plain, _ = step(noisy_state(optax.sgd(0.05)), BATCH)
    searched, _ = step(noisy_state(tx), BATCH)
    assert same_bits(searched.batch_stats, plain.batch_stats)
    assert not same_bits(searched.params, plain.params)
    assert np.isfinite(optax.tree.norm(searched.params))


def count_traces(tx: Any) -> int:
    traces = 0

    def counted(params: Any, batch: Any, ctx: Any) -> jax.Array:
        nonlocal traces
        traces += 1
        return squares(params, batch, ctx)

    jax.eval_shape(train_step(counted), noisy_state(tx), BATCH)
    return traces


def test_loss_is_traced_once_more_for_each_point_at_which_sam_looks():
    several = optax.contrib.sam(optax.sgd(0.05), NORMALIZED_SGD, sync_period=3, opaque_mode=True)
    assert [count_traces(tx) for tx in (optax.adam(1e-3), SAM, several)] == [1, 2, 3]


def test_what_is_offered_adds_nothing_to_the_program_of_who_does_not_take_it():
    def offering(state: TrainState) -> TrainState:
        value, grads = jax.value_and_grad(loss_of)(state.params)
        return state.apply_gradients(grads=grads, value=value, value_fn=loss_of)

    def bare(state: TrainState) -> TrainState:
        _, grads = jax.value_and_grad(loss_of)(state.params)
        updates, opt_state = optax.adam(1e-3).update(grads, state.opt_state)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state)

    state = TrainState.create(params=PARAMS, tx=optax.adam(1e-3))
    assert str(jax.make_jaxpr(offering)(state)) == str(jax.make_jaxpr(bare)(state))


@pytest.mark.parametrize(
    ("tx", "asked"),
    [(BACKTRACKING, "'value'"), (SAM, "grad_fn"), (PLATEAU, "'value'")],
    ids=["backtracking", "sam", "plateau"],
)
def test_optimizer_that_is_offered_too_little_says_what_to_pass(tx, asked):
    state = TrainState.create(params=PARAMS, tx=tx)
    with pytest.raises(StateError, match=rf"needs more than grad.*{asked}.*value=loss, value_"):
        state.apply_gradients(grads=PARAMS)


def test_other_errors_of_an_optimizer_stay_what_they_are():
    def update(updates: Any, state: Any, params: Any = None) -> Any:
        raise ValueError("mine")

    tx = optax.GradientTransformation(lambda params: (), update)
    with pytest.raises(ValueError, match=r"^mine$"):
        TrainState.create(params=PARAMS, tx=tx).apply_gradients(grads=PARAMS)


def test_strict_optimizer_within_a_chain_is_explained_and_works_wrapped():
    clip = optax.clip_by_global_norm(1e6)
    with pytest.raises(StateError, match=r"does not accept 'grad'.*with_known_args"):
        stepped(optax.chain(clip, SAM))
    assert_close(stepped(optax.chain(clip, with_known_args(SAM))).params, stepped(SAM).params)


def test_with_known_args_is_the_optimizer_itself_where_that_takes_all():
    tx = optax.lbfgs()
    assert with_known_args(tx) is tx


def test_update_that_names_an_argument_gets_it_without_being_of_the_type_with_extra_arguments():
    def update(updates: Any, state: Any, params: Any = None, value: Any = None) -> Any:
        return jax.tree.map(lambda leaf: -value * leaf, updates), state

    tx = optax.GradientTransformation(lambda params: (), update)
    value, grads = jax.value_and_grad(loss_of)(PARAMS)
    assert_close(stepped(tx).params, jax.tree.map(lambda p, g: p - value * g, PARAMS, grads))


@pytest.mark.slow_but("True-sam")
@pytest.mark.parametrize("tx", [optax.lbfgs(), SAM], ids=["lbfgs", "sam"])
@pytest.mark.parametrize("frozen", [True, False])
def test_optimizer_of_a_group_sees_the_loss_over_its_own_parameters(tx, frozen):
    rest = {"freeze": True} if frozen else {"optimizer": optax.sgd(0.1)}
    groups = (ParamGroup("body", **rest), ParamGroup("head", optimizer=tx))
    grouped = stepped(build_optimizer(OptimizerConfig(groups=groups), 10).tx)
    alone = stepped(tx, PARAMS["head"], lambda head: loss_of({**PARAMS, "head": head}))
    assert_close(grouped.params["head"], alone.params)
    assert same_bits(grouped.params["body"], PARAMS["body"]) == frozen


def test_optimizer_under_a_mask_of_ones_own_is_offered_the_loss_over_what_is_shown():
    shown = {"body": False, "head": True}
    tx = optax.masked(BACKTRACKING, shown, mask_compatible_extra_args=True)
    tx = optax.chain(tx, optax.masked(optax.set_to_zero(), {"body": True, "head": False}))
    alone = stepped(
        BACKTRACKING, PARAMS["head"], lambda head: loss_of({**PARAMS, "head": head}), steps=3
    )
    assert_close(stepped(tx, steps=3).params["head"], alone.params)


def test_value_fn_with_arguments_of_its_own_gets_them():
    def scaled(params: Any, scale: Any) -> jax.Array:
        return scale * loss_of(params)

    state = TrainState.create(params=PARAMS, tx=BACKTRACKING)
    value, grads = jax.value_and_grad(scaled)(PARAMS, 2.0)
    state = state.apply_gradients(
        grads=grads, value=value, value_fn=scaled, optimizer_args={"scale": 2.0}
    )
    assert_close(
        state.params, stepped(BACKTRACKING, value_fn=lambda params: scaled(params, 2.0)).params
    )


def test_decay_within_sam_is_found():
    def sam(outer: Any) -> Any:
        return optax.contrib.sam(outer, NORMALIZED_SGD, opaque_mode=True)

    assert decays(sam(optax.adamw(0.1, weight_decay=0.1)), PARAMS)
    assert not decays(sam(optax.adam(0.1)), PARAMS)


def test_multi_steps_is_an_optimizer_whatever_brings_it():
    multi = optax.MultiSteps(PLATEAU, 2)
    for form in (multi, lambda steps: multi, multi.gradient_transformation()):
        state = stepped(build_optimizer(form, 10).tx, steps=4)
        assert int(state.opt_state.gradient_step) == 2
        assert float(optax.tree.get(state.opt_state, "best_value")) < 10
