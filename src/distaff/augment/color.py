"""Colour: changes that dm-pix makes."""

from __future__ import annotations

from typing import Any

import jax

from distaff.augment.pictures import as_pictures, is_finite
from distaff.core import optional
from distaff.core.typing import Key
from distaff.errors import BatchError, ConfigError


def color_jitter(
    key: Key,
    images: Any,
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
) -> jax.Array:
    """Changes the colours of each picture, in this order, and clips them to [0, 1] after each.

    A change of strength 0 is none at all. The changes are those of dm-pix
    (https://github.com/google-deepmind/dm_pix), computed in float32.

    Args:
        key: a random key, `[]`.
        images: `[batch, height, width, channels]`, float in [0, 1]; for saturation and hue in three
            channels: red, green, blue.
        brightness: what is added is uniform in [-brightness, brightness].
        contrast: a factor, uniform in [1 - contrast, 1 + contrast] and never negative, for the
            distance of each pixel from the mean of its channel.
        saturation: a factor of the same kind, for the saturation in HSV.
        hue: what is added to the hue in HSV is uniform in [-hue, hue], in turns: at most 0.5.

    Returns:
        The pictures, in the shape and dtype of `images`.

    Raises:
        BatchError: `images` has another form.
        ConfigError: a strength is out of range.
        MissingExtraError: dm-pix is not installed.
    """
    images = as_pictures(images, only_floats=True)
    strengths = {
        "brightness": brightness,
        "contrast": contrast,
        "saturation": saturation,
        "hue": hue,
    }
    for name, strength in strengths.items():
        if not is_finite(strength) or strength < 0 or (name == "hue" and strength > 0.5):
            most = "in [0, 0.5]" if name == "hue" else "at least 0 and finite in float32"
            raise ConfigError(f"{name} is a number, {most}; got {strength!r}.")
    if (saturation or hue) and images.shape[3] != 3:
        raise BatchError(
            "saturation and hue need pictures with the channels red, green, blue; got shape "
            f"{images.shape}. Leave both at 0, or repeat a grey channel: jnp.repeat(images, 3, -1)."
        )
    strengths = {name: strength for name, strength in strengths.items() if strength}
    if not strengths:
        return images
    return optional.load("dm_pix", extra="images").color_jitter(key, images, strengths)
