"""Mixed precision: which products run in which dtype, what stays in float32, and what is saved."""

from __future__ import annotations

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from distaff import (
    OptimizerConfig,
    PrecisionConfig,
    TrainerModule,
    TrainState,
    data,
    tasks,
    train_step,
    zoo,
)
from distaff.core.config.encoding import from_json, to_json
from distaff.errors import ConfigError
from distaff.models import Variables, as_model, in_precision
from distaff.plan.devices import devices_of
from distaff.plan.targets import target_of
from distaff.run.diagnosis.products import products, summary
from distaff.trainer.config import TrainerConfig
from model_kinds import KINDS
from scripted import Break, InterruptError, Regression

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 3)).astype(np.float32)
BATCH = {"x": jnp.asarray(X), "y": jnp.asarray(X.sum(1))}
IMAGES = {"x": jnp.ones((4, 8, 8, 1)), "y": jnp.ones(4)}
TOKENS = jnp.asarray(RNG.integers(0, 16, (2, 8)))
MLP = zoo.MLP((8, 3))
FAMILIES = ("linen", "nnx", "equinox", "functions")
GPT = {"vocab_size": 16, "num_layers": 2, "num_heads": 2, "features": 16, "max_length": 8}


def loss_fn(params, batch, ctx):
    outputs = ctx.apply(params, batch["x"])
    return jnp.square(outputs.reshape(len(outputs), -1).mean(-1) - batch["y"])


def next_token(params, batch, ctx):
    logits = ctx.apply(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["x"]).mean(-1)


def state_of(model, x, precision, on_mesh=False):
    model = in_precision(as_model(model), precision, on_mesh=on_mesh)
    variables = model.init(jax.random.key(0), x)
    return TrainState.create(
        apply_fn=model.apply_fn,
        tx=optax.adamw(1e-3),
        rng=jax.random.key(1),
        **variables._asdict(),
    )


def traced(model, batch, precision="bf16", loss=loss_fn, on_mesh=False):
    state = state_of(model, batch["x"], precision, on_mesh)
    return jax.make_jaxpr(train_step(loss))(state, batch)


def check_all_in_half(jaxpr):
    found = products(jaxpr)
    forward = [each for each in found if not each.is_backward]
    assert {each.dtype for each in found} == {"bfloat16"}
    assert 0 < len(forward) < len(found)
    return forward


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [(0.1, False), (0.1, True)], ids=["dropout", "batch_norm"])
def test_all_products_of_small_models_are_in_half_precision(family, options):
    model = KINDS[family].mlp(*options)
    assert len(check_all_in_half(traced(model, BATCH))) == 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_all_convolutions_of_small_models_are_in_half_precision(family):
    assert len(check_all_in_half(traced(KINDS[family].cnn(), IMAGES))) == 2


@pytest.mark.slow_but("MLP")
@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (zoo.MLP((8, 3), batch_norm=True), BATCH),
        (zoo.CNN(), IMAGES),
        (zoo.ResNet(blocks=(1, 1), features=(4, 8)), IMAGES),
    ],
    ids=["MLP", "CNN", "ResNet"],
)
def test_all_products_of_the_zoo_are_in_half_precision(model, batch):
    check_all_in_half(traced(model, batch))


@pytest.mark.slow
def test_all_products_of_a_gpt_are_in_half_precision():
    batch = {"x": TOKENS}
    found = products(traced(zoo.GPT(**GPT), batch, "float32", next_token))
    assert {each.dtype for each in found} == {"float32"}
    assert len(check_all_in_half(traced(zoo.GPT(**GPT), batch, "bf16", next_token))) == len(
        [each for each in found if not each.is_backward]
    )


def half_outputs(jaxpr):
    """Returns the names of the operations that have results in bfloat16."""
    found = set()
    for equation in jaxpr.eqns:
        inner = list(jaxprs_in_params(equation.params))
        for each in inner:
            found |= half_outputs(each)
        if not inner and any(var.aval.dtype == jnp.bfloat16 for var in equation.outvars):
            found.add(equation.primitive.name)
    return found


