"""Flax NNX modules as pure functions: variables, streams, modes, stacked layers, records."""

from __future__ import annotations

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distaff import TrainerModule, TrainState
from distaff.core.config.encoding import to_json
from distaff.errors import CheckpointError, ConfigError, StateError
from distaff.models import NnxModel, Variables, as_model, model_of, rebuild

KEY = jax.random.key(0)
X = jnp.linspace(-1, 1, 6).reshape(2, 3)


class Counter(nnx.Variable):
    pass


class Everything(nnx.Module):
    """Normalises, drops, counts its calls, shares a layer, holds an array that is no variable."""

    def __init__(self, width=3, rate=0.5, *, rngs):
        self.layers = nnx.List([nnx.Linear(width, 3, rngs=rngs) for _ in range(2)])
        self.tied = self.layers[0]
        self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.calls = Counter(jnp.zeros((), jnp.int32))
        self.places = nnx.Param(jnp.arange(3))
        self.offset = jnp.full((3,), 0.5)
        self.stream = rngs.noise.fork()

    def encode(self, x, scale=1.0):
        return self.layers[0](x) * scale

    def __call__(self, x):
        self.calls[...] += 1
        for layer in self.layers:
            x = layer(x)
        noise = jax.random.normal(self.stream())
        return self.drop(self.norm(self.tied(x + self.offset[None]))), noise


