"""Reads nested dicts of plain arrays from a MessagePack file, as written by Flax.

A file may claim any length or dtype, so nothing beyond the size of the data is allocated, and only
dicts, strings, integers, nil and arrays of a few dtypes are accepted.
"""

from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np

from distaff.errors import CheckpointError

_DEEPEST = 4
_LARGEST_MAP = 32
_LARGEST_RANK = 8
_ARRAY, _SCALAR = 1, 3
_DTYPES = {name: np.dtype(name).newbyteorder("<") for name in ("float32", "int32", "int64")}


def read_tree(data: bytes) -> Any:
    """Returns nested dicts with arrays, strings, ints or None at the leaves.

    Raises:
        CheckpointError: the data hold anything else, end early, or continue after the tree.
    """
    unpacker = msgpack.Unpacker(
        max_buffer_size=len(data) + 1,  # 0 would be no limit
        max_map_len=_LARGEST_MAP,
        max_array_len=0,
        object_pairs_hook=_as_dict,
        ext_hook=_as_array,
    )
    unpacker.feed(data)
    try:
        tree = unpacker.unpack()
    except CheckpointError:  # from the hooks
        raise
    except msgpack.OutOfData:
        raise _refused(f"ends at byte {len(data)}, in the middle of a value") from None
    except msgpack.StackError:
        raise _refused(f"has dicts of more than {_DEEPEST} levels") from None
    except (ValueError, msgpack.FormatError) as error:
        raise _refused(f"cannot be read: {error or type(error).__name__}") from error
    if unpacker.tell() != len(data):
        raise _refused(f"ends, and {len(data) - unpacker.tell()} bytes follow")
    _check(tree, 0)
    return tree


def _as_dict(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    entries = {_text(key): value for key, value in pairs}
    if len(entries) < len(pairs):
        raise _refused("has a duplicate key")
    return entries


def _as_array(kind: int, data: bytes) -> np.ndarray:
    """Returns an array, encoded as its shape, its dtype's name and its bytes."""
    try:
        shape, name, buffer = msgpack.unpackb(data, max_array_len=_LARGEST_RANK, max_map_len=0)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise _refused(f"has an extension that is not an array: {error}") from error
    is_shape = type(shape) is list and all(type(n) is int and n >= 1 for n in shape)
    if kind not in (_ARRAY, _SCALAR) or not is_shape or type(buffer) is not bytes:
        raise _refused("has an extension that is not an array with integers >= 1 as its shape")
    dtype = _DTYPES.get(_text(name))
    if dtype is None or len(buffer) != math.prod(shape) * dtype.itemsize:
        raise _refused("has an array whose bytes do not match its shape and dtype")
    return np.frombuffer(buffer, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def _text(name: Any) -> str:
    """Returns a name as str; some are bytes."""
    if not isinstance(name, str | bytes):
        raise _refused(f"has a name that is a {type(name).__name__}")
    return name if isinstance(name, str) else name.decode()


def _check(tree: Any, depth: int) -> None:
    """Raises if a value has a type that such a file never has."""
    if isinstance(tree, dict):
        if depth == _DEEPEST:
            raise _refused(f"has dicts of more than {_DEEPEST} levels")
        for member in tree.values():
            _check(member, depth + 1)
    elif type(tree) not in (str, bytes, int, type(None), np.ndarray):
        raise _refused(f"has a value that is a {type(tree).__name__}, which no such file has")


def _refused(what: str) -> CheckpointError:
    return CheckpointError(f"The MessagePack file {what}.")