@pytest.mark.parametrize(
    ("model", "batch", "loss"),
    [
        (zoo.GPT(**GPT), {"x": TOKENS}, next_token),
        (zoo.ResNet(blocks=(1,), features=(4,)), IMAGES, loss_fn),
        (KINDS["nnx"].mlp(0.0, True), BATCH, loss_fn),
    ],
    ids=["GPT", "ResNet", "nnx"],
)
def test_losses_softmax_and_statistics_are_in_float32(model, batch, loss):
    names = half_outputs(traced(model, batch, loss=loss).jaxpr)
    moves = {"convert_element_type", "transpose", "rev", "reshape", "broadcast_in_dim"}
    assert names - moves <= {"dot_general", "conv_general_dilated"}


def test_a_step_is_the_same_as_by_hand():
    kernel = jnp.asarray(RNG.normal(size=(3, 1)), jnp.float32)

    def half(x):
        return x.astype(jnp.bfloat16)

    def by_hand(kernel):
        outputs = (half(BATCH["x"]) @ half(kernel)).astype(jnp.float32)
        return jnp.square(outputs[:, 0] - BATCH["y"]).mean()

    model = as_model((lambda key, x: {"kernel": kernel}, lambda p, x: x @ p["kernel"]))
    model = in_precision(model, "bf16")
    params = {"kernel": kernel}
    state = TrainState.create(apply_fn=model.apply_fn, params=params, tx=optax.sgd(1.0))

    def loss_fn(params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"]).mean()

    after, metrics = jax.jit(train_step(loss_fn))(state, BATCH)
    loss, gradient = jax.jit(jax.value_and_grad(by_hand))(kernel)
    assert after.params["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(metrics["loss"].compute(), loss)
    np.testing.assert_array_equal(after.params["kernel"], kernel - gradient)
    # The forward function alone computes in the precision, too.
    outputs = state.apply_fn({"params": params}, BATCH["x"])
    np.testing.assert_array_equal(outputs, (half(BATCH["x"]) @ half(kernel)).astype(jnp.float32))


def test_float32_is_the_model_itself():
    model = as_model(zoo.MLP((8, 1)))
    assert in_precision(model, "float32") is model
    trainer = Regression(zoo.MLP((8, 1)), example_batch=BATCH, root=None)
    assert trainer.state.apply_fn == trainer.model.apply_fn


@pytest.mark.slow
def test_running_statistics_are_those_of_float32_products():
    """As BatchNorm's, which are updated from the outputs of a product in half precision."""
    found = {}
    for precision in ("float32", "bf16"):
        state = state_of(KINDS["linen"].mlp(0.0, True), BATCH["x"], precision)
        found[precision] = jax.jit(train_step(loss_fn))(state, BATCH)[0].batch_stats
    assert {x.dtype.name for x in jax.tree.leaves(found["bf16"])} == {"float32"}
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=0.02), found["bf16"], found["float32"]
    )
    assert not jax.tree.all(jax.tree.map(jnp.array_equal, found["bf16"], found["float32"]))


