from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff.errors import BatchError, ConfigError
from distaff.zoo import CNN, MLP, ResNet
from distaff.zoo.resnet import ResidualBlock


def _size(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(4, 8, 8, 1)).astype(np.float32)


def _drawn(model, x):
    return jax.jit(lambda key: model.init(key, x, train=False))(jax.random.key(0))


def test_cnn_has_the_documented_parameters_and_statistics(pictures):
    variables = jax.eval_shape(lambda: CNN().init(jax.random.key(0), pictures, train=False))
    assert _size(variables["params"]) == 30_762
    assert jax.tree.map(jnp.shape, variables["batch_stats"]) == {
        f"BatchNorm_{block}": {"mean": (features,), "var": (features,)}
        for block, features in enumerate(CNN().features)
    }


@pytest.mark.parametrize("shape", [(8, 8, 1), (7, 9, 3), (1, 1, 2)])
def test_cnn_returns_logits_for_any_picture_size(shape):
    model, x = CNN(num_classes=3, features=(4, 6)), jnp.ones((2, *shape))
    logits, variables = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), x, train=False)
    )
    assert logits.shape == (2, 3)
    assert logits.dtype == jnp.float32
    assert variables["params"]["Conv_1"]["kernel"].shape == (3, 3, 4, 6)


def test_cnn_changes_statistics_and_drops_values_in_training_only(pictures):
    model = CNN(features=(4,), dropout=0.5)
    variables = _drawn(model, pictures)

    @jax.jit
    def train(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply(variables, pictures, mutable=["batch_stats"], rngs=rngs)

    (first, changed), (second, _) = train(0), train(1)
    assert not np.allclose(first, second)
    before = variables["batch_stats"]["BatchNorm_0"]["mean"]
    assert not np.allclose(before, changed["batch_stats"]["BatchNorm_0"]["mean"])

    evaluated = jax.jit(lambda x: model.apply(variables, x, train=False, mutable=["batch_stats"]))
    alone, _ = evaluated(pictures[:1])
    together, unchanged = evaluated(pictures)
    np.testing.assert_allclose(alone[0], together[0], rtol=1e-5)
    np.testing.assert_array_equal(before, unchanged["batch_stats"]["BatchNorm_0"]["mean"])


def test_cnn_refuses_pictures_without_channels():
    with pytest.raises(BatchError, match=r"\[batch, height, width, channels\].*\(4, 8, 8\)"):
        CNN().init(jax.random.key(0), jnp.ones((4, 8, 8)), train=False)


def _resnet_parameters(blocks: tuple[int, ...], features: tuple[int, ...], channels: int) -> int:
    """Counts by hand: 3 x 3 kernels, a scale and a shift behind each, and ten rows of logits."""
    total, width = 9 * channels * features[0] + 2 * features[0], features[0]
    for count, wider in zip(blocks, features, strict=True):
        total += 9 * width * wider + (2 * count - 1) * 9 * wider**2 + 4 * count * wider
        width = wider
    return total + 10 * width + 10


@pytest.mark.parametrize(
    ("blocks", "features", "channels", "documented"),
    [
        ((1, 1, 1), (16, 32, 64), 3, 75_290),
        ((3, 3, 3), (16, 32, 64), 3, 269_722),
        ((18, 18, 18), (16, 32, 64), 3, 1_727_962),  # "1.7M", table 6 of He et al. 2016
        ((1, 2), (4, 4), 1, None),
    ],
)
def test_resnet_has_the_documented_parameters(blocks, features, channels, documented):
    model = ResNet(blocks=blocks, features=features)
    x = jnp.ones((1, 8, 8, channels))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    expected = _resnet_parameters(blocks, features, channels)
    assert _size(variables["params"]) == expected
    assert documented in (None, expected)


@pytest.mark.parametrize("shape", [(8, 8, 1), (7, 9, 3), (1, 1, 2)])
def test_resnet_returns_logits_for_any_picture_size(shape):
    model = ResNet(num_classes=3, blocks=(1, 1), features=(4, 6))
    logits, _ = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), jnp.ones((2, *shape)), train=False)
    )
    assert logits.shape == (2, 3)
    assert logits.dtype == jnp.float32


