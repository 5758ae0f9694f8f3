"""Diagnosis: what is said of steps that go wrong, each in a way of its own."""

from __future__ import annotations

import inspect
import itertools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from distaff import TrainState
from distaff.core.pytrees import static
from distaff.optim import accumulate
from distaff.run.diagnosis import Finding, diagnose, replay
from distaff.step.finite import new_bad
from distaff.step.normalise import measured
from distaff.step.step import train_step

X = np.linspace(-1.0, 1.0, 24, dtype=np.float32).reshape(8, 3)
Y = np.linspace(0.0, 1.0, 8, dtype=np.float32)


def square_loss(params: Any, batch: Any, ctx: Any) -> jax.Array:
    return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])


def make_state(model: nn.Module, tx: Any = None, **members: Any) -> TrainState:
    variables = model.init(jax.random.key(0), X)
    return TrainState.create(
        params=variables["params"],
        batch_stats=variables.get("batch_stats"),
        apply_fn=model.apply,
        tx=tx or optax.sgd(0.1),
        rng=jax.random.key(1),
        **members,
    )


def batch_with(name: str, *places: tuple[int, ...], value: float = np.nan) -> dict[str, Any]:
    batch = {"x": X.copy(), "y": Y.copy()}
    for place in places:
        batch[name][place] = value
    return batch


def line_of(function: Callable[..., Any], text: str) -> str:
    """Returns the file and line of the only line of a function that holds `text`."""
    lines, first = inspect.getsourcelines(function)
    (found,) = [number for number, line in enumerate(lines, first) if text in line]
    return f"{__file__}:{found}"


def found(step: Any, state: TrainState, batch: Any) -> Finding:
    """Returns the finding, which there must be, and which must be of the kinds it says."""
    finding = diagnose(step, state, batch)
    assert finding is not None
    assert json.loads(json.dumps(finding._asdict(), allow_nan=False))["text"] == finding.text
    return finding


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_diagnose_names_leaf_and_examples_of_bad_batch(value: float) -> None:
    batch = batch_with("x", (5, 0), (5, 2), (7, 1), value=value)
    finding = found(train_step(square_loss), make_state(nn.Dense(1)), batch)
    assert finding == Finding(
        "the batch",
        ("x",),
        "The batch has 3 non-finite values in 'x', in examples 5, 7.",
    )


def test_diagnose_lists_few_of_many_bad_examples_and_blames_leaf_without_any_other() -> None:
    batch = batch_with("y", *((example,) for example in range(8)))
    finding = found(train_step(square_loss), make_state(nn.Dense(1)), batch)
    assert finding.text == (
        "The batch has 8 non-finite values in 'y', in examples 0, 1, 2, 3, 4 and 3 more."
    )


def test_diagnose_names_first_the_leaf_that_the_bad_number_comes_from() -> None:
    batch = {"a": X * np.nan, **batch_with("y", (0,))}
    finding = found(train_step(square_loss), make_state(nn.Dense(1)), batch)
    assert finding.names == ("y", "a")


def test_diagnose_blames_batch_for_gradient_of_what_is_masked() -> None:
    def masked_too_late(params: Any, batch: Any, ctx: Any) -> jax.Array:
        errors = square_loss(params, batch, ctx)
        return jnp.where(jnp.isnan(batch["y"]), 0.0, errors)

    state, batch = make_state(nn.Dense(1)), batch_with("y", (3,))
    _, metrics = jax.jit(train_step(masked_too_late))(state, batch)
    assert np.isfinite(metrics["loss"].compute())
    finding = found(train_step(masked_too_late), state, batch)
    assert (finding.where, finding.names) == ("the batch", ("y",))


