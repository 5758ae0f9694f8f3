"""Fingerprints: a number that tells batches apart, in microseconds."""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from distaff.core.typing import Batch
from distaff.errors import leaf_name

_WHOLE_BYTES = 4096
"""Up to this size, all bytes of a leaf are looked at."""

_PIECES, _PIECE_BYTES = 31, 128
"""Of larger leaves. A prime: else the pieces would begin at the same corner of each picture."""


def fingerprint(batch: Batch, before: int = 0) -> int:
    """Returns a checksum of a batch, over a sample of its bytes.

    It covers the names, dtypes and shapes of all leaves, and of NumPy's arrays, and what becomes
    one, all bytes up to 4 KiB and 31 pieces of 128 bytes, evenly spread, of larger ones. So it does
    of JAX arrays on the CPU, which it waits for. Those on an accelerator count by their form only:
    to read them would wait for its queue; so do random keys, and arrays that were given away.

    Args:
        batch: a pytree of arrays.
        before: the fingerprint of the batches before it, to have one of all of them.

    Returns:
        A CRC-32.
    """
    checksum = before
    for path, leaf in jax.tree.leaves_with_path(batch):
        is_read = not isinstance(leaf, jax.Array) or _is_at_hand(leaf)
        array = np.asarray(leaf) if is_read else leaf
        checksum = zlib.crc32(_form(path, array.dtype, array.shape), checksum)
        if is_read and array.nbytes and not array.dtype.hasobject:
            checksum = zlib.crc32(_sample(array), checksum)
    return checksum


def _is_at_hand(array: jax.Array) -> bool:
    """Whether the bytes of a JAX array are in the memory of this process."""
    if array.is_deleted() or jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        return False
    return array.is_fully_addressable and all(d.platform == "cpu" for d in array.devices())


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
