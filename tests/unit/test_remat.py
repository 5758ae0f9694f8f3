"""Rematerialization: what is computed again, what is not stored, and that no number changes."""

from __future__ import annotations

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from distaff import Lora, OptimizerConfig, RematConfig, TrainState, data, train_step, zoo
from distaff.core.config.encoding import from_json, to_json
from distaff.errors import ConfigError
from distaff.models import as_model, in_precision, rematerialized
from distaff.run.diagnosis.products import products
from distaff.trainer.config import TrainerConfig
from model_kinds import KINDS
from scripted import Break, InterruptError, Regression

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 3)).astype(np.float32)
BATCH = {"x": jnp.asarray(X), "y": jnp.asarray(X.sum(1))}
WIDE = {"x": jnp.asarray(RNG.normal(size=(64, 32)).astype(np.float32)), "y": jnp.ones(64)}
FAMILIES = ("linen", "nnx", "equinox", "functions")
# XLA for CPU otherwise removes the barriers, and merges what is computed again with the original.
WITH_BARRIERS = {"xla_disable_hlo_passes": "cse_barrier_expander"}
DEPTH = 3


def squares(params, batch, ctx):
    outputs = ctx.apply(params, batch["x"])
    return jnp.square(outputs.reshape(len(outputs), -1).mean(-1) - batch["y"])


def state_of(model, remat, x, precision="float32", tx=None):
    model = in_precision(rematerialized(as_model(model), remat), precision)
    variables = model.init(jax.random.key(0), x)
    return TrainState.create(
        apply_fn=model.apply_fn,
        tx=tx or optax.sgd(0.1),
        rng=jax.random.key(1),
        **variables._asdict(),
    )


def count(jaxpr, *names):
    """Returns how many equations of these names a program has, however deep."""
    return sum(
        (each.primitive.name in names)
        + sum(count(inner, *names) for inner in jaxprs_in_params(each.params))
        for each in jaxpr.eqns
    )


def parts(state, batch=BATCH, loss=squares):
    """Returns the number of parts of a step that are computed again."""
    return count(jax.make_jaxpr(train_step(loss))(state, batch).jaxpr, "remat2", "checkpoint")


def compiled(model, remat, batch=WIDE, loss=squares):
    """Returns how many products the program of a step has, and the bytes of its temporaries."""
    lowered = jax.jit(train_step(loss)).lower(state_of(model, remat, batch["x"]), batch)
    program = lowered.compile(compiler_options=WITH_BARRIERS)
    return program.as_text().count(" dot("), program.memory_analysis().temp_size_in_bytes


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.Dense(128, name="up")(x)
        for _ in range(4):
            h = jnp.sin(h)
        return x + nn.Dense(32, name="down")(h)


class LinenStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        for n in range(DEPTH):
            x = LinenBlock(name=f"blocks_{n}")(x)
        return x


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(32, 128, rngs=rngs), nnx.Linear(128, 32, rngs=rngs)

    def __call__(self, x):
        h = self.up(x)
        for _ in range(4):
            h = jnp.sin(h)
        return x + self.down(h)


