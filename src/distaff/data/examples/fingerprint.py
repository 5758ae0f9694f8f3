"""Computes fingerprints of batches in microseconds."""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from distaff.core.typing import Batch
from distaff.errors import leaf_name

_WHOLE_BYTES = 4096
"""Up to this size, all bytes of a leaf are read."""

_PIECES, _PIECE_BYTES = 31, 128
"""Sample of a larger leaf. A prime, so that pieces do not all begin at the corner of a picture."""


def fingerprint(batch: Batch, before: int = 0) -> int:
    """Returns a CRC-32 of a sample of a batch, combined with that of the batches before it.

    It covers the names, dtypes and shapes of all leaves. Of NumPy arrays, and JAX arrays on the
    CPU, it covers all bytes up to 4 KiB, and of larger ones 31 evenly spread pieces of 128 bytes.
    Arrays on an accelerator are not read, since this would wait for its queue; nor are random keys
    and deleted arrays.
    """
    checksum = before
    for path, leaf in jax.tree.leaves_with_path(batch):
        is_read = not isinstance(leaf, jax.Array) or _is_readable(leaf)
        array = np.asarray(leaf) if is_read else leaf
        checksum = zlib.crc32(_signature(path, array.dtype, array.shape), checksum)
        if is_read and array.nbytes and not array.dtype.hasobject:
            checksum = zlib.crc32(_sample(array), checksum)
    return checksum


def _is_readable(array: jax.Array) -> bool:
    """Whether the bytes of a JAX array are in host memory of this process."""
    if array.is_deleted() or jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        return False
    return array.is_fully_addressable and all(d.platform == "cpu" for d in array.devices())


@lru_cache(maxsize=256)
def _signature(path: tuple[Any, ...], dtype: Any, shape: tuple[int, ...]) -> bytes:
    return f"{leaf_name(path)} {dtype} {shape}\n".encode()


def _sample(array: np.ndarray) -> Any:
    data = array.ravel(order="K").view(np.uint8)  # copies only if the memory has gaps
    if data.size <= _WHOLE_BYTES:
        return data
    rows = data[: data.size - data.size % _PIECES].reshape(_PIECES, -1)
    return rows[:, :_PIECE_BYTES].tobytes()
