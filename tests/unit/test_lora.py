"""LoRA: the base keeps its bits, two small matrices learn, and both become an ordinary model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import equinox as eqx
import flax.linen as nn
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distaff
from distaff import InitFrom, Lora, export_weights, tasks, zoo
from distaff.checkpoint.weights import named
from distaff.errors import CheckpointError, ConfigError
from distaff.models import Variables, as_model
from distaff.run.display import as_text


class Regression(distaff.TrainerModule):
    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"]).mean(axis=-1) - batch["y"])


class Untabled:
    def print_tabulate(self, example_batch):
        pass  # it takes most of the time of a start


class Quick(Untabled, Regression):
    pass


class NextToken(Untabled, tasks.LanguageModel):
    pass


def vectors() -> list[dict[str, np.ndarray]]:
    x = np.random.default_rng(0).normal(size=(4, 8, 6)).astype(np.float32)
    return [{"x": each, "y": each.sum(axis=1)} for each in x]


def tokens() -> list[dict[str, np.ndarray]]:
    return [{"tokens": each} for each in np.random.default_rng(0).integers(0, 16, (4, 2, 9))]


MLP = zoo.MLP((8, 5), batch_norm=True)
GPT = zoo.GPT(vocab_size=16, num_layers=1, num_heads=2, features=8, max_length=8)
CASES = {
    "mlp": (Quick, vectors, Lora(MLP, "*kernel", rank=2, alpha=3)),
    "attention": (NextToken, tokens, Lora(GPT, "*/query/kernel", rank=2)),
}
NUM_TRAINED = {"mlp": 2 * (6 + 8) + 2 * (8 + 5), "attention": 2 * (8 + 8)}


def make(case: str, model: Any = None, **options: Any) -> distaff.TrainerModule:
    cls, batches, lora = CASES[case]
    return cls(
        model or lora,
        example_batch=batches()[0],
        **{"root": None, "enable_progress_bar": False, "optimizer": optax.adam(0.01), **options},
    )


def leaves(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in named(tree).items()}


@pytest.fixture(scope="module", params=CASES)
def trained(request: Any, tmp_path_factory: pytest.TempPathFactory) -> distaff.TrainerModule:
    root = str(tmp_path_factory.mktemp("lora"))
    trainer = make(request.param, root=root, name=request.param, steps_per_call=2)
    trainer.case, trainer.first = request.param, leaves(trainer.state)
    trainer.train_model(CASES[request.param][1](), num_epochs=2)
    return trainer


def test_table_counts_what_is_trained() -> None:
    lora = Regression(CASES["mlp"][2], root=None, enable_progress_bar=False)
    lora.print_tabulate(vectors()[0])
    text = as_text(lora._workspace.table)
    assert re.search(rf"total +{NUM_TRAINED['mlp']} ", text)
    assert re.search(r"Dense_0/kernel/lora_a +\[6, 2\] +float32 +12 ", text)
    assert re.search(r"Dense_0/kernel +\[6, 8\] +float32 +\(lora_base\)", text)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_lora_begins_as_its_base(case: str) -> None:
    batches = CASES[case][1]()
    lora, base = make(case), make(case, CASES[case][2].module)
    np.testing.assert_array_equal(lora.predict(batches), base.predict(batches))
    values = sum(leaf.size for leaf in jax.tree.leaves(lora.state.params))
    assert values == NUM_TRAINED[case]


@pytest.mark.slow_but("mlp")
def test_only_the_small_matrices_change(trained: distaff.TrainerModule) -> None:
    last = leaves(trained.state)
    for name, leaf in last.items():
        if not name.startswith("batch_stats/"):
            is_trained = name.endswith(("/lora_a", "/lora_b"))
            assert (leaf.tobytes() != trained.first[name].tobytes()) == is_trained, name
    if trained.case == "mlp":  # running statistics move as in the base
        assert (last["batch_stats/BatchNorm_0/mean"] != 0).any()
    num_state = sum(leaf.size for leaf in jax.tree.leaves(trained.state.opt_state))
    assert num_state == 2 * NUM_TRAINED[trained.case] + 1


@pytest.mark.slow
def test_step_equals_one_on_merged_kernels() -> None:
    lora = CASES["mlp"][2]
    model, x = as_model(lora), jnp.asarray(vectors()[0]["x"])
    variables = model.init(jax.random.key(0), x)
    b = jax.random.normal(jax.random.key(1), (2, 8))
    variables.params["Dense_0"]["kernel"]["lora_b"] = b
    kernel = variables.collections["lora_base"]["Dense_0"]["kernel"]
    a = variables.params["Dense_0"]["kernel"]["lora_a"]
    merged = model.merged(variables).params["Dense_0"]["kernel"]
    np.testing.assert_allclose(merged, kernel + 3 / 2 * a @ b, rtol=1e-6)
    outputs, _ = model.apply(variables, x, train=False, key=None)
    own = {"params": variables.params, "batch_stats": variables.batch_stats}
    again = model.apply_fn({**own, **variables.collections}, x, train=False)
    np.testing.assert_array_equal(outputs, again)
    np.testing.assert_array_equal(outputs, model.bind(variables)(x, train=False))
    base, _ = as_model(lora.module).apply(model.base(variables), x, train=False, key=None)
    assert not np.allclose(outputs, base)


@pytest.mark.slow
def test_merged_weights_are_an_ordinary_model(
    trained: distaff.TrainerModule, tmp_path: Path
) -> None:
    batches = CASES[trained.case][1]()
    path = trained.export_weights(tmp_path / "merged.safetensors")
    plain = make(trained.case, CASES[trained.case][2].module, init_from=path)
    outputs = trained.predict(batches)
    np.testing.assert_allclose(plain.predict(batches), outputs, rtol=1e-5, atol=1e-6)
    fresh = make(trained.case, CASES[trained.case][2].module)
    assert not np.allclose(fresh.predict(batches), outputs, rtol=1e-3)


@pytest.mark.slow
def test_lora_is_loaded_from_its_run(trained: distaff.TrainerModule) -> None:
    batches = CASES[trained.case][1]()
    loaded = type(trained).load_from_checkpoint(trained.last_run.path)
    assert loaded.model.module == trained.model.module
    np.testing.assert_array_equal(loaded.predict(batches), trained.predict(batches))
    again = make(trained.case, init_from=trained.last_run.path)
    assert leaves(again.state).keys() == trained.first.keys()
    np.testing.assert_array_equal(again.predict(batches), trained.predict(batches))


@pytest.mark.slow
def test_lora_begins_with_the_weights_of_a_base(tmp_path: Path) -> None:
    base = make("mlp", MLP, root="runs", name="base", seed=5)
    base.train_model(vectors(), num_epochs=1)
    lora = make("mlp", init_from=base.last_run.path)
    np.testing.assert_array_equal(lora.predict(vectors()), base.predict(vectors()))
    lora.train_model(vectors(), num_epochs=1)
    only = ("*/lora_a", "*/lora_b")
    small = lora.export_weights(tmp_path / "small.safetensors", merge=False, only=only)
    whole = lora.export_weights(tmp_path / "whole.safetensors", merge=False)
    again = make("mlp", init_from=whole)
    np.testing.assert_array_equal(again.predict(vectors()), lora.predict(vectors()))
    assert small.stat().st_size < whole.stat().st_size
    with pytest.raises(CheckpointError, match="missing: 'lora_base/Dense_0/kernel'"):
        make("mlp", init_from=small)


@pytest.mark.slow
def test_lora_resumes() -> None:
    class Stop(distaff.Callback):
        at = 4

        def on_checkpoint(self, info: Any) -> None:
            if info.step == self.at:
                raise KeyboardInterrupt

    options = {"root": "runs", "name": "lora"}
    straight = make("mlp")
    straight.train_model(vectors(), num_epochs=2)
    with pytest.raises(KeyboardInterrupt):
        make("mlp", callbacks=[Stop()], **options).train_model(vectors(), num_epochs=2)
    Stop.at = -1
    again = make("mlp", callbacks=[Stop()], **options)
    assert again.train_model(vectors(), num_epochs=2).path.name == "0001"
    for name, leaf in leaves(straight.state).items():
        assert leaf.tobytes() == leaves(again.state)[name].tobytes()


@pytest.mark.slow
def test_language_model_knows_the_limits_of_its_base() -> None:
    assert len(make("attention").sample(np.array([1, 2]), 9)) == 11  # max_length is 8


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"rank": 0}, "rank must be an integer"),
        ({"rank": True}, "rank must be an integer"),
        ({"alpha": 0}, "alpha must be a finite positive number"),
        ({"alpha": float("nan")}, "alpha must be a finite positive number"),
        ({"alpha": True}, "alpha must be a finite positive number"),
        ({"alpha": 10**400}, "alpha must be a finite positive number"),
        ({"module": Lora(MLP)}, "must not be a Lora itself"),
        ({"pattern": ".*kernel"}, r"'\.\*kernel' matches none.*Kernels: \['Dense_0/kernel'"),
        ({"pattern": "*bias"}, "matches none"),
        ({"pattern": None}, "pattern must be a str"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make("mlp", Lora(**{"module": MLP, **options}))


def test_alpha_of_numpy_is_kept_as_a_float() -> None:
    assert type(Lora(MLP, alpha=np.float32(2)).alpha) is float
    assert Lora(MLP, alpha=np.int64(2)) == Lora(MLP, alpha=2)


@pytest.mark.slow
def test_matrices_have_the_dtype_and_the_scale_of_their_kernel() -> None:
    model = as_model(Lora(nn.Dense(64, param_dtype=jnp.bfloat16), rank=32))
    variables = model.init(jax.random.key(0), jnp.ones((1, 256), jnp.bfloat16))
    pair = variables.params["kernel"]
    assert {leaf.dtype for leaf in jax.tree.leaves(pair)} == {jnp.dtype(jnp.bfloat16)}
    assert not pair["lora_b"].any()
    assert np.std(np.float32(pair["lora_a"])) == pytest.approx(1 / 16, rel=0.05)


def test_kernel_of_the_name_weight_has_its_outputs_first() -> None:
    model = as_model(Lora(lambda key: eqx.nn.Linear(256, 64, key=key), "*weight", rank=32, alpha=8))
    variables = model.init(jax.random.key(0), jnp.ones((1, 256)))
    pair = variables.params["weight"]
    assert {name: leaf.shape for name, leaf in pair.items()} == {
        "lora_a": (32, 256),
        "lora_b": (64, 32),
    }
    assert np.std(pair["lora_a"]) == pytest.approx(1 / 16, rel=0.05)
    pair["lora_b"] = jax.random.normal(jax.random.key(1), (64, 32))
    expected = variables.collections["lora_base"]["weight"] + pair["lora_b"] @ pair["lora_a"] / 4
    np.testing.assert_allclose(model.merged(variables).params["weight"], expected, rtol=1e-5)


def test_two_kernels_of_one_shape_have_matrices_of_their_own() -> None:
    variables = as_model(Lora(zoo.MLP((6, 6)))).init(jax.random.key(0), jnp.ones((1, 6)))
    first, second = (variables.params[name]["kernel"]["lora_a"] for name in ("Dense_0", "Dense_1"))
    assert (first != second).all()


def test_export_of_a_tree_has_its_names(tmp_path: Path) -> None:
    path = export_weights(
        tmp_path / "x.safetensors", Variables({"a": np.ones(2)}, {"b": np.ones(1)})
    )
    with pytest.raises(CheckpointError, match="missing: 'Dense_0/kernel'"):
        make("mlp", init_from=InitFrom(path))


def test_ready_made_base_is_taken_as_it_is_and_matrices_follow_the_seed() -> None:
    base = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    model = as_model(Lora(base, "*kernel", rank=2))
    one, two = (model.ready(jax.random.key(seed)) for seed in (1, 2))
    for made in (one, two):
        assert made.collections["lora_base"]["kernel"] is base.kernel[...]
    assert not np.array_equal(one.params["kernel"]["lora_a"], two.params["kernel"]["lora_a"])
    trainer = Regression(Lora(base, "*kernel", rank=2), root=None, enable_progress_bar=False)
    x = np.ones((4, 64), np.float32)
    trainer._set_up({"x": x, "y": np.zeros(4, np.float32)})
    np.testing.assert_array_equal(trainer.predict([x])[:4], base(x))


def test_matrices_alone_are_saved_and_loaded(trained: Any, tmp_path: Path) -> None:
    small = trained.export_weights(
        tmp_path / "small.safetensors", only=("*/lora_a", "*/lora_b"), merge=False
    )
    case = next(name for name, (cls, _, _) in CASES.items() if cls is type(trained))
    again = make(case, init_from=InitFrom(small, missing="keep"))
    again._set_up(CASES[case][1]()[0])
    expected, found = (leaves(each.state.params) for each in (trained, again))
    assert expected.keys() == found.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(leaf, found[name])
