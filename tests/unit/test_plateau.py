"""A plateau rule: the learning rate falls when the monitored metric stops improving."""

from __future__ import annotations

import dataclasses
import json
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import distaff
from distaff import Monitor, OptimizerConfig, data
from distaff.core.config.encoding import from_json, to_json
from distaff.errors import ConfigError
from distaff.loggers import MemoryLogger
from distaff.optim import ParamGroup, Plateau, applied_rates, build_optimizer
from distaff.optim.reuse import reusable_state
from distaff.optim.transforms.plateau import PlateauState, after_validation, with_numbers

PARAMS = {"w": jnp.ones(3), "b": jnp.zeros(())}
NAN, INF = math.nan, math.inf
VALUES = [3.0, 2.0, 2.0, 2.1, 1.9, 1.9, 1.9, 1.9, 1.9, NAN, INF, 1.0, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0]


def scales_of(plateau, values, mode):
    tx = build_optimizer(OptimizerConfig("sgd", learning_rate=1.0, plateau=plateau), 100).tx
    opt_state, scales = tx.init(PARAMS), []
    for value in values:
        opt_state, (_, after) = with_numbers(
            opt_state, lambda numbers, value=value: rule(plateau, mode)(numbers, value)
        )
        scales.append(after)
    return scales


def rule(plateau, mode):
    return lambda numbers, value: after_validation(numbers, value, plateau=plateau, mode=mode)


def by_hand(plateau, values):
    """The scale after each value, for a metric of which smaller values are better."""
    scale, best, waited, cooling, scales = 1.0, INF, 0, 0, []
    for value in values:
        is_better = value < best - plateau.min_delta
        best, waited = (value, 0) if is_better else (best, waited + 1)
        if cooling:
            cooling, waited = cooling - 1, 0
        elif waited == plateau.patience:
            scale, waited, cooling = scale * plateau.factor, 0, plateau.cooldown
        scale = max(scale, plateau.min_scale)
        scales.append(scale)
    return scales


@pytest.mark.slow_but("plateau2-max", "plateau1-max")
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize(
    "plateau",
    [
        Plateau(),
        Plateau(factor=0.5, patience=1),
        Plateau(factor=0.5, patience=2, cooldown=1),
        Plateau(factor=0.5, patience=2, min_scale=0.3),
        Plateau(factor=0.5, patience=3, cooldown=2, min_delta=0.5),
    ],
)
def test_the_scale_follows_the_rule(plateau, mode):
    values = VALUES if mode == "min" else [-value for value in VALUES]
    found = scales_of(plateau, values, mode)
    assert found == pytest.approx(by_hand(plateau, VALUES))
    assert found[-1] < 1


def test_the_scale_is_that_of_optax_for_a_loss():
    plateau = Plateau(factor=0.5, patience=2, cooldown=1, min_delta=0.05)
    tx = optax.contrib.reduce_on_plateau(0.5, 2, rtol=0.0, atol=0.05, cooldown=1)
    state, scales = tx.init(jnp.zeros([])), []
    for value in VALUES:
        _, state = tx.update(jnp.ones([]), state, value=value)
        scales.append(float(state.scale))
    assert scales_of(plateau, VALUES, "min") == scales


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.slow
def test_updates_and_logged_rates_are_scaled(accumulate):
    group = ParamGroup("b", learning_rate=0.2)
    options = {"learning_rate": 0.1, "schedule": "linear", "weight_decay": 0.1, "groups": (group,)}
    config = OptimizerConfig("adamw", accumulate=accumulate, **options)
    watched = dataclasses.replace(config, plateau=Plateau(factor=0.25, patience=1))
    plain, scaled = build_optimizer(config, 8).tx, build_optimizer(watched, 8).tx
    grads = {"w": jnp.array([1.0, -2.0, 3.0]), "b": jnp.array(0.5)}
    state, other = plain.init(PARAMS), scaled.init(PARAMS)
    for step in range(4):
        updates, state = plain.update(grads, state, PARAMS)
        same, other = scaled.update(grads, other, PARAMS)
        factor = 1.0 if step < 2 else 0.25
        jax.tree.map(
            lambda a, b, factor=factor: np.testing.assert_array_equal(factor * a, b), updates, same
        )
        rates = applied_rates(other)
        linear = 1 - 0.99 * (step // accumulate) / (8 // accumulate)
        expected = {"learning_rate": 0.1, "learning_rate/b": 0.2}
        for name, peak in expected.items():
            if (step + 1) % accumulate == 0:
                assert float(rates[name]) == pytest.approx(factor * peak * linear)
        if step == 1:
            for value in (1.0, 1.0):
                numbers = rule(Plateau(factor=0.25, patience=1), "min")
                other, _ = with_numbers(
                    other, lambda each, value=value, numbers=numbers: numbers(each, value)
                )


def test_a_second_training_restarts_the_scale_with_the_schedule():
    config = OptimizerConfig("adam", plateau=Plateau(factor=0.5, patience=1))
    tx = build_optimizer(config, 8).tx
    fresh = tx.init(PARAMS)
    _, old = tx.update(PARAMS, fresh, PARAMS)
    for value in (1.0, 1.0):
        old, scales = with_numbers(
            old, lambda each, value=value: rule(config.plateau, "min")(each, value)
        )
    assert scales == [1.0, 0.5]
    kept = reusable_state(old, fresh, config)
    assert isinstance(kept, PlateauState)
    assert (float(kept.scale), float(kept.best)) == (1.0, INF)
    adam = optax.tree.get(kept, "mu")
    assert float(adam["w"][0]) != 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"factor": 1.0}, r"factor of Plateau must be a number above 0 and below 1; got 1\.0"),
        ({"factor": "0.5"}, r"factor of Plateau"),
        ({"patience": 0}, r"patience must be an integer, at least 1; got 0"),
        ({"cooldown": -1}, r"cooldown must be an integer, at least 0; got -1"),
        ({"min_scale": 1.0}, r"min_scale of Plateau must be a number at least 0 and below 1"),
        ({"min_delta": NAN}, r"min_delta of Plateau must be a number finite and at least 0"),
    ],
)
def test_values_out_of_range_raise(fields, message):
    with pytest.raises(ConfigError, match=message):
        Plateau(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"plateau": 5}, r"must be an optim\.Plateau or None; got 5"),
        ({"name": "schedule_free_adamw"}, r"'schedule_free_adamw' sizes its steps itself"),
        ({"name": "lbfgs"}, r"'lbfgs' sizes its steps itself"),
    ],
)
def test_optimizers_that_a_rule_does_not_fit_raise(fields, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**{"plateau": Plateau(), **fields})


