"""Augmentation: what each function may make of a picture, how often, and in which dtype."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from typing import Any

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff import augment
from distaff.errors import BatchError, ConfigError

KEY = jax.random.key(7)
BATCH = 6
shapes = st.sampled_from([(1, 1, 1), (3, 5, 1), (6, 4, 3)])
keys = st.integers(0, 2**31 - 1).map(jax.random.key)
laws = settings(deadline=None, max_examples=12)


def pictures(shape: tuple[int, ...], batch: int = BATCH, dtype: Any = np.float32) -> np.ndarray:
    """Returns pictures whose values all differ, in (0, 1]."""
    size = batch * int(np.prod(shape))
    values = np.random.default_rng(0).permutation(size) + 1
    return (values.reshape(batch, *shape) / size).astype(dtype)


def own_labels(batch: int = BATCH) -> np.ndarray:
    """Returns labels that name each example, so that a mixed one tells what it was made of."""
    return np.eye(batch, dtype=np.float32)


def mixed_from(labels: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Returns the weight of each example's own label, and the other example; itself if none is."""
    rows = np.array(labels, np.float64)
    np.testing.assert_allclose(rows.sum(axis=1), 1, rtol=1e-6)
    own = rows.diagonal().copy()
    np.fill_diagonal(rows, 0)
    assert ((rows > 0).sum(axis=1) <= 1).all()
    others = np.where(rows.any(axis=1), rows.argmax(axis=1), np.arange(len(rows)))
    return own, others


def is_uniform(counts: np.ndarray, critical: float) -> bool:
    """Pearson's chi-square test; `critical` is the quantile 0.999 for `len(counts) - 1`."""
    expected = counts.sum() / len(counts)
    return ((counts - expected) ** 2 / expected).sum() < critical


@laws
@given(keys, shapes, st.sampled_from([0, 1, 3]), st.sampled_from(["reflect", "constant"]))
@pytest.mark.slow
def test_crop_is_a_window_of_the_padded_picture(key, shape, padding, mode):
    images = pictures(shape)
    height, width, _ = shape
    padded = np.pad(images, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)), mode=mode)
    cropped = np.asarray(augment.random_crop(key, images, padding, mode))
    for whole, crop in zip(padded, cropped, strict=True):
        places = range(2 * padding + 1)
        windows = [whole[y : y + height, x : x + width] for y in places for x in places]
        assert any(np.array_equal(window, crop) for window in windows)


def test_crops_are_uniform_over_all_places():
    images = np.broadcast_to(pictures((5, 5, 1), 1), (4500, 5, 5, 1))
    # Of a picture padded with zeros, the corner pixel tells the place.
    corner = np.asarray(augment.random_crop(KEY, images, 1, "constant"))[:, 1, 1, 0]
    values, counts = np.unique(corner, return_counts=True)
    np.testing.assert_array_equal(values, np.unique(images[0, :3, :3, 0]))
    assert is_uniform(counts, critical=26.1)


@pytest.mark.slow
def test_crop_is_that_of_dm_pix():
    image = jnp.asarray(pictures((4, 5, 3), 1)[0])
    padded = dm_pix.pad_to_size(image, 8, 9, mode="reflect")
    many = jax.random.split(KEY, 400)
    theirs = jax.vmap(lambda key: dm_pix.random_crop(key, padded, image.shape))(many)
    ours = augment.random_crop(KEY, jnp.broadcast_to(image, (400, *image.shape)), 2)
    windows = [{window.tobytes() for window in np.asarray(each)} for each in (ours, theirs)]
    assert windows[0] == windows[1]
    assert len(windows[0]) == 25


@laws
@given(keys, shapes)
def test_flip_is_the_picture_or_its_mirror_as_dm_pix_makes_it(key, shape):
    images = pictures(shape)
    mirrored = np.asarray(dm_pix.flip_left_right(images))
    flipped = np.asarray(augment.random_flip(key, images))
    for plain, mirror, each in zip(images, mirrored, flipped, strict=True):
        assert np.array_equal(each, plain) or np.array_equal(each, mirror)


def test_half_of_all_pictures_are_flipped():
    images = np.broadcast_to(pictures((1, 2, 1), 1), (2000, 1, 2, 1))
    is_flipped = np.asarray(augment.random_flip(KEY, images)) != images
    count = is_flipped.any(axis=(1, 2, 3)).sum()
    assert is_uniform(np.array([count, 2000 - count]), critical=10.8)