class Logarithm(nn.Module):
    """Takes the logarithm of something negative."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.log(nn.Dense(1)(x) - 100.0)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(3)(x)
        return Logarithm(name="inner")(x)


@pytest.mark.slow
def test_diagnose_does_not_blame_nan_that_the_loss_masks() -> None:
    def masked(params: Any, batch: Any, ctx: Any) -> jax.Array:
        is_there = ~jnp.isnan(batch["y"])
        labels = jnp.where(is_there, batch["y"], 0.0)
        return jnp.where(is_there, square_loss(params, batch | {"y": labels}, ctx), 0.0)

    batch = batch_with("y", (3,))
    assert diagnose(train_step(masked), make_state(nn.Dense(1)), batch) is None
    finding = found(train_step(masked), make_state(Model()), batch)
    assert (finding.where, finding.operation) == ("the forward pass", "log")
    assert "batch" not in finding.text


def test_diagnose_says_if_step_is_bad_without_what_is_bad_in_batch() -> None:
    finding = found(train_step(square_loss), make_state(Model()), batch_with("y", (3,)))
    assert (finding.where, finding.operation) == ("the forward pass", "log")
    assert finding.text.endswith(
        " The batch has 1 non-finite value in 'y', in example 3. "
        "Replacing these values does not help."
    )


def test_diagnose_names_module_and_line_of_forward_pass() -> None:
    finding = found(train_step(square_loss), make_state(Model()), batch_with("x"))
    line = line_of(Logarithm.__call__, "jnp.log")
    assert finding.where == "the forward pass"
    assert finding.names == ("Model/inner",)
    assert (finding.operation, finding.line) == ("log", line)
    assert finding.text.startswith("The loss is not finite. It comes from log(-1")
    assert finding.text.endswith(f", which is NaN, in Model/inner at {line}.")


def test_diagnose_finds_overflow_behind_nan() -> None:
    def loss_fn(params: Any, batch: Any, ctx: Any) -> jax.Array:
        large = jnp.exp(ctx.apply(params, batch["x"])[:, 0] ** 2 + 100.0)
        return large - large

    finding = found(train_step(loss_fn), make_state(nn.Dense(1)), batch_with("x"))
    assert (finding.names, finding.operation) == (("loss",), "exp")
    assert finding.line == line_of(loss_fn, "jnp.exp")
    assert "which is inf" in finding.text
    assert finding.text.endswith(f"sub turns it into NaN, at {line_of(loss_fn, 'large - large')}.")


def test_diagnose_does_not_blame_inf_elsewhere_in_an_array() -> None:
    def loss_fn(params: Any, batch: Any, ctx: Any) -> jax.Array:
        outputs = ctx.apply(params, batch["x"])[:, 0]
        is_first = jnp.arange(8) == 0
        mixed = jnp.where(is_first, jnp.exp(outputs + 200.0), outputs - 100.0)
        return jnp.where(is_first, 0.0, jnp.log(mixed))

    finding = found(train_step(loss_fn), make_state(nn.Dense(1)), batch_with("x"))
    assert finding.line == line_of(loss_fn, "jnp.log")


def test_diagnose_does_not_blame_inf_that_is_clipped() -> None:
    def loss_fn(params: Any, batch: Any, ctx: Any) -> jax.Array:
        large = jnp.exp(ctx.apply(params, batch["x"])[:, 0] + 200.0)
        return jnp.arccosh(jnp.minimum(large, 0.5))

    finding = found(train_step(loss_fn), make_state(nn.Dense(1)), batch_with("x"))
    assert (finding.operation, finding.line) == ("acosh", line_of(loss_fn, "arccosh"))


def test_diagnose_names_operation_that_makes_nan_of_a_constant() -> None:
    def loss_fn(params: Any, batch: Any, ctx: Any) -> jax.Array:
        outputs = ctx.apply(params, batch["x"])
        logits = jnp.where(outputs > 100.0, outputs, -jnp.inf)
        return jax.nn.softmax(logits)[:, 0]

    finding = found(train_step(loss_fn), make_state(nn.Dense(1)), batch_with("x"))
    assert finding.line == line_of(loss_fn, "jax.nn.softmax")
    assert finding.text == (
        f"The loss is not finite. It comes from sub(-inf, -inf), which is NaN, at {finding.line}."
    )


def test_diagnose_leaves_out_inf_that_is_meant() -> None:
    def loss_fn(params: Any, batch: Any, ctx: Any) -> jax.Array:
        logits = jnp.where(jnp.eye(8, dtype=bool), ctx.apply(params, batch["x"]), -jnp.inf)
        attention = jax.nn.softmax(logits)
        return attention.sum(-1) + jnp.log(batch["y"] - 2.0)

    finding = found(train_step(loss_fn), make_state(nn.Dense(8)), batch_with("x"))
    assert finding.line == line_of(loss_fn, "jnp.log")


class Norm(nn.Module):
    """Adds the norm of zeros, whose gradient does not exist."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        zeros = self.param("zeros", nn.initializers.zeros, (2,))
        return nn.Dense(1)(x) + jnp.sqrt(jnp.sum(zeros**2))