class Looped(nn.Module):
    """Dense layers below `nn.scan` and `nn.remat`."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Inner), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return layers(name="layers")(x, None)[0]


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(3)(x)), None


def test_exceptions_by_path_stay_in_float32():
    def dtypes(pattern, model=MLP):
        found = products(traced(model, BATCH, PrecisionConfig(float32=(pattern,))))
        return [(each.scope, each.dtype, each.is_backward) for each in found]

    assert dtypes("Dense_1/*") == [
        ("MLP/Dense_0", "bfloat16", False),
        ("MLP/Dense_1", "float32", False),
        ("MLP/Dense_1", "float32", True),
        ("MLP/Dense_1", "float32", True),
        ("MLP/Dense_0", "bfloat16", True),
    ]
    assert {dtype for _, dtype, _ in dtypes("*/kernel")} == {"float32"}
    assert {dtype for _, dtype, _ in dtypes("*/bias")} == {"bfloat16"}
    assert {dtype for _, dtype, _ in dtypes("layers/*/kernel", Looped())} == {"float32"}
    assert {dtype for _, dtype, _ in dtypes("other", Looped())} == {"bfloat16"}


@pytest.mark.parametrize("family", ["nnx", "equinox", "functions"])
def test_exceptions_are_paths_of_parameters_in_every_family(family):
    precision = PrecisionConfig(float32=("last/*",))
    found = products(traced(KINDS[family].mlp(), BATCH, precision))
    assert [each.dtype for each in found if not each.is_backward] == ["bfloat16", "float32"]


def test_matmul_precision_is_that_of_the_products_in_float32():
    jaxpr = traced(zoo.MLP((8, 3)), BATCH, PrecisionConfig("float32", matmul_precision="highest"))
    found = [each for each in jaxpr.eqns if each.primitive.name == "dot_general"]
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert [each.params["precision"] for each in found] == [highest] * 5


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Regression(zoo.MLP((1,)), precision="bf61"), "Did you mean 'bf16'"),
        (lambda: Regression(zoo.MLP((1,)), precision="bfloat16"), "Write precision='bf16'"),
        (lambda: Regression(zoo.MLP((1,)), precision=16), "must be one of 'float32', 'bf16'"),
        (lambda: PrecisionConfig("half"), "The name of a PrecisionConfig has no value 'half'"),
        (lambda: PrecisionConfig(float32="head/*"), "a tuple of patterns"),
        (lambda: PrecisionConfig(matmul_precision="low"), "matmul_precision has no value 'low'"),
        (lambda: PrecisionConfig(gradient_sums="bf16"), "gradient_sums has no value 'bf16'"),
    ],
)
def test_wrong_values_are_named(make, complaint):
    with pytest.raises(ConfigError, match=complaint):
        make()


def dtypes_of_results(jaxpr):
    """Returns the dtype of the result of each matrix product."""
    for equation in jaxpr.eqns:
        if equation.primitive is jax.lax.dot_general_p:
            yield equation.outvars[0].aval.dtype.name
        for inner in jaxprs_in_params(equation.params):
            yield from dtypes_of_results(inner)


GPT_BATCH = {"x": TOKENS, "y": jnp.ones(2)}


@pytest.mark.parametrize(
    ("model", "batch", "loss"),
    [(MLP, BATCH, loss_fn), (zoo.GPT(**GPT), GPT_BATCH, next_token)],
    ids=["MLP", "GPT"],
)
@pytest.mark.slow_but("MLP")
def test_gradients_on_a_mesh_are_added_up_in_float32(model, batch, loss):
    params = state_of(model, batch["x"], "bf16").params
    kernels = sum("kernel" in str(path) for path, _ in jax.tree.leaves_with_path(params))
    jaxpr = traced(model, batch, loss=loss, on_mesh=True)
    check_all_in_half(jaxpr)
    found = list(dtypes_of_results(jaxpr.jaxpr))
    assert found.count("float32") == kernels < found.count("bfloat16")
    for alone in (
        traced(model, batch, loss=loss),
        traced(model, batch, PrecisionConfig(gradient_sums="half"), loss, on_mesh=True),
    ):
        assert set(dtypes_of_results(alone.jaxpr)) == {"bfloat16"}


@pytest.mark.slow
@pytest.mark.compiler("jax_plugins.xla_cuda12")
@pytest.mark.parametrize(("sums", "dtype"), [("float32", "f32"), ("half", "bf16")])
def test_gpus_add_up_gradients_in_that_dtype(sums, dtype):
    mesh = jax.sharding.Mesh(devices_of(target_of("h100:1x8")), "data")
    placed = functools.partial(jax.NamedSharding, mesh)
    config = PrecisionConfig("bf16", gradient_sums=sums)
    model = in_precision(as_model(zoo.MLP((256, 128))), config, on_mesh=True)

    def shape_of(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed(jax.P()))

    def loss(params, x):
        outputs, _ = model.apply(Variables(params), x, train=False, key=None)
        return jnp.square(outputs).mean()

    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((1, 256)))).params
    x = jax.ShapeDtypeStruct((1024, 256), jnp.float32, sharding=placed(jax.P("data")))
    program = jax.jit(jax.grad(loss)).lower(jax.tree.map(shape_of, params), x).compile()
    sizes = re.findall(r"= (\w+)\[(\d+)\]\S* all-reduce-start", program.as_text())
    assert max(sizes, key=lambda each: int(each[1]))[0] == dtype


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "remat"])
def test_gradients_added_up_in_float32_are_those_of_one_device(precision, wrap):
    params = state_of(MLP, X, precision).params

    def loss(params, model):
        outputs, _ = model.apply(Variables(params, {}), jnp.asarray(X), train=False, key=None)
        return jnp.square(outputs).sum()

    wide, half = (
        jax.grad(wrap(functools.partial(loss, model=in_precision(as_model(MLP), name, on_mesh=on))))
        for name, on in ((precision, True), (precision, False))
    )
    for found, alone in zip(*map(jax.tree.leaves, (wide(params), half(params))), strict=True):
        np.testing.assert_array_equal(found, alone)
    # A gradient of a gradient, as a penalty on its norm has it.
    second = jax.grad(lambda p: sum(jnp.square(x).sum() for x in jax.tree.leaves(wide(p))))(params)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(second))


@pytest.mark.parametrize("value", ["bf16", PrecisionConfig("bf16", float32=("a/*", "b"))])
def test_option_is_recorded_as_json(value):
    config = TrainerConfig(precision=value)
    assert from_json(TrainerConfig, to_json(config)) == config


def loader(seed=0):
    arrays = {"x": X, "y": X.sum(1)}
    return data.ArrayLoader(arrays, batch_size=8, seed=seed)


def trained(cls=Regression, model=None, **options):
    defaults = {"root": None, "enable_progress_bar": False, "optimizer": OptimizerConfig("adam")}
    trainer = cls(zoo.MLP((4, 1)) if model is None else model, **{**defaults, **options})
    result = trainer.train_model(loader(), loader(), num_epochs=2)
    return trainer, result


def test_pattern_without_a_parameter_is_an_error():
    with pytest.raises(ConfigError, match="'head/\\*' matches none"):
        trained(precision=PrecisionConfig(float32=("head/*",)))


class Distribution:
    def __init__(self, mean):
        self.mean = mean


def test_model_that_returns_other_objects_is_an_error():
    model = (lambda key, x: {"w": jnp.ones(3)}, lambda params, x: Distribution(x @ params["w"]))
    state = state_of(model, BATCH["x"], "bf16")
    step = train_step(lambda params, batch, ctx: ctx.apply(params, batch["x"]).mean)
    with pytest.raises(ConfigError, match="returned an object of the class Distribution"):
        step(state, BATCH)


class OwnStep(Regression):
    """A step that its class writes itself."""

    through = "ctx"

    def create_functions(self):
        def objective(params, batch, state):
            if self.through == "ctx":
                from distaff import Context

                outputs = Context(state, train=True).apply(params, batch["x"])
            elif self.through == "state":
                outputs = state.apply_fn({"params": params}, batch["x"])
            else:
                outputs = self.model.module.apply({"params": params}, batch["x"])
            return jnp.square(outputs[:, 0] - batch["y"]).mean()

        def step(state, batch):
            loss, grads = jax.value_and_grad(objective)(state.params, batch, state)
            return state.apply_gradients(grads=grads), {"loss": loss}

        return step, super().create_functions()[1]


@pytest.mark.parametrize("through", ["ctx", "state"])
@pytest.mark.slow
def test_a_step_of_ones_own_computes_in_the_precision(through, caplog):
    with caplog.at_level("INFO", "distaff"):
        trained(type("Own", (OwnStep,), {"through": through}), precision="bf16")
    assert "Products in bfloat16: 2 of 2 forward, 3 of 3 backward" in caplog.text


def test_a_step_that_does_not_use_the_precision_is_an_error():
    with pytest.raises(ConfigError, match="none of the 5 matrix products"):
        trained(type("Own", (OwnStep,), {"through": "module"}), precision="bf16")


class Contrastive(Regression):
    def loss_fn(self, params, batch, ctx):
        outputs = ctx.apply(params, batch["x"])
        return jnp.square(outputs[:, 0] - batch["y"]) + jnp.diag(outputs @ outputs.T)


@pytest.mark.slow
def test_log_names_the_products_in_float32(caplog):
    with caplog.at_level("INFO", "distaff"):
        trained(Contrastive, precision="bf16")
        line = Contrastive.loss_fn.__code__.co_firstlineno + 2
    assert "Products in bfloat16: 2 of 3 forward, 3 of 5 backward; not bfloat16: " in caplog.text
    assert f"test_precision.py:{line} (float32)" in caplog.text


@pytest.mark.slow
def test_log_is_silent_in_float32(caplog):
    with caplog.at_level("INFO", "distaff"):
        trained()
    assert "Products in" not in caplog.text


def test_summary_names_a_few_and_counts_the_rest():
    def loss(params, batch, ctx):
        x = batch["x"]
        for _ in range(7):
            x = x @ params["kernel"] / 3
        return jnp.square(x.mean(-1) - batch["y"])

    state = TrainState.create(params={"kernel": jnp.ones((3, 3))}, tx=optax.sgd(1e-3))
    found = products(jax.make_jaxpr(train_step(loss))(state, BATCH))
    named = [each._replace(line=f"model.py:{n}") for n, each in enumerate(found)]
    assert summary(named, jnp.bfloat16).endswith("model.py:4 (float32) and 2 more")
    assert "0 of 7 forward, 0 of 13 backward" in summary(named, jnp.bfloat16)


def test_products_of_the_optimizer_do_not_count():
    tx = optax.contrib.muon(1e-3)
    state = state_of(zoo.MLP((8, 3)), BATCH["x"], "bf16")
    state = state.replace(tx=tx, opt_state=tx.init(state.params))
    assert len(products(jax.make_jaxpr(train_step(loss_fn))(state, BATCH))) == 5


@pytest.mark.slow
def test_evaluation_and_prediction_compute_in_the_precision():
    trainer, _ = trained(precision="bf16")
    params = trainer.state.params
    half = in_precision(as_model(zoo.MLP((4, 1))), "bf16").apply_fn
    expected = jax.jit(half)({"params": params}, X)
    np.testing.assert_array_equal(trainer.predict([{"x": X}]), expected)
    metrics = trainer.eval_model([BATCH])
    loss = jnp.square(expected[:, 0] - BATCH["y"]).mean()
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    assert not np.array_equal(zoo.MLP((4, 1)).apply({"params": params}, X), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_fused_steps_are_those_one_by_one(family):
    states = [
        trained(model=KINDS[family].mlp(0.1, True), precision="bf16", steps_per_call=k)[0].state
        for k in (1, 4)
    ]
    one, four = (jax.tree.leaves(state.params) for state in states)
    for a, b in zip(one, four, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits():
    options = {"precision": "bf16", "model": KINDS["linen"].mlp(0.1, True), "steps_per_call": 1}

    def run(root, fails=None):
        return trained(root=root, name="run", callbacks=[Break(fails)], **options)

    whole, _ = run("whole")
    with pytest.raises(InterruptError):
        run("broken", fails=6)
    resumed, result = run("broken")
    assert result.path.name == "0001"
    jax.tree.map(np.testing.assert_array_equal, resumed.state.params, whole.state.params)
    jax.tree.map(np.testing.assert_array_equal, resumed.state.opt_state, whole.state.opt_state)


@pytest.mark.slow
def test_another_precision_is_another_run():
    def run(precision, fails=None):
        options = {"root": "runs", "name": "run", "callbacks": [Break(fails)]}
        return trained(precision=precision, **options)[1].path.name

    with pytest.raises(InterruptError):
        run("bf16", fails=6)
    assert run("float32") == "0002"
    assert run("bf16") == "0001"


@pytest.mark.slow
def test_loaded_model_has_the_precision_of_its_run():
    trainer, result = trained(root="runs", name="run", precision="bf16")
    loaded = Regression.load_from_checkpoint(result.path)
    np.testing.assert_array_equal(loaded.predict([{"x": X}]), trainer.predict([{"x": X}]))
    plain = Regression.load_from_checkpoint(result.path, precision="float32")
    assert not np.array_equal(plain.predict([{"x": X}]), trainer.predict([{"x": X}]))


def test_model_that_returns_plain_values_and_its_input_is_left_alone():
    def apply(params, x):
        return {"mean": x @ params["w"], "name": "mean", "count": 3, "input": x, "none": None}

    model = (lambda key, x: {"w": jnp.ones(3)}, apply)
    state = state_of(model, BATCH["x"], "bf16")
    outputs = state.apply_fn({"params": state.params}, BATCH["x"])
    assert (outputs["name"], outputs["count"], outputs["none"]) == ("mean", 3, None)
    np.testing.assert_array_equal(outputs["input"], BATCH["x"])


class Sown(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(1)(x)
        self.sow("intermediates", "outputs", x)
        return x


@pytest.mark.slow
def test_collections_that_a_model_sows_are_returned():
    def loss(params, batch, ctx):
        outputs, changed = ctx.apply(params, batch["x"], mutable=["intermediates"])
        return jnp.square(outputs[:, 0] - changed["intermediates"]["outputs"][0][:, 0] + 1)

    state = state_of(Sown(), BATCH["x"], "bf16")
    assert train_step(loss)(state, BATCH)[1]["loss"].compute() == 1


def test_tasks_take_the_option():
    trainer = tasks.Classifier(zoo.MLP((4, 3)), root=None, precision="bf16")
    assert trainer.config.precision == "bf16"
    assert issubclass(tasks.Classifier, TrainerModule)
