"""What a pass draws from, what it keeps, and where it may be called."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import DenyList, freeze

from distaff import Context, TrainerModule, TrainState
from distaff.errors import ConfigError, LossError
from distaff.models import Variables, as_model, whole_batches
from distaff.models.randomness import NoKeyError
from distaff.trainer.initial import normalized

KEY = jax.random.key(0)
X = jnp.linspace(-1, 1, 12).reshape(4, 3)


def context(source: Any, *, train: bool = True, rng: Any = KEY) -> tuple[Context, Any]:
    model = as_model(source)
    variables = model.ready(KEY) or model.init(KEY, X)
    state = TrainState.create(**variables._asdict(), apply_fn=model.apply_fn, rng=rng)
    return Context(state, train=train), jax.tree.map(jnp.copy, state.params)


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        return nn.Dropout(0.5, deterministic=not train)(x)


class NnxDropping(nnx.Module):
    def __init__(self, rngs):
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(x)


class EqxDropping(eqx.Module):
    scale: jax.Array
    drop: eqx.nn.Dropout

    def __call__(self, x, *, rng=None):
        return self.drop(x * self.scale, key=rng)


def _functions():
    return lambda key: {
        "w": jnp.ones(())
    }, lambda params, x, *, key: x * params["w"] * jax.random.bernoulli(key, 0.5, x.shape)


def eqx_dropping(key):
    return EqxDropping(jnp.ones(()), eqx.nn.Dropout(0.5))


DROPPING = {
    "linen": Dropping,
    "nnx": lambda: NnxDropping,
    "equinox": lambda: eqx_dropping,
    "functions": _functions,
}
LOOPS = {
    "scan": lambda f, xs: jax.lax.scan(lambda carry, x: (carry, f(x)), None, xs)[1],
    "map": jax.lax.map,
    "vmap": lambda f, xs: jax.vmap(f)(xs),
    "fori_loop": lambda f, xs: jax.lax.fori_loop(0, 2, lambda n, total: total + f(xs[n]), 0 * X),
}


@pytest.mark.parametrize(
    ("kind", "loop"), [("linen", loop) for loop in LOOPS] + [(kind, "scan") for kind in DROPPING]
)
@pytest.mark.slow
def test_pass_in_a_loop_draws_from_the_key_that_it_is_given_alone(kind, loop):
    ctx, params = context(DROPPING[kind]())
    with pytest.raises(LossError, match=r"rngs=key"):
        LOOPS[loop](lambda key: ctx.apply(params, X), jax.random.split(KEY, 2))
    drawn = jax.lax.map(lambda key: ctx.apply(params, X, rngs=key), jax.random.split(KEY, 2))
    assert (drawn[0] != drawn[1]).any()


def test_loop_around_the_step_and_transformations_of_one_pass_are_no_matter():
    ctx, params = context(Dropping())
    state = ctx.state

    def step(number, _):
        inner = Context(state, train=True)
        ctx_passes = jax.checkpoint(lambda x: inner.apply(params, x))(X)
        return number, jnp.stack([ctx_passes, jax.jit(lambda x: inner.apply(params, x))(X)])

    drawn = jax.lax.scan(step, 0, None, length=2)[1][0]
    assert (drawn[0] != drawn[1]).any()
    assert (drawn == 0).any()


@pytest.mark.parametrize(
    "around",
    [
        jax.checkpoint,
        lambda f: jax.vmap(f, in_axes=(None, 0)),
        lambda f: lambda p, x: jax.grad(lambda p: f(p, x).sum())(p),
    ],
    ids=["checkpoint", "vmap", "grad"],
)
def test_statistics_that_cannot_leave_a_transformation_are_an_error(around):
    ctx, params = context(nn.BatchNorm(momentum=0.5))
    with pytest.raises(LossError, match=r"batch_stats.*remat=\.\.\. to the trainer"):
        around(ctx.apply)(params, X)
    around(lambda p, x: ctx.apply(p, x, use_running_average=True))(params, X)
    with pytest.raises(LossError, match="a penalty"):
        jax.checkpoint(lambda x: ctx.add_penalty(x.sum()))(X)


def test_model_that_draws_needs_a_key():
    for kind, make in DROPPING.items():
        ctx, params = context(make(), rng=None)
        with pytest.raises(NoKeyError, match="draws random numbers"):
            ctx.apply(params, X)
        assert ctx.apply(params, X, rngs=KEY).shape == X.shape, kind


class Streams(nn.Module):
    @nn.compact
    def __call__(self, x):
        def draw(cell, carry, _):
            return carry, jax.random.normal(cell.make_rng("noise"))

        steps = nn.scan(
            draw, variable_broadcast="params", split_rngs={"params": False, "noise": True}, length=3
        )
        return steps(self, None, None)[1], jax.random.normal(self.make_rng("other"))


def test_streams_of_any_name_are_split_and_may_be_passed():
    ctx, params = context(Streams(), train=False)
    noise, other = ctx.apply(params, X)
    assert len({*noise.tolist(), float(other)}) == 4
    given = ctx.apply(params, X, rngs={"noise": jax.random.key(7)})
    again = ctx.apply(params, X, rngs={"noise": jax.random.key(7)})
    np.testing.assert_array_equal(given[0], again[0])
    assert (given[0] != noise).all()


class WithKey(nn.Module):
    @nn.compact
    def __call__(self, x, z_rng, *, train=False):
        return x + jax.random.normal(z_rng, x.shape)


def test_linen_module_that_asks_for_a_key_is_given_one():
    ctx, params = context(WithKey())
    assert (ctx.apply(params, X) != ctx.apply(params, X)).all()


class Sown(nn.Module):
    @nn.compact
    def __call__(self, x):
        zero = {"init_fn": lambda: jnp.zeros(()), "reduce_fn": jnp.add}
        self.sow("losses", "sum", x.mean(), **zero)
        self.sow("losses", "sum", jnp.ones(()), **zero)
        self.sow("intermediates", "all", x)
        ema = self.variable("ema", "mean", lambda: jnp.zeros(()))
        hidden = self.perturb("hidden", x + ema.value)
        if self.is_mutable_collection("ema"):
            ema.value = ema.value + 1
        return hidden


def test_state_is_what_a_pass_leaves_for_the_next_one():
    model = as_model(Sown())
    variables = model.init(KEY, X)
    assert jax.tree.structure(variables.collections) == jax.tree.structure({"ema": {"mean": 0}})
    for train in (True, False):
        (_, sown), _ = model.apply(variables, X, train=train, key=KEY, mutable="losses")
        assert set(sown) == {"losses"}
        np.testing.assert_allclose(sown["losses"]["sum"], 1, atol=1e-6)
    (_, sown), after = model.apply(variables, X, train=True, key=KEY, mutable=DenyList("losses"))
    assert set(sown) == {"ema", "intermediates", "perturbations"} | (set(sown) & {"params"})
    assert float(after.collections["ema"]["mean"]) == 2
    (_, seen), _ = model.apply(variables, X, train=False, key=KEY, mutable=True)
    assert {"losses", "intermediates", "ema"} <= set(seen)


class Grows(nn.Module):
    """Counts in evaluation too, and adds a variable in training."""

    @nn.compact
    def __call__(self, x, train=True):
        calls = self.variable("counters", "calls", lambda: jnp.zeros((), jnp.int32))
        calls.value += 1
        if train and not self.is_initializing():
            self.sow("counters", "sown", x)
        return x


def test_evaluation_drops_changes_and_training_keeps_the_form():
    model = as_model(Grows())
    variables = model.init(KEY, X)
    assert model.apply(variables, X, train=False, key=None)[1] is variables
    after = model.apply(variables, X, train=True, key=None)[1]
    assert jax.tree.map(int, after.collections) == {"counters": {"calls": 2}}


def test_mode_and_key_of_a_pass_may_be_chosen():
    ctx, params = context(Dropping(), train=False)
    np.testing.assert_array_equal(ctx.apply(params, X), X)
    chosen = ctx.apply(params, X, train=True, key=KEY)
    np.testing.assert_array_equal(chosen, ctx.apply(params, X, train=True, rngs=KEY))
    assert (chosen == 0).any()
    for kwargs in ({"train": X}, {"key": X}):
        with pytest.raises(ConfigError, match="by position"):
            ctx.apply(params, X, **kwargs)


def test_collections_that_are_passed_are_those_of_the_pass():
    ctx, params = context(nn.BatchNorm(use_running_average=True), train=False)
    moved = {"mean": jnp.full(3, 5.0), "var": jnp.ones(3)}
    np.testing.assert_allclose(
        ctx.apply({"params": params, "batch_stats": moved}, X), X - 5, rtol=1e-4
    )
    np.testing.assert_array_equal(ctx.changed["batch_stats"]["mean"], jnp.zeros(3))


def test_bound_module_and_its_own_functions_are_the_module():
    variables = {"params": {"kernel": jnp.full((3, 1), 2.0), "bias": jnp.zeros(1)}}
    bound = as_model(nn.Dense(1).bind(variables))
    np.testing.assert_array_equal(bound.ready(KEY).params["kernel"], jnp.full((3, 1), 2.0))
    assert bound.module.scope is None
    module = nn.Dense(1)
    assert as_model((module.init, module.apply)).module is module


class Boxes(nn.Module):
    @nn.compact
    def __call__(self, x):
        ones = nn.with_partitioning(nn.initializers.ones, ("embed",))
        return nn.LayerNorm(scale_init=ones)(x)


def test_boxes_are_opened_and_arrays_are_those_of_a_program():
    variables = as_model(Boxes()).init(KEY, X)
    assert isinstance(variables.params["LayerNorm_0"]["scale"], jax.Array)
    rows = as_model(Boxes()).layers(jax.eval_shape(jax.random.key, 0), X)
    assert {name for row in rows for _, name, _, _ in row.variables} == {"scale", "bias"}
    raw = Boxes().init(KEY, X)
    found = normalized({**raw, "tables": {"a": np.arange(3.0), "b": np.int64(1)}})
    assert isinstance(found.params["LayerNorm_0"]["scale"], jax.Array)
    assert jax.tree.map(lambda x: str(x.dtype), found.collections) == {
        "tables": {"a": "float32", "b": "int32"}
    }
    frozen = normalized(Variables(freeze({"a": X}), None, freeze({"b": {"c": X}})))
    assert [type(frozen.params), type(frozen.collections)] == [dict, dict]
    with pytest.raises(ConfigError, match="run_model_init must return"):
        normalized([1])


def _orthogonal(key, shape):
    return jnp.asarray(np.linalg.qr(np.asarray(jax.random.normal(key, (3, 3))))[0][:, : shape[1]])


class HostInitializer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", _orthogonal, (3, 1))


def test_initializer_of_linen_that_computes_on_the_host_is_named():
    params = HostInitializer().init(KEY, X)["params"]
    model = as_model(HostInitializer())
    with pytest.raises(ConfigError, match=r"initializer of HostInitializer.*jnp\.linalg\.qr"):
        model.apply(Variables(params), X, train=True, key=None)


class Needs(nn.Module):
    @nn.compact
    def __call__(self, x, *, scale):
        return x * scale


def test_argument_that_is_missing_is_named_with_its_remedy():
    with pytest.raises(ConfigError, match=r"'scale'.*override run_model_init"):
        as_model(Needs()).init(KEY, X)


class Task(TrainerModule):
    def run_model_init(self, example_batch, key):
        return self.model.module.init(key, example_batch, scale=2.0)

    def predict_fn(self, params, batch, ctx):
        return ctx.apply(params, batch, scale=2.0)


def test_run_model_init_of_ones_own_is_enough_for_other_arguments():
    task = Task(Needs(), example_batch=np.asarray(X), root=None, enable_progress_bar=False)
    np.testing.assert_array_equal(task.predict([np.asarray(X)]), 2 * X)


class NnxSowing(nnx.Module):
    def __init__(self, rngs):
        self.head = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        self.sow(nnx.Intermediate, "sum", x.sum())
        return self.head(x)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_what_nnx_modules_sow_is_returned_and_no_state():
    module = NnxSowing(nnx.Rngs(0))
    module(X)
    ctx, params = context(module)
    assert ctx.state.collections is None
    _, sown = ctx.apply(params, X, mutable="Intermediate")
    np.testing.assert_allclose(sown["Intermediate"]["sum"][0], X.sum(), atol=1e-6)
    assert ctx.apply(params, X, mutable=["Other"])[1] == {}


class Moving(eqx.Module):
    scale: jax.Array
    index: eqx.nn.StateIndex

    def __call__(self, x, state):
        return x * self.scale, state.set(self.index, x.sum())


def test_state_of_equinox_that_differs_between_examples_is_an_error():
    module, state = eqx.nn.make_with_state(
        lambda: Moving(jnp.ones(()), eqx.nn.StateIndex(jnp.zeros(())))
    )()
    ctx, params = context((module, state))
    with pytest.raises(ConfigError, match=r"jax\.lax\.pmean\(value, 'batch'\)"):
        ctx.apply(params, X)
    model = whole_batches((module, state))
    _, after = model.apply(model.ready(KEY), X, train=True, key=None)
    np.testing.assert_allclose(after.collections["state"]["0"], X.sum(), atol=1e-6)


class Averaging(eqx.Module):
    scale: jax.Array

    def __call__(self, x):
        return x - jax.lax.pmean(x, "examples") * self.scale


def test_axis_of_an_unknown_name_is_an_error():
    ctx, params = context(Averaging(jnp.ones(())))
    with pytest.raises(ConfigError, match="axis_name='batch'"):
        ctx.apply(params, X)


def test_linen_collections_from_functions_are_not_trained():
    module = nn.BatchNorm(use_running_average=True)
    model = as_model((lambda key, x: module.init(key, x), lambda v, x: module.apply(v, x)))
    with pytest.raises(ConfigError, match="Pass the module itself"):
        model.init(KEY, X)
