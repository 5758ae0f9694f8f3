from __future__ import annotations

import inspect
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff import EvalStep, Monitor, TrainerModule, TrainState, data, train_step, zoo
from distaff.errors import ConfigError, LossError
from distaff.optim import (
    OptimizerConfig,
    ParamGroup,
    build_optimizer,
    catalog,
    decay_mask,
    decays,
    l2_loss,
)

PARAMS = {
    "Dense_0": {"kernel": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "bias": jnp.ones(3)},
    "LayerNorm_0": {"scale": jnp.full(3, 2.0)},
}
OPTIONS = {
    "noisy_sgd": {"key": 0},
    "dpsgd": {"l2_norm_clip": 1.0, "noise_multiplier": 0.1, "seed": 0},
}


def same_bits(left, right):
    return jax.tree.all(
        jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), left, right)
    )


def test_l2_loss_is_half_the_coefficient_times_the_sum_of_squares():
    kernel = PARAMS["Dense_0"]["kernel"]
    assert float(l2_loss(PARAMS, 0.3)) == pytest.approx(0.15 * float((kernel**2).sum()))
    every = jax.tree.map(lambda _: True, PARAMS)
    assert float(l2_loss(PARAMS, 0.3, every)) == pytest.approx(
        0.15 * float((kernel**2).sum() + 3 + 3 * 4)
    )
    assert l2_loss(PARAMS, 0.3, lambda params: jax.tree.map(lambda _: False, params)) == 0.0


@pytest.mark.parametrize("coefficient", [1e-4, 0.3])
def test_gradient_of_l2_loss_is_decay_added_to_the_gradient_bit_for_bit(coefficient):
    grads = jax.grad(l2_loss)(PARAMS, coefficient)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    tx = optax.add_decayed_weights(coefficient, decay_mask)
    decayed, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
    assert same_bits(grads, decayed)


@pytest.mark.parametrize("coefficient", [-1.0, math.nan, math.inf])
def test_l2_loss_refuses_a_coefficient(coefficient):
    with pytest.raises(ConfigError, match=f"coefficient must be .* {coefficient}"):
        l2_loss(PARAMS, coefficient)


def decay_arguments(function):
    names = inspect.signature(function).parameters
    return [name for name in names if "weight_decay" in name and "mask" not in name]


def made(name, decay):
    function = catalog.optimizers()[name]
    arguments = dict.fromkeys(decay_arguments(function), decay)
    rate = 1.0 if name.startswith("dadapt") else 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return function(rate, **arguments, **OPTIONS.get(name, {}))


@pytest.mark.parametrize("name", sorted(catalog.optimizers()))
@pytest.mark.slow
def test_decays_tells_for_every_name_of_optax(name):
    assert decays(made(name, 0.0), PARAMS) == (name == "fromage")
    if decay_arguments(catalog.optimizers()[name]):
        assert decays(made(name, 1e-4), PARAMS) == (name not in ("prodigy", "sophia"))


WARMUP = optax.linear_schedule(0.0, 1e-3, 1000)
MASK = {"Dense_0": {"kernel": True, "bias": False}, "LayerNorm_0": {"scale": False}}
LAMB = OptimizerConfig("lamb", weight_decay=0.1)
DECAYING = {
    "default of adamw": optax.adamw(1e-3),
    "tiny": optax.adamw(1e-6, weight_decay=1e-6),
    "warm-up": optax.adamw(WARMUP),
    "accumulated": optax.MultiSteps(optax.adamw(WARMUP), 16).gradient_transformation(),
    "in the gradient of Adam": optax.chain(optax.add_decayed_weights(1e-4), optax.adam(1e-3)),
    "in a sign": optax.chain(optax.add_decayed_weights(1e-4), optax.sign_sgd(1e-3)),
    "masked": optax.adamw(1e-3, mask=MASK),
    "chained": optax.chain(optax.clip_by_global_norm(1.0), optax.lion(1e-4)),
    "injected": optax.inject_hyperparams(optax.adamw)(learning_rate=WARMUP),
    "config": build_optimizer(OptimizerConfig(weight_decay=1e-4, warmup_steps=5), 1000).tx,
    "group": build_optimizer(
        OptimizerConfig("adam", groups=(ParamGroup("Dense_0/kernel", optimizer=LAMB),)), 10
    ).tx,
}
PLAIN = {
    "config": build_optimizer(OptimizerConfig("adamw", clip_norm=1.0), 1000).tx,
    "frozen": build_optimizer(
        OptimizerConfig(
            weight_decay=0.1, schedule="constant", groups=[ParamGroup("Dense_0/*", freeze=True)]
        ),
        None,
    ).tx,
    "trust ratio": optax.chain(optax.adam(1e-3), optax.scale_by_trust_ratio()),
    "noise": optax.noisy_sgd(0.1, key=1),
    "line search": optax.lbfgs(),
    "plateau": optax.chain(optax.adam(1e-3), optax.contrib.reduce_on_plateau()),
    "projection": optax.chain(optax.adam(1e-3), optax.keep_params_nonnegative()),
    "averaged": optax.contrib.schedule_free_adamw(0.1, b1=0.95),
    "of another tree": optax.adamw(1e-3, mask={"other": True}),
}


@pytest.mark.parametrize("name", DECAYING)
@pytest.mark.slow
def test_decays_sees_through_whatever_hides_a_decay(name):
    assert decays(DECAYING[name], PARAMS)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.slow
def test_decays_does_not_take_other_updates_for_decay(name):
    assert not decays(PLAIN[name], PARAMS)


