"""Fingerprints: a number that tells batches apart, in microseconds."""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from distaff.errors import leaf_name
from distaff.typing import Batch

_WHOLE_BYTES = 4096
"""Up to this size, all bytes of a leaf are looked at."""

_PIECES, _PIECE_BYTES = 31, 128
"""Of larger leaves. A prime: else the pieces would begin at the same corner of each picture."""


def fingerprint(batch: Batch, before: int = 0) -> int:
    """Returns a checksum of a batch, over a sample of its bytes.

    It covers the names, dtypes and shapes of all leaves, and of NumPy's arrays, and what becomes
    one, all bytes up to 4 KiB and 31 pieces of 128 bytes, evenly spread, of larger ones. JAX arrays
    count by their form only: to read them would wait for the device.

    Args:
        batch: a pytree of arrays.
        before: the fingerprint of the batches before it, to have one of all of them.

    Returns:
        A CRC-32.
    """
    checksum = before
    for path, leaf in jax.tree.leaves_with_path(batch):
        is_jax = isinstance(leaf, jax.Array)
        array = leaf if is_jax else np.asarray(leaf)
        checksum = zlib.crc32(_form(path, array.dtype, array.shape), checksum)
        if not is_jax and array.nbytes and not array.dtype.hasobject:
            checksum = zlib.crc32(_sample(array), checksum)
    return checksum


@lru_cache(maxsize=256)
def _form(path: tuple[Any, ...], dtype: Any, shape: tuple[int, ...]) -> bytes:
    """Returns name, dtype and shape of a leaf; those of a run are few."""
    return f"{leaf_name(path)} {dtype} {shape}\n".encode()


def _sample(array: np.ndarray) -> Any:
    data = array.ravel(order="K").view(np.uint8)  # a copy only where the memory has gaps
    if data.size <= _WHOLE_BYTES:
        return data
    rows = data[: data.size - data.size % _PIECES].reshape(_PIECES, -1)
    return rows[:, :_PIECE_BYTES].tobytes()