def test_diagnose_names_bad_leaves_of_gradient() -> None:
    finding = found(train_step(square_loss), make_state(Norm()), batch_with("x"))
    line = line_of(Norm.__call__, "jnp.sqrt")
    assert (finding.where, finding.names) == ("the gradient", ("zeros",))
    assert (finding.operation, finding.line) == ("div", line)
    assert finding.text == (
        "The gradient is not finite in 'zeros' (1 of 3 leaves); the loss is. It comes from "
        f"div(0.5, 0), which is inf, in Norm at {line}; mul turns it into NaN, in Norm at {line}."
    )


@pytest.mark.slow
def test_diagnose_is_not_led_astray_by_trials_of_the_optimizer() -> None:
    def loss_fn(params: Any, batch: Any, ctx: Any) -> jax.Array:
        ctx.add_l2_loss(params, 0.1)
        return square_loss(params, batch, ctx)

    finding = found(train_step(loss_fn), make_state(Norm()), batch_with("x"))
    assert (finding.where, finding.names) == ("the gradient", ("zeros",))
    assert "(1 of 3 leaves)" in finding.text


@pytest.mark.slow
def test_diagnose_names_module_whose_forward_pass_runs_again_for_the_gradient() -> None:
    class Root(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return jnp.sqrt(0.0 * nn.Dense(1)(x))

    class Saving(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.remat(Root)(name="root")(nn.Dense(3)(x))

    finding = found(train_step(square_loss), make_state(Saving()), batch_with("x"))
    assert finding.where == "the gradient"
    assert f", in Saving/root at {line_of(Root.__call__, 'jnp.sqrt')}" in finding.text


def test_diagnose_names_penalty_that_is_bad_and_not_the_loss() -> None:
    def loss_fn(params: Any, batch: Any, ctx: Any) -> jax.Array:
        ctx.add_penalty(jnp.sqrt(-jnp.sum(params["kernel"] ** 2)))
        return square_loss(params, batch, ctx)

    finding = found(train_step(loss_fn), make_state(nn.Dense(1)), batch_with("x"))
    assert finding.where == "the gradient"
    assert " The metric 'penalty' is not finite either." in finding.text


def test_diagnose_names_update_of_huge_learning_rate() -> None:
    def loss_fn(params: Any, batch: Any, ctx: Any) -> jax.Array:
        return 100.0 * square_loss(params, batch, ctx)

    finding = found(train_step(loss_fn), make_state(nn.Dense(1), optax.sgd(1e38)), batch_with("x"))
    assert (finding.where, finding.operation) == ("the update", "mul")
    assert finding.names[0].startswith("params/")
    assert "; the loss and the gradient are. It comes from mul(" in finding.text
    assert finding.line == ""


@pytest.mark.slow
def test_diagnose_names_bad_state_before_step() -> None:
    state = make_state(nn.Dense(1), optax.adam(0.1))
    moments = state.opt_state[0]
    bad = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), moments.mu)
    state = state.replace(opt_state=(moments._replace(mu=bad), *state.opt_state[1:]))
    finding = found(train_step(square_loss), state, batch_with("x"))
    assert finding.where == "the state"
    assert finding.names[0].startswith("opt_state/0/mu/")
    assert finding.text.startswith("Before the step, the state has 1 non-finite value in")


