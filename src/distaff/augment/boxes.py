"""Random boxes in pictures, and cutout."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from distaff.augment.pictures import as_pictures
from distaff.core.config.checks import whole
from distaff.core.typing import Key


def cutout(key: Key, images: Any, size: int) -> jax.Array:
    """Sets a random square of each picture to zero, the mean of normalised pictures.

    Its centre is any pixel, so a part of it may lie outside. Source: DeVries and Taylor,
    Improved Regularization of Convolutional Neural Networks with Cutout, 2017, arXiv:1708.04552,
    section 3.2.

    Args:
        key: a random key, `[]`.
        images: `[batch, height, width, channels]`, of any dtype.
        size: side of the square, in pixels.

    Returns:
        The pictures, in the shape and dtype of `images`.

    Raises:
        BatchError: `images` does not have four axes.
        ConfigError: `size` is not an integer, or less than 1.
    """
    images = as_pictures(images)
    size = whole("size", size)
    return jnp.where(boxes(key, images, size, size), jnp.zeros_like(images), images)


def boxes(
    key: Key, images: jax.Array, height: jax.Array | int, width: jax.Array | int
) -> jax.Array:
    """Returns a mask of a box around a random pixel of each picture, bool `[batch, h, w, 1]`.

    The height and width of the boxes are int `[batch]` or `[]`.
    """
    key_of_rows, key_of_columns = jax.random.split(key)
    rows = _intervals(key_of_rows, len(images), images.shape[1], height)
    columns = _intervals(key_of_columns, len(images), images.shape[2], width)
    return rows[:, :, None, None] & columns[:, None, :, None]


def _intervals(key: Key, num: int, side: int, length: jax.Array | int) -> jax.Array:
    """Returns masks of intervals around random positions of a side, bool `[num, side]`."""
    start = jax.random.randint(key, (num,), 0, side) - length // 2
    places = jnp.arange(side)[None]
    return (places >= start[:, None]) & (places < (start + length)[:, None])
