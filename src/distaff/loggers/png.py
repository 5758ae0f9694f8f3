"""Encodes images and figures as PNG."""

from __future__ import annotations

import io
import struct
import zlib
from functools import partial
from typing import Any

import numpy as np

from distaff.errors import BatchError

_COLOR_TYPES = {1: 0, 3: 2, 4: 6}  # ISO/IEC 15948, 11.2.2: greyscale, RGB, RGBA


def encode(image: Any) -> bytes:
    """Returns an image as PNG, eight bits per channel.

    Args:
        image: `[height, width]`, or `[height, width, channels]` with 1, 3 or 4 channels; uint8, or
            float in [0, 1].

    Raises:
        BatchError: `image` is something else.
    """
    pixels = as_pixels(image)
    height, width, channels = pixels.shape
    header = struct.pack(">2I5B", width, height, 8, _COLOR_TYPES[channels], 0, 0, 0)
    # Each row starts with its filter type: 0, none.
    rows = np.insert(pixels.reshape(height, -1), 0, 0, axis=1)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def viewable(figure: Any) -> Any:
    """Returns a figure of matplotlib that a notebook shows, although it is made without pyplot."""
    figure._repr_png_ = partial(encode_figure, figure)
    return figure


def encode_figure(figure: Any) -> bytes:
    """Returns a matplotlib Figure as PNG, 150 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def as_pixels(image: Any) -> np.ndarray:
    """Returns an image as uint8 `[height, width, channels]`.

    Raises:
        BatchError: it is not an image that `encode` takes.
    """
    pixels = np.asarray(image)
    shape = pixels.shape
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[-1] not in _COLOR_TYPES or not pixels.size:
        raise BatchError(
            "An image is [height, width], or [height, width, channels] with 1, 3 or 4 channels; "
            f"got shape {list(shape)}. Log one image at a time, channels last."
        )
    if pixels.dtype == np.uint8:
        return pixels
    # bfloat16 is not a subtype of np.floating.
    is_float = np.issubdtype(pixels.dtype, np.floating) or "float" in pixels.dtype.name
    if not is_float or not ((pixels >= 0) & (pixels <= 1)).all():
        raise BatchError(
            f"An image is uint8, or float in [0, 1]; got {pixels.dtype} from {pixels.min()} to "
            f"{pixels.max()}. Scale it to that range, and clip it."
        )
    return np.round(pixels.astype(np.float32) * 255).astype(np.uint8)