@pytest.mark.slow
def test_diagnose_does_not_blame_inf_that_an_optimizer_begins_with() -> None:
    tx = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    state = make_state(Model(), tx)
    assert not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.opt_state))
    assert found(train_step(square_loss), state, batch_with("x")).operation == "log"
    assert diagnose(train_step(square_loss), make_state(nn.Dense(1), tx), batch_with("x")) is None


def user_step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
    def loss_fn(params: Any) -> jax.Array:
        outputs = state.apply_fn({"params": params}, batch["x"])
        return jnp.mean((outputs[:, 0] - batch["y"]) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    updates, opt_state = state.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), {"loss": loss}


def test_diagnose_sees_into_steps_of_the_user() -> None:
    for step in (user_step, jax.jit(user_step), jax.jit(user_step, donate_argnums=0)):
        state = make_state(Norm())
        finding = found(step, state, batch_with("x"))
        assert (finding.where, finding.names) == ("the gradient", ("zeros",))
        assert finding.line == line_of(Norm.__call__, "jnp.sqrt")
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    finding = found(user_step, make_state(Model()), batch_with("x"))
    assert finding.names == ("Model/inner",)


class Players(TrainState):
    critic: Any
    critic_state: Any
    critic_tx: Any = static()


def make_players() -> Players:
    tx, weight = optax.sgd(0.1), jnp.zeros([])
    critic = {"critic": weight, "critic_state": tx.init(weight), "critic_tx": tx}
    params = nn.Dense(1).init(jax.random.key(0), X)["params"]
    return Players.create(params=params, tx=tx, **critic)


def critic_update(state: Players) -> dict[str, Any]:
    grads = jax.grad(lambda weight: jnp.sqrt(weight))(state.critic)
    updates, critic_state = state.critic_tx.update(grads, state.critic_state)
    critic = optax.apply_updates(state.critic, updates)
    return {"critic": critic, "critic_state": critic_state}


def test_diagnose_says_which_of_several_optimizers_was_first() -> None:
    def step(state: Players, batch: Any) -> tuple[Players, dict[str, jax.Array]]:
        critic = critic_update(state)
        grads = jax.grad(lambda params: jnp.sqrt(0.0 * jnp.sum(params["bias"])))(state.params)
        return state.apply_gradients(grads=grads, **critic), {"generator": jnp.float32(1.0)}

    finding = found(step, make_players(), batch_with("x"))
    assert finding.where == "the gradient"
    assert finding.line == line_of(critic_update, "jnp.sqrt")
    assert finding.text.startswith("The gradient passed to critic_tx is not finite in ")


def test_diagnose_sees_gradients_after_a_loop_of_updates() -> None:
    def step(state: Players, batch: Any) -> tuple[Players, dict[str, jax.Array]]:
        def body(_: jax.Array, critic: dict[str, Any]) -> dict[str, Any]:
            return critic_update(state.replace(**critic))

        critic = {"critic": jnp.float32(1.0), "critic_state": state.critic_state}
        critic = jax.lax.fori_loop(0, 2, body, critic)
        grads = jax.grad(lambda params: jnp.sqrt(0.0 * jnp.sum(params["bias"])))(state.params)
        return state.apply_gradients(grads=grads, **critic), {}

    finding = found(step, make_players(), batch_with("x"))
    assert (finding.where, finding.names) == ("the gradient", ("bias",))


def test_diagnose_does_not_tell_gradient_from_update_where_it_sees_neither() -> None:
    inner = jax.jit(user_step)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        after, _ = inner(state, batch)
        return after, {"loss": jnp.zeros([])}

    finding = found(step, make_state(Model()), batch_with("x"))
    assert (finding.where, finding.operation) == ("the step", "log")
    assert finding.line == line_of(Logarithm.__call__, "jnp.log")


@pytest.mark.slow
def test_diagnose_names_leaves_of_step_that_reads_values() -> None:
    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        after, metrics = user_step(state, batch)
        assert float(metrics["loss"]) != 0.0
        return after, metrics

    finding = found(step, make_state(Model()), batch_with("x"))
    assert finding == Finding("the forward pass", ("loss",), "The loss is not finite.")


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return Logarithm()(x)


