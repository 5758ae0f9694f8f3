"""dm-pix: random colour changes for each image of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import dm_pix
import jax
import jax.numpy as jnp

from distaff.core.typing import Key

_CHANGES: dict[str, Callable[[Key, jax.Array, float], Any]] = {
    "brightness": dm_pix.random_brightness,
    "contrast": lambda key, image, c: dm_pix.random_contrast(key, image, max(0, 1 - c), 1 + c),
    "saturation": lambda key, image, s: dm_pix.random_saturation(key, image, max(0, 1 - s), 1 + s),
    "hue": dm_pix.random_hue,
}


def color_jitter(key: Key, images: jax.Array, strengths: Mapping[str, float]) -> jax.Array:
    """Changes colours at random; see `distaff.augment.color_jitter`.

    Args:
        key: a random key, `[]`.
        images: `[batch, height, width, channels]`, float in [0, 1].
        strengths: strength of each change by name; each uses its own key, independent of the
            other changes.
    """

    def jittered(key: Key, image: jax.Array) -> jax.Array:
        for number, (name, change) in enumerate(_CHANGES.items()):
            if name in strengths:
                image = change(jax.random.fold_in(key, number), image, strengths[name])
                image = image.clip(0, 1)
        return image

    # dm-pix converts other floats to float32 when it changes the hue.
    jitter = jax.vmap(jittered)
    return jitter(jax.random.split(key, len(images)), images.astype(jnp.float32)).astype(
        images.dtype
    )
