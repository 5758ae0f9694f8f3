"""Chunks: consecutive batches that are trained on as one program, and where it finds them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.typing import Batch, PyTree


class ChunkData(Protocol):
    """Where a program finds the batches of a chunk: a pytree of arrays."""

    @property
    def capacity(self) -> int:
        """How many batches there is room for."""
        ...

    def batch(self, index: jax.Array | int) -> Batch:
        """Returns a batch, inside the program."""
        ...

    def padded(self, size: int) -> ChunkData:
        """Returns it with `size` examples in each batch, the last one again and again."""
        ...


class One(NamedTuple):
    """One batch, as the loader yields it."""

    whole: Batch

    capacity = 1
    """How many batches there is room for."""

    def batch(self, index: jax.Array | int) -> Batch:
        """Returns the batch."""
        return self.whole

    def padded(self, size: int) -> One:
        """Returns it with `size` examples, the last one again and again."""
        return One(pad(self.whole, size))


class Stacked(NamedTuple):
    """Batches that the host has stacked.

    Attributes:
        batches: each leaf `[capacity, batch, ...]`.
    """

    batches: PyTree

    @property
    def capacity(self) -> int:
        """How many batches there is room for."""
        return jax.tree.leaves(self.batches)[0].shape[0]

    def batch(self, index: jax.Array | int) -> Batch:
        """Returns one of the batches."""
        return jax.tree.map(lambda leaf: leaf[index], self.batches)

    def padded(self, size: int) -> Stacked:
        """Returns it with `size` examples in each batch, the last one again and again."""
        return Stacked(pad(self.batches, size, axis=1))


class Gathered(NamedTuple):
    """Arrays on the device, and which of their rows make the batches.

    Attributes:
        arrays: each leaf `[examples, ...]`.
        rows: int32 `[capacity, batch]`.
    """

    arrays: PyTree
    rows: jax.Array | np.ndarray

    @property
    def capacity(self) -> int:
        """How many batches there is room for."""
        return self.rows.shape[0]

    def batch(self, index: jax.Array | int) -> Batch:
        """Gathers one of the batches."""
        rows = self.rows[index]
        return jax.tree.map(lambda leaf: leaf.at[rows].get(mode="promise_in_bounds"), self.arrays)

    def padded(self, size: int) -> Gathered:
        """Returns it with `size` examples in each batch, the last one again and again."""
        return Gathered(self.arrays, pad(self.rows, size, axis=1))


class Chunk(NamedTuple):
    """Consecutive batches of one form.

    Attributes:
        num_steps: how many; what a source holds after them is padding.
        examples: in each.
        source: where the program finds them.
        position: of the loader after the last of them, as its `get_state` gave it.
        num_bytes: about how much memory is held for them alone until they are used.
    """

    num_steps: int
    examples: int
    source: ChunkData
    position: Mapping[str, Any] | None = None
    num_bytes: int = 0


class ChunkSize(NamedTuple):
    """How many batches the next chunk shall have.

    Attributes:
        num_steps: at most this many.
        capacity: the source has room for this many.
        rest: 0, or the room in the source of a chunk that is shorter than `num_steps`; one that is
            as long may then have a program for just this number.
    """

    num_steps: int
    capacity: int
    rest: int = 0


_ALIGNMENT = 64

SINGLE = ChunkSize(1, 1)
"""One batch."""


def stack(items: Sequence[PyTree], capacity: int) -> PyTree:
    """Stacks pytrees of one form along a new first axis of length `capacity`.

    What is missing is zero; a program goes no further than its `num_steps`.
    """

    def stacked(*leaves: Any) -> Any:
        if isinstance(leaves[0], jax.Array):
            padding = leaves[-1:] * (capacity - len(leaves))
            return jnp.stack([*leaves, *padding])
        array = np.empty((capacity, *np.shape(leaves[0])), leaves[0].dtype)
        np.stack(leaves, out=array[: len(leaves)])
        array[len(leaves) :] = 0  # what was in memory may overflow where JAX narrows the dtype
        return array

    return jax.tree.map(stacked, *items)


def gather(arrays: PyTree, rows: Sequence[np.ndarray], capacity: int) -> PyTree:
    """Gathers batches from arrays on the host, along a new first axis of length `capacity`.

    Args:
        arrays: each leaf `[examples, ...]`.
        rows: which of them make each batch, `[batch]` each.
        capacity: how many batches there is room for; what follows the last one means nothing.
    """
    index = np.stack(rows)

    def gathered(leaf: np.ndarray) -> np.ndarray:
        batches = _aligned((capacity, *index.shape[1:], *leaf.shape[1:]), leaf.dtype)
        # `mode` spares a copy: the rows are known to be there.
        np.take(leaf, index, axis=0, out=batches[: len(index)], mode="clip")
        return batches

    return jax.tree.map(gathered, arrays)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an array with room for a shape, which JAX on the CPU takes without a copy."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


def pad(tree: PyTree, size: int, *, axis: int = 0) -> PyTree:
    """Repeats the last entries along an axis until it has the length `size`.

    Real examples rather than zeros, so that no division by zero or logarithm of zero can appear.
    """

    def padded(leaf: Any) -> Any:
        missing = size - leaf.shape[axis]
        if missing == 0:
            return leaf
        numpy = jnp if isinstance(leaf, jax.Array) else np  # what is on the device stays there
        widths = [(0, missing if each == axis else 0) for each in range(leaf.ndim)]
        return numpy.pad(leaf, widths, mode="edge")

    return jax.tree.map(padded, tree)
