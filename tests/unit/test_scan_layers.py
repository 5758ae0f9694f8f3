"""A GPT whose blocks are one loop, conversion of its weights, and other kinds of attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from distaff import OptimizerConfig, TrainState, data, tasks, train_step, zoo
from distaff.errors import ConfigError
from distaff.models import as_model, in_precision, rematerialized
from distaff.run.diagnosis.products import products
from distaff.zoo.attention import causal_attention

RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.integers(0, 16, (2, 8)))
SEGMENTS = jnp.asarray([[0, 0, 0, 1, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 1, 1]])
SIZES = {"vocab_size": 16, "num_heads": 2, "features": 16, "max_length": 8}
GPT = zoo.GPT(**SIZES, num_layers=3)
LOOPED = GPT.clone(scan_layers=True)


def next_token(params, batch, ctx):
    logits = ctx.apply(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["x"]).mean(-1)


def state_of(model, remat=None, precision="float32", params=None):
    model = in_precision(rematerialized(as_model(model), remat), precision)
    made = model.init(jax.random.key(0), TOKENS).params if params is None else params
    tx = optax.sgd(0.1)
    return TrainState.create(apply_fn=model.apply_fn, params=made, tx=tx, rng=jax.random.key(1))


def traced(state):
    return jax.make_jaxpr(train_step(next_token))(state, {"x": TOKENS}).jaxpr


def size(jaxpr):
    """Returns the number of equations of a program, however deep."""
    inner = (each for equation in jaxpr.eqns for each in jaxprs_in_params(equation.params))
    return len(jaxpr.eqns) + sum(map(size, inner))


def logits(model, params, **options):
    def apply(params):
        return model.apply({"params": params}, TOKENS, train=False, **options)

    return jax.jit(apply)(params)


@pytest.fixture(scope="module")
def params():
    return jax.jit(GPT.init)(jax.random.key(0), TOKENS)["params"]


def test_the_program_of_a_loop_has_one_block_whatever_the_depth():
    def size_of(depth, **options):
        model = zoo.GPT(**SIZES, num_layers=depth, **options)
        variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
        gradient = jax.grad(lambda variables: model.apply(variables, TOKENS, train=False).sum())
        return size(jax.make_jaxpr(gradient)(variables).jaxpr)

    assert size_of(2, scan_layers=True) == size_of(5, scan_layers=True) < size_of(2)
    assert size_of(5) > 2 * size_of(2)


@pytest.mark.slow
def test_the_lowered_program_of_a_loop_is_as_long_whatever_the_depth():
    def length(depth, **options):
        state = state_of(zoo.GPT(**SIZES, num_layers=depth, dropout=0.1, **options))
        return len(jax.jit(train_step(next_token)).lower(state, {"x": TOKENS}).as_text())

    assert abs(length(2, scan_layers=True) - length(12, scan_layers=True)) < 1000
    assert length(12) > 3 * length(2)


def test_weights_are_converted_both_ways(params):
    stacked = zoo.stacked_blocks(params)
    own = jax.jit(LOOPED.init)(jax.random.key(0), TOKENS)["params"]
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, own)
    jax.tree.map(np.testing.assert_array_equal, zoo.separate_blocks(stacked), params)
    assert zoo.separate_blocks(stacked).keys() == params.keys()
    assert own["blocks"]["up"]["kernel"].std((1, 2)) == pytest.approx(0.02, rel=0.2)
    assert not np.array_equal(*own["blocks"]["up"]["kernel"][:2])


@pytest.mark.slow_but("whole")
@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["whole", "segments"])
def test_logits_of_a_loop_are_those_of_separate_blocks(params, segment_ids):
    found, expected = (
        logits(model, each, segment_ids=segment_ids)
        for model, each in ((LOOPED, zoo.stacked_blocks(params)), (GPT, params))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_training_a_loop_is_training_separate_blocks(params):
    found = []
    for model, start in ((GPT, params), (LOOPED, zoo.stacked_blocks(params))):
        state, losses = state_of(model, params=start), []
        step = jax.jit(train_step(next_token))
        for _ in range(10):
            state, metrics = step(state, {"x": TOKENS})
            losses.append(metrics["loss"].compute())
        found.append((state.params, losses))
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        found[0][0],
        zoo.separate_blocks(found[1][0]),
    )


@pytest.mark.slow
def test_each_pass_of_the_loop_draws_its_own_dropout(params):
    first = jax.tree.map(lambda leaf: leaf[:1].repeat(3, 0), zoo.stacked_blocks(params)["blocks"])
    model = LOOPED.clone(dropout=0.5)
    _, seen = model.apply(
        {"params": {**params, "blocks": first}},
        TOKENS,
        rngs={"dropout": jax.random.key(0)},
        capture_intermediates=lambda module, _: module.name == "Dropout_0",
    )
    dropped = seen["intermediates"]["blocks"]["Dropout_0"]["__call__"][0] == 0
    assert 0.3 < dropped.mean() < 0.7
    assert not np.array_equal(dropped[0], dropped[1])


def stored(model, remat):
    """Returns the bytes that a forward pass keeps for the backward pass of a loop of 3 blocks."""
    state = state_of(model, remat)

    def pullback(params):
        return jax.vjp(lambda p: state.apply_fn({"params": p}, TOKENS), params)[1]

    kept = jax.tree.leaves(jax.eval_shape(pullback, state.params))
    return sum(x.size * 4 for x in kept if x.shape[:3] in ((3, 2, 8), (3, 2, 2), (3, 16, 16)))


def test_a_block_of_the_loop_is_computed_again():
    assert stored(LOOPED, "blocks") < stored(LOOPED, None) / 4


@pytest.mark.slow
def test_a_block_of_the_loop_is_computed_again_in_the_compiled_program(optimized):
    found = []
    for remat in (None, "blocks"):
        state = state_of(LOOPED.clone(dropout=0.1), remat)
        lowered = jax.jit(train_step(next_token)).lower(state, {"x": TOKENS})
        # XLA for CPU otherwise merges what is computed again with the original.
        program = lowered.compile(
            compiler_options={"xla_disable_hlo_passes": "cse_barrier_expander"}
        )
        size = program.memory_analysis().temp_size_in_bytes
        for _ in range(3):
            state, _ = program(state, {"x": TOKENS})
        found.append((program.as_text().count(" dot("), size, state.params))
    (few, large, params), (more, small, same) = found
    assert more > few
    assert small < large
    jax.tree.map(np.testing.assert_array_equal, params, same)


@pytest.mark.parametrize("options", [{"scan_layers": True}, {"attention": "xla"}])
@pytest.mark.slow
def test_all_products_are_in_half_precision(options):
    state = state_of(GPT.clone(**options), precision="bf16")
    found = products(traced(state))
    assert {each.dtype for each in found} == {"bfloat16"}
    assert any(each.is_backward for each in found)


@pytest.mark.slow
def test_a_language_model_trains_as_a_loop():
    rows = np.tile(np.arange(8, dtype=np.int32), (32, 1))
    trainer = tasks.LanguageModel(
        LOOPED,
        root=None,
        enable_progress_bar=False,
        remat="blocks",
        optimizer=OptimizerConfig("adam", learning_rate=1e-2),
        init_from=zoo.stacked_blocks(GPT.init(jax.random.key(3), TOKENS)["params"]),
    )
    result = trainer.train_model(data.ArrayLoader({"tokens": rows}, batch_size=8), num_epochs=8)
    assert result.metrics["train/loss"] < 1
    separate = {"params": zoo.separate_blocks(trainer.state.params)}
    np.testing.assert_allclose(
        trainer.predict([{"tokens": rows}]),
        GPT.apply(separate, rows[:, :-1], train=False),
        atol=1e-4,
    )


@pytest.mark.slow_but("segments")
@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["whole", "segments"])
def test_attention_of_jax_or_a_function_is_the_same(params, segment_ids):
    def own(query, key, value, segment_ids):
        assert query.shape == (2, 8, 2, 8)
        return causal_attention(query, key, value, segment_ids)

    expected = logits(GPT, params, segment_ids=segment_ids)
    for attention in ("xla", own):
        found = logits(GPT.clone(attention=attention), params, segment_ids=segment_ids)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_cudnn_gets_bfloat16(params, monkeypatch):
    def stand_in(query, key, value, *, mask, is_causal, implementation):
        assert (implementation, is_causal, mask) == ("cudnn", True, None)
        assert {x.dtype for x in (query, key, value)} == {jnp.dtype(jnp.bfloat16)}
        return causal_attention(query, key, value)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    found = logits(GPT.clone(attention="cudnn"), params)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, logits(GPT, params), atol=1e-2)


@pytest.mark.parametrize(
    ("attention", "complaint"),
    [
        ("flash", "attention has no value 'flash'.*'cudnn', 'xla'"),
        ("cudnn", "needs an NVIDIA GPU; JAX runs on the backend 'cpu'"),
    ],
)
def test_wrong_attention_is_named(params, attention, complaint):
    with pytest.raises(ConfigError, match=complaint):
        logits(GPT.clone(attention=attention), params)


@pytest.mark.parametrize(
    ("convert", "tree", "complaint"),
    [
        (zoo.stacked_blocks, {"params": {}}, r"without the collection: variables\['params'\]"),
        (zoo.stacked_blocks, {"Block_1": {}, "head": {}}, r"got \['Block_1', 'head'\]"),
        (
            zoo.stacked_blocks,
            {"Block_0": {"k": np.ones(2)}, "Block_1": {"k": np.ones(3)}},
            "Block_1 differs from Block_0",
        ),
        (zoo.separate_blocks, {"Block_0": {}}, r"got \['Block_0'\]"),
        (zoo.separate_blocks, {"blocks": {"k": np.ones(2), "l": np.ones(3)}}, "scan_layers=True"),
    ],
)
def test_other_trees_cannot_be_converted(convert, tree, complaint):
    with pytest.raises(ConfigError, match=complaint):
        convert(tree)
