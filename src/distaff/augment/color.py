"""Random changes of colour, with dm-pix."""

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
    """Randomly changes brightness, contrast, saturation and hue of each picture, in this order.

    Values are clipped to [0, 1] after each change. A change of strength 0 is skipped. The changes
    are computed in float32 by dm-pix (https://github.com/google-deepmind/dm_pix).

    Args:
        key: a random key, `[]`.
        images: `[batch, height, width, channels]`, float in [0, 1]; saturation and hue need three
            channels: red, green, blue.
        brightness: the added value is uniform in [-brightness, brightness].
        contrast: the factor of each pixel's distance from the mean of its channel is uniform in
            [1 - contrast, 1 + contrast], and never negative.
        saturation: the factor of the saturation in HSV, sampled in the same way.
        hue: the value added to the hue in HSV is uniform in [-hue, hue], in turns; at most 0.5.

    Returns:
        The pictures, in the shape and dtype of `images`.

    Raises:
        BatchError: `images` has another shape or dtype.
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
            raise ConfigError(f"{name} must be a number, {most}; got {strength!r}.")
    if (saturation or hue) and images.shape[3] != 3:
        raise BatchError(
            "saturation and hue need pictures with the channels red, green, blue; got shape "
            f"{images.shape}. Set both to 0, or repeat a grey channel: jnp.repeat(images, 3, -1)."
        )
    strengths = {name: strength for name, strength in strengths.items() if strength}
    if not strengths:
        return images
    return optional.load("dm_pix", extra="images").color_jitter(key, images, strengths)
