"""What can be trained, and what an optimizer is given: gradients of every kind and shape."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import distaff
from distaff import OptimizerConfig, TrainState, data
from distaff.errors import ConfigError, DistaffError, StateError
from distaff.optim import ParamGroup, build_optimizer, evaluation_params
from distaff.step.step import train_step

TARGET = 1 + 1j


class Trainer(distaff.TrainerModule):
    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"]) - 1.0)


def loader():
    return data.ArrayLoader({"x": np.ones((16, 3), np.float32)}, 4)


def distance(params, batch, ctx):
    return jnp.abs(params["w"] * batch - TARGET) ** 2


@pytest.mark.parametrize(
    ("tx", "steps"),
    [(optax.sgd(0.2), 30), (optax.adam(0.1), 60), (optax.lbfgs(), 5)],
    ids=["sgd", "adam", "lbfgs"],
)
@pytest.mark.slow
def test_a_complex_parameter_descends(tx, steps):
    state = TrainState.create(params={"w": jnp.zeros((), jnp.complex64)}, tx=tx)
    step = jax.jit(train_step(distance))
    for _ in range(steps):
        state, _ = step(state, jnp.ones(4))
    assert abs(complex(state.params["w"]) - TARGET) < 0.1


def test_gradients_of_a_step_of_ones_own_are_those_of_jax_also_for_complex_parameters():
    state = TrainState.create(params={"w": jnp.zeros((), jnp.complex64)}, tx=optax.sgd(0.25))
    grads = jax.grad(lambda p: jnp.abs(p["w"] - TARGET) ** 2)(state.params)
    # The gradient of |w - t|^2 is 2 (w - t).
    np.testing.assert_allclose(state.apply_gradients(grads=grads).params["w"], TARGET / 2)


def test_a_line_search_that_takes_a_wrong_slope_for_complex_parameters_is_refused():
    tx = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(3))
    state = TrainState.create(params={"w": jnp.zeros((), jnp.complex64)}, tx=tx)
    with pytest.raises(StateError, match=r"complex.*scale_by_zoom_linesearch"):
        train_step(distance)(state, jnp.ones(4))


@pytest.mark.parametrize(
    ("leaf", "dtype"),
    [
        (jnp.int32(3), "int32"),
        (jnp.array([True]), "bool"),
        (jnp.zeros((0,), jnp.int8), "int8"),
        (jax.random.key(0), "key<fry>"),
    ],
)
def test_a_parameter_that_is_no_float_is_named_before_the_training(leaf, dtype):
    params = {"w": jnp.ones(3), "part": {"size": leaf}}
    with pytest.raises(StateError, match=rf"'part/size' has dtype {dtype}.*collection"):
        TrainState.create(params=params, tx=optax.sgd(0.1))
    assert TrainState.create(params=params).params is params
    trainer = Trainer((lambda key, x: params, lambda p, x: x @ p["w"]), root=None)
    with pytest.raises(DistaffError, match=rf"'part/size' has dtype {dtype}"):
        trainer.train_model(loader(), num_epochs=1)


@pytest.mark.parametrize("name", ["adamw", "galore"])
@pytest.mark.slow
def test_parameters_without_numbers_are_trained_saved_loaded_and_resumed(tmp_path, name):
    def init(key, x):
        return {"w": jnp.ones((3, 2)), "a": jnp.zeros((4, 0)), "b": jnp.zeros((0, 4))}

    def apply(params, x):
        return (x @ params["w"]).mean(-1) + (params["a"] @ params["b"]).sum()

    options = {"root": str(tmp_path), "name": "run", "enable_progress_bar": False}
    config = OptimizerConfig(name, learning_rate=0.1)
    trainer = Trainer((init, apply), optimizer=config, **options)
    result = trainer.train_model(loader(), num_epochs=1)
    loaded = Trainer.load_from_checkpoint(result.path, model=(init, apply))
    jax.tree.map(np.testing.assert_array_equal, loaded.state.params, trainer.state.params)
    assert loaded.state.params["a"].shape == (4, 0)
    warm = Trainer((init, apply), init_from=result.path, **{**options, "root": None})
    warm.train_model(loader(), num_epochs=1)


def line(params, example):
    return jnp.square(example @ params["w"] - 1.0)


def test_dpsgd_takes_the_gradient_of_each_example_and_not_their_mean():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        tx = optax.contrib.dpsgd(0.1, l2_norm_clip=0.5, noise_multiplier=0.1, seed=0)
    params = {"w": jnp.ones((3, 3)), "unused": jnp.zeros(3)}
    examples = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
    grads = jax.vmap(jax.grad(lambda p, x: line(p, x).sum()), (None, 0))(params, examples)
    state = TrainState.create(params=params, tx=tx).apply_gradients(grads=grads)
    updates, _ = tx.update(grads, tx.init(params))
    jax.tree.map(np.testing.assert_array_equal, state.params, optax.apply_updates(params, updates))
    mean = jax.tree.map(lambda leaf: leaf.mean(0), grads)
    with pytest.raises(StateError, match=r"gradient of each example|\[examples, \*shape\]"):
        TrainState.create(params=params, tx=tx).apply_gradients(grads=mean)
    with pytest.raises(StateError, match=r"structure and the shapes"):
        TrainState.create(params=params, tx=optax.sgd(0.1)).apply_gradients(grads=grads)


def test_lookahead_trains_its_own_kind_of_parameters():
    tx = optax.lookahead(optax.sgd(0.1), sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced({"w": jnp.ones(3)})
    state, opt_state = TrainState.create(params=params, tx=tx), tx.init(params)
    for _ in range(3):
        grads = jax.grad(lambda fast: jnp.square(fast["w"]).sum())(params.fast)
        assert jax.tree.all(jax.tree.map(np.array_equal, state.params, params))
        state = state.apply_gradients(grads=grads)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    with pytest.raises(StateError, match=r"LookaheadParams\.init_synced"):
        TrainState.create(params={"w": jnp.ones(3)}, tx=tx).apply_gradients(grads=grads)


def test_what_is_frozen_behind_schedule_free_is_evaluated_as_it_is():
    mask = {"w": True, "b": False}
    tx = optax.chain(optax.contrib.schedule_free_sgd(0.5), optax.freeze(mask))
    plain = optax.contrib.schedule_free_sgd(0.5)
    params = {"w": jnp.ones(3), "b": jnp.zeros(2)}
    state, alone = (TrainState.create(params=params, tx=each) for each in (tx, plain))
    for step in range(4):
        grads = jax.tree.map(lambda leaf, step=step: jnp.cos(leaf + step), params)
        state, alone = (each.apply_gradients(grads=grads) for each in (state, alone))
    evaluated = evaluation_params(state.opt_state, state.params)
    np.testing.assert_array_equal(evaluated["w"], params["w"])
    expected = evaluation_params(alone.opt_state, alone.params)
    np.testing.assert_array_equal(evaluated["b"], expected["b"])


@pytest.mark.parametrize(
    ("groups", "moving"),
    [
        ((ParamGroup("body/*", freeze=True),), {"head/norm"}),
        ((ParamGroup("body/*", freeze=True, freeze_statistics=False),), {"head/norm", "body/norm"}),
        (
            (ParamGroup("body/norm/*", learning_rate=0.1), ParamGroup("body/*", freeze=True)),
            {"head/norm", "body/norm"},
        ),
    ],
)
def test_running_statistics_of_a_frozen_part_stay_unless_they_are_to_move(groups, moving):
    part = {"norm": {"scale": jnp.ones(2)}, "dense": {"kernel": jnp.ones((2, 2))}}
    params = {"body": part, "head": part}
    statistics = {
        "body": {"norm": {"mean": jnp.zeros(2)}},
        "head": {"norm": {"mean": jnp.zeros(2)}},
    }
    tx = build_optimizer(OptimizerConfig("sgd", groups=groups, accumulate=2), 10).tx
    state = TrainState.create(params=params, tx=tx, batch_stats=statistics)
    new = jax.tree.map(lambda leaf: leaf + 1, statistics)
    after = state.apply_gradients(grads=params, batch_stats=new).batch_stats
    assert {f"{n}/norm" for n in ("body", "head") if after[n]["norm"]["mean"].any()} == moving


@pytest.mark.parametrize("seed", [2**63, 2**64, -(2**64), 10**40])
def test_a_seed_of_any_size_is_a_seed_of_its_own(seed):
    model = lambda key, x: {"w": jax.random.normal(key, (3,))}, lambda p, x: x @ p["w"]
    batch = {"x": np.ones((4, 3), np.float32)}
    weights = [
        np.asarray(Trainer(model, seed=each, example_batch=batch, root=None).state.params["w"])
        for each in (seed, seed, seed + 1, 42)
    ]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert len({each.tobytes() for each in weights}) == 3


def test_dpsgd_by_name_says_how_it_is_used():
    with pytest.raises(ConfigError, match=r"vmap\(jax\.grad"):
        OptimizerConfig("dpsgd", options={"l2_norm_clip": 1.0})
