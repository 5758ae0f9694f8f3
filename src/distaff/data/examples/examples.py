"""Examples: data that are read by index, and loaders over them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from inspect import getattr_static
from itertools import islice
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import numpy as np

from distaff.core.config.checks import whole
from distaff.core.typing import Batch, PyTree
from distaff.data.entry import register_dataclasses
from distaff.data.examples.block_cache import Kept
from distaff.data.examples.order import Order
from distaff.data.loader import canonicalize_leaf, drops_remainder, epoch_length, num_examples
from distaff.data.positioned import Positioned
from distaff.errors import BatchError, leaf_name


@runtime_checkable
class Examples(Protocol):
    """Data of a known length, read by index: a list, a file of records, a PyTorch dataset.

    An example is a pytree of arrays and numbers, without a batch axis.

    Four attributes are optional:

    * `starts`, int64 `[blocks + 1]`, for data in blocks that are read whole: the index of the first
      example of each block, then the number of examples.
    * `blocks_in_memory`, the number of blocks that are cached. A shuffled epoch never needs more at
      once. 1 by default.
    * `fingerprint`, an int that identifies the data. A position is only restored if it is equal.
    * `read_batch(indices)`, which returns the stacked examples, faster than one by one.

    They must be attributes of the object itself: those found by `__getattr__` are ignored, as is a
    `read_batch` if a subclass overrides only `__getitem__`.
    """

    def __len__(self) -> int:
        """Returns the number of examples."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """Returns an example."""
        ...


class BlockExamples(ABC):
    """Examples in blocks, which are read whole and cached.

    Make one object per loader: two loaders that are read in turn would evict each other's blocks.
    A pickle, such as for worker processes, contains no blocks.

    Args:
        sizes: number of examples in each block, `[blocks]`.
        blocks_in_memory: number of cached blocks, which a shuffled epoch mixes at a time.

    Raises:
        BatchError: there are no examples.
        ConfigError: `blocks_in_memory` is not an integer, or less than 1.
    """

    def __init__(self, sizes: Sequence[int] | np.ndarray, *, blocks_in_memory: int = 16) -> None:
        self.blocks_in_memory = whole("blocks_in_memory", blocks_in_memory)
        self.starts = np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64), dtype=np.int64)])
        if not len(self):
            raise BatchError(
                f"{type(self).__name__} must hold at least one example; its {len(sizes)} blocks "
                "are empty. Check the paths."
            )
        self._kept: Kept[int, Examples] = Kept(self.blocks_in_memory)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int, /) -> Any:
        starts = self.starts.data  # indexing a memoryview is faster than indexing the array
        if not 0 <= index < starts[-1]:
            raise IndexError(f"{type(self).__name__} holds {len(self)} examples; got {index}")
        block = bisect_right(starts, index) - 1
        return self._block(block)[index - starts[block]]

    def _block(self, number: int) -> Examples:
        return self._kept.get(number, self.read_block)

    @abstractmethod
    def read_block(self, block: int) -> Examples:
        """Reads the examples of a block.

        Args:
            block: number of the block, from 0.

        Returns:
            The examples, read by index, in their order.
        """


class MappedExamples:
    """Applies a function to each example on demand.

    Args:
        examples: source of the examples.
        function: `example -> example`, without state and randomness.

    Raises:
        BatchError: `examples` has no length, or cannot be read by index.

    >>> doubled = MappedExamples([1, 2, 3], lambda example: 2 * example)
    >>> [doubled[index] for index in range(len(doubled))]
    [2, 4, 6]
    """

    def __init__(self, examples: Examples, function: Callable[[Any], Any]) -> None:
        _check_examples(examples)
        self._examples, self._function = examples, function
        self.starts: np.ndarray | None = _attribute(examples, "starts")
        self.blocks_in_memory: int = _attribute(examples, "blocks_in_memory", 1)
        self.fingerprint: int | None = _attribute(examples, "fingerprint")

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int, /) -> Any:
        return self._function(self._examples[index])


def from_examples(
    examples: Examples,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    remainder: Literal["keep", "drop"] | None = None,
) -> Positioned:
    """Returns a loader that reads and stacks examples, and restores any position at once.

    Each epoch has an order that depends on `(seed, epoch)` alone. For examples in blocks, such as
    files, a shuffled epoch mixes as many blocks as are cached.

    Args:
        examples: examples that are read by index, all of one structure and one shape per leaf.
        batch_size: examples in a batch.
        shuffle: whether each epoch has a new order.
        seed: seed of the orders, not negative.
        remainder: what to do with a short last batch; see `ArrayLoader`.

    Returns:
        A loader of batches `[batch, ...]`. The dtype of a leaf is that of its values, in 32 bits.
        If these are Python ints in one batch and floats in another, as in JSON, convert them with
        `MappedExamples`.

    Raises:
        BatchError: the examples have no length, fill no batch, or have invalid `starts`; while
            reading: they differ in structure or shape, or an integer does not fit into 32 bits.
        ConfigError: an option is out of range.

    >>> loader = from_examples([{"x": np.ones(2)}, {"x": np.zeros(2)}, {"x": np.ones(2)}], 2)
    >>> [batch["x"].shape for batch in loader]
    [(2, 2), (1, 2)]
    """
    batch_size = whole("batch_size", batch_size)
    order = make_order(examples, batch_size, shuffle=shuffle, seed=seed)
    drop = drops_remainder(remainder, shuffle)
    length = epoch_length(len(examples), batch_size, drop=drop)
    identity = {**order.identity(), "batch_size": batch_size, "drop": drop}
    source = _ExampleBatches(examples, order, batch_size, length)
    return Positioned(
        source,
        length=length,
        identity=identity,
        in_order=lambda: from_examples(examples, batch_size, remainder="keep"),
    )


def make_order(examples: Examples, batch_size: int, *, shuffle: bool, seed: int) -> Order:
    """Returns the order in which a loader reads examples.

    Raises:
        BatchError: the examples have no length, cannot be read by index, or have invalid `starts`.
    """
    _check_examples(examples)
    whole("batch_size", batch_size)
    starts = _attribute(examples, "starts")
    if starts is not None:
        starts = np.asarray(starts, np.int64)
        if [*starts[:1], *starts[-1:]] != [0, len(examples)]:
            raise BatchError(
                "`starts` must begin with 0 and end with the number of examples; in "
                f"{type(examples).__name__} it is {starts}, and there are {len(examples)} "
                "examples. Correct `starts`, or set it to None."
            )
    return Order(
        len(examples),
        shuffle=bool(shuffle),
        seed=whole("seed", seed, least=0),
        starts=starts,
        window=whole("blocks_in_memory", _attribute(examples, "blocks_in_memory", 1)),
        fingerprint=_attribute(examples, "fingerprint"),
    )


def _check_examples(examples: Any) -> None:
    if not isinstance(examples, Examples) or isinstance(examples, dict | str | bytes):
        raise BatchError(
            "Examples must have a length and be read by index, examples[0]; got "
            f"{type(examples).__name__}. Write data.ArrayLoader(arrays, batch_size=...) for arrays "
            "in memory, list(...) for an iterator over examples, or pass an iterable of batches "
            "directly to the trainer."
        )


def _attribute(examples: Examples, name: str, default: Any = None) -> Any:
    """Returns an attribute of examples, without calling their `__getattr__`."""
    is_own = getattr_static(examples, name, None) is not None
    return getattr(examples, name, default) if is_own else default


def stacked(examples: Sequence[PyTree]) -> Batch:
    """Stacks examples into a batch `[batch, ...]`, in 32 bits like `ArrayLoader`.

    Raises:
        BatchError: the examples differ in structure, or a leaf in shape or kind of number.
    """
    batch = joined(_stacked_leaf, examples)
    num_examples(batch)
    return batch


def joined(
    join: Callable[[tuple[Any, ...], Sequence[Any]], Any], examples: Sequence[PyTree]
) -> PyTree:
    """Maps `join`, `(path, leaves) -> leaf`, over the corresponding leaves of examples.

    Raises:
        BatchError: the examples differ in structure.
    """
    with_path, structure = jax.tree.flatten_with_path(register_dataclasses(examples[0]))
    rows = []
    for example in examples:
        leaves, other = jax.tree.flatten(example)
        if other != structure:
            raise BatchError(
                f"All examples must have one structure; got {structure} and {other}. "
                "Give them the same leaves (data.MappedExamples)."
            )
        rows.append(leaves)
    columns = zip(*rows, strict=True)
    pairs = zip(with_path, columns, strict=True)
    return jax.tree.unflatten(structure, [join(path, leaves) for (path, _), leaves in pairs])


def _stacked_leaf(path: tuple[Any, ...], leaves: Sequence[Any]) -> np.ndarray:
    arrays = [np.asanyarray(leaf) for leaf in leaves]
    if len({array.dtype.kind for array in arrays}) > 1:
        dtypes = sorted({array.dtype.name for array in arrays})
        raise BatchError(
            f"All examples of a batch must have one kind of number; {leaf_name(path)!r} has "
            f"{', '.join(dtypes)}. Convert them, for example with np.float32 (data.MappedExamples)."
        )
    try:
        stack = np.stack(arrays)
    except ValueError as error:
        shapes = sorted({np.shape(leaf) for leaf in leaves})
        raise BatchError(
            f"All examples of a batch must have one shape; {leaf_name(path)!r} has {shapes}. Pad "
            "or crop them (data.MappedExamples), or use data.bucketed or data.packed for sequences."
        ) from error
    return canonicalize_leaf(stack, path)


class _ExampleBatches:
    """Batches of stacked examples; the number of the batch is the position."""

    has_one_order = True

    def __init__(self, examples: Examples, order: Order, batch_size: int, length: int) -> None:
        self._order, self._batch_size, self._length = order, batch_size, length
        self._read_batch = _reader_of(examples)

    def start(self, epoch: int, batch: int, saved: Any) -> Iterator[Batch]:
        if batch > self._length:
            raise ValueError(f"an epoch has {self._length} batches")
        return self._read(self._order.epoch(epoch, batch * self._batch_size), batch)

    def position(self) -> None:
        """Returns None: the number of the batch is enough."""

    def _read(self, indices: Iterator[int], batch: int) -> Iterator[Batch]:
        for _ in range(batch, self._length):
            yield self._read_batch(list(islice(indices, self._batch_size)))


def _reader_of(examples: Any) -> Callable[[Sequence[int]], Batch]:
    """Returns `read_batch`, unless a subclass overrides only `__getitem__`."""
    for kind in type(examples).__mro__:
        if "read_batch" in vars(kind):
            return examples.read_batch
        if "__getitem__" in vars(kind):
            break
    return lambda indices: stacked([examples[index] for index in indices])
