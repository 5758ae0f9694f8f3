"""TrainStep and EvalStep: every form of loss, metric and batch, and what a loss may rely on."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff import EvalStep, TrainState, TrainStep, train_step
from distaff.errors import BatchError, ConfigError, LossError, StateError
from distaff.execution.placement import owned
from distaff.metrics import Last, Mean, Metric, Sum, compute, to_host
from distaff.step.normalise import accumulating, measured
from distaff.step.step import Context, MaskError

SIZE = 8
X = np.random.default_rng(0).normal(size=(SIZE, 3)).astype(np.float32)
Y = np.arange(SIZE, dtype=np.float32)
BATCH = {"x": X, "y": Y}


def linear(variables: Any, x: Any) -> jax.Array:
    return x @ variables["params"]["w"]


def linear_state(tx: optax.GradientTransformation | None = None, **members: Any) -> TrainState:
    tx = optax.sgd(0.5) if tx is None else tx
    return TrainState.create(apply_fn=linear, params={"w": jnp.ones(3)}, tx=tx, **members)


def squared(params: Any, batch: Any, ctx: Context) -> jax.Array:
    return jnp.square(ctx.apply(params, batch["x"]) - batch["y"])


class Net(nn.Module):
    dropout: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train, momentum=0.75)(x)
        return nn.Dropout(self.dropout, deterministic=not train)(x)


def net_state(**options: Any) -> TrainState:
    model, key = Net(**options), jax.random.key(3)
    variables = model.init(key, X, train=False)
    return TrainState.create(apply_fn=model.apply, tx=optax.sgd(0.0), rng=key, **variables)


def net_output(params: Any, batch: Any, ctx: Context) -> Any:
    outputs = ctx.apply(params, batch["x"])
    return jnp.square(outputs).mean(1), {"outputs": Last(outputs)}


def values_of(metrics: dict[str, Metric]) -> dict[str, Any]:
    return compute(to_host(metrics))


@pytest.mark.parametrize(
    ("reduce", "weight"),
    [
        (lambda loss: loss, np.ones(SIZE)),
        (lambda loss: loss.mean(), np.ones(SIZE)),
        (lambda loss: (loss, {}), np.ones(SIZE)),
        (lambda loss: Mean.per_example(loss), np.ones(SIZE)),
        (lambda loss: (Mean.per_example(loss, jnp.arange(SIZE)), {"n": Sum(1)}), np.arange(SIZE)),
    ],
    ids=["per example", "scalar", "with metrics", "declared", "weighted"],
)
def test_step_takes_the_gradient_of_the_mean_loss(reduce, weight):
    state, metrics = train_step(lambda *args: reduce(squared(*args)))(linear_state(), BATCH)
    errors = X.sum(1) - Y
    weight = weight / weight.sum()
    assert values_of(metrics)["loss"] == pytest.approx(float(weight @ errors**2), rel=1e-5)
    gradient = 2 * (weight * errors) @ X
    np.testing.assert_allclose(state.params["w"], 1 - 0.5 * gradient, rtol=1e-5)
    assert int(state.step) == 1


RULE = "A loss is a float: one number per example, shape [8], or a scalar; the loss function"


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (jnp.ones((8, 3)), f"{RULE} returned shape (8, 3). Average it first: loss.mean(axis=(1,))"),
        (jnp.ones((8, 2, 2)), "loss.mean(axis=(1, 2))"),
        (jnp.ones(5), f"{RULE} returned shape (5,). Average it first: loss.mean()."),
        (Mean.per_example(jnp.ones((8, 3))), "returned shape (8, 3). Average it first"),
        (Mean.per_example(jnp.ones(5)), "returned shape (5,)"),
        (jnp.arange(8), f"{RULE} returned dtype int32."),
        (jnp.ones(8, bool), "returned dtype bool"),
        ([1.0] * 8, f"{RULE} returned list."),
        (None, f"{RULE} returned NoneType."),
        (Sum(jnp.ones(())), f"{RULE} returned Sum."),
        (Sum.per_example(jnp.ones(8)), f"{RULE} returned PerExample."),
        ((jnp.ones(8), jnp.ones(8)), "or (loss, metrics) with metrics as a dict; it returned"),
        ((jnp.ones(8), {}, {}), "it returned tuple holding tuple and dict"),
        ({"loss": jnp.ones(8)}, "it returned dict holding dict and dict"),
        ((jnp.ones(8), {"loss": 1.0}), "The metric name 'loss' is reserved for the loss. Rename"),
        ((jnp.ones(8), {"hits": jnp.ones(3)}), "'hits' has shape (3,); expected a scalar"),
    ],
)
def test_step_refuses_a_wrong_loss_and_names_the_remedy(returned, message):
    for step in (train_step(lambda *args: returned), EvalStep(lambda *args: returned)):
        with pytest.raises(LossError, match=re.escape(message)):
            jax.eval_shape(step, linear_state(), BATCH)


def test_step_refuses_a_batch_whose_leaves_disagree():
    with pytest.raises(BatchError, match=re.escape("'y' has shape (7,)")):
        train_step(squared)(linear_state(), {"x": X, "y": Y[:7]})


def test_a_loss_without_what_it_needs_says_so():
    step = train_step(lambda params, batch, ctx: jax.random.normal(ctx.rng, (SIZE,)))
    with pytest.raises(StateError, match=re.escape("ctx.rng needs a root key, and TrainState.rng")):
        step(linear_state(), BATCH)
    with pytest.raises(ConfigError, match=re.escape("ctx.apply needs TrainState.apply_fn")):
        train_step(squared)(linear_state().replace(apply_fn=None), BATCH)
    with pytest.raises(LossError, match="TrainStep has no loss"):
        TrainStep()(linear_state(), BATCH)


def test_apply_takes_params_bare_and_under_their_name():
    state = linear_state()
    bare = train_step(squared)(state, BATCH)
    named = train_step(lambda p, b, ctx: squared({"params": p}, b, ctx))(state, BATCH)
    jax.tree.map(np.testing.assert_array_equal, named, bare)


def test_running_statistics_move_in_training_and_only_there():
    state = net_state()
    trained, _ = train_step(net_output)(state, BATCH)
    moved = trained.batch_stats["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(moved, 0.25 * X.mean(0), rtol=1e-5)
    ctx = Context(trained, train=False)
    outputs = ctx.apply(trained.params, X)
    stats = trained.batch_stats["BatchNorm_0"]
    expected = (X - stats["mean"][None]) / np.sqrt(stats["var"][None] + 1e-5)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    assert ctx.changed["batch_stats"] is trained.batch_stats


def test_dropout_differs_between_steps_and_repeats_for_the_same_step():
    step, state = train_step(net_output), net_state()

    def dropped(state: TrainState) -> np.ndarray:
        return np.asarray(step(state, BATCH)[1]["outputs"].compute()) == 0

    first, second = dropped(state), dropped(state.replace(step=jnp.int32(1)))
    assert first.any()
    assert not first.all()
    assert (first != second).any()
    np.testing.assert_array_equal(dropped(state), first)
    assert (dropped(state.replace(rng=jax.random.key(4))) != first).any()


def test_two_passes_draw_from_their_own_keys_and_chain_the_statistics():
    def twice(params: Any, batch: Any, ctx: Context) -> Any:
        first, second = (ctx.apply(params, batch["x"] + shift) for shift in (0.0, 4.0))
        return jnp.square(first).mean(1), {"first": Last(first), "second": Last(second)}

    state, metrics = train_step(twice)(net_state(), BATCH)
    drops = [np.asarray(metrics[name].compute()) == 0 for name in ("first", "second")]
    assert (drops[0] != drops[1]).any()
    chained = 0.75 * (0.25 * X.mean(0)) + 0.25 * (X.mean(0) + 4)
    np.testing.assert_allclose(
        state.batch_stats["BatchNorm_0"]["mean"], chained, rtol=1e-5, atol=1e-6
    )


def test_evaluation_draws_the_same_whatever_the_step():
    def noise(params: Any, batch: Any, ctx: Context) -> jax.Array:
        return jax.random.uniform(ctx.rng, (SIZE,)) + ctx.apply(params, batch["x"]).mean()

    states = [net_state(), net_state().replace(step=jnp.int32(5))]
    evaluated = [values_of(EvalStep(noise)(state, BATCH)) for state in states]
    trained = [values_of(train_step(noise)(state, BATCH)[1]) for state in states]
    assert evaluated[0] == evaluated[1]
    assert trained[0] != trained[1]
    assert evaluated[0] != trained[0]


def test_eval_step_counts_only_what_its_mask_shows():
    def loss(params: Any, batch: Any, ctx: Context) -> Any:
        return squared(params, batch, ctx), {"y": Sum.per_example(batch["y"])}

    poisoned = {"x": np.where(Y[:, None] < 5, X, np.nan), "y": Y}
    metrics = values_of(EvalStep(loss)(linear_state(), poisoned, jnp.asarray(Y < 5)))
    expected = np.square(X.sum(1) - Y)[:5].mean()
    assert metrics == {"loss": pytest.approx(float(expected), rel=1e-5), "y": 10.0}
    assert np.isnan(values_of(EvalStep(loss)(linear_state(), poisoned))["loss"])


def test_eval_step_refuses_a_mask_over_what_is_reduced_already():
    step = EvalStep(lambda *args: (squared(*args), {"n": Sum(jnp.int32(1))}))
    with pytest.raises(MaskError, match=re.escape("['n'] are reduced already")):
        step(linear_state(), BATCH, jnp.ones(SIZE, bool))


def test_the_loss_is_traced_once_for_many_steps():
    traces = 0

    def counted(params: Any, batch: Any, ctx: Context) -> Any:
        nonlocal traces
        traces += 1
        return squared(params, batch, ctx), {"one": 1, "rate": Last(0.5), "n": Sum(jnp.sum(Y > 3))}

    step = jax.jit(measured(TrainStep(counted)), donate_argnums=0)
    state = linear_state(optax.adam(0.1), rng=jax.random.key(0))
    for _ in range(5):
        state, metrics = step(state, BATCH)
        assert float(metrics["n"].compute()) == 4
    assert (traces, int(state.step)) == (1, 5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    x: Any
    y: Any


@pytest.mark.parametrize("make", [lambda x, y: (x, y), lambda x, y: [x, y], Pair])
def test_a_batch_is_any_pytree(make):
    def loss(params: Any, batch: Any, ctx: Context) -> jax.Array:
        x, y = (batch.x, batch.y) if isinstance(batch, Pair) else batch
        return squared(params, {"x": x, "y": y}, ctx)

    got = jax.jit(train_step(loss))(linear_state(), make(X, Y))
    expected = jax.jit(train_step(squared))(linear_state(), BATCH)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(got), jax.tree.leaves(expected))


def test_train_step_serves_a_line_search():
    start = values_of(EvalStep(squared)(linear_state(), BATCH))["loss"]
    state, step = linear_state(optax.lbfgs()), jax.jit(train_step(squared))
    for _ in range(8):
        state, metrics = step(state, BATCH)
    solution = np.linalg.lstsq(X, Y)[0]
    np.testing.assert_allclose(state.params["w"], solution, rtol=1e-3, atol=1e-3)
    assert values_of(metrics)["loss"] < start


def test_a_step_of_ones_own_may_return_plain_metrics():
    def own(state: TrainState, batch: Any) -> Any:
        state = state.replace(step=state.step + 1)
        return state, {"rows": batch["y"], "mean": batch["y"].mean(), "max": Last(batch["y"].max())}

    _, metrics = jax.jit(measured(own))(linear_state(), BATCH)
    assert values_of(metrics) == {"rows": 3.5, "mean": 3.5, "max": 7.0}
    with pytest.raises(LossError, match=re.escape("'rows' has shape (8,)")):
        accumulating({"rows": Y}, 5)


def test_measured_step_keeps_no_weak_type_that_would_compile_it_twice():
    class Counting(TrainState):
        count: Any = 0

    def step(state: Counting, batch: Any) -> Any:
        return state.replace(count=1.0 * batch["x"].shape[0]), {}

    state = owned(
        Counting.create(params=jnp.ones(2), count=jnp.asarray(1.0), rng=jax.random.key(0))
    )
    program = jax.jit(measured(step))
    assert not any(jax.typeof(leaf).weak_type for leaf in jax.tree.leaves(state))
    new, _ = program(state, {"x": np.ones([2, 1])})
    assert not any(jax.typeof(leaf).weak_type for leaf in jax.tree.leaves(new))
