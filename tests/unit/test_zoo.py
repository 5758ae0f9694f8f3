from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff.errors import BatchError, ConfigError
from distaff.zoo import CNN, MLP


def _size(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def pictures() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (4, 8, 8, 1))


def test_cnn_has_the_documented_parameters_and_statistics(pictures):
    variables = CNN().init(jax.random.key(0), pictures, train=False)
    assert _size(variables["params"]) == 30_762
    shapes = jax.tree.map(jnp.shape, variables["batch_stats"])
    assert shapes == {
        f"BatchNorm_{block}": {"mean": (features,), "var": (features,)}
        for block, features in enumerate(CNN().features)
    }


@pytest.mark.parametrize("shape", [(8, 8, 1), (7, 9, 3), (1, 1, 2)])
def test_cnn_returns_logits_for_any_picture_size(shape):
    model, x = CNN(num_classes=3, features=(4, 6)), jnp.ones((2, *shape))
    logits, variables = model.init_with_output(jax.random.key(0), x, train=False)
    assert logits.shape == (2, 3)
    assert logits.dtype == jnp.float32
    assert variables["params"]["Conv_1"]["kernel"].shape == (3, 3, 4, 6)


def test_cnn_changes_statistics_and_drops_values_in_training_only(pictures):
    model = CNN(features=(4,), dropout=0.5)
    variables = model.init(jax.random.key(0), pictures, train=False)

    def train(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply(variables, pictures, mutable=["batch_stats"], rngs=rngs)

    (first, changed), (second, _) = train(0), train(1)
    assert not np.allclose(first, second)
    before = variables["batch_stats"]["BatchNorm_0"]["mean"]
    assert not np.allclose(before, changed["batch_stats"]["BatchNorm_0"]["mean"])

    alone = model.apply(variables, pictures[:1], train=False)
    together, unchanged = model.apply(variables, pictures, train=False, mutable=["batch_stats"])
    np.testing.assert_allclose(alone[0], together[0], rtol=1e-5)
    np.testing.assert_array_equal(before, unchanged["batch_stats"]["BatchNorm_0"]["mean"])


def test_cnn_refuses_pictures_without_channels():
    with pytest.raises(BatchError, match=r"\[batch, height, width, channels\].*\(4, 8, 8\)"):
        CNN().init(jax.random.key(0), jnp.ones((4, 8, 8)), train=False)


def test_mlp_is_linear_relu_linear(pictures):
    outputs, variables = MLP([5, 2]).init_with_output(jax.random.key(0), pictures)
    params = jax.tree.map(np.asarray, variables["params"])
    assert set(variables) == {"params"}
    assert _size(params) == (64 * 5 + 5) + (5 * 2 + 2)
    hidden = (
        np.asarray(pictures).reshape(4, 64) @ params["Dense_0"]["kernel"]
        + params["Dense_0"]["bias"]
    )
    expected = np.maximum(hidden, 0) @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", [MLP([]), CNN(features=())])
def test_zoo_refuses_no_features(model, pictures):
    with pytest.raises(ConfigError, match="features"):
        model.init(jax.random.key(0), pictures)
