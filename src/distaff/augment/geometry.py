"""Random crops and flips."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from distaff.augment.pictures import as_pictures
from distaff.core.config.checks import whole
from distaff.core.typing import Key
from distaff.errors import ConfigError, nearest


def random_crop(
    key: Key, images: Any, padding: int = 4, mode: Literal["reflect", "constant"] = "reflect"
) -> jax.Array:
    """Pads each picture on all sides, and crops a random window of the original size.

    All `(2 * padding + 1) ** 2` positions are equally likely. Source: He et al., Deep Residual
    Learning for Image Recognition, 2016, arXiv:1512.03385, section 4.2, which pads with zeros.

    Args:
        key: a random key, `[]`.
        images: `[batch, height, width, channels]`, of any dtype.
        padding: rows and columns on each side, the maximal shift of a picture.
        mode: `"reflect"` mirrors at the border pixels; `"constant"` pads with zeros.

    Returns:
        The windows, in the shape and dtype of `images`.

    Raises:
        BatchError: `images` does not have four axes.
        ConfigError: an option is out of range.

    >>> random_crop(jax.random.key(0), jnp.ones((2, 8, 8, 1)), padding=2).shape
    (2, 8, 8, 1)
    """
    images = as_pictures(images)
    padding = whole("padding", padding, least=0)
    if mode not in ("reflect", "constant"):
        raise ConfigError(f"Unknown mode {mode!r}. {nearest(str(mode), ('reflect', 'constant'))}")
    sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(images, sides, mode=mode)
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * padding + 1)
    window = images.shape[1:]
    return jax.vmap(lambda image, yx: jax.lax.dynamic_slice(image, (*yx, 0), window))(
        padded, corners
    )


def random_flip(key: Key, images: Any) -> jax.Array:
    """Flips each picture horizontally with probability 1/2.

    Args:
        key: a random key, `[]`.
        images: `[batch, height, width, channels]`, of any dtype.

    Returns:
        Each picture or its mirror image, in the shape and dtype of `images`.

    Raises:
        BatchError: `images` does not have four axes.
    """
    images = as_pictures(images)
    is_flipped = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(is_flipped, images[:, :, ::-1], images)
