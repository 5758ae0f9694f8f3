"""The learning rates in the log: those that were applied, of every group, however they are kept."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distaff
from distaff import OptimizerConfig, data
from distaff.loggers import MemoryLogger
from distaff.optim import ParamGroup, applied_rates, build_optimizer
from distaff.step.logged_rates import host_rates

MODEL = (lambda key, x: {"w": jnp.ones(3), "b": jnp.zeros(())}, lambda p, x: x @ p["w"] + p["b"])
PARAMS = {"w": jnp.ones(3), "b": jnp.zeros(())}
HALVED = optax.exponential_decay(1.0, 1, 0.5)


def config(*groups):
    return OptimizerConfig("sgd", learning_rate=1.0, schedule="constant", groups=groups)


@pytest.mark.parametrize(
    ("groups", "rates"),
    [
        ((), {"learning_rate": 1.0}),
        ((ParamGroup("*", learning_rate=0.1),), {"learning_rate/all": 0.1}),
        (
            (ParamGroup("b", learning_rate=0.1),),
            {"learning_rate": 1.0, "learning_rate/b": 0.1},
        ),
        ((ParamGroup("b", freeze=True),), {"learning_rate": 1.0}),
        (
            (ParamGroup("[b]", learning_rate=0.1), ParamGroup("w", optimizer=optax.sgd(0.3))),
            {"learning_rate/b": 0.1},
        ),
    ],
)
def test_each_group_that_is_trained_has_a_rate_by_its_name(groups, rates):
    found = host_rates(build_optimizer(config(*groups), 4).tx, PARAMS, None)
    assert found is not None
    assert {name: pytest.approx(rate) for name, rate in rates.items()} == found(0)


def test_rates_of_several_groups_are_those_of_their_schedules():
    own = OptimizerConfig("sgd", learning_rate=0.5, schedule="linear", end_fraction=0.0)
    found = host_rates(build_optimizer(config(ParamGroup("b", optimizer=own)), 4).tx, PARAMS, None)
    assert found is not None
    assert [found(step)["learning_rate/b"] for step in range(4)] == [0.5, 0.375, 0.25, 0.125]
    assert [found(step)["learning_rate"] for step in range(2)] == [1.0, 1.0]


def test_nothing_is_known_of_a_transformation():
    assert host_rates(build_optimizer(optax.sgd(0.1), 4).tx, PARAMS, None) is None


def injected(rate=HALVED):
    return optax.inject_hyperparams(optax.sgd)(learning_rate=rate)


@pytest.mark.parametrize(
    ("tx", "names"),
    [
        (optax.chain(optax.clip(1.0), injected()), ["learning_rate"]),
        (
            optax.partition({"x": injected(), "y": injected(0.1)}, {"w": "x", "b": "y"}),
            ["learning_rate/x", "learning_rate/y"],
        ),
        (optax.chain(injected(), injected(0.1)), ["learning_rate/0", "learning_rate/1"]),
        (optax.adam(0.1), []),
    ],
)
def test_injected_rates_are_found_at_any_depth(tx, names):
    assert sorted(applied_rates(tx.init(PARAMS))) == names


class Line(distaff.TrainerModule):
    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"]))


@pytest.mark.parametrize("optimizer", [injected(), lambda steps: injected()])
def test_an_injected_rate_is_logged_as_it_was_applied_also_from_a_factory(optimizer):
    log = MemoryLogger()
    options = {"root": None, "enable_progress_bar": False, "log_every_n_steps": 1}
    trainer = Line(MODEL, optimizer=optimizer, loggers=[log], **options)
    loader = data.ArrayLoader({"x": np.ones((16, 3), np.float32)}, 4)
    result = trainer.train_model(loader, num_epochs=1)
    name = "step/learning_rate"
    assert [r.metrics[name] for r in log.records if name in r.metrics] == [1.0, 0.5, 0.25, 0.125]
    assert "train/learning_rate" not in result.metrics
