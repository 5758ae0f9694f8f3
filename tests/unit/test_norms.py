"""Norms of gradients, updates and parameters: by hand, fused, skipped, accumulated, resumed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff import OptimizerConfig, TrainerModule, TrainState, train_step
from distaff.callbacks import Callback
from distaff.errors import ConfigError, DistaffError, LossError
from distaff.step.norms import Norms
from line import Line, loader, trained

HEAD = {"w": np.float32([1, 2, 2]), "b": np.float32(0)}
PARAMS = {"encoder": {"w": np.float32([3, 4])}, "head": HEAD}
BATCH = {"x": np.float32([[1, 2], [3, 4]])}


def loss_fn(params, batch, ctx):
    hidden = batch["x"] @ params["encoder"]["w"]
    return jnp.square(hidden) * params["head"]["w"].sum() + params["head"]["b"]


def run_step(norms, tx=None, params=PARAMS):
    tx = tx or optax.sgd(0.01)
    state = TrainState.create(params=jax.tree.map(jnp.asarray, params), tx=tx)
    after, metrics = jax.jit(train_step(loss_fn, norms=norms))(state, BATCH)
    return state, after, {name: np.asarray(each.compute()) for name, each in metrics.items()}


def length(*leaves):
    return np.sqrt(sum(np.square(np.float64(leaf)).sum() for leaf in leaves))


def test_norms_equal_those_of_optax_and_numpy():
    state, after, metrics = run_step(Norms(["encoder/*", "head/*"]))
    grads = jax.grad(lambda p: loss_fn(p, BATCH, None).mean())(state.params)
    updates = jax.tree.map(lambda a, b: a - b, after.params, state.params)
    for tree, name in [(grads, "grad"), (updates, "update"), (after.params, "param")]:
        np.testing.assert_allclose(metrics[f"{name}_norm"], optax.tree.norm(tree), rtol=1e-6)
        encoder, head = tree["encoder"], tree["head"]
        np.testing.assert_allclose(metrics[f"{name}_norm/encoder"], length(encoder["w"]), 1e-6)
        expected = length(head["w"], head["b"])
        np.testing.assert_allclose(metrics[f"{name}_norm/head"], expected, rtol=1e-6)
    assert len(metrics) == 1 + 3 * 3


def test_norms_change_no_update():
    _, plain, _ = run_step(None)
    _, after, _ = run_step(Norms())
    jax.tree.map(np.testing.assert_array_equal, plain.params, after.params)


def test_gradient_is_that_before_clipping():
    _, _, free = run_step(Norms())
    _, _, clipped = run_step(Norms(), optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0)))
    assert clipped["grad_norm"] == free["grad_norm"] > 1
    np.testing.assert_allclose(clipped["update_norm"], 0.1, rtol=1e-5)


def test_low_precision_is_summed_in_float32():
    params = {"encoder": {"w": jnp.full(2, 0.1, jnp.bfloat16)}, "head": HEAD}
    _, after, metrics = run_step(Norms(), params=params)
    leaves = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(after.params)]
    np.testing.assert_allclose(metrics["param_norm"], length(*leaves), rtol=1e-6)
    assert metrics["param_norm"].dtype == np.float32


def test_taken_name_raises():
    def own(params, batch, ctx):
        return loss_fn(params, batch, ctx), {"grad_norm": jnp.float32(0)}

    state = TrainState.create(params=PARAMS, tx=optax.sgd(0.1))
    with pytest.raises(LossError, match="reserved for the norms of log_norms"):
        train_step(own, norms=Norms())(state, BATCH)


def test_pattern_without_a_parameter_raises():
    with pytest.raises(ConfigError, match="'decoder/\\*' matches none"):
        run_step(Norms(["decoder/*"]))


@pytest.mark.parametrize("value", [0, "", (), (1,), None, [""]])
def test_wrong_option_raises(value):
    with pytest.raises(ConfigError, match="log_norms must be True, False, or patterns"):
        Line(log_norms=value)


def norms_in(run):
    lines = [line for line in run.logged if "step/grad_norm" in line]
    return [line["step/grad_norm"] for line in lines], run


def test_a_run_logs_norms_by_window_and_epoch_fused_or_not():
    fused, run = norms_in(trained(Line, log_norms=True))
    single, _ = norms_in(trained(Line, log_norms=True, steps_per_call=1, name="single"))
    plain, off = norms_in(trained(Line, name="off"))
    assert len(fused) == 4
    assert fused == single
    assert plain == []
    np.testing.assert_array_equal(run.params, off.params)
    epochs = [line["train/grad_norm"] for line in run.logged if "train/grad_norm" in line]
    np.testing.assert_allclose(epochs[0], np.mean(fused[:2]), rtol=1e-6)


def test_lines_on_the_screen_leave_norms_out(capsys):
    trained(Line, log_norms=True, enable_progress_bar=True)
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("epoch")]
    assert len(lines) == 2
    assert all("train loss" in line and "norm" not in line for line in lines)


def test_groups_of_a_run_have_names_of_their_own():
    run = trained(Line, log_norms="w")
    line = next(line for line in run.logged if "step/param_norm/w" in line)
    assert line["step/param_norm/w"] == line["step/param_norm"]


@pytest.mark.slow
def test_micro_batches_without_an_update_do_not_count_in_its_average():
    sgd = OptimizerConfig("sgd", learning_rate=0.05, accumulate=2)
    run = trained(Line, log_norms=True, optimizer=sgd)
    each = {"log_every_n_steps": 1, "steps_per_call": 1, "name": "one"}
    whole = trained(Line, log_norms=True, optimizer=sgd, **each)
    by_window = [line["step/update_norm"] for line in run.logged if "step/update_norm" in line]
    by_step = [line.get("step/update_norm") for line in whole.logged if "step/grad_norm" in line]
    np.testing.assert_allclose(by_window, by_step[1::2], rtol=1e-6)


def test_a_step_of_your_own_without_norms_raises():
    class Own(Line):
        def create_functions(self):
            return train_step(self.loss_fn), TrainerModule.create_functions(self)[1]

    with pytest.raises(ConfigError, match="the step of Own returns \\['loss'\\]"):
        Own(log_norms=True).train_model(loader(), num_epochs=1)


class Break(Callback):
    """Ends the process, as it were, after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, info):
        if info.step == self.step:
            raise InterruptError


class InterruptError(Exception):
    pass


@pytest.mark.slow
def test_a_resumed_run_logs_the_same_norms():
    options = {"log_norms": True, "steps_per_call": 1, "save_every": 1e-9}
    with pytest.raises(InterruptError):
        trained(Line, callbacks=[Break(3)], **options)
    resumed, run = norms_in(trained(Line, callbacks=[Break(None)], resume="must", **options))
    whole, _ = norms_in(trained(Line, callbacks=[Break(None)], name="whole", **options))
    assert run.result.first_step == 2
    assert resumed == whole


def test_another_choice_of_norms_is_another_run():
    with pytest.raises(InterruptError):
        trained(Line, callbacks=[Break(7)])
    with pytest.raises(DistaffError, match="log_norms"):
        trained(Line, callbacks=[Break(None)], log_norms=True, resume="must")