class NnxStack(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(DEPTH)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class EquinoxBlock(eqx.Module):
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.up, self.down = eqx.nn.Linear(32, 128, key=first), eqx.nn.Linear(128, 32, key=second)

    def __call__(self, x):
        h = self.up(x)
        for _ in range(4):
            h = jnp.sin(h)
        return x + self.down(h)


class EquinoxStack(eqx.Module):
    blocks: list[EquinoxBlock]

    def __init__(self, key):
        self.blocks = [EquinoxBlock(each) for each in jax.random.split(key, DEPTH)]

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


STACKS = {
    "linen": (LinenStack(), "blocks_*"),
    "nnx": (NnxStack, "blocks/*"),
    "equinox": (EquinoxStack, "blocks/*"),
    "functions": (
        (
            lambda key, x: LinenStack().init(key, x)["params"],
            lambda params, x: LinenStack().apply({"params": params}, x),
        ),
        None,
    ),
}


def stored(model, remat):
    """Returns the bytes that a forward pass keeps for the backward pass, without parameters."""
    state = state_of(model, remat, WIDE["x"])

    def pullback(params, x):
        return jax.vjp(lambda p: state.apply_fn({"params": p}, x), params)[1]

    kept = jax.tree.leaves(jax.eval_shape(pullback, state.params, WIDE["x"]))
    return sum(x.size * 4 for x in kept if 64 in x.shape)


@pytest.mark.slow_but("linen")
@pytest.mark.parametrize("family", ["linen", "nnx", "equinox"])
def test_blocks_are_computed_again_instead_of_stored(family):
    model, pattern = STACKS[family]
    num_products, size = compiled(model, None)
    num_again, smaller = compiled(model, pattern)
    assert num_products == 6 * DEPTH - 1
    assert num_again > num_products
    assert smaller < 0.7 * size


@pytest.mark.parametrize("family", ["linen", "nnx", "equinox"])
def test_a_pattern_stores_the_inputs_of_its_modules_only(family):
    model, pattern = STACKS[family]
    assert parts(state_of(model, pattern, WIDE["x"]), WIDE) == DEPTH
    assert stored(model, pattern) == DEPTH * 64 * 32 * 4
    both = stored(model, RematConfig(pattern, policy="dots_saveable"))
    assert stored(model, pattern) < both < stored(model, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_applies_to_the_whole_forward_pass(family):
    model, _ = STACKS[family]
    assert parts(state_of(model, "dots_saveable", WIDE["x"]), WIDE) == 1
    nothing, dots, everything = (
        stored(model, f"{each}_saveable") for each in ("nothing", "dots", "everything")
    )
    assert nothing == 64 * 32 * 4
    assert nothing < dots < everything == stored(model, None)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_decides_which_products_are_computed_again(family):
    model, _ = STACKS[family]
    num_products, _ = compiled(model, None)
    assert compiled(model, "dots_saveable")[0] == num_products
    assert compiled(model, "nothing_saveable")[0] > num_products


def after(state, batch=BATCH, loss=squares, num_steps=2):
    """Returns the state after some steps, operation by operation.

    Two programs may differ in how XLA fuses operations, and with it in the last bit.
    """
    with jax.disable_jit():
        for _ in range(num_steps):
            state, _ = train_step(loss)(state, batch)
    return state


def check_same_bits(one, other):
    for name in ("params", "batch_stats", "collections"):
        jax.tree.map(np.testing.assert_array_equal, getattr(one, name), getattr(other, name))


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["*", "dots_saveable"], ids=["pattern", "policy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_bit_changes_with_dropout_and_batch_norm(family, remat):
    if (family, remat) == ("functions", "*"):
        pytest.skip("functions have no modules")
    model = KINDS[family].mlp(0.1, True)
    plain, again = (state_of(model, each, BATCH["x"]) for each in (None, remat))
    assert jax.tree.structure(plain.params) == jax.tree.structure(again.params)
    assert parts(again) > 0
    check_same_bits(after(plain), after(again))


GPT = {"vocab_size": 16, "num_layers": 2, "num_heads": 2, "features": 16, "max_length": 8}
TOKENS = {"x": jnp.asarray(RNG.integers(0, 16, (2, 8)))}


def next_token(params, batch, ctx):
    logits = ctx.apply(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["x"]).mean(-1)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_blocks_of_a_gpt_in_a_precision(precision):
    model = zoo.GPT(**GPT, dropout=0.1)
    plain, again = (state_of(model, x, TOKENS["x"], precision) for x in (None, "Block_*"))
    step = train_step(next_token)
    dtypes = [
        [each.dtype for each in products(jax.make_jaxpr(step)(state, TOKENS))]
        for state in (plain, again)
    ]
    assert len(dtypes[1]) > len(dtypes[0])
    assert len(set(dtypes[0] + dtypes[1])) == 1
    check_same_bits(after(plain, TOKENS, next_token), after(again, TOKENS, next_token))


@pytest.mark.slow
def test_compiled_steps_of_a_gpt_have_the_same_bits(optimized):
    model = zoo.GPT(**GPT, dropout=0.1)
    found = []
    for remat in (None, "Block_*", "nothing_saveable"):
        state = state_of(model, remat, TOKENS["x"])
        lowered = jax.jit(train_step(next_token)).lower(state, TOKENS)
        step = lowered.compile(compiler_options=WITH_BARRIERS)
        for _ in range(3):
            state, _ = step(state, TOKENS)
        found.append(state)
    check_same_bits(found[0], found[1])
    check_same_bits(found[0], found[2])


@pytest.mark.slow_but("linen")
@pytest.mark.parametrize("family", FAMILIES)
def test_products_keep_their_names_in_half_precision(family):
    model, pattern = STACKS[family]
    found = []
    for remat in (None, pattern or "nothing_saveable"):
        state = state_of(model, remat, WIDE["x"], "bf16")
        found.append(products(jax.make_jaxpr(train_step(squares))(state, WIDE)))
    assert len(found[1]) > len(found[0])
    assert {each.dtype for each in found[1]} == {"bfloat16"}
    assert {each.scope for each in found[1]} == {each.scope for each in found[0]}


def test_a_module_inside_a_matching_one_belongs_to_it():
    state = state_of(LinenStack(), "*", WIDE["x"])
    assert parts(state, WIDE) == DEPTH
    assert parts(state_of(LinenStack(), ("blocks_0/up", "blocks_1"), WIDE["x"]), WIDE) == 2


class Embedded(nn.Module):
    """A block with a shared module, a flag by position, and a result that is not an array."""

    embed: nn.Module

    @nn.compact
    def __call__(self, x, scale, is_doubled, note=None):
        x = self.embed(x) + nn.Dense(4)(x) * scale
        return (2 * x if is_doubled else x), {"note": note, "scale": scale}


class Sharing(nn.Module):
    def setup(self):
        self.embed = nn.Dense(4)
        self.first, self.second = Embedded(self.embed), Embedded(self.embed)

    def __call__(self, x):
        x, kept = self.first(x, jnp.float32(2), True, note="first")
        assert kept["note"] == "first"
        return self.second(x, kept["scale"], False)[0]

    def encode(self, x):
        return self.embed(x)


def test_linen_modules_may_share_modules_and_take_flags():
    x = jnp.asarray(RNG.normal(size=(8, 4)).astype(np.float32))
    batch = {"x": x, "y": jnp.ones(8)}
    plain, again = (state_of(Sharing(), each, x) for each in (None, ("first", "second")))
    assert parts(again, batch) == 2
    check_same_bits(after(plain, batch), after(again, batch))
    variables = {"params": plain.params}
    np.testing.assert_array_equal(
        again.apply_fn(variables, x, method="encode"),
        Sharing().apply(variables, x, method="encode"),
    )


def test_functions_that_call_linen_modules_have_modules():
    state = state_of(STACKS["functions"][0], "blocks_*", WIDE["x"])
    assert parts(state, WIDE) == DEPTH


class NnxDrawing(nnx.Module):
    """A block whose random stream is another module's, too, and which sows."""

    def __init__(self, rngs):
        self.inner, self.drop = nnx.Linear(3, 3, rngs=rngs), nnx.Dropout(0.5)

    def __call__(self, x, rngs, is_last):
        x = self.drop(self.inner(x), rngs=rngs)
        self.sow(nnx.Intermediate, "seen", x.mean())
        return x.sum(-1, keepdims=True) if is_last else x


class NnxSharing(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([NnxDrawing(rngs), NnxDrawing(rngs)])
        self.rngs = rngs

    def __call__(self, x):
        return self.blocks[1](self.blocks[0](x, self.rngs, False), self.rngs, is_last=True)


def test_nnx_modules_may_share_streams_and_sow():
    plain, again = (state_of(NnxSharing, each, BATCH["x"]) for each in (None, "blocks/*"))
    assert parts(again) == 2
    check_same_bits(after(plain), after(again))

    def sown(state):
        model = state.apply_fn.__self__
        return model.forward(
            {"params": state.params},
            BATCH["x"],
            train=True,
            key=jax.random.key(2),
            mutable="Intermediate",
        )[1]

    with jax.disable_jit():
        jax.tree.map(np.testing.assert_array_equal, sown(plain), sown(again))


def test_nnx_modules_that_draw_nothing_need_no_key():
    state = state_of(KINDS["nnx"].mlp(0.0), "*", BATCH["x"])
    outputs = jax.jit(lambda x: state.apply_fn({"params": state.params}, x, train=True))(X)
    assert outputs.shape == (32, 1)


def scanned(make):
    """Returns a stack of NNX or Equinox blocks in one loop."""

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=DEPTH)
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def blocks(rngs):
                return NnxBlock(rngs)

            self.blocks = blocks(rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def run(x, block):
                return block(x)

            return run(x, self.blocks)

    class Equinox(eqx.Module):
        blocks: EquinoxBlock

        def __init__(self, key):
            self.blocks = eqx.filter_vmap(EquinoxBlock)(jax.random.split(key, DEPTH))

        def __call__(self, x):
            arrays, rest = eqx.partition(self.blocks, eqx.is_array)
            return jax.lax.scan(lambda x, each: (eqx.combine(each, rest)(x), None), x, arrays)[0]

    return {"nnx": Nnx, "equinox": Equinox}[make]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["nnx", "equinox"])
def test_a_block_in_a_loop_over_layers_is_computed_again(family):
    model = scanned(family)
    assert parts(state_of(model, "blocks", WIDE["x"]), WIDE) == 1
    assert stored(model, "blocks") < stored(model, None) / 3
    one, other = (state_of(model, each, WIDE["x"]) for each in (None, "blocks"))
    check_same_bits(after(one, WIDE), after(other, WIDE))


def test_the_base_of_a_lora_and_standardized_inputs():
    lora = Lora(KINDS["nnx"].mlp(), "*kernel", rank=2)
    assert parts(state_of(lora, "first", BATCH["x"])) == 1
    assert parts(state_of(Lora(LinenStack()), "blocks_*", WIDE["x"]), WIDE) == DEPTH
    trainer = Regression(
        KINDS["equinox"].mlp(),
        example_batch=BATCH,
        root=None,
        remat="last",
        standardize=data.Standardize.fit({"x": X}),
    )
    tx = optax.sgd(0.1)
    state = trainer.state.replace(tx=tx, opt_state=tx.init(trainer.state.params))
    assert parts(state) == 1


@pytest.mark.parametrize(
    ("model", "remat", "complaint"),
    [
        (LinenStack(), "block_*", "matches no module of LinenStack. Did you mean 'blocks_"),
        (
            LinenStack(),
            ("blocks_*", "head"),
            "'head' is not a policy.*Known: 'blocks_0', 'blocks_0/down'",
        ),
        (LinenStack(), "dots_savable", "Did you mean the policy 'dots_saveable'"),
        (NnxStack, "block_*", "Known: 'blocks/0', 'blocks/0/down'"),
        (EquinoxStack, "blocks/9", "Known: 'blocks/0', 'blocks/0/down'"),
        (
            (lambda key, x: {"w": x[0]}, lambda p, x: x * p["w"][None]),
            "*",
            "which calls none that can be matched.* Pass a policy",
        ),
    ],
    ids=["linen", "second", "policy", "nnx", "equinox", "functions"],
)
def test_a_pattern_without_a_module_is_an_error(model, remat, complaint):
    state = state_of(model, remat, WIDE["x"])
    with pytest.raises(ConfigError, match=complaint) as error:
        jax.eval_shape(train_step(squares), state, WIDE)
    assert "Policies: 'nothing_saveable'" in str(error.value)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (True, "remat must be a pattern .* got True"),
        ((), "remat must be a pattern"),
        (("a", "dots_saveable"), "Write remat=RematConfig\\(\\('a',\\), policy='dots_saveable'"),
        (jax.checkpoint_policies.dots_saveable, "by its name.* Write remat='"),
    ],
)
def test_wrong_values_are_named(value, complaint):
    with pytest.raises(ConfigError, match=complaint):
        Regression(zoo.MLP((1,)), remat=value)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: RematConfig(), "patterns for the paths of modules, a policy, or both"),
        (lambda: RematConfig((1,)), r"got \(1,\)"),
        (lambda: RematConfig("a", policy="dots"), "policy has no value 'dots'"),
    ],
)
def test_wrong_values_of_a_config_are_named(make, complaint):
    with pytest.raises(ConfigError, match=complaint):
        make()