BATCH = {
    "x": np.linspace(-1, 1, 8, dtype=np.float32)[:, None],
    "y": np.linspace(1, 3, 8, dtype=np.float32),
}


def data_loss(params, batch, ctx):
    outputs = batch["x"] @ params["Dense_0"]["kernel"].sum(axis=1, keepdims=True)[:1]
    return jnp.square(outputs[:, 0] + params["Dense_0"]["bias"].sum() - batch["y"])


def l2_of(coefficient):
    def loss_fn(params, batch, ctx):
        ctx.add_l2_loss(params, coefficient)
        return data_loss(params, batch, ctx)

    return loss_fn


def trained(loss_fn, tx, steps=3):
    step, state = jax.jit(train_step(loss_fn)), TrainState.create(params=PARAMS, tx=tx)
    metrics = {}
    for _ in range(steps):
        state, metrics = step(state, BATCH)
    return state, {name: float(metric.compute()) for name, metric in metrics.items()}


def test_l2_in_the_loss_trains_as_decay_in_sgd():
    state, metrics = trained(l2_of(0.3), optax.sgd(0.01))
    decayed, _ = trained(
        data_loss, optax.chain(optax.add_decayed_weights(0.3, decay_mask), optax.sgd(0.01))
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        state.params,
        decayed.params,
    )
    assert metrics.keys() == {"loss", "penalty"}


def test_a_penalty_is_in_no_loss_that_is_reported():
    state = TrainState.create(params=PARAMS, tx=optax.sgd(0.01))
    _, metrics = trained(l2_of(0.3), optax.sgd(0.01), steps=1)
    plain = data_loss(PARAMS, BATCH, None).mean()
    assert metrics["loss"] == pytest.approx(float(plain))
    assert metrics["penalty"] == pytest.approx(float(l2_loss(PARAMS, 0.3)))
    evaluated = EvalStep(l2_of(0.3))(state, BATCH, jnp.ones(8, bool))
    assert evaluated.keys() == {"loss"}
    assert float(evaluated["loss"].compute()) == pytest.approx(float(plain))


def test_penalties_add_up_and_reach_the_optimizer_with_the_loss():
    seen = {}

    def update(updates, state, params=None, *, value, value_fn, **_):
        seen.update(value=value, again=value_fn(params))
        return updates, state

    def loss_fn(params, batch, ctx):
        ctx.add_penalty(jnp.float32(2))
        ctx.add_penalty(jnp.float32(3))
        return data_loss(params, batch, ctx)

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
    _, metrics = train_step(loss_fn)(TrainState.create(params=PARAMS, tx=tx), BATCH)
    assert float(metrics["penalty"].compute()) == 5
    assert float(seen["value"]) == pytest.approx(float(metrics["loss"].compute()) + 5)
    assert float(seen["again"]) == float(seen["value"])


@pytest.mark.parametrize(
    "tx",
    [optax.adamw(1e-3), build_optimizer(OptimizerConfig(weight_decay=0.1), 100).tx],
    ids=["bare", "config"],
)
@pytest.mark.slow
def test_l2_beside_an_optimizer_that_decays_is_refused(tx):
    with pytest.raises(ConfigError, match=r"Decay is in one place.*coefficient 0\.3"):
        trained(l2_of(0.3), tx)
    trained(l2_of(0.0), tx)
    trained(l2_of(0.3), optax.adamw(1e-3, weight_decay=0.0))


def test_l2_beside_an_optimizer_that_decays_is_refused_in_a_population():
    tx = optax.adamw(1e-3)
    states = jax.vmap(lambda scale: TrainState.create(
        params=jax.tree.map(lambda leaf: scale * leaf, PARAMS), tx=tx))(jnp.ones(2))  # fmt: skip
    with pytest.raises(ConfigError, match="Decay is in one place"):
        jax.jit(jax.vmap(train_step(l2_of(0.3)), in_axes=(0, None)))(states, BATCH)


@pytest.mark.parametrize(
    ("value", "message"),
    [(jnp.ones(3), r"float scalar.* shape \(3,\)"), (jnp.int32(1), "dtype int32")],
)
def test_a_penalty_that_is_no_scalar_is_refused(value, message):
    def loss_fn(params, batch, ctx):
        ctx.add_penalty(value)
        return data_loss(params, batch, ctx)

    with pytest.raises(LossError, match=message):
        trained(loss_fn, optax.sgd(0.1))


def test_a_metric_may_not_take_the_name_of_the_penalty():
    def loss_fn(params, batch, ctx):
        ctx.add_penalty(jnp.float32(1))
        return data_loss(params, batch, ctx), {"penalty": 1.0}

    with pytest.raises(LossError, match="Rename the metric"):
        trained(loss_fn, optax.sgd(0.1))


class Shrinking(TrainerModule):
    """Its penalty falls from epoch to epoch by more than the loss of the data rises."""

    monitor = Monitor("val/loss", mode="min")

    def loss_fn(self, params, batch, ctx):
        ctx.add_l2_loss(params, 1.0)
        return -0.1 * l2_loss(jax.lax.stop_gradient(params), 1.0)


@pytest.mark.slow
def test_the_best_model_is_chosen_by_the_loss_of_the_data():
    loader = data.ArrayLoader({"x": BATCH["x"]}, batch_size=4)
    trainer = Shrinking(zoo.MLP((4, 1)), optimizer=optax.sgd(0.1), root=None)
    result = trainer.train_model(loader, loader, num_epochs=3)
    assert result.best is not None
    assert result.best.epoch == 1
    assert {"train/loss", "train/penalty"} <= result.metrics.keys()
    assert "val/penalty" not in result.best.metrics
