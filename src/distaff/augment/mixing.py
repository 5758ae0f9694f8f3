"""Mixup and CutMix: mix pairs of examples and their labels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.augment.boxes import boxes
from distaff.augment.pictures import as_pictures, is_finite
from distaff.core.typing import Key
from distaff.errors import BatchError, ConfigError


def mixup(key: Key, images: Any, labels: Any, alpha: float = 0.2) -> tuple[jax.Array, jax.Array]:
    """Blends each example with another of the batch: `weight * own + (1 - weight) * other`.

    Each example has its own weight from Beta(alpha, alpha), for both picture and label. Source:
    Zhang et al., mixup: Beyond Empirical Risk Minimization, 2018, arXiv:1710.09412, section 2,
    which uses one weight per batch.

    Args:
        key: a random key, `[]`.
        images: `[batch, height, width, channels]`, float.
        labels: class probabilities, float `[batch, classes]`; for class indices, use
            `jax.nn.one_hot(labels, num_classes)`.
        alpha: large values mix in equal parts; values near 0 hardly mix.

    Returns:
        `(images, labels)`, in their shapes and dtypes.

    Raises:
        BatchError: `images` or `labels` has another shape or dtype.
        ConfigError: `alpha` is not a positive, finite number in float32.

    >>> labels = jax.nn.one_hot(jnp.array([0, 1, 2]), 3)
    >>> images, labels = mixup(jax.random.key(0), jnp.ones((3, 8, 8, 1)), labels)
    >>> bool(jnp.allclose(labels.sum(axis=1), 1))
    True
    """
    images, labels = as_pictures(images, only_floats=True), _probabilities(images, labels)
    weight, partners = _sample_pairs(key, len(images), alpha)
    return _blend(images, partners, weight), _blend(labels, partners, weight)


def cutmix(key: Key, images: Any, labels: Any, alpha: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Pastes a box of another example into each example; mixes labels by the share of pixels.

    The box has the sides of the picture times `sqrt(1 - weight)`, with a weight from
    Beta(alpha, alpha). Its centre is any pixel, so a part of it may lie outside. Source: Yun et
    al., CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features,
    2019, arXiv:1905.04899, section 3.1, which uses one weight and one box per batch.

    Args:
        key: a random key, `[]`.
        images: `[batch, height, width, channels]`, of any dtype.
        labels: class probabilities, float `[batch, classes]`; for class indices, use
            `jax.nn.one_hot(labels, num_classes)`.
        alpha: with 1, as in the paper, the area of the box is uniform.

    Returns:
        `(images, labels)`, in their shapes and dtypes.

    Raises:
        BatchError: `images` or `labels` has another shape or dtype.
        ConfigError: `alpha` is not a positive, finite number in float32.
    """
    images, labels = as_pictures(images), _probabilities(images, labels)
    key, key_of_boxes = jax.random.split(key)
    weight, partners = _sample_pairs(key, len(images), alpha)
    height, width = (jnp.int32(side * jnp.sqrt(1 - weight)) for side in images.shape[1:3])
    pasted = boxes(key_of_boxes, images, height, width)
    kept = 1 - pasted.mean(axis=(1, 2, 3), dtype=jnp.float32)
    return jnp.where(pasted, images[partners], images), _blend(labels, partners, kept)


def _probabilities(images: Any, labels: Any) -> jax.Array:
    labels = jnp.asarray(labels)
    is_float = jnp.issubdtype(labels.dtype, jnp.floating)
    if labels.ndim != 2 or len(labels) != len(images) or not is_float:
        raise BatchError(
            "Labels to mix must be probabilities, float [batch, classes], for images "
            f"{jnp.shape(images)}; got {labels.dtype} {labels.shape}. For class indices, use "
            "jax.nn.one_hot(labels, num_classes)."
        )
    return labels


def _sample_pairs(key: Key, size: int, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Returns the weight and the partner of each example, both `[batch]`."""
    if not is_finite(alpha) or float(alpha) < np.finfo(np.float32).tiny:
        raise ConfigError(
            f"alpha must be a positive, finite number in float32; got {alpha!r}. To disable "
            "mixing, remove the call."
        )
    key_of_weights, key_of_partners = jax.random.split(key)
    weights = jax.random.beta(key_of_weights, alpha, alpha, (size,), jnp.float32)
    return weights, jax.random.permutation(key_of_partners, size)


def _blend(values: jax.Array, partners: jax.Array, weight: jax.Array) -> jax.Array:
    """Blends in at least float32, so that the weights of narrow floats add up to one."""
    wide = values.astype(jnp.float64 if values.dtype == jnp.float64 else jnp.float32)
    weight = weight.reshape(-1, *[1] * (values.ndim - 1)).astype(wide.dtype)
    return (weight * wide + (1 - weight) * wide[partners]).astype(values.dtype)
