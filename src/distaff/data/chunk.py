"""Chunks: consecutive batches that are trained on as one program, and where it finds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from distaff.data.arrays import ArrayLoader
from distaff.data.loader import Loader, epoch_of, num_examples
from distaff.typing import Batch, PyTree

_MAX_RESIDENT_BYTES = 2**29
_MAX_CHUNK_BYTES = 2**25
_MAX_FEEDS = 4


class Source(Protocol):
    """Where a program finds the batches of a chunk: a pytree of arrays."""

    @property
    def capacity(self) -> int:
        """How many batches there is room for."""
        ...

    def batch(self, index: jax.Array | int) -> Batch:
        """Returns a batch, inside the program."""
        ...

    def padded(self, size: int) -> Source:
        """Returns it with `size` examples in each batch, the last one again and again."""
        ...


class One(NamedTuple):
    """One batch, as the loader yields it."""

    whole: Batch

    @property
    def capacity(self) -> int:
        """Returns 1."""
        return 1

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
    """

    num_steps: int
    examples: int
    source: Source


class Form(NamedTuple):
    """How many batches the next chunk shall have.

    Attributes:
        num_steps: at most this many.
        capacity: the source has room for this many.
    """

    num_steps: int
    capacity: int


SINGLE = Form(1, 1)
"""One batch."""


class Feed:
    """Hands out the epochs of a loader in chunks.

    Args:
        loader: where the batches come from.
        name: what errors call it, such as `"train"`.
        resident: whether to place arrays in memory on the device once, and gather there. What
            other loaders yield is stacked on the host.
    """

    def __init__(self, loader: Loader, *, name: str, resident: bool) -> None:
        self.loader = loader
        self._name = name
        self._arrays = _placed(loader) if resident else None

    def epoch(
        self, form: Callable[[], Form] = lambda: SINGLE, steps_per_epoch: int | None = None
    ) -> Iterator[Chunk]:
        """Yields the chunks of one epoch.

        Args:
            form: asked before each chunk.
            steps_per_epoch: as `epoch_of` takes it.

        Raises:
            BatchError: the loader is empty.
        """
        source = self.loader if self._arrays is None else _Rows(self.loader)
        items = epoch_of(source, steps_per_epoch, name=self._name)
        waiting: list[Any] = list(islice(items, 1))
        while waiting:
            num_steps, capacity = form()
            capacity = min(capacity, 1 + _MAX_CHUNK_BYTES // _num_bytes(waiting[0]))
            num_steps = min(num_steps, capacity)
            waiting.extend(islice(items, max(num_steps - len(waiting), 0)))
            group = _of_one_form(waiting[:num_steps])
            del waiting[: len(group)]
            yield Chunk(len(group), self._size(group[0]), self._source(group, capacity))
            if not waiting:
                waiting.extend(islice(items, 1))

    def _size(self, item: Any) -> int:
        return num_examples(item) if self._arrays is None else len(item)

    def _source(self, group: Sequence[Any], capacity: int) -> Source:
        if self._arrays is not None:
            return Gathered(self._arrays, stack(group, capacity))
        return One(group[0]) if capacity == 1 else Stacked(stack(group, capacity))


class Feeds:
    """The feeds of the loaders that were seen last, so that their arrays are placed once."""

    def __init__(self) -> None:
        self._feeds: list[Feed] = []

    def of(self, loader: Loader, *, name: str, resident: bool = True) -> Feed:
        """Returns the feed of a loader; see `Feed`."""
        found = next((feed for feed in self._feeds if feed.loader is loader), None)
        feed = found or Feed(loader, name=name, resident=resident)
        self._feeds = [feed, *(each for each in self._feeds if each is not feed)][:_MAX_FEEDS]
        return feed


class _Rows:
    """An array loader that hands out the rows of its batches."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def get_state(self) -> dict[str, int]:
        return self._loader.get_state()

    def set_state(self, state: Mapping[str, int]) -> None:
        self._loader.set_state(state)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self._loader.rows()


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


def pad(tree: PyTree, size: int, *, axis: int = 0) -> PyTree:
    """Repeats the last entries along an axis until it has the length `size`.

    Real examples rather than zeros, so that no division by zero or logarithm of zero can appear.
    """

    def padded(leaf: Any) -> Any:
        missing = size - leaf.shape[axis]
        if missing == 0:
            return leaf
        last = np.take(np.asarray(leaf), [-1], axis)
        return np.concatenate([leaf, np.repeat(last, missing, axis)], axis)

    return jax.tree.map(padded, tree)


def _of_one_form(items: Sequence[PyTree]) -> Sequence[PyTree]:
    """Returns the first items, as far as they are of one form."""
    if len(items) == 1:
        return items[:1]
    form = _form(items[0])
    return next((items[:n] for n, item in enumerate(items) if _form(item) != form), items[:])


def _form(item: PyTree) -> Any:
    leaves, structure = jax.tree.flatten(item)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _placed(loader: Loader) -> PyTree | None:
    """Returns a loader's arrays on the device; None without any, or for too large ones."""
    # A subclass may yield something else than the rows of its arrays.
    if type(loader) is not ArrayLoader or _num_bytes(loader.arrays) > _MAX_RESIDENT_BYTES:
        return None
    return jax.tree.map(jnp.array, loader.arrays)


def _num_bytes(tree: PyTree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