def test_a_group_has_no_rule_of_its_own():
    own = OptimizerConfig(plateau=Plateau())
    with pytest.raises(ConfigError, match="Clipping, groups, accumulation and a plateau belong"):
        ParamGroup("b", optimizer=own)


def test_a_rule_survives_strict_json():
    config = OptimizerConfig(plateau=Plateau(factor=0.5, cooldown=2))
    assert from_json(OptimizerConfig, json.loads(json.dumps(to_json(config)))) == config
    assert hash(config) == hash(dataclasses.replace(config))


MODEL = (lambda key, x: {"w": jnp.ones(3), "b": jnp.zeros(())}, lambda p, x: x @ p["w"] + p["b"])
X = np.linspace(-1, 1, 24, dtype=np.float32).reshape(8, 3)
LOADER = data.ArrayLoader({"x": X}, 4, shuffle=False)
PLATEAU = Plateau(factor=0.5, patience=2)
CONFIG = OptimizerConfig("sgd", learning_rate=0.1, schedule="constant", plateau=PLATEAU)


class Scripted(distaff.TrainerModule):
    """Its validations yield given values."""

    monitor = Monitor("val/score", mode="max")
    values = (1.0, 2.0, 2.0, 1.0, 3.0)

    def print_tabulate(self, example_batch):
        pass

    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"]) - 1.0), {"score": jnp.ones(4)}

    def eval_model(self, loader, prefix="val/", **options):
        return {"val/score": self.values[self.epoch - 1]}


def trained(cls=Scripted, val=LOADER, epochs=5, optimizer=CONFIG, **options):
    log = MemoryLogger()
    defaults = {"root": None, "enable_progress_bar": False, "log_every_n_steps": 1}
    trainer = cls(MODEL, optimizer=optimizer, loggers=[log], **{**defaults, **options})
    trainer.train_model(LOADER, val, num_epochs=epochs)
    name = "step/learning_rate"
    return trainer, [round(r.metrics[name], 6) for r in log.records if name in r.metrics]


@pytest.mark.parametrize("steps_per_call", [1, 2])
def test_a_run_lowers_its_rate_after_validations_without_improvement(steps_per_call, caplog):
    with caplog.at_level(logging.INFO, logger="distaff"):
        trainer, rates = trained(steps_per_call=steps_per_call)
    assert rates == [0.1] * 8 + [0.05] * 2
    line = "the learning rate is now 0.5 of its schedule: val/score has not improved for 2"
    assert sum(line in message for message in caplog.messages) == 1
    assert trainer.state.opt_state.scale.dtype == jnp.float32


@pytest.mark.parametrize("precision", ["bf16-params", "fp16"])
@pytest.mark.slow
def test_a_run_of_another_precision_lowers_its_rate(precision):
    _, rates = trained(precision=precision)
    assert rates == [0.1] * 8 + [0.05] * 2


class OfTraining(Scripted):
    monitor = Monitor("train/loss")

    def loss_fn(self, params, batch, ctx):
        loss, metrics = super().loss_fn(params, batch, ctx)
        return jax.lax.stop_gradient(loss) * 0 + (params["b"] * 1e-9) ** 2, metrics


def test_a_metric_of_training_needs_no_validation():
    with pytest.warns(UserWarning, match="in the first"):  # nothing is learned here
        _, rates = trained(OfTraining, None, epochs=4)
    assert rates == [0.1] * 6 + [0.05] * 2


def test_a_run_without_validation_raises_before_its_first_step():
    with pytest.raises(ConfigError, match=r"plateau rule, which reads 'val/score', but this run"):
        trained(val=None)


def test_without_a_rule_the_optimizer_is_what_it_was():
    plain = dataclasses.replace(CONFIG, plateau=None)
    trainer, rates = trained(optimizer=plain, epochs=1)
    by_hand = build_optimizer(plain, 2).tx.init(PARAMS)
    assert jax.tree.structure(trainer.state.opt_state) == jax.tree.structure(by_hand)
    assert not any(isinstance(node, PlateauState) for node in jax.tree.leaves(by_hand))
    assert rates == [0.1] * 2
