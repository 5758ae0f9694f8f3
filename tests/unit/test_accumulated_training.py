"""Training that accumulates: micro-batches make the update of the batch that they are parts of."""

from __future__ import annotations

import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import distaff
from distaff import OptimizerConfig, TrainState, data, metrics
from distaff.errors import ConfigError
from distaff.loggers import MemoryLogger
from distaff.optim import ParamGroup, accumulate, build_optimizer, num_updates
from distaff.step.remainder import may_have_rest, with_rest
from distaff.step.step import train_step

LINE = (lambda key, x: {"w": jnp.ones(3), "b": jnp.zeros(())}, lambda p, x: x @ p["w"] + p["b"])
_random = np.random.default_rng(0)
X = _random.normal(size=(22, 3)).astype(np.float32)
Y = _random.normal(size=22).astype(np.float32)
WEIGHTS = _random.integers(0, 4, 22).astype(np.float32)


def batches(sizes):
    ends = np.cumsum(sizes)
    return [
        {"x": X[end - size : end], "y": Y[end - size : end], "w": WEIGHTS[end - size : end]}
        for end, size in zip(ends, sizes, strict=True)
    ]


def errors(params, batch):
    return jnp.square(batch["x"] @ params["w"] + params["b"] - batch["y"])


def scalar(params, batch, ctx):
    return errors(params, batch).mean()


def per_example(params, batch, ctx):
    ctx.add_l2_loss(params, 0.1)
    return errors(params, batch)


def weighted(params, batch, ctx):
    return metrics.Mean.per_example(errors(params, batch), weight=batch["w"])


def stepped(loss, config, sizes, total_steps):
    tx = build_optimizer(config, total_steps).tx
    params = {"w": jnp.ones(3), "b": jnp.zeros(())}
    state = TrainState.create(params=params, tx=tx)
    step = jax.jit(train_step(loss))
    for batch in batches(sizes):
        state, _ = step(state, batch)
    return with_rest(state) if may_have_rest(state) else state


@pytest.mark.parametrize("loss", [scalar, per_example, weighted])
@pytest.mark.slow
def test_micro_batches_of_any_sizes_make_the_updates_of_whole_batches(loss):
    config = {"learning_rate": 0.1, "clip_norm": 0.5, "schedule": "linear", "warmup_steps": 1}
    whole = stepped(loss, OptimizerConfig("adam", **config), [12, 10], 2)
    parts = OptimizerConfig("adam", accumulate=3, **config)
    accumulated = stepped(loss, parts, [4, 3, 5, 8, 2], 5)
    assert int(accumulated.step) == 5
    assert int(num_updates(accumulated.opt_state)) == 2
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), accumulated.params, whole.params
    )


def test_a_micro_batch_without_weight_counts_nothing_even_if_it_is_nan():
    tx = accumulate(optax.sgd(1.0), 2)
    state = tx.init(jnp.zeros(2))
    _, state = tx.update(jnp.array([jnp.nan, 1.0]), state, weight=jnp.float32(0), value=jnp.nan)
    updates, state = tx.update(jnp.array([2.0, 4.0]), state, weight=jnp.float32(3), value=1.0)
    np.testing.assert_array_equal(updates, [-2.0, -4.0])
    _, state = tx.update(jnp.ones(2), state, weight=jnp.float32(0))
    updates, state = tx.update(jnp.ones(2), state, weight=jnp.float32(0))
    np.testing.assert_array_equal(updates, [0.0, 0.0])


def test_nothing_is_left_at_the_end_of_a_whole_window():
    state = stepped(scalar, OptimizerConfig("adam", accumulate=2), [4, 4], 2)
    again = with_rest(state)
    jax.tree.map(
        np.testing.assert_array_equal,
        (again.params, again.opt_state),
        (*(state.params, state.opt_state),),
    )


class Line(distaff.TrainerModule):
    def loss_fn(self, params, batch, ctx):
        return per_example(params, batch, ctx)


class EndAt(distaff.Callback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, info):
        if info.step == self.step:
            signal.raise_signal(signal.SIGINT)


