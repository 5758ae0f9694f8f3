"""Flax Linen modules as pure functions: flags, streams, collections, methods, layers, records."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff.core.config.encoding import to_json
from distaff.errors import CheckpointError, ConfigError
from distaff.models import LinenModel, Variables, as_model, rebuild

KEY = jax.random.key(0)
X = jnp.linspace(-1, 1, 6).reshape(2, 3)


class Train(nn.Module):
    def __call__(self, x, train):
        return train


class Training(nn.Module):
    def __call__(self, x, *, training=None):
        return training


class IsTraining(nn.Module):
    def __call__(self, x, is_training=None):
        return is_training


class Deterministic(nn.Module):
    def __call__(self, x, deterministic=None):
        return not deterministic


class RunningAverage(nn.Module):
    def __call__(self, x, use_running_average=None):
        return not use_running_average


class Everything(nn.Module):
    """Normalises, drops, draws from a stream of its own and counts its training calls."""

    @nn.compact
    def __call__(self, x, train=True):
        calls = self.variable("counters", "calls", lambda: jnp.zeros((), jnp.int32))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(4)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        if not train or self.is_initializing():
            return x, {}
        calls.value += 1
        noise = {name: jax.random.normal(self.make_rng(name)) for name in ("noise", "other")}
        return x, noise


class Block(nn.Module):
    width: int = 2
    inner: nn.Module | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(x)
        return x if self.inner is None else self.inner(x)


class Coder(nn.Module):
    """Written with `setup`; its decoder is called by a method, not by `__call__`."""

    def setup(self):
        self.encoder = nn.Dense(2, dtype=jnp.bfloat16)
        self.blocks = [Block(), Block(3)]
        self.scale = self.param("scale", nn.initializers.ones, (3,))

    def encode(self, x, train):
        return self.encoder(x) + train

    def decode(self, code):
        for block in self.blocks:
            code = block(code)
        return code * self.scale[None]

    def __call__(self, x):
        return self.decode(self.encode(x, train=False))


class TopLevel(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x @ self.param("kernel", nn.initializers.ones, (3, 2))
        return x + self.variable("offsets", "shift", jnp.zeros, (1, 2)).value


class Options(nn.Module):
    widths: tuple[int, ...] = (1, 2)
    dtype: Any = jnp.bfloat16
    limit: float = 1.0
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    kernel_init: Callable[..., jax.Array] = nn.initializers.lecun_normal()
    table: Mapping[str, Any] | None = None
    parts: tuple[nn.Module, ...] = ()

    @nn.compact
    def __call__(self, x):
        return nn.Dense(sum(self.widths), kernel_init=self.kernel_init)(self.activation(x))


@pytest.fixture(scope="module")
def everything() -> tuple[LinenModel, Variables]:
    model = LinenModel(Everything())
    return model, model.init(KEY, X)


def assert_same(tree: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.parametrize("module", [Train, Training, IsTraining, Deterministic, RunningAverage])
@pytest.mark.parametrize("train", [True, False])
def test_training_is_told_under_the_models_own_name(module, train):
    model = as_model(module())
    outputs, _ = model.apply(Variables({}), X, train=train, key=None)
    assert outputs is train


def test_flag_given_by_the_caller_wins():
    outputs, _ = as_model(Deterministic()).apply(
        Variables({}), X, train=False, key=None, deterministic=False
    )
    assert outputs is True


@pytest.mark.parametrize("train", [True, False])
def test_model_without_a_flag_is_called_without(train):
    model = as_model(nn.Dense(2))
    variables = model.init(KEY, X)
    outputs, after = model.apply(variables, X, train=train, key=None)
    np.testing.assert_allclose(outputs, X @ variables.params["kernel"], rtol=1e-6)
    assert after is variables


def test_init_splits_the_collections(everything):
    _, variables = everything
    assert set(variables.params) == {"Dense_0", "BatchNorm_0"}
    assert set(variables.batch_stats) == {"BatchNorm_0"}
    assert_same(variables.collections, {"counters": {"calls": 0}})
    assert as_model(nn.Dense(2)).init(KEY, X)._replace(params=None) == Variables(None, None, None)


def test_training_changes_statistics_and_collections_but_no_parameters(everything):
    model, variables = everything
    (outputs, _), once = model.apply(variables, X, train=True, key=KEY)
    assert outputs.shape == (2, 4)
    assert_same(once.params, variables.params)
    assert_same(once.collections, {"counters": {"calls": 1}})
    hidden = X @ variables.params["Dense_0"]["kernel"]
    mean = once.batch_stats["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, hidden.mean(axis=0) / 2, rtol=1e-5)
    _, twice = model.apply(once, X, train=True, key=KEY)
    assert_same(twice.collections, {"counters": {"calls": 2}})


def test_evaluation_changes_nothing_and_draws_nothing(everything):
    model, variables = everything
    (with_key, _), after = model.apply(variables, X, train=False, key=KEY)
    (without_key, _), _ = model.apply(variables, X, train=False, key=None)
    assert_same(with_key, without_key)
    assert after is variables


def test_every_stream_draws_from_the_one_key(everything):
    model, variables = everything

    def draw(seed: int) -> Any:
        return model.apply(variables, X, train=True, key=jax.random.key(seed))[0]

    (first, noise), (other, other_noise) = draw(1), draw(2)
    assert_same(draw(1), (first, noise))
    assert noise["noise"] != noise["other"]
    assert noise["noise"] != other_noise["noise"]
    dropped, other_dropped = np.asarray(first == 0), np.asarray(other == 0)
    assert dropped.any()
    assert (dropped != other_dropped).any()


@pytest.mark.parametrize("method", ["encode", Coder.encode])
def test_other_method_is_told_under_its_own_name(method):
    model = as_model(Coder())
    variables = model.init(KEY, X)
    trained, _ = model.apply(variables, X, train=True, key=None, method=method)
    evaluated, _ = model.apply(variables, X, train=False, key=None, method=method)
    np.testing.assert_allclose(trained - evaluated, 1, atol=0.02)
    decoded, _ = model.apply(variables, evaluated, train=True, key=None, method="decode")
    assert_same(decoded, model.apply(variables, X, train=True, key=None)[0])


def test_collections_asked_for_by_the_caller_come_back_to_it(everything):
    model, variables = everything
    mutable = ["counters", "batch_stats"]
    (_, asked), after = model.apply(variables, X, train=True, key=KEY, mutable=mutable)
    assert_same(asked["counters"], {"calls": 1})
    assert_same(asked["batch_stats"], after.batch_stats)
    assert_same(after.collections["counters"], {"calls": 1})


class Sowing(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train)(x)
        self.sow("losses", "size", jnp.square(x).mean())
        return x


def test_what_is_sown_comes_back_and_is_not_kept():
    model = as_model(Sowing())
    variables = model.init(KEY, X)
    assert variables.collections is None
    (_, sown), after = model.apply(variables, X, train=True, key=None, mutable=["losses"])
    np.testing.assert_allclose(sown["losses"]["size"][0], 1, atol=0.05)
    assert len(sown["losses"]["size"]) == 1
    assert jax.tree.structure(after) == jax.tree.structure(variables)
    assert (after.batch_stats["BatchNorm_0"]["mean"] != 0).any()


def test_bound_model_is_called_as_in_linen(everything):
    model, variables = everything
    outputs, _ = model.bind(variables)(X, train=False)
    assert_same(outputs, model.apply(variables, X, train=False, key=None)[0][0])


@pytest.mark.parametrize(
    "module",
    [
        Everything(),
        Coder(),
        TopLevel(),
        Block(inner=Block(4)),
        nn.Sequential([nn.Dense(2), Block()]),
    ],
    ids=lambda module: type(module).__name__,
)
def test_layers_hold_each_array_of_init_once(module):
    rows = as_model(module).layers(KEY, X)
    assert (rows[0].path, rows[0].kind) == ("", type(module).__name__)
    listed = {
        (collection, f"{row.path}/{name}".strip("/")): (shape, dtype)
        for row in rows
        for collection, name, shape, dtype in row.variables
    }
    made = {}
    for path, leaf in jax.tree.leaves_with_path(module.init(KEY, X)):
        collection, name = jax.tree_util.keystr(path, simple=True, separator="/").split("/", 1)
        made[collection, name] = (leaf.shape, leaf.dtype)
    assert listed == made
    assert sum(len(row.variables) for row in rows) == len(made)
    sizes = [math.prod(shape) for (kind, _), (shape, _) in listed.items() if kind == "params"]
    assert sum(sizes) == sum(
        leaf.size for leaf in jax.tree.leaves(as_model(module).init(KEY, X)[0])
    )


def test_layers_come_in_order_of_call_with_their_outputs():
    rows = as_model(Coder()).layers(KEY, X)
    assert [(row.path, row.kind, row.output) for row in rows] == [
        ("", "Coder", "float32[2,3]"),
        ("encoder", "Dense", "bfloat16[2,2]"),
        ("blocks_0", "Block", "float32[2,2]"),
        ("blocks_0/Dense_0", "Dense", "float32[2,2]"),
        ("blocks_1", "Block", "float32[2,3]"),
        ("blocks_1/Dense_0", "Dense", "float32[2,3]"),
    ]
    assert rows[0].variables == (("params", "scale", (3,), jnp.float32),)
    assert [name for _, name, _, _ in rows[1].variables] == ["bias", "kernel"]


class Shares(nn.Module):
    """Calls one layer on all rows, again on one, and a third time from a block that it is in."""

    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(3, use_bias=False, name="shared")
        return Block(3, inner=shared, name="block")(shared(shared(x)[:1]))


class Auxiliary(nn.Module):
    """Uses one of its layers in training only."""

    @nn.compact
    def __call__(self, x, train):
        auxiliary = nn.Dense(5, use_bias=False)(x)
        return (x, auxiliary) if train else x * 2


class EvaluatedOnly(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return x if train else nn.Sequential([jnp.square])(x)


class NeverEvaluated(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        assert train
        return nn.Dense(2)(x)


def flops_of(module: nn.Module) -> dict[str, float | None]:
    return {row.path: row.flops for row in as_model(module).layers(KEY, X)}


def test_layers_count_each_modules_own_flops():
    block = Block(4, inner=nn.Dense(2, use_bias=False))
    assert flops_of(nn.Sequential([nn.Dense(2), block, jnp.square])) == {
        "": 2 * 2,
        "layers_0": 2 * (2 * 3) * 2 + 2 * 2,
        "layers_1": 0,
        "layers_1/Dense_0": 2 * (2 * 2) * 4 + 2 * 4,
        "layers_1/inner": 2 * (2 * 4) * 2,
    }


def test_flops_of_a_layer_that_is_called_again_are_its_callers():
    one_row = 2 * 3 * 3
    assert flops_of(Shares()) == {
        "": 2 * one_row,
        "shared": 2 * one_row,
        "block": None,
        "block/Dense_0": one_row + 3,
    }


def test_flops_whose_result_is_not_used_leave_no_negative_count():
    assert flops_of(Auxiliary()) == {"": 0, "Dense_0": 2 * (2 * 3) * 5}


def test_flops_of_a_module_that_is_not_listed_are_its_callers():
    assert flops_of(EvaluatedOnly()) == {"": 2 * 3}


def test_layers_without_an_estimate_have_no_flops(monkeypatch):
    assert flops_of(NeverEvaluated()) == {"": None, "Dense_0": None}
    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda self: None)
    assert flops_of(nn.Dense(2)) == {"": None}


def test_as_model_takes_an_instance_of_a_module_only():
    assert type(as_model(Block())) is LinenModel
    with pytest.raises(ConfigError, match=r"pass Block\(\.\.\.\) instead of Block"):
        as_model(Block)
    for wrong, name in ((lambda x: x, "function"), ({"params": X}, "dict"), (None, "NoneType")):
        with pytest.raises(ConfigError, match=rf"flax\.linen\.Module.* Got builtins\.{name}"):
            as_model(wrong)


def other_than_default(x: jax.Array) -> jax.Array:
    return -x


@pytest.mark.parametrize(
    "module",
    [
        Options(),
        Options(widths=(3,), dtype=jnp.float32, limit=float("-inf")),
        Options(dtype=None, table={"a": 1, "b": {"c": (1.5, "x", None)}}),
        Options(activation=other_than_default),
        Options(kernel_init=nn.initializers.he_normal()),
        Options(parts=(Block(3), nn.Dense(2, use_bias=False))),
        Block(inner=Block(5, inner=nn.Dense(1))),
        nn.Sequential([nn.Dense(2), Block()]),
    ],
)
@pytest.mark.slow
def test_rebuild_brings_back_what_was_recorded(module):
    record = json.loads(json.dumps(to_json(module), allow_nan=False))
    rebuilt = rebuild(record)
    assert type(rebuilt) is type(module)
    assert to_json(rebuilt) == record
    assert_same(
        *(
            as_model(each).apply(as_model(module).init(KEY, X), X, train=False, key=None)[0]
            for each in (module, rebuilt)
        )
    )


NAMELESS = (lambda x: x, lambda x: -x)


class Anonymous(nn.Module):
    activation: Callable[[jax.Array], jax.Array] = NAMELESS[0]


ME = f"{__name__}:Options"


@pytest.mark.parametrize(
    ("record", "named"),
    [
        (to_json(Anonymous(activation=NAMELESS[1])), "<lambda>"),
        ({"$class": "os:system", "command": "touch hacked"}, "'os:system'"),
        ({"$class": "builtins:eval"}, "'builtins:eval'"),
        ({"$class": f"{__name__}:Variables"}, "is imported. Import it first; for a command, name"),
        ({"$class": ["a"]}, "no module class"),
        ({"widths": [1]}, "'None'"),
        ("text", "'None'"),
        ({"$class": ME, "depth": 3}, "no hyperparameter 'depth'"),
        ({"$class": ME, "parent": None}, "no hyperparameter 'parent'"),
        ({"$class": ME, "dtype": {"$dtype": "os:system"}}, "dtype was recorded as"),
        ({"$class": ME, "limit": {"$float": "much"}}, "limit was recorded as"),
        ({"$class": ME, "activation": {"$function": "os:system"}}, "activation was recorded as"),
        ({"$class": ME, "parts": [{"$class": "os:system"}]}, "'os:system'"),
        ({"$class": "flax.linen.linear:Dense"}, "features"),
    ],
)
def test_rebuild_refuses_what_it_cannot_bring_back(record, named, tmp_path):
    with pytest.raises(CheckpointError, match="Pass the module itself") as caught:
        rebuild(record)
    assert named in str(caught.value)
    assert list(tmp_path.iterdir()) == []
