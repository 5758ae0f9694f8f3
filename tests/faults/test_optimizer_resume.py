"""Optimizers of a config, fused, interrupted and resumed: the run is the same, bit for bit."""

from __future__ import annotations

import dataclasses
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distaff
from distaff import OptimizerConfig, data
from distaff.loggers import MemoryLogger
from distaff.optim import Plateau

X = np.random.default_rng(0).normal(size=(24, 4)).astype(np.float32)
Y = np.stack([X.sum(axis=1), X[:, 0] * X[:, 1]], axis=1)

MODEL = (
    lambda key, x: {
        "up": {"w": jax.random.normal(key, (4, 6)), "bias": jnp.zeros(6)},
        "head": {"w": jnp.ones((6, 2))},
    },
    lambda p, x: jnp.tanh(x @ p["up"]["w"] + p["up"]["bias"][None]) @ p["head"]["w"],
)

CONFIGS = {
    "wsd": OptimizerConfig("adam", learning_rate=0.1, schedule="wsd", decay_steps=6),
    "muon": OptimizerConfig(
        "muon", learning_rate=0.1, weight_decay=0.1, options={"adam_learning_rate": 0.02}
    ),
    "plateau": OptimizerConfig(
        "adam",
        learning_rate=0.1,
        accumulate=2,
        plateau=Plateau(factor=0.5, patience=1, min_delta=100.0),
    ),
    "soap": OptimizerConfig(
        "soap", learning_rate=0.05, weight_decay=0.1, options={"precondition_frequency": 3}
    ),
    "factory": OptimizerConfig("optax.contrib:ademamix", learning_rate=0.1, options={"b1": 0.8}),
}


class Fit(distaff.TrainerModule):
    def print_tabulate(self, example_batch):
        pass  # it takes most of the time of a start

    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"]) - batch["y"]).mean(axis=1)


class EndAt(distaff.Callback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, info):
        if info.step == self.step:
            signal.raise_signal(signal.SIGINT)


def trained(config, **options):
    """Returns the result, the arrays of the state, and the logged rates by step."""
    log = MemoryLogger()
    defaults = {"root": None, "enable_progress_bar": False, "log_every_n_steps": 1}
    trainer = Fit(MODEL, optimizer=config, loggers=[log], **{**defaults, **options})
    arrays = {"x": X, "y": Y}
    train, val = data.ArrayLoader(arrays, 6), data.ArrayLoader(arrays, 12, shuffle=False)
    result = trainer.train_model(train, val, num_epochs=4)
    state = trainer.state
    rates = {
        (record.step, name): value
        for record in log.records
        for name, value in record.metrics.items()
        if "learning_rate" in name
    }
    return result, (state.params, state.opt_state, state.step), rates


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.slow
def test_a_run_that_is_interrupted_and_resumed_is_the_same_run(name, tmp_path):
    config, root = CONFIGS[name], str(tmp_path / "cut")
    whole, state, rates = trained(config, root=str(tmp_path / "whole"), steps_per_call=1)
    for step in (7, 14):
        cut, _, _ = trained(config, root=root, steps_per_call=1, callbacks=[EndAt(step)])
        assert (cut.status, cut.step) == ("interrupted", step)
    resumed, again, found = trained(config, root=root, steps_per_call=1, callbacks=[EndAt(0)])
    assert (resumed.status, resumed.first_step) == ("finished", 14)
    assert_same(again, state)
    assert {key: rates[key] for key in found} == found
    assert resumed.metrics == whole.metrics


class EndOn(distaff.Callback):
    """Asks the run to end at an event of its second epoch."""

    def __init__(self, event):
        self.event = event

    def on_epoch_end(self, info):
        self._end("epoch", info)

    def on_validation_end(self, info):
        self._end("validation", info)

    def on_checkpoint(self, info):
        self._end("checkpoint", info)

    def _end(self, event, info):
        if event == self.event and info.epoch == 2:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.slow_but("checkpoint")
@pytest.mark.parametrize("event", ["epoch", "validation", "checkpoint"])
def test_a_validation_counts_once_if_a_run_is_interrupted_around_it(event, tmp_path):
    config, root = CONFIGS["plateau"], str(tmp_path)
    _, state, rates = trained(config, steps_per_call=1)
    cut, _, before = trained(config, root=root, steps_per_call=1, callbacks=[EndOn(event)])
    assert cut.status == "interrupted"
    _, again, after = trained(config, root=root, steps_per_call=1, callbacks=[EndOn("")])
    assert_same(again, state)
    assert {**before, **after} == rates


@pytest.mark.slow_but("wsd")
@pytest.mark.parametrize("name", CONFIGS)
def test_fused_steps_are_those_of_single_ones(name):
    _, single, rates = trained(CONFIGS[name], steps_per_call=1)
    _, fused, found = trained(CONFIGS[name], steps_per_call=4)
    assert found == rates
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), fused, single)


CHANGES = {
    "wsd": {"decay_steps": 7},
    "muon": {"no_muon": ("up/*",)},
    "plateau": {"plateau": Plateau(factor=0.25, patience=1, min_delta=100.0)},
    "soap": {"options": {"precondition_frequency": 4}},
    "factory": {"options": {"b1": 0.7}},
}


@pytest.mark.slow_but("wsd")
@pytest.mark.parametrize("name", CONFIGS)
def test_another_value_of_an_option_is_another_run(name, tmp_path):
    config, root = CONFIGS[name], str(tmp_path)
    trained(config, root=root, steps_per_call=1, callbacks=[EndAt(5)])
    other = dataclasses.replace(config, **CHANGES[name])
    result, _, _ = trained(other, root=root, steps_per_call=1)
    assert result.first_step == 0