CONFIG = OptimizerConfig(
    "adam",
    learning_rate=0.1,
    schedule="linear",
    end_fraction=0.0,
    accumulate=3,
    groups=(ParamGroup("b", learning_rate=0.01),),
)
LOADER = {"batch_size": 5, "shuffle": False, "remainder": "keep"}


def trained(**options):
    log = MemoryLogger()
    arrays = {"x": X, "y": Y}
    defaults = {"root": None, "enable_progress_bar": False, "log_every_n_steps": 1}
    trainer = Line(LINE, optimizer=CONFIG, loggers=[log], **{**defaults, **options})
    result = trainer.train_model(data.ArrayLoader(arrays, **LOADER), num_epochs=3)
    return trainer, result, log


def rates_of(log, name):
    return [r.metrics[name] for r in log.records if name in r.metrics]


@pytest.mark.slow
def test_epochs_end_with_an_update_and_schedules_and_logged_rates_count_updates():
    trainer, result, log = trained(steps_per_call=1)
    # Each epoch has the batches 5 5 5 5 2, which make the updates 15 7.
    assert result.step == int(trainer.state.step) == 15
    assert int(num_updates(trainer.state.opt_state)) == 6
    of_steps = rates_of(log, "step/learning_rate")
    np.testing.assert_allclose(
        of_steps[2:7] + of_steps[7:8],
        [
            *(0.1, 0.1, 0.1, 0.1 * 5 / 6, 0.1 * 5 / 6, 0.1 * 4 / 6),
        ],
        rtol=1e-5,
    )
    np.testing.assert_allclose(rates_of(log, "step/learning_rate/b"), np.array(of_steps) / 10)
    assert not any("learning_rate" in name for name in result.metrics)
    fused = trained(steps_per_call=4)[0]
    jax.tree.map(np.testing.assert_array_equal, trainer.state.params, fused.state.params)


@pytest.mark.slow
def test_a_run_resumed_within_a_window_ends_bit_for_bit_as_one_that_was_not(tmp_path):
    whole = trained(root=str(tmp_path / "whole"))[0]
    options = {"root": str(tmp_path / "cut"), "steps_per_call": 1}
    _, cut, _ = trained(callbacks=[EndAt(7)], **options)
    assert (cut.status, cut.step) == ("interrupted", 7)
    resumed, result, _ = trained(callbacks=[EndAt(0)], **options)
    assert result.status == "finished"
    members = [(s.params, s.opt_state, s.step) for s in (whole.state, resumed.state)]
    jax.tree.map(np.testing.assert_array_equal, *members)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda steps: accumulate(build_optimizer(OptimizerConfig("sgd"), 1 + steps // 64).tx, 64),
        optax.MultiSteps(optax.sgd(0.1), 64),
        OptimizerConfig("sgd", accumulate=64),
    ],
)
def test_accumulating_for_long_is_no_sign_of_a_training_that_learns_nothing(optimizer):
    loader = data.ArrayLoader({"x": X, "y": Y}, batch_size=2)
    options = {"root": None, "enable_progress_bar": False, "log_every_n_steps": 1}
    result = Line(LINE, optimizer=optimizer, **options).train_model(loader, num_epochs=1)
    assert result.status == "finished"  # a warning would have been an error


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(3)),
        optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1), opaque_mode=True),
        optax.lbfgs(),
        optax.contrib.sophia(0.1),
    ],
)
def test_an_optimizer_that_searches_with_the_loss_cannot_accumulate(tx):
    state = TrainState.create(params={"w": jnp.ones(3), "b": jnp.zeros(())}, tx=accumulate(tx, 2))
    with pytest.raises(ConfigError, match=r"cannot accumulate.*accumulate=1"):
        train_step(scalar)(state, batches([4])[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, r"accumulate must be an integer, at least 1; got 0"),
        ({"accumulate": 2.5}, r"accumulate must be an integer"),
        ({"name": "lbfgs", "accumulate": 2}, r"'lbfgs' evaluates the loss"),
    ],
)
def test_a_config_refuses_to_accumulate(options, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**options)


def test_sophia_is_offered_the_loss():
    state = stepped(scalar, OptimizerConfig("sophia", learning_rate=0.1), [4, 4], 2)
    assert not np.array_equal(state.params["w"], np.ones(3))
