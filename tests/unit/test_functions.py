"""Plain functions as a model: what `apply` is given, by the names of its parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.example_libraries import stax

from distaff import Context, TrainState
from distaff.core.config.encoding import to_json
from distaff.errors import ConfigError
from distaff.models import Functions, Variables, as_model, model_of
from distaff.models.functional import FunctionModel

KEY = jax.random.key(0)
X = jnp.ones((2, 3))


class Transformed(NamedTuple):
    """As Haiku's: the pair, whose functions have the signature of the transformed one."""

    init: Any
    apply: Any


def init(key, x):
    return {"kernel": jax.random.normal(key, (x.shape[-1], 1))}


def init_with_state(rng, x, is_training):
    assert is_training is True
    return init(rng, x), {"ema/~/mean": jnp.zeros(())}


def apply_with_state(params, state, rng, x, is_training):
    moved = {"ema/~/mean": state["ema/~/mean"] + 1}
    return (x @ params["kernel"], rng, is_training), moved


def given(apply: Any, *, train: bool = True, **kwargs: Any) -> Any:
    return as_model((init, apply)).apply(Variables({"p": 1}), X, train=train, key=KEY, **kwargs)[0]


def test_pair_makes_and_uses_parameters():
    model = as_model((init, lambda params, x: x @ params["kernel"]))
    variables = model.init(KEY, X)
    assert variables == Variables({"kernel": variables.params["kernel"]})
    outputs, after = model.apply(variables, X, train=True, key=KEY)
    np.testing.assert_array_equal(outputs, X @ variables.params["kernel"])
    assert after is variables
    np.testing.assert_array_equal(model.bind(variables)(X), outputs)
    np.testing.assert_array_equal(model.apply_fn({"params": variables.params}, X), outputs)
    assert model_of(model.apply_fn) is model


@pytest.mark.parametrize(
    "apply",
    [
        lambda params, rng, x: (params, x, rng),
        lambda params, key, x: (params, x, key),
        lambda params, x, key: (params, x, key),
        lambda params, x, *, rng: (params, x, rng),
    ],
)
def test_key_is_passed_where_it_is_named(apply):
    params, x, key = given(apply)
    assert params == {"p": 1}
    assert x is X
    assert key is KEY


def test_mode_is_told_under_its_name():
    assert given(lambda params, x, train: train, train=True) is True
    assert given(lambda params, x, *, deterministic: deterministic, train=True) is False
    assert given(lambda params, x, is_training: is_training, train=False) is False


def test_haikus_pair_with_a_state_is_taken_as_it_is():
    model = as_model(Transformed(init_with_state, apply_with_state))
    variables = model.init(KEY, X)
    assert variables.collections == {"state": {"ema/~/mean": 0}}
    (_, rng, training), after = model.apply(variables, X, train=True, key=KEY)
    assert rng is KEY
    assert training is True
    assert after.collections == {"state": {"ema/~/mean": 1}}
    (_, _, training), untouched = model.apply(after, X, train=False, key=KEY)
    assert training is False
    assert untouched is after


def test_empty_state_is_no_collection():
    model = as_model((lambda rng, x: ({}, {}), lambda params, state, rng, x: (x, {})))
    variables = model.init(KEY, X)
    assert variables.collections is None
    assert model.apply(variables, X, train=True, key=KEY)[1] is variables


def test_table_is_one_row():
    (row,) = as_model((init, lambda params, x: x @ params["kernel"])).layers(KEY, X)
    assert (row.path, row.kind, row.output) == ("", "Functions", "float32[2,1]")
    assert row.variables == (("params", "kernel", (3, 1), jnp.float32),)
    assert row.flops == 2 * 2 * 3


def test_record_names_the_functions():
    record = to_json(Functions(init, apply_with_state).record)
    assert record == {"$module": "init, apply_with_state", "kind": "functions"}


class Own:
    """Someone's own adapter: the protocol, and nothing of Distaff."""

    module = "own"

    def ready(self, key):
        return None

    @property
    def record(self):
        raise AssertionError("a look at the model computes its record")

    @property
    def apply_fn(self):
        return self.forward

    def forward(self, variables, x):
        return x * variables["params"]

    def init(self, key, *inputs):
        return Variables(jnp.ones(()))

    def apply(self, variables, *inputs, train, key, **kwargs):
        return self.forward({"params": variables.params}, *inputs), variables

    def bind(self, variables):
        return self

    def layers(self, key, *inputs):
        return []


def test_model_of_ones_own_is_taken_as_it_is():
    own = Own()
    assert as_model(own) is own
    assert model_of(own.apply_fn) is own
    assert type(model_of(lambda variables, x: x)) is FunctionModel


def test_what_is_no_model_is_refused_by_name():
    for wrong, name in (
        (lambda params, x: x, "function"),
        ({"params": X}, "dict"),
        (None, "NoneType"),
        ((init, {}), "tuple"),
        ((init, init, init), "tuple"),
    ):
        with pytest.raises(ConfigError, match=rf"A model must be a flax.* Got builtins\.{name}\."):
            as_model(wrong)
    with pytest.raises(ConfigError, match="Got the class Own"):
        as_model(Own)
    with pytest.raises(ConfigError, match="init is a dict, which cannot be called"):
        Functions({}, init)
    model = as_model((init, lambda params, state, x: (x, state)))
    with pytest.raises(ConfigError, match=r"must return \(params, state\).*it returned a dict"):
        model.init(KEY, X)


def test_parameters_may_be_one_array() -> None:
    model = as_model((lambda key, x: jnp.ones(x.shape[1]), lambda params, x: x @ params))
    row = model.layers(jax.random.key(0), jnp.ones((2, 3)))[0]
    assert [tuple(shape) for _, _, shape, _ in row.variables] == [(3,)]


def test_forward_function_of_ones_own_has_collections_mode_and_key() -> None:
    def forward(variables, x, train, key=None):
        return x * variables["batch_stats"]["scale"], train, key

    state = TrainState.create(
        params={"w": jnp.ones(1)},
        batch_stats={"scale": jnp.full((), 3.0)},
        apply_fn=forward,
        rng=KEY,
    )
    params = {"w": jnp.ones(1)}
    outputs, train, key = Context(state, train=True).apply(params, X)
    np.testing.assert_array_equal(outputs, 3 * X)
    assert train is True
    assert key is not None
    assert Context(state, train=False).apply(params, X, train=True, key=KEY)[1:] == (True, KEY)


def test_init_takes_the_key_alone_or_a_shape() -> None:
    assert as_model((lambda key: {"w": key}, lambda p, x: x)).init(KEY, X).params["w"] is KEY
    option = (lambda key, x, width=3: {"width": width}, lambda p, x: x)
    assert as_model(option).init(KEY, X).params == {"width": 3}
    dense = stax.serial(stax.Dense(2), stax.Relu)
    model = as_model(dense)
    with jax.numpy_rank_promotion("allow"):
        outputs, _ = model.apply(model.init(KEY, X), X, train=True, key=None)
    assert outputs.shape == (len(X), 2)