def test_a_constant_result_stays_an_array():
    def apply(params, state, x):
        return x @ params["w"], {"is_first": jnp.array(False)}

    model = (lambda key, x: ({"w": jnp.ones((3, 1))}, {"is_first": jnp.array(True)}), apply)
    state = state_of(model, "dots_saveable", BATCH["x"])
    found = []

    def step(state, batch):
        state, _ = train_step(squares)(state, batch)
        found.append(state.collections["state"]["is_first"])
        return state

    jax.eval_shape(step, state, BATCH)
    assert found[0].dtype == bool


def test_a_model_that_returns_other_objects_is_an_error():
    class Distribution:
        def __init__(self, mean):
            self.mean = mean

    model = (lambda key, x: {"w": jnp.ones(3)}, lambda params, x: Distribution(x @ params["w"]))
    state = state_of(model, "dots_saveable", BATCH["x"])
    with pytest.raises(ConfigError, match="returned an object of the class Distribution"):
        state.apply_fn({"params": state.params}, BATCH["x"])


@pytest.mark.parametrize(
    "value", ["Block_*", ("a", "b/*"), RematConfig("a/*", policy="dots_saveable")]
)
def test_option_is_recorded_as_json(value):
    config = TrainerConfig(remat=value)
    assert from_json(TrainerConfig, to_json(config)) == config