def square(height: int, width: int, centre: tuple[int, int], size: int) -> np.ndarray:
    inside = np.zeros((height, width), bool)
    top, left = (max(place - size // 2, 0) for place in centre)
    bottom, right = (place - size // 2 + size for place in centre)
    inside[top:bottom, left:right] = True
    return inside


@laws
@given(keys, shapes, st.sampled_from([1, 2, 3, 9]))
@pytest.mark.slow
def test_cutout_zeroes_one_square_that_is_clipped_at_the_border(key, shape, size):
    images = pictures(shape)
    height, width, _ = shape
    squares = [square(height, width, yx, size) for yx in np.ndindex(height, width)]
    for plain, cut in zip(images, np.asarray(augment.cutout(key, images, size)), strict=True):
        is_zero = (cut == 0).all(axis=-1)
        np.testing.assert_array_equal(cut, np.where(is_zero[..., None], 0, plain))
        assert any(np.array_equal(is_zero, each) for each in squares)


def test_cutout_is_centred_on_any_pixel():
    cut = np.asarray(augment.cutout(KEY, np.ones((4500, 3, 3, 1)), 1))
    counts = (cut == 0).sum(axis=0).ravel()
    assert counts.sum() == 4500
    assert is_uniform(counts, critical=26.1)


@laws
@given(keys, shapes, st.sampled_from([0.01, 0.2, 1.0, 10.0]))
@pytest.mark.slow
def test_mixup_blends_pictures_and_labels_by_one_weight(key, shape, alpha):
    images = pictures(shape)
    mixed, labels = augment.mixup(key, images, own_labels(), alpha)
    own, others = mixed_from(labels)
    assert (own >= 0).all()
    assert (own <= 1).all()
    weight = own[:, None, None, None]
    np.testing.assert_allclose(mixed, weight * images + (1 - weight) * images[others], atol=1e-6)


@pytest.mark.slow
def test_mixup_draws_each_weight_from_a_beta_distribution_and_partners_as_a_permutation():
    images = np.zeros((500, 1, 1, 1), np.float32)
    mixup = jax.jit(lambda key: augment.mixup(key, images, own_labels(500), 0.4)[1])
    labels = [mixup(key) for key in jax.random.split(KEY, 8)]
    weights = np.concatenate([mixed_from(each)[0] for each in labels])
    assert weights.mean() == pytest.approx(0.5, abs=0.03)
    assert weights.var() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), abs=0.01)
    for each in labels:
        others = mixed_from(each)[1]
        # An example that was mixed with almost nothing of another is its own partner here.
        others = others[others != np.arange(500)]
        assert len(set(others)) == len(others) > 400


@laws
@given(keys, shapes, st.sampled_from([0.2, 1.0, 10.0]))
def test_cutmix_weighs_labels_by_the_share_of_pixels(key, shape, alpha):
    images = pictures(shape)
    mixed, labels = (np.asarray(x) for x in augment.cutmix(key, images, own_labels(), alpha))
    own, others = mixed_from(labels)
    is_own = (mixed == images).all(axis=-1)
    np.testing.assert_array_equal(mixed, np.where(is_own[..., None], images, images[others]))
    is_mixed = others != np.arange(BATCH)
    np.testing.assert_allclose(own[is_mixed], is_own.mean(axis=(1, 2))[is_mixed], atol=1e-6)
    for pasted in ~is_own:
        assert np.array_equal(pasted, np.outer(pasted.any(axis=1), pasted.any(axis=0)))


@pytest.mark.slow
def test_cutmix_pastes_boxes_of_all_sizes():
    images = pictures((8, 8, 1), 500)
    mixed, _ = jax.jit(augment.cutmix)(KEY, images, own_labels(500))
    sizes = (np.asarray(mixed) != images).sum(axis=(1, 2, 3))
    assert {side**2 for side in range(8)} <= set(sizes.tolist())


def in_hsv(images: Any) -> np.ndarray:
    pixels = np.asarray(images, np.float64).reshape(len(images), -1, 3)
    return np.array([[colorsys.rgb_to_hsv(*pixel) for pixel in picture] for picture in pixels])


COLOURS = 0.3 + 0.4 * pictures((2, 3, 3), 40)
"""Far enough from 0 and 1 that no change below is clipped."""


def test_colour_jitter_without_strength_is_the_identity():
    np.testing.assert_array_equal(augment.color_jitter(KEY, COLOURS), COLOURS)


def assert_drawn(values: np.ndarray, low: float, high: float) -> None:
    """Each picture has one value of its own, uniform between the bounds."""
    np.testing.assert_allclose(values, np.broadcast_to(values[:, :1], values.shape), atol=1e-4)
    drawn, margin = values[:, 0], (high - low) / 10
    assert low <= drawn.min() < low + margin < high - margin < drawn.max() <= high
    assert len(np.unique(drawn)) > 30


def test_brightness_is_added_to_each_picture():
    changed = augment.color_jitter(KEY, COLOURS, brightness=0.2)
    assert_drawn((np.asarray(changed) - COLOURS).reshape(40, -1), -0.2, 0.2)


def test_contrast_scales_the_distance_from_the_mean_of_each_channel():
    changed = np.asarray(augment.color_jitter(KEY, COLOURS, contrast=0.5))
    mean = COLOURS.mean(axis=(1, 2), keepdims=True)
    is_far = abs(COLOURS - mean).reshape(40, -1) > 0.01
    factors = ((changed - mean) / (COLOURS - mean)).reshape(40, -1)
    factors = np.where(is_far, factors, np.median(factors, axis=1, keepdims=True))
    assert_drawn(factors, 0.5, 1.5)


def test_saturation_is_scaled_and_hue_and_value_stay():
    changed = in_hsv(augment.color_jitter(KEY, COLOURS, saturation=0.4))
    before = in_hsv(COLOURS)
    np.testing.assert_allclose(changed[..., [0, 2]], before[..., [0, 2]], atol=1e-5)
    assert_drawn(changed[..., 1] / before[..., 1], 0.6, 1.4)


def test_hue_turns_and_saturation_and_value_stay():
    changed, before = in_hsv(augment.color_jitter(KEY, COLOURS, hue=0.1)), in_hsv(COLOURS)
    np.testing.assert_allclose(changed[..., 1:], before[..., 1:], atol=1e-5)
    assert_drawn((changed[..., 0] - before[..., 0] + 0.5) % 1 - 0.5, -0.1, 0.1)


def test_colours_are_clipped_and_a_factor_is_never_negative():
    images = pictures((2, 3, 3), 40)
    changed = np.asarray(augment.color_jitter(KEY, images, brightness=0.9, contrast=3.0))
    assert changed.min() == 0
    assert changed.max() == 1
    changed = np.asarray(augment.color_jitter(KEY, COLOURS, contrast=3.0))
    slopes = (changed - COLOURS.mean(axis=(1, 2), keepdims=True)) * (
        COLOURS - COLOURS.mean(axis=(1, 2), keepdims=True)
    )
    assert slopes.min() > -1e-6


def test_colours_of_narrow_floats_are_computed_in_float32():
    narrow = jnp.asarray(COLOURS, jnp.bfloat16)
    strengths = {"brightness": 0.2, "contrast": 0.3, "saturation": 0.4, "hue": 0.1}
    wide = augment.color_jitter(KEY, narrow.astype(jnp.float32), **strengths)
    changed = augment.color_jitter(KEY, narrow, **strengths)
    np.testing.assert_array_equal(changed, wide.astype(jnp.bfloat16))


def mixing(function: Callable[..., Any]) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    return lambda key, images: function(key, images, jnp.eye(len(images), dtype=images.dtype))


FUNCTIONS: dict[str, Callable[[jax.Array, jax.Array], Any]] = {
    "random_crop": lambda key, images: augment.random_crop(key, images, 2),
    "random_flip": augment.random_flip,
    "cutout": lambda key, images: augment.cutout(key, images, 2),
    "mixup": mixing(augment.mixup),
    "cutmix": mixing(augment.cutmix),
    "color_jitter": lambda key, images: augment.color_jitter(
        key, images, brightness=0.2, contrast=0.3, saturation=0.4, hue=0.1
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.slow
def test_functions_keep_dtypes_within_a_compiled_scan(name):
    images = jnp.asarray(pictures((4, 4, 3), dtype=jnp.bfloat16))

    def step(carry: None, key: jax.Array) -> tuple[None, Any]:
        return carry, FUNCTIONS[name](key, images)

    stacked = jax.jit(lambda keys: jax.lax.scan(step, None, keys)[1])(jax.random.split(KEY, 3))
    for leaf in jax.tree.leaves(stacked):
        assert leaf.dtype == jnp.bfloat16
        assert leaf.shape[:2] == (3, BATCH)
        assert not jnp.array_equal(leaf[0], leaf[1])


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.slow
def test_functions_draw_for_each_picture_anew_and_from_the_key_alone(name):
    images = np.repeat(pictures((4, 4, 3), 1), 16, axis=0)
    function = jax.jit(FUNCTIONS[name])
    *_, first = jax.tree.leaves(function(KEY, images))
    *_, again = jax.tree.leaves(function(KEY, images))
    np.testing.assert_array_equal(first, again)
    mixed = np.sort(np.asarray(first).reshape(16, -1), axis=1)
    rows = mixed if "mix" in name else np.asarray(first).reshape(16, -1)
    assert len(np.unique(rows, axis=0)) > 1


@pytest.mark.usefixtures("strict_dtypes")
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "color_jitter"])
def test_functions_promote_no_dtype_by_accident(name, dtype):
    images = jnp.asarray(pictures((4, 4, 3), dtype=dtype))
    for leaf in jax.tree.leaves(jax.eval_shape(FUNCTIONS[name], KEY, images)):
        assert leaf.dtype == dtype


IMAGES, LABELS = np.zeros((2, 4, 4, 3), np.float32), np.eye(2, dtype=np.float32)


@pytest.mark.parametrize(
    ("attempt", "error", "words"),
    [
        (
            lambda: augment.random_flip(KEY, IMAGES[0]),
            BatchError,
            r"\(4, 4, 3\).*images\[\.\.\., N",
        ),
        (
            lambda: augment.random_crop(KEY, IMAGES, -1),
            ConfigError,
            "padding .* at least 0; got -1",
        ),
        (lambda: augment.random_crop(KEY, IMAGES, 1.5), ConfigError, r"padding .* got 1\.5"),
        (
            lambda: augment.random_crop(KEY, IMAGES, 1, "reflekt"),
            ConfigError,
            "Did you mean 'reflect'",
        ),
        (lambda: augment.cutout(KEY, IMAGES, 0), ConfigError, "size .* at least 1; got 0"),
        (lambda: augment.cutout(KEY, IMAGES, True), ConfigError, "size .* got True"),
        (lambda: augment.mixup(KEY, IMAGES, LABELS, 0), ConfigError, "alpha .* got 0.*remove"),
        (lambda: augment.cutmix(KEY, IMAGES, LABELS, np.nan), ConfigError, "alpha .* got nan"),
        (lambda: augment.mixup(KEY, IMAGES, LABELS, 1e-300), ConfigError, "alpha .* got 1e-300"),
        (lambda: augment.mixup(KEY, IMAGES, LABELS, 1e-39), ConfigError, "alpha .* got 1e-39"),
        (lambda: augment.mixup(KEY, IMAGES, LABELS, 10**400), ConfigError, "alpha .* got 1000"),
        (lambda: augment.cutmix(KEY, IMAGES, LABELS, 1e300), ConfigError, r"alpha .* got 1e\+300"),
        (
            lambda: augment.color_jitter(KEY, IMAGES, brightness=1e39),
            ConfigError,
            r"brightness .* finite in float32; got 1e\+39",
        ),
        (lambda: augment.random_crop(KEY, IMAGES, 1, None), ConfigError, "Unknown mode None"),
        (lambda: augment.random_crop(KEY, IMAGES, 1, ["reflect"]), ConfigError, "Unknown mode"),
        (
            lambda: augment.mixup(KEY, IMAGES, np.arange(2)),
            BatchError,
            r"int32 \(2,\).*jax\.nn\.one_hot",
        ),
        (lambda: augment.cutmix(KEY, IMAGES, LABELS[:1]), BatchError, r"float32 \(1, 2\)"),
        (
            lambda: augment.mixup(KEY, IMAGES.astype(np.uint8), LABELS),
            BatchError,
            r"floats; got uint8.*/ 255",
        ),
        (
            lambda: augment.color_jitter(KEY, IMAGES[..., :1], hue=0.1),
            BatchError,
            r"red, green, blue; got shape \(2, 4, 4, 1\)",
        ),
        (
            lambda: augment.color_jitter(KEY, IMAGES, hue=0.6),
            ConfigError,
            r"hue .* \[0, 0\.5\]; got 0\.6",
        ),
        (lambda: augment.color_jitter(KEY, IMAGES, contrast=-1), ConfigError, "contrast .* got -1"),
    ],
)
def test_bad_input_is_named(attempt, error, words):
    with pytest.raises(error, match=words):
        attempt()


@pytest.mark.parametrize("alpha", [1.2e-38, 3e38, 1, np.float16(2), np.float64(0.2)])
@pytest.mark.slow
def test_weights_of_any_alpha_that_is_taken_are_numbers(alpha):
    _, labels = augment.mixup(KEY, IMAGES, LABELS, alpha)
    np.testing.assert_allclose(labels.sum(axis=1), 1)


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int32, jnp.bfloat16, np.float32])
@pytest.mark.slow
def test_cutout_keeps_the_dtype(dtype):
    cut = augment.cutout(KEY, np.ones((2, 8, 8, 1), dtype), 3)
    assert cut.dtype == dtype
    assert 2 * 64 - 2 * 9 <= int((cut == 1).sum()) < 2 * 64
