from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff.errors import BatchError, ConfigError
from distaff.zoo import GPT, generate
from distaff.zoo.gpt import Block, causal_attention, rotary

SMALL = GPT(vocab_size=17, num_layers=2, num_heads=2, features=8, max_length=13)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(17, size=(3, 11), dtype=np.int32)


@pytest.fixture(scope="module")
def variables(tokens):
    return jax.jit(SMALL.init)(jax.random.key(0), tokens)


@pytest.mark.slow
def test_gpt_logits_depend_on_no_later_token(tokens, variables):
    # Large parameters, so that every part of the model tells in the logits.
    large = jax.tree.map(lambda leaf: 10 * leaf if leaf.ndim == 2 else leaf, variables)
    logits_of = jax.jit(lambda tokens: SMALL.apply(large, tokens, train=False))
    before = np.asarray(logits_of(tokens))
    for position in range(tokens.shape[1]):
        changed = tokens.copy()
        changed[:, position] = (changed[:, position] + 1) % 17
        after = np.asarray(logits_of(changed))
        np.testing.assert_array_equal(after[:, :position], before[:, :position])
        differs = (after[:, position:] != before[:, position:]).any(axis=(0, 2))
        assert differs.all(), f"the token at {position} does not reach {np.flatnonzero(~differs)}"


def _norm(x, module):
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6) * module["scale"]


def _turned(x, position):
    """Rotary positions as complex numbers."""
    half = len(x) // 2
    turned = (x[:half] + 1j * x[half:]) * np.exp(
        1j * position * 10_000.0 ** -(np.arange(half) / half)
    )
    return np.concatenate([turned.real, turned.imag])


def _attention(query, key, value):
    outputs = np.zeros_like(query)
    for position in range(len(query)):
        turned = _turned(query[position], position)
        scores = [turned @ _turned(key[other], other) for other in range(position + 1)]
        weights = np.exp(np.array(scores) / np.sqrt(len(turned)))
        outputs[position] = weights / weights.sum() @ value[: position + 1]
    return outputs


