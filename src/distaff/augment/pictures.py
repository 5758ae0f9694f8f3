"""Checks of the arguments of augmentations."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.config.checks import as_float
from distaff.errors import BatchError

_MAX = float(np.finfo(np.float32).max)


def as_pictures(images: Any, *, only_floats: bool = False) -> jax.Array:
    """Converts pictures to a JAX array `[batch, height, width, channels]`.

    Raises:
        BatchError: the pictures do not have four axes, or are not floats, with `only_floats`.
    """
    images = jnp.asarray(images)
    if images.ndim != 4:
        raise BatchError(
            f"Pictures must be [batch, height, width, channels]; got shape {images.shape}. Grey "
            "pictures need a last axis of length 1: images[..., None]."
        )
    if only_floats and not jnp.issubdtype(images.dtype, jnp.floating):
        raise BatchError(
            f"Pictures to blend or recolour must be floats; got {images.dtype}. Convert bytes with "
            "images.astype(jnp.float32) / 255."
        )
    return images


def is_finite(value: Any) -> bool:
    """Whether an option is a number that is finite in float32."""
    return abs(as_float(value)) <= _MAX