def loader():
    return data.ArrayLoader({"x": X, "y": X.sum(1)}, batch_size=8, seed=0)


def trained(cls=Regression, model=None, **options):
    defaults = {"root": None, "enable_progress_bar": False, "optimizer": OptimizerConfig("sgd")}
    trainer = (
        cls(LinenMLP(), **{**defaults, **options})
        if model is None
        else cls(model, **{**defaults, **options})
    )
    result = trainer.train_model(loader(), loader(), num_epochs=2)
    return trainer, result


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.relu(nn.Dense(8, name="first")(x))
        return nn.Dense(1, name="last")(nn.Dropout(0.1, deterministic=not train)(x))


class OwnStep(Regression):
    """A step that its class writes itself, past the state's forward function."""

    def create_functions(self):
        def step(state, batch):
            def objective(params):
                outputs = self.model.module.apply({"params": params}, batch["x"], train=False)
                return jnp.square(outputs[:, 0] - batch["y"]).mean()

            loss, grads = jax.value_and_grad(objective)(state.params)
            return state.apply_gradients(grads=grads), {"loss": loss}

        return step, super().create_functions()[1]


def test_a_step_without_effect_is_an_error():
    with pytest.raises(ConfigError, match=r"remat has no effect.*'first'"):
        trained(OwnStep, remat="first")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"optimizer": OptimizerConfig("adam", accumulate=2)}, {"steps_per_call": 4}],
    ids=["accumulated", "fused"],
)
def test_a_resumed_run_has_the_same_bits_with_another_remat(options):
    def run(root, fails=None, **remat):
        return trained(root=root, name="run", callbacks=[Break(fails)], **options, **remat)

    whole, _ = run("whole")
    with pytest.raises(InterruptError):
        run("broken", fails=6, remat="first")
    resumed, result = run("broken", remat=RematConfig("*", policy="dots_saveable"))
    assert result.path.name == "0001"
    jax.tree.map(np.testing.assert_array_equal, resumed.state.params, whole.state.params)
    jax.tree.map(np.testing.assert_array_equal, resumed.state.opt_state, whole.state.opt_state)
    loaded = Regression.load_from_checkpoint(result.path, LinenMLP())
    np.testing.assert_array_equal(loaded.predict([{"x": X}]), resumed.predict([{"x": X}]))