class Block(nnx.Module):
    def __init__(self, *, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.stream = rngs.noise.fork()
        self.calls = Counter(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        return self.drop(self.linear(x)), jax.random.normal(self.stream())


class Stack(nnx.Module):
    """Its layers are one module with a leading axis, which a scan runs through."""

    def __init__(self, *, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return Block(rngs=rngs)

        self.blocks = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def run(x, block):
            return block(x)

        return run(x, self.blocks)


class Flags(nnx.Module):
    def __call__(self, x, training, rngs=None):
        return training, rngs


class Sows(nnx.Module):
    def __init__(self, *, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.seen = Counter(jnp.zeros(()))

    def __call__(self, x):
        self.added = Counter(x.sum())
        return self.linear(x)


@pytest.fixture(scope="module")
def model() -> NnxModel:
    return NnxModel(lambda rngs: Everything(rngs=rngs))


@pytest.fixture(scope="module")
def variables(model: NnxModel) -> Variables:
    return jax.jit(model.init)(KEY)


def assert_same(tree: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_variables_lie_by_their_types(variables):
    assert set(variables.params) == {"layers", "norm"}  # shared layers once, integers not
    assert set(variables.params["layers"]) == {"0", "1"}
    assert set(variables.batch_stats["norm"]) == {"mean", "var"}
    assert {name: jax.tree.map(jnp.shape, x) for name, x in variables.collections.items()} == {
        "Counter": {"calls": ()},
        "Param": {"places": (3,)},
        "arrays": {"offset": (3,)},
    }
    assert not any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(variables))


def test_pass_agrees_with_the_live_module(model, variables):
    live = nnx.clone(Everything(rngs=nnx.Rngs(3)))
    held = as_model(live).ready(KEY)
    live.eval()
    expected, _ = live(X)
    (outputs, _), after = as_model(live).apply(held, X, train=False, key=KEY)
    np.testing.assert_allclose(outputs, expected, rtol=1e-6)
    assert after is held


def test_training_changes_all_but_the_parameters(model, variables):
    (_, noise), once = model.apply(variables, X, train=True, key=KEY)
    (_, other), twice = model.apply(once, X, train=True, key=jax.random.key(1))
    assert once.collections["Counter"]["calls"] == 1
    assert twice.collections["Counter"]["calls"] == 2
    assert (once.batch_stats["norm"]["mean"] != variables.batch_stats["norm"]["mean"]).any()
    assert once.params is variables.params
    assert jax.tree.structure(once) == jax.tree.structure(variables)
    assert noise != other


def test_gradient_of_a_shared_layer_is_of_both_its_uses(model, variables):
    def loss(params):
        return model.apply(variables._replace(params=params), X, train=False, key=None)[0][0].sum()

    grads = jax.grad(loss)(variables.params)
    first = grads["layers"]["0"]["bias"]
    direction = jax.tree.map(jnp.zeros_like, variables.params)
    direction["layers"]["0"]["bias"] = jnp.ones(3)

    def moved(step):
        return loss(jax.tree.map(lambda p, d: p + step * d, variables.params, direction))

    np.testing.assert_allclose(first.sum(), (moved(0.5) - moved(-0.5)), rtol=1e-3)


def test_stacked_layers_have_streams_and_variables_of_their_own():
    model = as_model(Stack)
    variables = jax.jit(model.init)(KEY)
    assert variables.params["blocks"]["linear"]["kernel"].shape == (3, 3, 3)

    @jax.jit
    def run(variables, key):
        return model.apply(variables, X, train=True, key=key)

    (_, noise), after = run(variables, KEY)
    assert len(set(noise.tolist())) == 3
    assert_same(after.collections["Counter"]["blocks"]["calls"], np.ones(3))
    (_, other), _ = run(variables, jax.random.key(1))
    assert not set(noise.tolist()) & set(other.tolist())
    rows = {row.path: row for row in model.layers(KEY, X)}
    assert rows["blocks/linear"].variables[1][2] == (3, 3, 3)


def test_key_of_the_pass_is_the_only_source_of_randomness():
    made = [Everything(rngs=nnx.Rngs(5)) for _ in range(2)]
    made[1].stream()  # has drawn once more
    outputs = [
        as_model(each).apply(as_model(each).ready(KEY), X, train=True, key=KEY)[0] for each in made
    ]
    assert_same(*outputs)


def test_ready_made_module_keeps_its_parameters_and_a_function_follows_the_seed():
    def params(model: Any, seed: int) -> Any:
        trainer = TrainerModule(
            model, seed=seed, root=None, enable_progress_bar=False, tune_process=False
        )
        trainer.init_model({"x": X})
        return trainer.state.params["layers"]["0"]["kernel"]

    module = Everything(rngs=nnx.Rngs(0))
    assert_same(params(module, 1), params(module, 2))
    assert params(module, 1) is module.layers[0].kernel.get_value()  # no copy, no constant
    for made in (Everything, functools.partial(Everything, 3), lambda rngs: Everything(rngs=rngs)):
        assert_same(params(made, 1), params(Everything, 1))
        assert (params(made, 1) != params(made, 2)).any()


def test_call_is_told_whether_it_trains_and_given_streams():
    model = as_model(Flags())
    (training, rngs), _ = model.apply(Variables({}), X, train=True, key=KEY)
    assert training is True
    assert isinstance(rngs, nnx.Rngs)
    (training, rngs), _ = model.apply(Variables({}), X, train=False, key=None)
    assert (training, rngs) == (False, None)
    (training, _), _ = model.apply(Variables({}), X, train=True, key=None, training="mine")
    assert training == "mine"


@pytest.mark.parametrize("method", ["encode", Everything.encode])
def test_other_method_is_called(model, variables, method):
    outputs, _ = model.apply(variables, X, train=False, key=None, method=method, scale=2.0)
    layer = variables.params["layers"]["0"]
    np.testing.assert_allclose(outputs, (X @ layer["kernel"] + layer["bias"][None]) * 2, rtol=1e-5)


def test_variable_that_a_pass_adds_is_dropped():
    model = as_model(Sows(rngs=nnx.Rngs(0)))
    _, after = model.apply(model.ready(KEY), X, train=True, key=KEY)
    assert jax.tree.structure(after) == jax.tree.structure(model.ready(KEY))


def test_forward_function_of_the_state_takes_collections(model, variables):
    assert model_of(model.apply_fn) is model
    outputs, _ = model.apply(variables, X, train=False, key=None)
    assert_same(model.apply_fn(variables.by_collection(), X), outputs)
    with pytest.raises(StateError, match="needs 'Counter/calls', which is not among"):
        model.apply_fn({"params": variables.params}, X)
    state = TrainState.create(params={}, apply_fn=model.apply_fn)
    assert jax.tree.structure(state) == jax.tree.structure(state.replace(step=state.step + 1))


def test_bound_module_is_live_and_evaluates(model, variables):
    bound = model.bind(variables)
    assert isinstance(bound, Everything)
    assert_same(bound(X)[0], bound(X)[0])
    assert bound.calls[...] == 2
    bound.train()
    assert (bound(X)[0] != bound(X)[0]).any()
    assert variables.collections["Counter"]["calls"] == 0


def test_table_lists_modules_in_order_of_call(model):
    call = nnx.Linear.__call__
    rows = model.layers(jax.eval_shape(jax.random.key, 0), X)
    assert nnx.Linear.__call__ is call
    assert [(row.path, row.kind, row.output) for row in rows] == [
        ("", "Everything", "float32[2,3], float32[]"),
        ("layers/0", "Linear", "float32[2,3]"),
        ("layers/1", "Linear", "float32[2,3]"),
        ("norm", "BatchNorm", "float32[2,3]"),
        ("drop", "Dropout", "float32[2,3]"),
    ]
    assert [name for _, name, _, _ in rows[1].variables] == ["bias", "kernel"]


def test_record_tells_models_apart_and_is_no_recipe():
    def record(*options: Any) -> Any:
        made = as_model(lambda rngs: Everything(*options, rngs=rngs))
        return json.loads(json.dumps(to_json(made.record)))

    assert record() == record()
    assert record(3, 0.5) != record(3, 0.25)
    assert record(3) != record(4)
    assert record() == json.loads(
        json.dumps(to_json(as_model(Everything(rngs=nnx.Rngs(7))).record))
    )
    with pytest.raises(CheckpointError, match=r"kind flax\.nnx: .*:Everything\. Pass the module"):
        rebuild(record())


class NeedsMore(nnx.Module):
    def __init__(self, width, *, rngs):
        self.width = width


def test_what_makes_no_module_is_refused():
    with pytest.raises(ConfigError, match=r"pass lambda rngs: NeedsMore\(\.\.\., rngs=rngs\)"):
        as_model(NeedsMore)
    with pytest.raises(ConfigError, match=r"must return a flax\.nnx\.Module; .* returned dict"):
        as_model(lambda rngs: {}).init(KEY, X)