@pytest.mark.slow
def test_resnet_changes_statistics_in_training_only(pictures):
    model = ResNet(blocks=(1, 1), features=(4, 6))
    variables = _drawn(model, pictures)
    before = variables["batch_stats"]
    _, changed = jax.jit(lambda: model.apply(variables, pictures, mutable=["batch_stats"]))()
    leaves = zip(jax.tree.leaves(before), jax.tree.leaves(changed["batch_stats"]), strict=True)
    assert all(not np.allclose(old, new) for old, new in leaves)
    evaluated = jax.jit(lambda x: model.apply(variables, x, train=False, mutable=["batch_stats"]))
    together, unchanged = evaluated(pictures)
    jax.tree.map(np.testing.assert_array_equal, before, unchanged["batch_stats"])
    alone, _ = evaluated(pictures[:1])
    np.testing.assert_allclose(alone[0], together[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow_but("shape1")
@pytest.mark.parametrize("shape", [(8, 8), (7, 9)])
def test_resnet_block_of_zero_kernels_is_its_shortcut(shape):
    # Every other pixel, and zeros in the new channels: option A of He et al. 2016.
    x = np.random.default_rng(0).uniform(size=(2, *shape, 3)).astype(np.float32)
    block = ResidualBlock(5, stride=2)
    variables = _drawn(block, x)
    zeros = jax.tree.map(np.zeros_like, variables["params"])
    output = jax.jit(lambda: block.apply({**variables, "params": zeros}, x, train=False))()
    np.testing.assert_array_equal(output[..., :3], x[:, ::2, ::2])
    np.testing.assert_array_equal(output[..., 3:], np.zeros_like(output[..., 3:]))


def test_resnet_convolutions_meet_the_pixels_of_the_shortcut():
    # A kernel that copies its middle adds to each pixel of the shortcut that very pixel.
    x = np.random.default_rng(0).uniform(size=(1, 8, 8, 1)).astype(np.float32)
    block = ResidualBlock(1, stride=2)
    variables = _drawn(block, x)
    copy = np.zeros((3, 3, 1, 1), np.float32)
    copy[1, 1] = 1.0
    params = {**variables["params"], "Conv_0": {"kernel": copy}, "Conv_1": {"kernel": copy}}
    output = jax.jit(lambda: block.apply({**variables, "params": params}, x, train=False))()
    np.testing.assert_allclose(output, 2 * x[:, ::2, ::2], rtol=1e-4)


def _layer(variables, number: int, x: np.ndarray, stride: int = 1) -> np.ndarray:
    """Returns a 3 x 3 convolution and its normalization by running statistics, in NumPy."""
    params, stats = variables
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    kernel, norm = params[f"Conv_{number}"]["kernel"], params[f"BatchNorm_{number}"]
    x = np.einsum("bhwcij,ijcf->bhwf", windows[:, ::stride, ::stride], kernel)
    mean, var = stats[f"BatchNorm_{number}"]["mean"], stats[f"BatchNorm_{number}"]["var"]
    return (x - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"]


def test_resnet_equals_its_equations(pictures):
    model, random = ResNet(num_classes=3, blocks=(1, 2), features=(4, 6)), np.random.default_rng(0)

    def drawn(path, leaf):
        values = random.normal(size=leaf.shape).astype(np.float32)
        return np.abs(values) + 1 if "var" in jax.tree_util.keystr(path) else values

    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), pictures, train=False))
    variables = jax.tree_util.tree_map_with_path(drawn, shapes)
    params, stats = variables["params"], variables["batch_stats"]

    x = np.maximum(_layer((params, stats), 0, np.asarray(pictures)), 0)
    for block, stride in enumerate((1, 2, 1)):
        inner = (params[f"ResidualBlock_{block}"], stats[f"ResidualBlock_{block}"])
        residual = _layer(inner, 1, np.maximum(_layer(inner, 0, x, stride), 0))
        new_channels = residual.shape[-1] - x.shape[-1]
        shortcut = np.pad(x[:, ::stride, ::stride], (*[(0, 0)] * 3, (0, new_channels)))
        x = np.maximum(shortcut + residual, 0)
    expected = x.mean(axis=(1, 2)) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]

    logits = jax.jit(lambda: model.apply(variables, pictures, train=False))()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_resnet_kernels_are_drawn_by_he(pictures):
    model = ResNet(blocks=(1,), features=(128,))
    params = _drawn(model, pictures)["params"]
    kernel = params["ResidualBlock_0"]["Conv_0"]["kernel"]
    np.testing.assert_allclose(kernel.std(), (2 / (9 * 128)) ** 0.5, rtol=0.02)


def test_resnet_refuses_pictures_without_channels():
    with pytest.raises(BatchError, match=r"\[batch, height, width, channels\].*\(4, 8, 8\)"):
        ResNet().init(jax.random.key(0), jnp.ones((4, 8, 8)), train=False)


@pytest.mark.parametrize(
    ("blocks", "features", "complaint"),
    [
        ((), (), "at least one stage"),
        ((1, 1), (16,), "one entry for each stage"),
        ((1, 0), (16, 16), "at least one block"),
        ((1, 1), (16, 8), "must not decrease"),
    ],
)
def test_resnet_refuses_stages_that_do_not_fit(pictures, blocks, features, complaint):
    with pytest.raises(ConfigError, match=complaint):
        ResNet(blocks=blocks, features=features).init(jax.random.key(0), pictures)


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


@pytest.mark.slow
def test_mlp_normalizes_and_drops_between_its_layers_in_training_only(pictures):
    model = MLP([512, 2], dropout=0.5, batch_norm=True)
    variables = _drawn(model, pictures)
    assert set(variables["params"]) == {"Dense_0", "BatchNorm_0", "Dense_1"}
    rngs = {"dropout": jax.random.key(1)}
    _, changed = jax.jit(
        lambda: model.apply(
            variables, pictures, rngs=rngs, mutable=True, capture_intermediates=True
        )
    )()
    seen = changed["intermediates"]
    (normed,), (dropped,) = (seen[name]["__call__"] for name in ("BatchNorm_0", "Dropout_0"))
    np.testing.assert_allclose(normed.mean(axis=0), 0, atol=1e-5)
    kept = np.asarray(dropped != 0)
    np.testing.assert_allclose(dropped[kept], 2 * normed[kept], rtol=1e-5)
    assert np.all(normed[kept] > 0)
    assert 0.4 < kept.sum() / (normed > 0).sum() < 0.6
    alone = model.apply(variables, pictures[:1], train=False)
    together = model.apply(variables, pictures, train=False)
    np.testing.assert_allclose(alone[0], together[0], rtol=1e-5)


@pytest.mark.parametrize("model", [MLP([]), CNN(features=())])
def test_zoo_refuses_no_features(model, pictures):
    with pytest.raises(ConfigError, match="features"):
        model.init(jax.random.key(0), pictures)
