"""The loss scale of float16: small gradients survive, and steps that overflow are skipped."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale

from distaff import OptimizerConfig, PrecisionConfig, TrainState, data, optim, train_step, zoo
from distaff.errors import ConfigError, NonFiniteError
from distaff.models import as_model, in_precision
from distaff.run.diagnosis.products import products
from model_kinds import KINDS
from scripted import Break, InterruptError, Regression

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 3)).astype(np.float32)
BATCH = {"x": jnp.asarray(X), "y": jnp.asarray(X.sum(1)), "factor": jnp.ones(32)}
KERNEL = jnp.asarray(RNG.normal(size=(3, 1)), jnp.float32)
LINEAR = (lambda key, x: {"kernel": KERNEL}, lambda params, x: x @ params["kernel"])


def loss_fn(params, batch, ctx):
    outputs = ctx.apply(params, batch["x"])[:, 0]
    return jnp.square(outputs - batch["y"]) * batch["factor"]


def state_of(tx, *, model=None, precision="fp16"):
    model = in_precision(as_model(LINEAR if model is None else model), precision)
    variables = model.init(jax.random.key(0), BATCH["x"])
    return TrainState.create(
        apply_fn=model.apply_fn, tx=tx, rng=jax.random.key(1), **variables._asdict()
    )


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("factor", [1.0, 1e-6])
@pytest.mark.slow
def test_gradients_are_those_of_flax(factor):
    batch = {**BATCH, "factor": jnp.full(32, factor)}

    def by_hand(params):
        outputs = batch["x"].astype(jnp.float16) @ params["kernel"].astype(jnp.float16)
        outputs = outputs.astype(jnp.float32)[:, 0]
        return (jnp.square(outputs - batch["y"]) * batch["factor"]).mean()

    params = {"kernel": KERNEL}
    _, is_finite, _, expected = DynamicScale(scale=jnp.float32(2.0**8)).value_and_grad(by_hand)(
        params
    )
    state = state_of(optim.with_loss_scale(optax.sgd(1.0), initial=2.0**8))
    after, _ = jax.jit(train_step(loss_fn))(state, batch)
    assert bool(is_finite)
    found = state.params["kernel"] - after.params["kernel"]
    np.testing.assert_allclose(found, expected["kernel"], rtol=1e-6, atol=3e-7)


def test_small_gradients_become_zero_only_without_a_scale():
    batch = {**BATCH, "factor": jnp.full(32, 1e-8)}

    def gradient(tx):
        after, _ = jax.jit(train_step(loss_fn))(state_of(tx), batch)
        is_trace = lambda node: isinstance(node, optax.TraceState)  # noqa: E731
        nodes = jax.tree.leaves(after.opt_state, is_leaf=is_trace)
        (trace,) = filter(is_trace, nodes)
        return np.asarray(trace.trace["kernel"])

    momentum = optax.sgd(1.0, momentum=0.9)
    assert (gradient(momentum) == 0).all()
    scaled = gradient(optim.with_loss_scale(momentum))
    exact = jax.grad(lambda k: (jnp.square((X @ k)[:, 0] - BATCH["y"]) * 1e-8).mean())(KERNEL)
    np.testing.assert_allclose(scaled, exact, rtol=5e-3)


def test_a_step_that_overflows_changes_nothing_but_the_scale():
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    state = state_of(optim.with_loss_scale(optax.adam(schedule), initial=2.0**10))
    step = jax.jit(train_step(loss_fn))
    state, _ = step(state, BATCH)
    before = state.opt_state
    after, metrics = step(state, {**BATCH, "factor": jnp.full(32, 1e4)})
    assert np.isfinite(metrics["loss"].compute())
    assert_equal(after.params, state.params)
    assert_equal(after.opt_state.inner, before.inner)
    assert (int(after.step), int(after.opt_state.num_skipped)) == (2, 1)
    assert (float(before.scale), float(after.opt_state.scale)) == (2.0**10, 2.0**9)
    # The next step is what it would have been without the skipped one.
    again, _ = step(after.replace(step=state.step), BATCH)
    direct, _ = step(state, BATCH)
    assert_equal(again.params, direct.params)
    assert_equal(again.opt_state.inner, direct.opt_state.inner)


def test_the_scale_doubles_after_finite_steps():
    tx = optim.with_loss_scale(optax.sgd(0.1), initial=4.0, grow_every=3)
    params = {"w": jnp.ones(2)}
    state, scales = tx.init(params), []
    for gradient in (1, 1, 1, 1, np.inf, 1, 1, 1, np.nan, np.inf, 1, 1, 1):
        _, state = jax.jit(tx.update)({"w": jnp.full(2, gradient)}, state, params)
        scales.append(float(state.scale))
    assert scales == [4, 4, 8, 8, 4, 4, 4, 8, 4, 2, 2, 2, 4]
    assert (int(state.num_skipped), int(state.num_updates)) == (3, 10)


def test_at_a_scale_of_one_a_step_is_not_skipped():
    tx = optim.with_loss_scale(optax.sgd(0.1), initial=2.0)
    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    for _ in range(2):
        changes, state = tx.update({"w": jnp.full(2, np.nan)}, state, params)
    assert np.isnan(changes["w"]).all()


def test_state_can_be_donated():
    state = state_of(optim.with_loss_scale(optax.adam(1e-3)))
    after, _ = jax.jit(train_step(loss_fn), donate_argnums=0)(state, BATCH)
    assert int(after.step) == 1


@pytest.mark.parametrize("initial", [0.5, 3.0, 2.0**41, -1.0])
def test_a_scale_that_is_no_power_of_two_is_an_error(initial):
    with pytest.raises(ConfigError, match="power of two"):
        optim.with_loss_scale(optax.sgd(0.1), initial=initial)
    with pytest.raises(ConfigError, match="power of two"):
        PrecisionConfig("fp16", loss_scale=initial)


@pytest.mark.parametrize("family", ["linen", "nnx", "equinox", "functions"])
@pytest.mark.slow
def test_all_products_are_in_half_precision(family):
    tx = optim.with_loss_scale(optax.adam(1e-3))
    state = state_of(tx, model=KINDS[family].mlp(0.1, True))
    found = products(jax.make_jaxpr(train_step(loss_fn))(state, BATCH))
    assert {each.dtype for each in found} == {"float16"}


class Sqrt(Regression):
    """Its gradient is infinite at zero, however small the scale."""

    def loss_fn(self, params, batch, ctx):
        return jnp.sqrt(jnp.abs(0 * ctx.apply(params, batch["x"])[:, 0]))


def trained(cls=Regression, *, model=None, epochs=4, **options):
    defaults = {"root": None, "precision": "fp16", "steps_per_call": 1, "seed": 1}
    defaults |= {"enable_progress_bar": False, "optimizer": OptimizerConfig("adam")}
    trainer = cls(model or zoo.MLP((4, 1)), **{**defaults, **options})
    loader = data.ArrayLoader({"x": X, "y": X.sum(1)}, batch_size=8, seed=0)
    return trainer, trainer.train_model(loader, num_epochs=epochs)


def test_skipped_steps_are_counted_and_do_not_advance_the_schedule():
    trainer, _ = trained()
    state = trainer.state.opt_state
    assert 0 < int(state.num_skipped) < trainer.step == 16
    assert int(state.num_updates) + int(state.num_skipped) == 16
    assert float(state.scale) == 2.0 ** (24 - int(state.num_skipped))
    assert int(state.inner.count) == int(state.num_updates)


@pytest.mark.slow
def test_metrics_have_the_scale_and_the_number_of_skipped_steps(tmp_path):
    trainer, result = trained(root=tmp_path, log_every_n_steps=1)
    lines = [json.loads(x) for x in (result.path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step/loss_scale" in line]
    assert steps[0]["step/loss_scale"] == 2.0**24
    skipped = sum(line["step/skipped_updates"] for line in steps)
    assert skipped == int(trainer.state.opt_state.num_skipped)
    assert skipped == sum(line.get("train/skipped_updates", 0) for line in lines)
    # The learning rate is that of the update, whose number is not that of the step.
    rates = {line["step/learning_rate"] for line in steps}
    assert len(rates) == int(trainer.state.opt_state.num_updates) < 16


@pytest.mark.slow
def test_gradients_that_are_never_finite_end_the_run():
    with pytest.raises(NonFiniteError):
        trained(Sqrt, epochs=1, precision=PrecisionConfig("fp16", loss_scale=4.0))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits(accumulate):
    def run(root, fails=None):
        options = {"model": KINDS["linen"].mlp(0.1, True), "callbacks": [Break(fails)]}
        optimizer = OptimizerConfig("adam", accumulate=accumulate, warmup_steps=2)
        return trained(root=root, name="run", optimizer=optimizer, **options)

    whole, _ = run("whole")
    with pytest.raises(InterruptError):
        run("broken", fails=6)
    resumed, result = run("broken")
    assert result.path.name == "0001"
    assert result.first_step == 4
    assert_equal(resumed.state.params, whole.state.params)
    assert_equal(resumed.state.opt_state, whole.state.opt_state)
    assert 0 < int(whole.state.opt_state.num_skipped) < 16


@pytest.mark.slow
def test_fused_steps_are_those_one_by_one():
    one, four = (trained(steps_per_call=k)[0].state for k in (1, 4))
    assert int(one.opt_state.num_skipped) == int(four.opt_state.num_skipped) > 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one.params, four.params
    )


def test_averages_do_not_count_skipped_steps():
    trainer, _ = trained(ema=0.9)
    average = trainer.state.averages["ema"]
    assert int(average.count) == int(trainer.state.opt_state.num_updates) < 16


class OwnOptimizer(Regression):
    def init_optimizer(self, total_steps):
        tx = optax.adam(1e-3)
        self.state = self.state.replace(tx=tx, opt_state=tx.init(self.state.params))


class OwnForward(Regression):
    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.state.apply_fn({"params": params}, batch["x"])[:, 0] - batch["y"])


@pytest.mark.parametrize("cls", [OwnOptimizer, OwnForward])
def test_a_step_without_the_scale_is_an_error(cls):
    with pytest.raises(ConfigError, match="needs a loss scale, which the training step does not"):
        trained(cls)


@pytest.mark.slow
def test_a_second_training_keeps_the_scale():
    trainer, _ = trained()
    before = jax.tree.map(np.asarray, trainer.state.opt_state)
    loader = data.ArrayLoader({"x": X, "y": X.sum(1)}, batch_size=8, seed=0)
    trainer.train_model(loader, num_epochs=1)
    after = trainer.state.opt_state
    assert after.scale <= before.scale < 2.0**24
    assert after.num_updates > before.num_updates