def _reference(params, tokens, num_layers, num_heads):
    """The model of one row of tokens, in NumPy."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = params["Embed_0"]["embedding"][tokens]
    for layer in range(num_layers):
        block = params[f"Block_{layer}"]
        kernels = {name: module["kernel"] for name, module in block.items() if "kernel" in module}
        h = _norm(x, block["RMSNorm_0"])
        query, key, value = (
            np.split(h @ kernels[name], num_heads, axis=1) for name in ("query", "key", "value")
        )
        heads = [_attention(*head) for head in zip(query, key, value, strict=True)]
        x = x + np.concatenate(heads, axis=1) @ kernels["out"]
        h = _norm(x, block["RMSNorm_1"]) @ kernels["up"]
        h = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + h @ kernels["down"]
    return _norm(x, params["RMSNorm_0"]) @ params["head"]["kernel"]


@pytest.mark.slow
def test_gpt_computes_what_its_papers_say(tokens, variables):
    keys = iter(jax.random.split(jax.random.key(5), len(jax.tree.leaves(variables))))
    params = jax.tree.map(
        lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), variables["params"]
    )
    logits = jax.jit(lambda tokens: SMALL.apply({"params": params}, tokens, train=False))(tokens)
    for row, row_logits in zip(tokens, np.asarray(logits), strict=True):
        expected = _reference(params, row, SMALL.num_layers, SMALL.num_heads)
        np.testing.assert_allclose(row_logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_block_leaves_the_residual_stream_to_what_is_not_dropped():
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    block = Block(num_heads=2, out_scale=1.0, dropout=1.0)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    outputs, variables = jax.jit(block.init_with_output)(rngs, x)
    np.testing.assert_array_equal(outputs, x)
    evaluated = jax.jit(lambda variables, x: block.apply(variables, x, train=False))(variables, x)
    assert not np.allclose(evaluated, x)


@pytest.mark.parametrize(
    "model", [GPT(), SMALL, GPT(vocab_size=300, num_layers=1, num_heads=3, features=24)]
)
def test_gpt_has_the_documented_parameters(model):
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 3), jnp.int32))
    width, vocab = model.features, model.vocab_size
    expected = 2 * vocab * width + model.num_layers * (12 * width**2 + 2 * width) + width
    assert set(variables) == {"params"}
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == expected
    assert model != GPT() or expected == 853_120


@pytest.mark.slow
def test_gpt_is_uncertain_before_training():
    model = GPT(num_layers=2, features=64, num_heads=2)
    tokens = jax.random.randint(jax.random.key(1), (8, 65), 0, 256)
    logits, _ = jax.jit(model.init_with_output)(jax.random.key(0), tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    assert logits.shape == (8, 64, 256)
    assert float(losses.mean()) == pytest.approx(math.log(256), abs=0.05)


@pytest.mark.slow
def test_gpt_scales_what_writes_into_the_residual_stream():
    model = GPT(num_layers=2, features=64)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), int))
    block = variables["params"]["Block_1"]
    for name, scale in (("query", 1), ("up", 1), ("out", 1 / 2), ("down", 1 / 2)):
        assert float(block[name]["kernel"].std()) == pytest.approx(0.02 * scale, rel=0.05), name


@pytest.mark.slow
def test_gpt_drops_values_in_training_only(tokens):
    model = GPT(vocab_size=17, num_layers=1, num_heads=2, features=8, dropout=0.5)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = jax.jit(model.init)(rngs, tokens)

    @jax.jit
    def train(seed):
        return model.apply(variables, tokens, rngs={"dropout": jax.random.key(seed)})

    assert not np.allclose(train(1), train(2))
    jax.eval_shape(lambda: model.apply(variables, tokens, train=False))  # asks for no key


@pytest.mark.parametrize(
    ("model", "tokens", "error", "match"),
    [
        (SMALL, jnp.zeros((1, 14), int), BatchError, "at most max_length=13 .* has 14"),
        (SMALL, jnp.zeros((4,), int), BatchError, r"\[batch, length\] .*\(4,\)"),
        (SMALL, jnp.zeros((1, 4)), BatchError, "int dtype.*float32"),
        (GPT(features=130), jnp.zeros((1, 4), int), ConfigError, "features=130, num_heads=4"),
        (GPT(features=12), jnp.zeros((1, 4), int), ConfigError, "even"),
    ],
)
def test_gpt_refuses(model, tokens, error, match):
    with pytest.raises(error, match=match):
        jax.eval_shape(model.init, jax.random.key(0), tokens)


@pytest.mark.slow_but("3")
@pytest.mark.parametrize("length", [1, 3, 13])
def test_causal_attention_is_that_of_jax(length):
    arrays = jax.random.normal(jax.random.key(0), (3, 2, length, 3, 4))

    def reference(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, is_causal=True)

    def value_and_grad(attention):
        return jax.jit(jax.value_and_grad(lambda arrays: jnp.sin(attention(*arrays)).sum()))(arrays)

    for actual, expected in zip(*map(value_and_grad, (causal_attention, reference)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_rotary_makes_products_depend_on_the_distance():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 6))
    turn = jax.jit(lambda x: rotary(jnp.tile(x, (1, 9, 1, 1)))[0, :, 0])
    turned_query, turned_key = np.asarray(turn(query)), np.asarray(turn(key))
    products = turned_query @ turned_key.T
    for distance in range(-8, 9):
        along = np.diagonal(products, distance)
        np.testing.assert_allclose(along, along[0], rtol=1e-4, atol=1e-5)
    assert np.ptp(products[0]) > 0.1
    np.testing.assert_allclose(np.square(turned_query).sum(-1), np.square(query).sum(), rtol=1e-5)


def _follow_the_table(tokens):
    """A model that is sure of the next token: the sum of the last three, modulo 10."""
    padded = jnp.pad(tokens, ((0, 0), (2, 0)))
    following = (padded[:, 2:] + padded[:, 1:-1] + padded[:, :-2]) % 10
    return 100.0 * jax.nn.one_hot(following, 10)


@pytest.mark.parametrize("max_length", [None, 3, 5, 50])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.slow
def test_generate_draws_what_the_model_says(max_length, temperature):
    tokens = jnp.asarray([[1, 2, 3] + [7] * 9, [4, 4, 4] + [0] * 9])

    @jax.jit
    def fill(tokens, start, key):
        return generate(
            _follow_the_table,
            tokens,
            start,
            key=key,
            temperature=temperature,
            max_length=max_length,
        )

    filled = np.asarray(fill(tokens, 3, jax.random.key(0)))
    expected = np.array(tokens)
    for position in range(3, 12):
        expected[:, position] = expected[:, position - 3 : position].sum(axis=1) % 10
    np.testing.assert_array_equal(filled, expected)
    other = fill(tokens.at[:, 3].set(5), 4, jax.random.key(1))
    assert np.asarray(other)[:, 3].tolist() == [5, 5]
    assert fill._cache_size() == 1


def test_generate_sees_at_most_max_length_tokens():
    seen = []

    def logits_fn(tokens):
        seen.append(tokens.shape)
        return jax.nn.one_hot(tokens, 10)

    generate(logits_fn, jnp.zeros((2, 9), int), 1, key=jax.random.key(0), max_length=4)
    assert set(seen) == {(2, 4)}


def test_generate_follows_key_and_temperature():
    logits = jnp.log(jnp.asarray([0.6, 0.3, 0.1]))

    def share(temperature, seed=0):
        buffer = jnp.zeros((1, 3_000), int)
        drawn = generate(
            lambda tokens: jnp.broadcast_to(logits, (*tokens.shape, 3)),
            buffer,
            1,
            key=jax.random.key(seed),
            temperature=temperature,
            max_length=1,
        )
        return np.bincount(np.asarray(drawn)[0, 1:], minlength=3) / 2_999

    np.testing.assert_allclose(share(1.0), [0.6, 0.3, 0.1], atol=0.03)
    np.testing.assert_allclose(share(0.5), np.array([36, 9, 1]) / 46, atol=0.03)
    assert share(0.0).tolist() == [1, 0, 0]
    assert share(1.0, seed=0).tolist() != share(1.0, seed=1).tolist()


def test_sampling_from_half_precision_logits_draws_as_from_float32():
    logits = jnp.asarray([[0.0, 0.01, 0.02, 3.0]] * 2, jnp.bfloat16)
    tokens = jnp.zeros((2, 60), jnp.int32)

    def draw(dtype: Any) -> Any:
        rows = jnp.broadcast_to(logits.astype(dtype)[:, None], (2, 60, 4))
        return generate(lambda _: rows, tokens, 1, key=jax.random.key(0))

    np.testing.assert_array_equal(draw(jnp.bfloat16), draw(jnp.float32))
