"""Equinox modules as pure functions: arrays, examples, keys, states, inference mode."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff.core.config.encoding import to_json
from distaff.errors import ConfigError
from distaff.models import Variables, as_model, model_of, whole_batches

KEY = jax.random.key(0)
X = jnp.linspace(-1, 1, 12).reshape(4, 3)


class Net(eqx.Module):
    layers: list[Any]
    norm: eqx.nn.BatchNorm
    places: jax.Array
    width: int = eqx.field(static=True)

    def __init__(self, width=3, rate=0.5, *, key):
        self.layers = [eqx.nn.Linear(3, width, key=key), jax.nn.relu, eqx.nn.Dropout(rate)]
        self.norm = eqx.nn.BatchNorm(3, "batch", momentum=0.5, mode="batch")
        self.places = jnp.arange(3)
        self.width = width

    def encode(self, x, scale):
        return self.layers[0](x) * scale

    def __call__(self, x, state, *, key=None):
        x, state = self.norm(x, state)
        for layer in self.layers:
            x = layer(x, key=key) if isinstance(layer, eqx.nn.Dropout) else layer(x)
        noise = jnp.zeros(()) if key is None else jax.random.normal(key)
        return (x, noise), state


class OfBatches(eqx.Module):
    kernel: jax.Array

    def __call__(self, x, train, key):
        assert x.ndim == 2
        return x @ self.kernel + train, key


def make(key: Any) -> Any:
    return eqx.nn.make_with_state(Net)(key=key)


class OnlyKey(eqx.Module):
    linear: eqx.nn.Linear

    def __init__(self, *, key):
        self.linear = eqx.nn.Linear(3, 2, key=key)


@pytest.fixture(scope="module")
def model() -> Any:
    return as_model(make)


@pytest.fixture(scope="module")
def variables(model: Any) -> Variables:
    return jax.jit(model.init)(KEY)


def assert_same(tree: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_only_floating_point_arrays_are_trained(variables):
    assert jax.tree.map(jnp.shape, variables) == Variables(
        {"layers": {"0": {"weight": (3, 3), "bias": (3,)}}, "norm": {"weight": (3,), "bias": (3,)}},
        None,
        {"arrays": {"places": (3,)}, "state": {"0": (), "1": (3,), "2": (3,)}},
    )


def test_ready_made_module_is_the_initial_one_and_a_function_follows_the_key(model):
    made = make(jax.random.key(3))
    assert as_model(made[0]).ready(KEY).collections.keys() == {"arrays"}
    assert_same(as_model(made).ready(KEY).params["layers"]["0"]["weight"], made[0].layers[0].weight)
    assert_same(as_model(made).init(KEY), as_model(made).ready(KEY))
    assert model.ready(KEY) is None
    assert as_model(OnlyKey).init(KEY, X).params["linear"]["bias"].shape == (2,)
    weights = [model.init(jax.random.key(n)).params["layers"]["0"]["weight"] for n in (1, 2)]
    assert (weights[0] != weights[1]).any()


def test_pass_agrees_with_the_module_mapped_by_hand(model, variables):
    (outputs, _), after = model.apply(variables, X, train=False, key=KEY)
    module, state = model.bind(variables)
    by_hand = jax.vmap(lambda x: module(x, state)[0][0], axis_name="batch")(X)
    np.testing.assert_allclose(outputs, by_hand, rtol=1e-6)
    assert after is variables


def test_each_example_has_its_own_key(model, variables):
    (_, noise), _ = model.apply(variables, X, train=True, key=KEY)
    assert len(set(noise.tolist())) == 4
    (_, other), _ = model.apply(variables, X, train=True, key=jax.random.key(1))
    assert not set(noise.tolist()) & set(other.tolist())
    assert_same(model.apply(variables, X, train=False, key=None)[0][1], jnp.zeros(4))


def test_state_is_of_the_whole_batch_and_changes_in_training(model, variables):
    _, after = model.apply(variables, X, train=True, key=KEY)
    count, mean, _ = after.collections["state"].values()
    assert count == 1
    np.testing.assert_allclose(mean, X.mean(axis=0) / 2, rtol=1e-6, atol=1e-7)
    assert_same(after.params, variables.params)
    assert_same(after.collections["arrays"], variables.collections["arrays"])


def test_other_method_is_called_with_what_is_not_mapped(model, variables):
    scale = jnp.full((3,), 2.0)
    outputs, after = model.apply(variables, X, train=False, key=KEY, method="encode", scale=scale)
    layer = variables.params["layers"]["0"]
    expected = (X @ layer["weight"].T + layer["bias"][None]) * 2
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    assert after is variables


def test_module_of_whole_batches_is_not_mapped():
    model = whole_batches(OfBatches(jnp.ones((3, 2))))
    (outputs, key), _ = model.apply(model.ready(KEY), X, train=True, key=KEY)
    np.testing.assert_allclose(outputs, X @ jnp.ones((3, 2)) + 1)
    assert key is KEY
    assert model.record != as_model(OfBatches(jnp.ones((3, 2)))).record


def test_input_without_examples_is_refused(model, variables):
    with pytest.raises(ConfigError, match=r"shapes are \[\(4, 3\), \(\)\]"):
        model.apply(variables, X, jnp.float32(1), train=True, key=KEY)


def test_forward_function_of_the_state_finds_the_model(model, variables):
    assert model_of(model.apply_fn) is model
    (outputs, _), _ = model.apply(variables, X, train=False, key=None)
    assert_same(model.apply_fn(variables.by_collection(), X)[0], outputs)


def test_table_lists_outputs_of_one_example(model):
    call = eqx.nn.Linear.__call__
    rows = model.layers(jax.eval_shape(jax.random.key, 0), X)
    assert eqx.nn.Linear.__call__ is call
    assert [(row.path, row.kind, row.output) for row in rows] == [
        ("", "Net", "float32[4,3], float32[4]"),
        ("norm", "BatchNorm", "float32[3]"),
        ("layers/0", "Linear", "float32[3]"),
        ("layers/2", "Dropout", "float32[3]"),
    ]


def test_record_tells_models_apart():
    def record(*options: Any) -> Any:
        made = as_model(lambda key: eqx.nn.make_with_state(Net)(*options, key=key))
        return json.loads(json.dumps(to_json(made.record), allow_nan=False))

    assert record() == record()
    assert record(3, 0.5) != record(3, 0.25)
    assert record() == json.loads(json.dumps(to_json(as_model(make(KEY)).record)))


def test_what_makes_no_module_is_refused():
    class NeedsMore(eqx.Module):
        width: int

    with pytest.raises(ConfigError, match=r"pass lambda key: NeedsMore\(\.\.\., key=key\)"):
        as_model(NeedsMore)
    with pytest.raises(ConfigError, match=r"is a module, or .* got dict"):
        as_model(lambda key: {}).init(KEY)
    with pytest.raises(ConfigError, match="got tuple"):
        as_model((make(KEY)[0], 3)).init(KEY)


def test_missing_equinox_is_named_with_its_remedy():
    code = (
        "import sys; sys.modules['equinox'] = None\n"
        "from distaff.models import as_model\n"
        "as_model(lambda key: None)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'pip install "distaff[equinox]"' in finished.stderr