@pytest.mark.slow
def test_diagnose_goes_through_batch_norm_and_dropout() -> None:
    variables = Normed().init(jax.random.key(0), X, train=False)
    state = TrainState.create(
        **variables, apply_fn=Normed().apply, tx=optax.sgd(0.1), rng=jax.random.key(1)
    )
    finding = found(train_step(square_loss), state, batch_with("x"))
    assert finding.names == ("Normed/Logarithm_0",)
    assert finding.line == line_of(Logarithm.__call__, "jnp.log")


class Layer(nn.Module):
    """Its third application is one of a negative number."""

    @nn.compact
    def __call__(self, carry: jax.Array, _: None) -> tuple[jax.Array, None]:
        scale = self.param("scale", nn.initializers.ones, ())
        return jnp.log(scale * carry), None


class Deep(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(1)(x) ** 2 + 5.0
        layer = nn.remat(Layer) if self.remat else Layer
        layers = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        return layers()(x, None)[0]


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.slow
def test_diagnose_goes_into_scanned_layers(remat: bool) -> None:
    finding = found(train_step(square_loss), make_state(Deep(remat)), batch_with("x"))
    assert finding.names[0].startswith("Deep/Scan")
    assert (finding.operation, finding.line) == ("log", line_of(Layer.__call__, "jnp.log"))
    assert finding.text.partition("log(")[2].startswith("-")


def test_diagnose_goes_through_a_scan_in_its_own_direction() -> None:
    def loss_fn(params: Any, batch: Any, ctx: Any) -> jax.Array:
        def body(carry: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
            return carry - row, jnp.log(carry)

        rows = jax.lax.scan(body, 2.5, jnp.arange(8.0), reverse=True)[1]
        return rows + square_loss(params, batch, ctx)

    finding = found(train_step(loss_fn), make_state(nn.Dense(1)), batch_with("x"))
    assert finding.line == line_of(loss_fn, "jnp.log")
    assert "It comes from log(-4.5), which is NaN" in finding.text


@pytest.mark.slow
def test_diagnose_goes_into_loops_conditions_and_rules_of_derivatives() -> None:
    @jax.custom_vjp
    def doubled(x: jax.Array) -> jax.Array:
        return 2.0 * x

    def backward(_: None, cotangent: jax.Array) -> tuple[jax.Array]:
        return (cotangent * jnp.log(-jnp.ones([])),)

    doubled.defvjp(lambda x: (doubled(x), None), backward)

    def looped(x: jax.Array) -> jax.Array:
        def body(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            step, y = carry
            return step + 1, jax.lax.fori_loop(0, 2, lambda _, y: jnp.exp(y + one - two), y)

        one, two, limit = 0.0 * x + 1.0, 0.0 * x + 2.0, jnp.stack([x.sum(), x.sum() * 0.0 + 3.0])
        return jax.lax.while_loop(lambda carry: carry[0] < limit[1], body, (0, x))[1]

    def chosen(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x.sum() > -1e9, lambda x: jnp.sqrt(x - 100.0), jnp.square, x)

    def loss_with(function: Callable[[jax.Array], jax.Array]) -> Any:
        return train_step(lambda params, batch, ctx: function(ctx.apply(params, batch["x"])[:, 0]))

    state, batch = make_state(nn.Dense(1)), batch_with("x")
    finding = found(loss_with(doubled), state, batch)
    # To JAX, what a rule of a derivative does is done in the line that calls the function.
    assert (finding.where, finding.operation) == ("the gradient", "log")
    assert finding.line == line_of(loss_with, "function(ctx")
    stopped = loss_with(lambda x: jax.lax.stop_gradient(looped(jax.lax.stop_gradient(x))) + x)
    finding = found(stopped, state, batch)
    assert (finding.operation, finding.line) == ("exp", line_of(looped, "jnp.exp"))
    assert found(loss_with(chosen), state, batch).line == line_of(chosen, "jnp.sqrt")


def test_diagnose_names_the_line_that_called_a_library() -> None:
    def loss_fn(params: Any, batch: Any, ctx: Any) -> jax.Array:
        first = jnp.linalg.norm(params["kernel"])
        second = jnp.linalg.norm(params["kernel"] - jax.lax.stop_gradient(params["kernel"]))
        return square_loss(params, batch, ctx) + first + second

    finding = found(train_step(loss_fn), make_state(nn.Dense(1)), batch_with("x"))
    assert finding.line == line_of(loss_fn, "second = ")


def test_diagnose_names_no_line_of_whoever_called() -> None:
    step = jax.jit(measured(train_step(square_loss)), inline=True)
    state = make_state(nn.Dense(1), optax.chain(optax.scale(1e38), optax.scale(1e38)))
    jax.block_until_ready(step(state, batch_with("x")))
    finding = found(measured(step), state, batch_with("x"))
    assert (finding.operation, finding.line) == ("mul", "")


@pytest.mark.slow
def test_diagnose_sees_gradients_that_accumulate() -> None:
    def loss_fn(params: Any, batch: Any, ctx: Any) -> jax.Array:
        return square_loss(params, batch, ctx) + jnp.sqrt(jnp.sum(params["bias"] ** 2))

    for tx in (accumulate(optax.sgd(0.1), 2), optax.MultiSteps(optax.sgd(0.1), 2)):
        finding = found(train_step(loss_fn), make_state(nn.Dense(1), tx), batch_with("x"))
        assert (finding.where, finding.names) == ("the gradient", ("bias",))


def test_diagnose_says_nothing_of_good_step_or_one_that_fails() -> None:
    def failing(state: TrainState, batch: Any) -> Any:
        raise RuntimeError("no step")

    state = make_state(nn.Dense(1))
    assert diagnose(train_step(square_loss), state, batch_with("x")) is None
    assert diagnose(failing, state, batch_with("x")) is None
    assert diagnose(train_step(square_loss), state, None) is None


def test_diagnose_says_nothing_where_other_processes_hold_arrays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state, batch = make_state(Model()), batch_with("x")
    monkeypatch.setattr(type(state.step), "is_fully_addressable", False)
    assert diagnose(train_step(square_loss), state, batch) is None


def test_diagnose_names_leaves_when_time_is_over() -> None:
    finding = diagnose(train_step(square_loss), make_state(Model()), batch_with("x"), max_seconds=0)
    assert finding == Finding("the forward pass", ("loss",), "The loss is not finite.")


def test_diagnose_works_where_nan_and_transfers_are_refused() -> None:
    state = make_state(Model())
    with jax.debug_nans(True), jax.transfer_guard_device_to_host("disallow"):
        finding = diagnose(train_step(square_loss), state, batch_with("x"))
    assert finding is not None
    assert finding.operation == "log"


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
@pytest.mark.slow
def test_diagnose_and_replay_work_on_sharded_batches(kind: jax.sharding.AxisType) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    batch = jax.device_put(batch_with("x"), jax.sharding.NamedSharding(mesh, jax.P("data")))
    step, state = train_step(square_loss), make_state(Model())
    finding = found(step, state, batch)
    assert finding.where == "the forward pass"
    # An explicit mesh refuses single operations on arrays that are not placed on it.
    assert finding.operation == ("log" if kind == jax.sharding.AxisType.Auto else "")
    replayed = replay(step, state, [batch], max_seconds=60)
    assert replayed is not None
    assert replayed.batch is batch


def batches(*bad: int) -> Iterator[dict[str, Any]]:
    """Yields batches of which some, by position, hold NaN; no end."""
    for index in itertools.count():
        yield batch_with("x", *([(2, 0)] if index in bad else []))


@pytest.mark.slow
def test_replay_returns_first_bad_step_and_the_state_before_it() -> None:
    step, state = train_step(square_loss), make_state(nn.Dense(1), optax.adam(0.1))
    expected = state
    for batch in itertools.islice(batches(), 3):
        expected, _ = jax.jit(step)(expected, batch)
    found = replay(step, state, batches(3, 5), max_seconds=60)
    assert found is not None
    assert found.index == int(found.state.step) == 3
    assert np.isnan(found.batch["x"][2, 0])
    for leaf, other in zip(jax.tree.leaves(found.state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(
            *(
                jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
                for x in (leaf, other)
            )
        )
    assert diagnose(step, found.state, found.batch) is not None
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("what", ["loss", "state", "neither"])
def test_replay_looks_at_loss_and_state(what: str) -> None:
    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        is_bad = state.step == 2
        bad = jnp.where(is_bad, jnp.nan, 0.0)
        params = jax.tree.map(lambda x: x + bad * (what == "state"), state.params)
        if what != "state":
            params = state.params
        loss = bad if what == "loss" else jnp.zeros([])
        return state.replace(step=state.step + 1, params=params), {"loss": loss, "other": bad}

    found = replay(step, make_state(nn.Dense(1)), itertools.islice(batches(), 5), max_seconds=60)
    assert (found and found.index) == (None if what == "neither" else 2)


def test_replay_compiles_once_and_gives_no_state_away() -> None:
    traces = []

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        traces.append(batch)
        return user_step(state, batch)

    state = make_state(nn.Dense(1))
    donating = jax.jit(step, donate_argnums=0)
    assert replay(donating, state, itertools.islice(batches(), 6), max_seconds=60) is None
    assert len(traces) == 1
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_replay_runs_steps_that_read_values() -> None:
    donating = jax.jit(user_step, donate_argnums=0)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        after, metrics = donating(state, batch)
        assert float(metrics["loss"]) != 0.0
        return after, metrics

    found = replay(step, make_state(nn.Dense(1)), batches(2), max_seconds=60)
    assert found is not None
    assert found.index == 2
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(found.state))


def test_replay_stops_in_time() -> None:
    taken = []

    def endless() -> Iterator[Any]:
        for batch in batches():
            taken.append(time.monotonic())
            time.sleep(0.01)
            yield batch

    assert (
        replay(train_step(square_loss), make_state(nn.Dense(1)), endless(), max_seconds=0.3) is None
    )
    assert len(taken) >= 1
    assert time.monotonic() - taken[0] < 30
    assert (
        replay(train_step(square_loss), make_state(nn.Dense(1)), batches(0), max_seconds=0) is None
    )


def test_replay_says_nothing_where_batches_fail() -> None:
    def failing() -> Iterator[Any]:
        yield batch_with("x")
        raise OSError("no disk")

    assert (
        replay(train_step(square_loss), make_state(nn.Dense(1)), failing(), max_seconds=60) is None
    )


FLOATS = ["float16", "float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64"]
NUMBERS = st.sampled_from([0.0, 1.0, -2.0, np.nan, np.inf, -np.inf])


def arrays(dtype: str) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, 3, elements=NUMBERS).map(lambda x: x.astype(jnp.dtype(dtype)))


@settings(deadline=None, max_examples=30)
@example([(np.ones(2, "complex64"), np.array([1, np.nan * 1j], "complex64"))], True)
@given(
    st.lists(
        st.sampled_from(FLOATS).flatmap(lambda dtype: st.tuples(arrays(dtype), arrays(dtype))),
        max_size=2,
    ),
    st.booleans(),
)
@pytest.mark.slow
def test_new_bad_is_what_numpy_says(pairs: list[tuple[np.ndarray, np.ndarray]], jit: bool) -> None:
    expected = any(
        np.isfinite(complex(x)) and not np.isfinite(complex(y))
        for before, after in pairs
        for x, y in zip(before, after, strict=True)
    )
    others = {"count": np.arange(3), "flag": np.ones(2, bool), "key": jax.random.key(0), "no": None}
    before, after = (
        ({"floats": list(each), **others} for each in zip(*pairs, strict=True))
        if pairs
        else (others, others)
    )
    flag = (jax.jit(new_bad) if jit else new_bad)(before, after)
    assert (flag.shape, flag.dtype) == ((), jnp.bool_)
    assert bool(flag) == expected
