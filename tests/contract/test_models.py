"""What every kind of model must do: Flax Linen, Flax NNX, Equinox, and plain functions."""

from __future__ import annotations

import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff import Context, TrainerModule, TrainState, data, train_step
from distaff.core.config.encoding import to_json
from distaff.errors import CheckpointError
from distaff.models import Variables, as_model
from model_kinds import KINDS, NAMES, Kind, LinenMLP

KEY = jax.random.key(0)


class Regression(TrainerModule):
    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])


def arrays(size: int = 64) -> dict[str, np.ndarray]:
    x = np.random.default_rng(0).normal(size=(size, 3)).astype(np.float32)
    return {"x": x, "y": x.sum(axis=1) + 1}


def loader(size: int = 64) -> data.ArrayLoader:
    return data.ArrayLoader(arrays(size), batch_size=16, shuffle=True, seed=1)


def trainer(model: Any, **options: Any) -> Regression:
    return Regression(
        model,
        optimizer=optax.adam(1e-2),
        enable_progress_bar=False,
        recompile="error",
        **{"steps_per_call": 4, "name": "run", **options},
    )


def assert_same(tree: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def differs(tree: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return any(bool((np.asarray(a) != np.asarray(b)).any()) for a, b in pairs)


def state_of(model: Any, variables: Variables, optimizer: Any = None) -> TrainState:
    return TrainState.create(
        **variables._asdict(), apply_fn=model.apply_fn, tx=optimizer, rng=jax.random.key(1)
    )


@pytest.fixture(params=NAMES)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(scope="module", params=NAMES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run of a model with dropout and statistics, by (its source, its trainer)."""
    source = KINDS[request.param].mlp(0.2, True)
    root = tmp_path_factory.mktemp(request.param)
    finished = trainer(source, root=str(root))
    finished.result_of_run = finished.train_model(loader(), loader(), num_epochs=4)
    return source, finished


@pytest.mark.parametrize("network", ["mlp", "cnn"])
@pytest.mark.slow
def test_equal_parameters_train_to_equal_losses(kind: Kind, network: str) -> None:
    shape = (16, 3) if network == "mlp" else (16, 6, 6, 1)
    x = jax.random.normal(KEY, shape)
    batch = {"x": x, "y": x.reshape(16, -1).sum(axis=1)}

    def loss_fn(params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])

    def losses(kind: Kind, params: Any) -> list[float]:
        model = as_model(getattr(kind, network)())
        made = jax.eval_shape(model.init, KEY, x)
        assert jax.tree.structure(params) == jax.tree.structure(made.params)
        state, seen = state_of(model, made._replace(params=params), optax.sgd(1e-2)), []
        step = jax.jit(train_step(loss_fn))
        for _ in range(3):
            state, metrics = step(state, batch)
            seen.append(float(metrics["loss"].compute()))
        return seen

    params = as_model(getattr(KINDS["linen"], network)()).init(KEY, x).params
    expected = losses(KINDS["linen"], params)
    assert expected[2] < expected[0]
    np.testing.assert_allclose(losses(kind, kind.converted(params)), expected, rtol=2e-5)


@pytest.mark.slow_but("linen", "nnx")
def test_dropout_differs_between_steps_and_calls_and_is_off_in_evaluation(kind: Kind) -> None:
    model, x = as_model(kind.mlp(0.5)), jnp.ones((4, 3))
    variables = model.init(KEY, x)
    state = state_of(model, variables)
    params = jax.tree.map(jnp.copy, state.params)

    def outputs(step: int, *, train: bool) -> tuple[Any, Any]:
        ctx = Context(state.replace(step=jnp.int32(step)), train=train)
        return ctx.apply(params, x), ctx.apply(params, x)

    first, again = outputs(1, train=True)
    assert differs(first, again)
    assert differs(first[:1], first[1:2])  # each example has a mask of its own
    assert_same((first, again), outputs(1, train=True))
    assert differs(first, outputs(2, train=True)[0])
    assert_same(*outputs(1, train=False))
    assert_same(outputs(1, train=False), outputs(2, train=False))
    assert_same(outputs(1, train=False)[0][0], outputs(1, train=False)[0][1])


@pytest.mark.slow_but("linen", "nnx")
def test_statistics_move_in_training_only(kind: Kind) -> None:
    model, x = as_model(kind.mlp(0.0, True)), jnp.asarray(arrays(16)["x"]) + 3
    variables = model.init(KEY, x)
    # Another batch than that of init, of which Haiku keeps the statistics.
    _, after = model.apply(variables, 2 * x, train=True, key=KEY)
    evaluated, untouched = model.apply(after, x, train=False, key=KEY)
    held = (variables.batch_stats, variables.collections)
    assert jax.tree.structure(held) == jax.tree.structure((after.batch_stats, after.collections))
    assert differs(held, (after.batch_stats, after.collections))
    assert_same(after.params, variables.params)
    assert untouched is after
    assert differs(evaluated, model.apply(variables, x, train=False, key=KEY)[0])


@pytest.mark.slow
def test_variables_are_plain_dictionaries(kind: Kind) -> None:
    variables = as_model(kind.mlp(0.5, True)).init(KEY, jnp.ones((4, 3)))

    def check(node: Any) -> None:
        if isinstance(node, dict):
            assert all(type(name) is str for name in node)
            [check(value) for value in node.values()]
        else:
            assert node is None or isinstance(node, jax.Array)

    [check(node) for node in variables]


@pytest.mark.slow
def test_loaded_model_predicts_the_same_bits(run: Any) -> None:
    source, finished = run
    loaded = Regression.load_from_checkpoint(finished.result_of_run.path, source)
    examples = data.ArrayLoader(arrays(), batch_size=16)
    assert_same(loaded.predict(examples), finished.predict(examples))
    assert_same(loaded.state.collections, finished.state.collections)


@pytest.mark.slow
def test_model_is_recorded_and_only_linen_is_rebuilt_from_that(run: Any) -> None:
    source, finished = run
    path = finished.result_of_run.path
    record = json.loads((path / "config.json").read_text())["model"]
    assert record == to_json(as_model(source).record)
    if "$class" in record:
        assert type(Regression.load_from_checkpoint(path).model.module) is LinenMLP
        return
    with pytest.raises(CheckpointError, match=r"load_from_checkpoint\(path, model=\.\.\.\)"):
        Regression.load_from_checkpoint(path)


@pytest.mark.slow_but("linen")
def test_plain_python_gives_what_programs_give(kind: Kind) -> None:
    model, x = as_model(kind.mlp(0.5, True)), jnp.asarray(arrays(16)["x"])

    def both(key):
        variables = model.init(key, x)
        return model.apply(variables, x, train=True, key=key)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        both(KEY),
        jax.jit(both)(KEY),
    )


def test_bound_model_gives_what_predict_gives(run: Any) -> None:
    _, finished = run
    x = arrays(16)["x"]
    bound = finished.bind_model()
    if isinstance(bound, nn.Module):
        outputs = bound(x, train=False)
    elif isinstance(bound, tuple):
        module, state = bound
        outputs = jax.vmap(lambda one: module(one, state)[0], axis_name="batch")(x)
    else:
        outputs = bound(x)
    expected = finished.predict([{"x": x}])
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)


def test_table_has_every_array_and_the_output(run: Any) -> None:
    _, finished = run
    rows = finished.model.layers(jax.eval_shape(jax.random.key, 0), arrays(16)["x"])
    state = finished.state
    variables = Variables(state.params, state.batch_stats, state.collections).by_collection()
    counted = sorted((name, shape) for row in rows for name, _, shape, _ in row.variables)
    paths = jax.tree.leaves_with_path(variables)
    assert counted == sorted((path[0].key, leaf.shape) for path, leaf in paths)
    assert rows[0].path == ""
    assert rows[0].output == "float32[16,1]"
    assert (rows[0].flops or 0) > 0


@pytest.mark.parametrize("kind", ["nnx", "equinox"])
def test_modules_have_the_flops_of_linens(kind: str) -> None:
    def counts(kind: str) -> dict[str, Any]:
        rows = as_model(KINDS[kind].cnn()).layers(KEY, jnp.ones((16, 6, 6, 1)))
        return {row.path: row.flops for row in rows}

    assert counts(kind) == counts("linen")
    assert counts(kind)["first"] > counts(kind)["last"] > 0
