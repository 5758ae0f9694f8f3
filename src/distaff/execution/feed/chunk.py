"""Chunks: consecutive batches for one program."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.config.cadence import Count, Unit
from distaff.core.typing import Batch, PyTree


class ChunkData(Protocol):
    """The batches of a chunk, as a pytree of arrays that programs take as an argument."""

    @property
    def capacity(self) -> int:
        """Most batches it can hold."""
        ...

    def batch(self, index: jax.Array | int) -> Batch:
        """Returns a batch; for use inside a program."""
        ...

    def padded(self, size: int) -> ChunkData:
        """Pads each batch to `size` examples by repeating its last one."""
        ...


class One(NamedTuple):
    """One batch, as the loader yields it."""

    whole: Batch

    capacity = 1
    """Most batches it can hold."""

    def batch(self, index: jax.Array | int) -> Batch:
        """Returns the batch."""
        return self.whole

    def padded(self, size: int) -> One:
        """Pads the batch to `size` examples by repeating its last one."""
        return One(pad(self.whole, size))


class Stacked(NamedTuple):
    """Batches stacked on the host.

    Attributes:
        batches: each leaf `[capacity, batch, ...]`.
    """

    batches: PyTree

    @property
    def capacity(self) -> int:
        """Most batches it can hold."""
        return jax.tree.leaves(self.batches)[0].shape[0]

    def batch(self, index: jax.Array | int) -> Batch:
        """Returns one of the batches."""
        return jax.tree.map(lambda leaf: leaf[index], self.batches)

    def padded(self, size: int) -> Stacked:
        """Pads each batch to `size` examples by repeating its last one."""
        return Stacked(pad(self.batches, size, axis=1))


class Gathered(NamedTuple):
    """Arrays on the device, and the rows of each batch.

    Attributes:
        arrays: each leaf `[examples, ...]`.
        rows: int32 `[capacity, batch]`.
    """

    arrays: PyTree
    rows: jax.Array | np.ndarray

    @property
    def capacity(self) -> int:
        """Most batches it can hold."""
        return self.rows.shape[0]

    def batch(self, index: jax.Array | int) -> Batch:
        """Gathers one of the batches."""
        rows = self.rows[index]
        return jax.tree.map(lambda leaf: leaf.at[rows].get(mode="promise_in_bounds"), self.arrays)

    def padded(self, size: int) -> Gathered:
        """Pads each batch to `size` examples by repeating its last one."""
        return Gathered(self.arrays, pad(self.rows, size, axis=1))


class Chunk(NamedTuple):
    """Consecutive batches of one structure, with equal shapes and dtypes.

    Attributes:
        num_steps: number of batches; further entries of `source` are padding.
        examples: examples per batch.
        source: the batches, as an argument of programs.
        position: the loader's `get_state()` after the last batch.
        num_bytes: approximate memory in use for these batches until they have been used.
        counts: what the run has counted after the last batch, by unit; see `Room`.
    """

    num_steps: int
    examples: int
    source: ChunkData
    position: Mapping[str, Any] | None = None
    num_bytes: int = 0
    counts: Mapping[Unit, Count] = {}


class ChunkSize(NamedTuple):
    """The size of the next chunk, in batches.

    Attributes:
        num_steps: most batches of the chunk.
        capacity: capacity of its data.
        partial_capacity: capacity of a chunk with fewer batches than `num_steps`, so that full
            chunks may use a program of fixed length; 0 to use `capacity` for both.
    """

    num_steps: int
    capacity: int
    partial_capacity: int = 0

    def at_most(self, num_steps: int) -> ChunkSize:
        """Returns the size of a chunk with at most so many batches."""
        if num_steps >= self.num_steps:
            return self
        capacity = self.partial_capacity or self.capacity
        return ChunkSize(num_steps, capacity, self.partial_capacity)


_ALIGNMENT = 64

SINGLE = ChunkSize(1, 1)
"""One batch."""


def stack(items: Sequence[PyTree], capacity: int) -> PyTree:
    """Stacks pytrees of equal shapes along a new first axis of length `capacity`.

    Programs do not read the entries after the last item.
    """

    def stack_leaves(*leaves: Any) -> Any:
        if isinstance(leaves[0], jax.Array):
            padding = leaves[-1:] * (capacity - len(leaves))
            return jnp.stack([*leaves, *padding])
        array = np.empty((capacity, *np.shape(leaves[0])), leaves[0].dtype)
        np.stack(leaves, out=array[: len(leaves)])
        array[len(leaves) :] = 0  # arbitrary memory may overflow when JAX narrows the dtype
        return array

    return jax.tree.map(stack_leaves, *items)


def gather(arrays: PyTree, rows: Sequence[np.ndarray], capacity: int) -> PyTree:
    """Gathers batches from arrays on the host, along a new first axis of length `capacity`.

    Args:
        arrays: each leaf `[examples, ...]`.
        rows: indices of the examples of each batch, `[batch]` each.
        capacity: most batches; entries after the last batch are undefined.
    """
    index = np.stack(rows)

    def gather_leaf(leaf: np.ndarray) -> np.ndarray:
        batches = _aligned((capacity, *index.shape[1:], *leaf.shape[1:]), leaf.dtype)
        # mode="clip" avoids a copy; all indices are valid.
        np.take(leaf, index, axis=0, out=batches[: len(index)], mode="clip")
        return batches

    return jax.tree.map(gather_leaf, arrays)


class Rows:
    """Rows of an array on the host, gathered when a part of them is read.

    With several processes, each then gathers only the rows that its own devices hold.

    Args:
        array: `[examples, ...]`.
        index: indices of examples, of any shape.

    Attributes:
        shape: the shape of `array[index]`.
        dtype: the dtype of the array.
    """

    def __init__(self, array: np.ndarray, index: np.ndarray) -> None:
        self._array, self._index = array, index
        self.shape, self.dtype = (*index.shape, *array.shape[1:]), array.dtype

    def __getitem__(self, part: tuple[slice, ...]) -> np.ndarray:
        """Returns a part of the rows, given a slice of each axis."""
        found = self._array[self._index[part[: self._index.ndim]]]
        return found[(..., *part[self._index.ndim :])]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an empty array, aligned so that JAX on the CPU uses it without a copy."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


def pad(tree: PyTree, size: int, *, axis: int = 0) -> PyTree:
    """Pads an axis to the length `size` by repeating its last entry.

    Real examples rather than zeros avoid divisions by zero and logarithms of zero.
    """

    def pad_leaf(leaf: Any) -> Any:
        missing = size - leaf.shape[axis]
        if missing == 0:
            return leaf
        numpy = jnp if isinstance(leaf, jax.Array) else np  # arrays on the device stay there
        widths = [(0, missing if each == axis else 0) for each in range(leaf.ndim)]
        return numpy.pad(leaf, widths, mode="edge")

    return jax.tree.map(pad_leaf, tree)
