"""TorchRules: names, layouts, fused and tied tensors, and what each error says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import distaff
from distaff import InitFrom, TorchRules
from distaff.checkpoint.weights import loaded, named
from distaff.checkpoint.weights.export import export_torch_weights
from distaff.checkpoint.weights.pytorch.layouts import equinox_conv_transpose
from distaff.errors import CheckpointError, ConfigError
from distaff.models import Variables, as_model

KEY = jax.random.key(0)


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def start(source: Any, *inputs: Any) -> tuple[Any, Variables, Any]:
    """Returns a model, its variables, and the function that creates them."""
    model = as_model(source)
    return model, model.init(KEY, *inputs), lambda: model.init(KEY, *inputs)


def load(
    module: Any, tensors: Any, *inputs: Any, rules: Any = "torch", **options: Any
) -> dict[str, np.ndarray]:
    """Returns the arrays of a model with the weights of tensors by name."""
    model, variables, init = start(module, *inputs)
    how = InitFrom(tensors, rules=rules, **options)
    return {n: np.asarray(x) for n, x in named(loaded(model, variables, how, init)[0]).items()}


def export(
    module: Any, *inputs: Any, rules: TorchRules | None = None, **options: Any
) -> dict[str, np.ndarray]:
    """Returns the tensors that an export of a new model has."""
    model, variables, init = start(module, *inputs)
    path = export_torch_weights(
        "out.safetensors", model, variables, rules or TorchRules(), init, **options
    )
    return load_file(path)


def assert_same_back(
    module: Any, tensors: dict[str, np.ndarray], *inputs: Any, rules: TorchRules
) -> None:
    """Asserts that an export of loaded weights equals the tensors, bit for bit."""
    model, variables, init = start(module, *inputs)
    filled = loaded(model, variables, InitFrom(tensors, rules=rules), init)[0]
    back = load_file(export_torch_weights("out.safetensors", model, filled, rules, init))
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, name)


X = np.ones((2, 4), np.float32)
SQUARE = {"weight": drawn(4, 4), "bias": drawn(4, seed=1)}


class Named(nn.Module):
    """A dense layer of a name."""

    name_: str = "layer"
    features: int = 4

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features, name=self.name_)(x)


def test_a_square_matrix_is_transposed_by_the_kind_of_its_layer() -> None:
    tensors = {f"layer.{name}": tensor for name, tensor in SQUARE.items()}
    arrays = load(Named(), tensors, X)
    np.testing.assert_array_equal(arrays["layer/kernel"], SQUARE["weight"].T)
    np.testing.assert_array_equal(arrays["layer/bias"], SQUARE["bias"])
    arrays = load(lambda key: eqx.nn.Linear(4, 4, key=key), SQUARE)
    np.testing.assert_array_equal(arrays["weight"], SQUARE["weight"])


@pytest.mark.parametrize("name", ["kernel", "weight"])
def test_functions_are_known_by_the_names_of_their_arrays(name: str) -> None:
    def init(key, x):
        return {"layer": {name: jnp.zeros((4, 4)), "bias": jnp.zeros(4)}}

    def apply(params, x):
        return x

    arrays = load((init, apply), {f"layer.{n}": x for n, x in SQUARE.items()}, X)
    expected = SQUARE["weight"].T if name == "kernel" else SQUARE["weight"]
    np.testing.assert_array_equal(arrays[f"layer/{name}"], expected)


@pytest.mark.parametrize("shape", [(4, 4), (4, 3)])
def test_a_square_array_of_an_unknown_layer_is_not_guessed(shape: tuple[int, ...]) -> None:
    def init(key, x):
        return {"layer": {"w": jnp.zeros(shape)}}

    tensors, rules = {"layer.weight": drawn(*shape)}, TorchRules({"layer.weight": "layer/w"})
    if shape == (4, 4):
        with pytest.raises(ConfigError, match=r"whether it is transposed in 'layer\.weight'"):
            load((init, lambda params, x: x), tensors, X, rules=rules)
        return
    arrays = load((init, lambda params, x: x), tensors, X, rules=rules)
    np.testing.assert_array_equal(arrays["layer/w"], tensors["layer.weight"])
    same = load((init, lambda params, x: x), {"layer.w": drawn(*shape)}, X)  # a parameter's name
    np.testing.assert_array_equal(same["layer/w"], tensors["layer.weight"])


@pytest.mark.parametrize("is_listed", [True, False])
def test_inputs_first_is_declared(is_listed: bool) -> None:
    rules = TorchRules(inputs_first="layer.w*" if is_listed else ())
    tensors = {f"layer.{name}": tensor for name, tensor in SQUARE.items()}
    arrays = load(Named(), tensors, X, rules=rules)
    weight = SQUARE["weight"]
    np.testing.assert_array_equal(arrays["layer/kernel"], weight if is_listed else weight.T)
    assert_same_back(Named(), tensors, X, rules=rules)


class Qkv(nn.Module):
    """Grouped queries: more outputs for queries than for keys and values."""

    @nn.compact
    def __call__(self, x):
        q = nn.DenseGeneral((4, 2), name="q")(x)
        k, v = nn.DenseGeneral((2, 2), name="k")(x), nn.DenseGeneral((2, 2), name="v")(x)
        return nn.DenseGeneral(4, axis=(-2, -1), name="o")(q + jnp.tile(k + v, (1, 2, 1)))


def test_a_fused_tensor_is_split_by_the_sizes_of_its_arrays() -> None:
    tensors = {"qkv.weight": drawn(16, 4), "qkv.bias": drawn(16), "o.weight": drawn(4, 8)}
    tensors["o.bias"] = drawn(4)
    rules = TorchRules({"qkv": ("q", "k", "v")})
    arrays = load(Qkv(), tensors, X, rules=rules)
    weight = tensors["qkv.weight"]
    np.testing.assert_array_equal(arrays["q/kernel"], weight[:8].T.reshape(4, 4, 2))
    np.testing.assert_array_equal(arrays["k/kernel"], weight[8:12].T.reshape(4, 2, 2))
    np.testing.assert_array_equal(arrays["v/bias"], tensors["qkv.bias"][12:].reshape(2, 2))
    np.testing.assert_array_equal(arrays["o/kernel"], tensors["o.weight"].T.reshape(4, 2, 4))
    assert_same_back(Qkv(), tensors, X, rules=rules)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x, y):
        return nn.MultiHeadDotProductAttention(2, qkv_features=4, name="attn")(x, y)


@pytest.mark.slow
def test_attention_over_other_features_is_not_fused() -> None:
    shapes = {
        name: each.shape for name, each in export(Attention(), X[None], X[None, :, :3]).items()
    }
    assert shapes["attn.q_proj_weight"] == (4, 4)
    assert shapes["attn.k_proj_weight"] == shapes["attn.v_proj_weight"] == (4, 3)
    assert shapes["attn.in_proj_bias"] == (12,)
    assert shapes["attn.out_proj.weight"] == (4, 4)
    assert len(shapes) == 6


def test_attention_whose_projections_have_names_is_not_fused() -> None:
    rules = TorchRules({f"attn.{each}_proj": f"attn/{each}" for each in ("query", "key", "value")})
    names = set(export(Attention(), X[None], X[None], rules=rules))
    parts = ("query_proj", "key_proj", "value_proj", "out")
    assert names == {f"attn.{part}.{leaf}" for part in parts for leaf in ("weight", "bias")}


def test_the_longest_name_counts_and_numbers_are_kept() -> None:
    rules = TorchRules({"model": "", "h.{}.x{}": "b_{}/y_{}", "z": "b_1/y_2/kernel", "s": "b_1"})
    assert rules.place("a/b").name == "model.a.b"
    assert rules.place("b_10/y_3/c").name == "h.10.x3.c"
    assert rules.place("b_1/y_2/kernel") == ("z", 0, True)
    assert rules.place("b_1/c").name == "s.c"
    assert rules.place("b_12/c").name == "model.b_12.c"
    assert TorchRules({"": "net"}).place("net/a").name == "a"
    assert TorchRules().place("layers/0/fc").name == "layers.0.fc"


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(3, 4, name="wte")
        return embed.attend(embed(tokens))


TOKENS = np.zeros((1, 2), np.int32)


def test_tied_tensors_are_one_array_and_must_be_equal() -> None:
    table = drawn(3, 4)
    rules = TorchRules(tied={"head.weight": "wte.weight"})
    both = {"wte.weight": table, "head.weight": table}
    for tensors in (both, {"wte.weight": table}, {"head.weight": table}):
        arrays = load(Tied(), tensors, TOKENS, rules=rules)
        np.testing.assert_array_equal(arrays["wte/embedding"], table)
    assert_same_back(Tied(), both, TOKENS, rules=rules)
    for other in (table + 1, table[:2]):
        with pytest.raises(CheckpointError, match=r"must be equal; 'head\.weight' and 'wte"):
            load(Tied(), {**both, "head.weight": other}, TOKENS, rules=rules)
    with pytest.raises(CheckpointError, match=r"unused: 'head.weight', float32\[3, 4\]"):
        load(Tied(), both, TOKENS)


def test_error_names_tensors_and_arrays_with_shapes() -> None:
    tensors = {"layr.weight": drawn(4, 4), "layer.bias": drawn(5)}
    tensors["norm.num_batches_tracked"] = np.array(3)
    with pytest.raises(CheckpointError) as caught:
        load(Named(), tensors, X)
    text = str(caught.value)
    for line in (
        "other shape: 'layer.bias' is float32[5] in the source, and must be [4] for 'layer/bias'",
        "missing: 'layer/kernel', float32[4, 4]: no tensor 'layer.weight', [4, 4] "
        "(nearest: 'layr.weight')",
        "unused: 'layr.weight', float32[4, 4]",
        "TorchRules({'layers.{}.attn'",
    ):
        assert line in text
    assert "num_batches_tracked" not in text


def test_a_matrix_that_is_not_transposed_is_an_error() -> None:
    tensors = {"layer.weight": drawn(4, 3), "layer.bias": drawn(3)}
    with pytest.raises(CheckpointError, match=r"is float32\[4, 3\] in the source, and must be"):
        load(Named(features=3), tensors, X)


def test_a_part_of_the_model_is_loaded_where_asked_for() -> None:
    tensors = {"layer.weight": drawn(4, 4), "other": drawn(1)}
    arrays = load(Named(), tensors, X, missing="keep", unused="ignore")
    np.testing.assert_array_equal(arrays["layer/kernel"], tensors["layer.weight"].T)
    np.testing.assert_array_equal(arrays["layer/bias"], 0)
    tensors["layer.bias"] = drawn(7)  # not wanted
    arrays = load(Named(), tensors, X, only="*/kernel", unused="ignore")
    np.testing.assert_array_equal(arrays["layer/bias"], 0)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: InitFrom("x", rules="pytorch"), "rules must be 'torch'"),
        (lambda: InitFrom("x", rules="torch", rename={"a": "b"}), "converts names itself"),
        (lambda: TorchRules("a"), "names is a dict"),
        (lambda: TorchRules({"a": 1}), "paths in the model"),
        (lambda: TorchRules({"a": ()}), "paths in the model"),
        (lambda: TorchRules({"a.{}.{}": "b"}), "same number"),
        (lambda: TorchRules({"a": "b_{}"}), "same number"),
        (lambda: TorchRules({"a": "x", "b": "x"}), "two sources for 'x'"),
        (lambda: TorchRules(tied={"a": 1}), "names of tensors"),
        (lambda: TorchRules(inputs_first=1), "shell pattern"),
        (lambda: load(Named(), SQUARE, X, rules=TorchRules({"a": "layr"})), "mean 'layer'"),
        (
            lambda: export(
                Qkv(), X, rules=TorchRules({"k": "q", "q": "k", "v.weight": "o/kernel"})
            ),
            "'v.weight' would be both",
        ),
        (
            lambda: export(Qkv(), X, rules=TorchRules({"kv": ("k", "v", "o")})),
            "differ in the number of outputs only; 'kv.weight'",
        ),
    ],
)
def test_bad_rules_raise(make: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make()


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
        return nn.scan(Step, **layers)(name="layers")(x, None)[0]


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(4, name="layer")(x), None


class Holder(nnx.Module):
    def __init__(self, rngs):
        self.held = nnx.Dict(kernel=nnx.Param(jnp.zeros((2, 2, 2))))

    def __call__(self, x):
        return x


class Stacked(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def make(rngs):
            return nnx.Linear(4, 4, rngs=rngs)

        self.layer = make(rngs)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.slow
def test_stacked_layers_have_a_number_in_pytorch_only(kind: str) -> None:
    module, path = (Scanned(), "layers/layer") if kind == "linen" else (Stacked, "layer")
    module = module if kind == "linen" else lambda rngs: Stacked(rngs)
    tensors = {f"h.{n}.fc.weight": drawn(4, 4, seed=n) for n in range(3)}
    tensors |= {f"h.{n}.fc.bias": drawn(4, seed=n) for n in range(3)}
    rules = TorchRules({"h.{}.fc": path})
    arrays = load(module, tensors, X, rules=rules)
    for n, (kernel, bias) in enumerate(
        zip(arrays[f"{path}/kernel"], arrays[f"{path}/bias"], strict=True)
    ):
        np.testing.assert_array_equal(kernel, tensors[f"h.{n}.fc.weight"].T)
        np.testing.assert_array_equal(bias, tensors[f"h.{n}.fc.bias"])
    assert_same_back(module, tensors, X, rules=rules)
    more = {**tensors, "h.3.fc.weight": drawn(4, 4)}
    with pytest.raises(CheckpointError, match=r"unused: 'h\.3\.fc\.weight'"):
        load(module, more, X, rules=rules)
    del tensors["h.2.fc.bias"]
    with pytest.raises(CheckpointError, match=r"no tensor 'h\.2\.fc\.bias', \[4\]"):
        load(module, tensors, X, rules=rules)


class ScannedAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}
        return nn.scan(AttentionStep, **layers)(name="layers")(x, None)[0]


class AttentionStep(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.MultiHeadDotProductAttention(2, name="attn")(x, x), None


def test_a_single_number_is_no_stack_of_layers() -> None:
    def init(key, x):
        return {"layer": {"scale": jnp.zeros(())}}

    rules = TorchRules({"h.{}": "layer"})
    with pytest.raises(ConfigError, match=r"'layer/scale' is a single number\. Write {} on both"):
        load((init, lambda params, x: x), {"h.0.weight": drawn(1)}, X, rules=rules)


@pytest.mark.slow
def test_stacked_attention_is_fused_in_each_layer() -> None:
    leaves = {"in_proj_weight": (12, 4), "in_proj_bias": (12,)}
    leaves |= {"out_proj.weight": (4, 4), "out_proj.bias": (4,)}
    tensors = {
        f"layers.{n}.attn.{leaf}": drawn(*shape, seed=n)
        for n in range(2)
        for leaf, shape in leaves.items()
    }
    assert_same_back(
        ScannedAttention(), tensors, X[None], rules=TorchRules({"layers.{}": "layers"})
    )


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: lambda rngs: Stacked(rngs), "'layer/kernel' is .3, 4, 4. for each tensor"),
        (Scanned, "'layers/layer/kernel' is .3, 4, 4. for each"),
        (lambda: lambda rngs: Holder(rngs), "'held/kernel'.*not called by itself"),
        (lambda: lambda rngs: nnx.GRUCell(4, 4, rngs=rngs), "another cell, without the second"),
        (lambda: nn.DenseGeneral(4, batch_dims=(0,)), "has batch axes"),
    ],
)
def test_layers_without_a_layout_raise(make: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        export(make(), X)


def test_grouped_transposed_convolution_is_the_gradient_of_a_convolution() -> None:
    torch = drawn(4, 3, 3, 3)  # [in, out / groups, *window], 2 groups
    x = drawn(4, 5, 5, seed=1)
    layer = eqx.nn.ConvTranspose2d(4, 6, 3, 2, groups=2, use_bias=False, key=KEY)
    arrays = load(lambda key: layer, {"weight": torch})
    outputs = eqx.tree_at(lambda m: m.weight, layer, jnp.asarray(arrays["weight"]))(x)

    def convolution(y):
        return jax.lax.conv_general_dilated(y, torch, (2, 2), "VALID", feature_group_count=2)

    expected = jax.vjp(convolution, jnp.zeros((1, 6, 11, 11)))[1](x[None])[0][0]
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    layout = equinox_conv_transpose(2)
    assert layout.shape(arrays["weight"].shape) == torch.shape
    np.testing.assert_array_equal(layout.save(arrays["weight"]), torch)


def test_both_directions_of_an_lstm_have_their_names() -> None:
    module = nn.Bidirectional(
        nn.RNN(nn.LSTMCell(4, name="there"), parent=None),
        nn.RNN(nn.LSTMCell(4, name="back"), parent=None),
    )
    rules = TorchRules({"lstm.l0": "forward_rnn/cell", "lstm.l0_reverse": "backward_rnn/cell"})
    shapes = {n: x.shape for n, x in export(module, X[None], rules=rules).items()}
    leaves = {"weight_ih": (16, 4), "weight_hh": (16, 4), "bias_ih": (16,), "bias_hh": (16,)}
    assert shapes == {
        f"lstm.{leaf}_{layer}": shape
        for leaf, shape in leaves.items()
        for layer in ("l0", "l0_reverse")
    }


def test_an_lstm_cell_at_the_root_has_the_names_of_a_cell() -> None:
    assert set(export(lambda key: eqx.nn.LSTMCell(4, 4, key=key))) == {
        *("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }


def test_biases_that_are_summed_have_one_dtype() -> None:
    tensors = export(lambda key: eqx.nn.LSTMCell(4, 4, key=key))
    tensors["bias_hh"] = tensors["bias_hh"].astype(np.int32)
    complaint = r"'bias_hh' is int32\[16\] in the source, and must be float32, like 'bias_ih'"
    with pytest.raises(CheckpointError, match=complaint):
        load(lambda key: eqx.nn.LSTMCell(4, 4, key=key), tensors)


def test_corrected_statistics_of_equinox_are_exported() -> None:
    make = eqx.nn.make_with_state(eqx.nn.BatchNorm)
    model, variables, init = start(lambda key: make(3, "batch", mode="batch"))
    mean = next(n for n, x in variables.collections["state"].items() if x.shape == (3,))
    count = next(n for n, x in variables.collections["state"].items() if x.dtype == jnp.int32)
    state = {**variables.collections["state"], mean: jnp.ones(3), count: jnp.array(2)}
    path = export_torch_weights(
        "out.safetensors",
        model,
        variables._replace(collections={"state": state}),
        TorchRules(),
        init,
    )
    tensors = load_file(path)
    np.testing.assert_allclose(tensors["running_mean"], 1 / (1 - 0.99**2), rtol=1e-6)
    assert set(tensors) == {"weight", "bias", "running_mean", "running_var"}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_a_narrow_file_loads_into_a_wide_model(dtype: Any) -> None:
    tensors = {f"layer.{name}": tensor.astype(dtype) for name, tensor in SQUARE.items()}
    save_file(tensors, "narrow.safetensors")
    arrays = load(Named(), "narrow.safetensors", X)
    assert arrays["layer/kernel"].dtype == np.float32
    np.testing.assert_array_equal(arrays["layer/kernel"], tensors["layer.weight"].T)


def test_lora_loads_its_base_and_is_exported_merged() -> None:
    tensors = {f"layer.{name}": tensor for name, tensor in SQUARE.items()}
    arrays = load(distaff.Lora(Named(), rank=2), tensors, X)
    np.testing.assert_array_equal(arrays["lora_base/layer/kernel"], SQUARE["weight"].T)


class Regression(distaff.TrainerModule):
    def print_tabulate(self, example_batch):
        pass  # it takes most of the time of a start

    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])).mean()


@pytest.mark.slow
def test_a_trainer_loads_records_and_exports(tmp_path: Path) -> None:
    tensors = {f"a.{name}": tensor for name, tensor in SQUARE.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    rules = TorchRules({"a": "layer"})
    batches = [{"x": X}, {"x": 2 * X}]

    def trained(model: Any, name: str) -> Regression:
        how = InitFrom(tmp_path / "a.safetensors", rules=rules)
        trainer = Regression(model, init_from=how, name=name, enable_progress_bar=False)
        trainer.train_model(batches, num_epochs=1)
        return trainer

    whole = trained(Named(), "whole")
    record = json.loads((whole.last_run.path / "config.json").read_text())
    assert record["init_from"]["rules"] == {
        "names": {"a": "layer"},
        "inputs_first": [],
        "tied": {},
    }
    back = load_file(whole.export_weights("back.safetensors", rules=rules))
    kernel = np.asarray(whole.state.params["layer"]["kernel"])
    np.testing.assert_array_equal(back["a.weight"], kernel.T)
    assert not np.array_equal(back["a.weight"], SQUARE["weight"])
    with safe_open("back.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    some = whole.export_weights("some.safetensors", rules=rules, only="*.bias")
    assert set(load_file(some)) == {"a.bias"}
    lora = trained(distaff.Lora(Named(), rank=2), "lora")
    merged = load_file(lora.export_weights("lora.safetensors", rules=rules, merge=False))
    assert set(merged) == {"a.weight", "a.bias"}
    assert not np.array_equal(merged["a.weight"], SQUARE["weight"])


class Stop(distaff.Callback):
    """Ends a run as a crash does, at a step; never, at none."""

    def __init__(self, step: int | None = None) -> None:
        self.step = step

    def on_checkpoint(self, info: Any) -> None:
        if info.step == self.step:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_without_the_file() -> None:
    save_file({f"a.{name}": tensor for name, tensor in SQUARE.items()}, "a.safetensors")
    how = InitFrom("a.safetensors", rules=TorchRules({"a": "layer"}))

    def trained(name: str, *callbacks: Any) -> dict[str, np.ndarray]:
        trainer = Regression(
            Named(), init_from=how, name=name, callbacks=callbacks, enable_progress_bar=False
        )
        trainer.train_model([{"x": X}, {"x": 2 * X}], num_epochs=2)
        assert trainer.step == 4
        return {n: np.asarray(x) for n, x in named(trainer.state).items()}

    straight = trained("straight")
    with pytest.raises(KeyboardInterrupt):
        trained("resumed", Stop(2))
    Path("a.safetensors").unlink()
    resumed = trained("resumed", Stop())
    assert Path("runs/resumed/0001").exists()
    assert not Path("runs/resumed/0002").exists()
    for name, array in straight.items():
        assert array.tobytes() == resumed[name].tobytes()
