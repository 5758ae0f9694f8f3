"""A reader for one use of MessagePack: nested dicts of plain arrays, as Flax writes them.

It accepts what `flax.serialization.to_bytes` writes of maps, strings, whole numbers, nil and NumPy
arrays, and refuses all else: what other readers accept could claim lengths that fill the memory, or
name a dtype that is more than numbers. Nothing is ever allocated beyond the size of the data.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from distaff.errors import CheckpointError

_DEEPEST = 4
_LARGEST_MAP = 32
_LARGEST_RANK = 8
_ARRAY, _SCALAR = 1, 3
_DTYPES = {name: np.dtype(name).newbyteorder("<") for name in ("float32", "int32", "int64")}

# The number of bytes that hold a length, or a whole number, by the byte that announces it.
_MAPS = {0xDE: 2, 0xDF: 4}
_LISTS = {0xDC: 2, 0xDD: 4}
_STRINGS = {0xD9: 1, 0xDA: 2, 0xDB: 4}
_BINARIES = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_UNSIGNED = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
_SIGNED = {0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_NIL = 0xC0


def read_tree(data: bytes) -> Any:
    """Returns what the data hold: nested dicts with arrays, strings, ints or None at the leaves.

    Args:
        data: all of the bytes.

    Raises:
        CheckpointError: they are anything else, or end early, or go on after the tree.
    """
    reader = _Reader(data)
    tree = reader.tree()
    if reader.position != len(data):
        raise reader.refused(f"ends, and {len(data) - reader.position} bytes follow")
    return tree


class _Reader:
    """A position in the data, which only goes forward."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def tree(self, depth: int = 0) -> Any:
        """Reads one value of any accepted kind."""
        tag = self.number(1)
        if 0x80 <= tag <= 0x8F or tag in _MAPS:
            return self.mapping(tag & 0x0F if tag <= 0x8F else self.number(_MAPS[tag]), depth)
        if tag in _EXTENSIONS or tag in _FIXED_EXTENSIONS:
            return self.extension(_FIXED_EXTENSIONS.get(tag) or self.number(_EXTENSIONS[tag]))
        if tag == _NIL:
            return None
        if (text := self.text(tag)) is not None:
            return text
        if (integer := self.integer(tag)) is not None:
            return integer
        raise self.refused(f"has a value of the kind {tag:#04x}, which no such file has")

    def mapping(self, length: int, depth: int) -> dict[str, Any]:
        """Reads the entries of a map."""
        if depth == _DEEPEST or length > _LARGEST_MAP:
            raise self.refused(
                f"has dicts of more than {_LARGEST_MAP} entries or {_DEEPEST} levels"
            )
        found: dict[str, Any] = {}
        for _ in range(length):
            key = self.text(self.number(1))
            if key is None or key in found:
                raise self.refused("has a key that is no text, or is there a second time")
            found[key] = self.tree(depth + 1)
        return found

    def extension(self, length: int) -> np.ndarray:
        """Reads an array: a list of its shape, its dtype's name and its bytes."""
        kind, end = self.number(1), self.position + length
        if kind not in (_ARRAY, _SCALAR) or self.number(1) != 0x93:
            raise self.refused("has an extension that is no array")
        shape = self.shape()
        dtype = _DTYPES.get(self.text(self.number(1)) or "")
        buffer = self.binary()
        if dtype is None or len(buffer) != math.prod(shape) * dtype.itemsize:
            raise self.refused("has an array whose bytes are not those of its shape and dtype")
        if self.position != end:
            raise self.refused("has an array that does not end where it should")
        return np.frombuffer(buffer, dtype).reshape(shape).astype(dtype.newbyteorder("="))

    def shape(self) -> tuple[int, ...]:
        """Reads a short list of lengths."""
        tag = self.number(1)
        if 0x90 <= tag <= 0x9F:
            rank = tag & 0x0F
        else:
            rank = self.number(_LISTS[tag]) if tag in _LISTS else _LARGEST_RANK + 1
        if rank > _LARGEST_RANK:
            raise self.refused("has an array whose shape is no short list")
        lengths = [self.integer(self.number(1)) or 0 for _ in range(rank)]
        if any(length < 1 for length in lengths):
            raise self.refused("has an array whose shape is not of whole numbers >= 1")
        return tuple(lengths)

    def text(self, tag: int) -> str | None:
        """Reads a string; None if the tag is of something else. Names are sometimes binaries."""
        if 0xA0 <= tag <= 0xBF:
            length = tag & 0x1F
        elif tag in _STRINGS or tag in _BINARIES:
            length = self.number(_STRINGS.get(tag) or _BINARIES[tag])
        else:
            return None
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise self.refused("has text that is not UTF-8") from error

    def integer(self, tag: int) -> int | None:
        """Reads a whole number; None if the tag is of something else."""
        if tag <= 0x7F:
            return tag
        if tag >= 0xE0:
            return tag - 0x100
        if tag in _UNSIGNED:
            return self.number(_UNSIGNED[tag])
        return self.number(_SIGNED[tag], signed=True) if tag in _SIGNED else None

    def binary(self) -> bytes:
        """Reads raw bytes."""
        tag = self.number(1)
        if tag not in _BINARIES:
            raise self.refused("has an array without bytes")
        return self.take(self.number(_BINARIES[tag]))

    def number(self, size: int, *, signed: bool = False) -> int:
        """Reads a whole number of so many bytes."""
        return int.from_bytes(self.take(size), "big", signed=signed)

    def take(self, size: int) -> bytes:
        """Reads raw bytes, all of which must be there."""
        start, self.position = self.position, self.position + size
        if self.position > len(self.data):
            raise self.refused(f"ends at byte {len(self.data)}, in the middle of a value")
        return self.data[start : self.position]

    def refused(self, what: str) -> CheckpointError:
        """Returns the error for data that are not as they must be."""
        return CheckpointError(f"The MessagePack file {what} (near byte {self.position}).")
