"""Mixing: examples that are made of two, with labels that say so."""

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

    Each example has a weight of its own, drawn from Beta(alpha, alpha), for its picture and its
    label. Source: Zhang et al., mixup: Beyond Empirical Risk Minimization, 2018, arXiv:1710.09412,
    section 2; there a batch has one weight.

    Args:
        key: a random key, `[]`.
        images: `[batch, height, width, channels]`, float.
        labels: the probability of each class, float `[batch, classes]`; of class indices,
            `jax.nn.one_hot(labels, num_classes)`.
        alpha: the greater, the more equal the parts; towards 0 examples stay as they are.

    Returns:
        `(images, labels)`, in their shapes and dtypes.

    Raises:
        BatchError: `images` or `labels` has another form.
        ConfigError: `alpha` is not a positive, finite number in float32.

    >>> labels = jax.nn.one_hot(jnp.array([0, 1, 2]), 3)
    >>> images, labels = mixup(jax.random.key(0), jnp.ones((3, 8, 8, 1)), labels)
    >>> bool(jnp.allclose(labels.sum(axis=1), 1))
    True
    """
    images, labels = as_pictures(images, only_floats=True), _probabilities(images, labels)
    weight, partners = _drawn(key, len(images), alpha)
    return _blended(images, partners, weight), _blended(labels, partners, weight)


def cutmix(key: Key, images: Any, labels: Any, alpha: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Pastes a box of another example of the batch into each; labels mix by the share of pixels.

    A weight is drawn from Beta(alpha, alpha); the box has the sides of the picture times
    `sqrt(1 - weight)`, around any pixel, and a part of it may lie outside. Source: Yun et al.,
    CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features, 2019,
    arXiv:1905.04899, section 3.1; there a batch has one weight and one box.

    Args:
        key: a random key, `[]`.
        images: `[batch, height, width, channels]`, of any dtype.
        labels: the probability of each class, float `[batch, classes]`; of class indices,
            `jax.nn.one_hot(labels, num_classes)`.
        alpha: with 1, as in the paper, each area of the box is as likely as any other.

    Returns:
        `(images, labels)`, in their shapes and dtypes.

    Raises:
        BatchError: `images` or `labels` has another form.
        ConfigError: `alpha` is not a positive, finite number in float32.
    """
    images, labels = as_pictures(images), _probabilities(images, labels)
    key, key_of_boxes = jax.random.split(key)
    weight, partners = _drawn(key, len(images), alpha)
    height, width = (jnp.int32(side * jnp.sqrt(1 - weight)) for side in images.shape[1:3])
    pasted = boxes(key_of_boxes, images, height, width)
    kept = 1 - pasted.mean(axis=(1, 2, 3), dtype=jnp.float32)
    return jnp.where(pasted, images[partners], images), _blended(labels, partners, kept)


def _probabilities(images: Any, labels: Any) -> jax.Array:
    labels = jnp.asarray(labels)
    is_float = jnp.issubdtype(labels.dtype, jnp.floating)
    if labels.ndim != 2 or len(labels) != len(images) or not is_float:
        raise BatchError(
            "Labels that are mixed are probabilities, float [batch, classes], for images "
            f"{jnp.shape(images)}; got {labels.dtype} {labels.shape}. Of class indices, write "
            "jax.nn.one_hot(labels, num_classes)."
        )
    return labels


def _drawn(key: Key, size: int, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Returns a weight for each example, and the example that it is mixed with, both `[batch]`."""
    if not is_finite(alpha) or float(alpha) < np.finfo(np.float32).tiny:
        raise ConfigError(
            f"alpha is a positive, finite number in float32, and is {alpha!r}. Leave the call out "
            "to mix nothing."
        )
    key_of_weights, key_of_partners = jax.random.split(key)
    weights = jax.random.beta(key_of_weights, alpha, alpha, (size,), jnp.float32)
    return weights, jax.random.permutation(key_of_partners, size)


def _blended(values: jax.Array, partners: jax.Array, weight: jax.Array) -> jax.Array:
    """Blends in float32 or wider, so that the parts of narrow floats add up to one."""
    wide = values.astype(jnp.float64 if values.dtype == jnp.float64 else jnp.float32)
    weight = weight.reshape(-1, *[1] * (values.ndim - 1)).astype(wide.dtype)
    return (weight * wide + (1 - weight) * wide[partners]).astype(values.dtype)
