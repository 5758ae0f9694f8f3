"""Examples: data that are read one by one, by index, and loaders over them."""

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
from distaff.data.dataclass_batches import known_to_jax
from distaff.data.examples.block_cache import Kept
from distaff.data.examples.order import Order
from distaff.data.loader import as_held_by_jax, drops, num_examples
from distaff.data.positioned import Positioned
from distaff.errors import BatchError, leaf_name


@runtime_checkable
class Examples(Protocol):
    """Data of a known length, read by index: a list, a file of records, a dataset of PyTorch's.

    An example is a pytree of arrays and numbers, without a batch axis.

    What lies in blocks that are read whole also has `starts`, int64 `[blocks + 1]`, the first
    example of each block, and behind them the number of examples; and `blocks_in_memory`, how
    many blocks it keeps. A shuffled epoch then never needs more of them at once.

    Two more are optional. `fingerprint`, an int, stands for the data: a position is refused where
    it is another. `read_batch(indices)` returns what stacking these examples would, sooner.

    All four count only where an object has them itself: what a `__getattr__` finds belongs to other
    examples, as does the `read_batch` of a class whose subclass has another `__getitem__`.
    """

    def __len__(self) -> int:
        """Returns the number of examples."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """Returns an example."""
        ...


class BlockExamples(ABC):
    """Examples that lie in blocks, each of which is read whole; the last ones stay in memory.

    Make one object for each loader: two loaders that are read in turn would each push the blocks of
    the other out of memory. A pickle, as for worker processes, holds no blocks.

    Args:
        sizes: how many examples each block has, `[blocks]`.
        blocks_in_memory: how many blocks are kept. A shuffled epoch mixes so many at a time.

    Raises:
        BatchError: there is no example.
        ConfigError: `blocks_in_memory` is no whole number, or less than 1.
    """

    def __init__(self, sizes: Sequence[int] | np.ndarray, *, blocks_in_memory: int = 16) -> None:
        self.blocks_in_memory = whole("blocks_in_memory", blocks_in_memory)
        self.starts = np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64), dtype=np.int64)])
        if not len(self):
            raise BatchError(
                f"{type(self).__name__} must hold at least one example; its {len(sizes)} blocks "
                "hold none. Check the paths."
            )
        self._kept: Kept[int, Examples] = Kept(self.blocks_in_memory)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int, /) -> Any:
        starts = self.starts.data  # items of which are read sooner than those of the array
        if not 0 <= index < starts[-1]:
            raise IndexError(f"{type(self).__name__} holds {len(self)} examples; got {index}")
        block = bisect_right(starts, index) - 1
        return self._block(block)[index - starts[block]]

    def _block(self, number: int) -> Examples:
        """Returns the examples of a block, which is read where it is not in memory."""
        return self._kept.get(number, self.read_block)

    @abstractmethod
    def read_block(self, block: int) -> Examples:
        """Returns the examples of a block, as many as it has."""


class MappedExamples:
    """Applies a function to each example, when it is asked for.

    Args:
        examples: where they come from.
        function: `example -> example`. It has no memory and no randomness of its own.

    Raises:
        BatchError: the examples have no length, or cannot be read by index.

    >>> doubled = MappedExamples([1, 2, 3], lambda example: 2 * example)
    >>> [doubled[index] for index in range(len(doubled))]
    [2, 4, 6]
    """

    def __init__(self, examples: Examples, function: Callable[[Any], Any]) -> None:
        _check_examples(examples)
        self._examples, self._function = examples, function
        self.starts: np.ndarray | None = _own(examples, "starts")
        self.blocks_in_memory: int = _own(examples, "blocks_in_memory", 1)
        self.fingerprint: int | None = _own(examples, "fingerprint")

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
    """Returns a loader that reads examples and stacks them, and goes to any position at once.

    Each epoch has an order that depends on `(seed, epoch)` alone. Of examples in blocks, as files
    have them, it mixes as many blocks as the examples keep in memory.

    Args:
        examples: what is read, by index; all of one structure, and leaf by leaf of one shape.
        batch_size: examples in a batch.
        shuffle: whether each epoch has a new order.
        seed: makes the orders, not negative.
        remainder: what becomes of a short last batch, as `ArrayLoader` has it.

    Returns:
        A loader of batches `[batch, ...]`. The dtype of a leaf is that of its values, in 32 bits:
        where they are ints of Python in one batch and floats in another, as JSON has them, convert
        them in a `MappedExamples`.

    Raises:
        BatchError: the examples have no length or fill no batch, or their `starts` are not those of
            so many; while it reads, they differ, or an integer does not fit into 32 bits.
        ConfigError: an option is out of range.

    >>> loader = from_examples([{"x": np.ones(2)}, {"x": np.zeros(2)}, {"x": np.ones(2)}], 2)
    >>> [batch["x"].shape for batch in loader]
    [(2, 2), (1, 2)]
    """
    batch_size = whole("batch_size", batch_size)
    order = make_order(examples, batch_size, shuffle=shuffle, seed=seed)
    is_short_dropped = drops(remainder, shuffle)
    length, rest = divmod(len(examples), batch_size)
    length += rest > 0 and not is_short_dropped
    if not length:
        raise BatchError(
            f"The examples must fill at least one batch; there are {len(examples)}, batch_size is "
            f"{batch_size}, and a short batch is dropped. Give more examples, lower batch_size, "
            "or keep the short batch with remainder='keep'."
        )
    identity = {**order.identity(), "batch_size": batch_size, "drop": is_short_dropped}
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
        BatchError: they have no length, cannot be read by index, or have `starts` that do not lead
            from 0 to their number.
        ConfigError: an option is no whole number, or out of range.
    """
    _check_examples(examples)
    whole("batch_size", batch_size)
    starts = _own(examples, "starts")
    if starts is not None:
        starts = np.asarray(starts, np.int64)
        if [*starts[:1], *starts[-1:]] != [0, len(examples)]:
            raise BatchError(
                "`starts` must lead from 0 to the number of examples; those of "
                f"{type(examples).__name__} are {starts}, and there are {len(examples)}. Give it "
                "`starts` of its own, or None."
            )
    return Order(
        len(examples),
        shuffle=bool(shuffle),
        seed=whole("seed", seed, least=0),
        starts=starts,
        window=whole("blocks_in_memory", _own(examples, "blocks_in_memory", 1)),
        fingerprint=_own(examples, "fingerprint"),
    )


def _check_examples(examples: Any) -> None:
    if not isinstance(examples, Examples) or isinstance(examples, dict | str | bytes):
        raise BatchError(
            "Examples have a length and are read by index, examples[0]; got "
            f"{type(examples).__name__}. Write data.ArrayLoader(arrays, batch_size=...) for arrays "
            "in memory, list(...) for an iterator over examples, or give an iterable of batches to "
            "the trainer as it is."
        )


def _own(examples: Examples, name: str, default: Any = None) -> Any:
    """Returns an attribute that examples have themselves; `__getattr__` is not asked for it."""
    is_own = getattr_static(examples, name, None) is not None
    return getattr(examples, name, default) if is_own else default


def stacked(examples: Sequence[PyTree]) -> Batch:
    """Returns a batch of examples, `[batch, ...]`, in 32 bits where `ArrayLoader` has 32 bits.

    Raises:
        BatchError: they differ in structure, or a leaf in its shape or kind of number, or an
            integer does not fit into 32 bits.
    """
    batch = joined(_stacked_leaf, examples)
    num_examples(batch)
    return batch


def joined(
    join: Callable[[tuple[Any, ...], Sequence[Any]], Any], examples: Sequence[PyTree]
) -> PyTree:
    """Returns a tree like each of the examples, which has at each leaf what is made of theirs.

    Args:
        join: `(path, leaves) -> leaf`, of the leaves at one path, one of each example.
        examples: pytrees of one structure.

    Raises:
        BatchError: they differ in structure.
    """
    with_path, structure = jax.tree.flatten_with_path(known_to_jax(examples[0]))
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
    made = [join(path, leaves) for (path, _), leaves in zip(with_path, columns, strict=True)]
    return jax.tree.unflatten(structure, made)


def _stacked_leaf(path: tuple[Any, ...], leaves: Sequence[Any]) -> np.ndarray:
    arrays = [np.asanyarray(leaf) for leaf in leaves]
    if len({array.dtype.kind for array in arrays}) > 1:
        dtypes = sorted({array.dtype.name for array in arrays})
        raise BatchError(
            f"All examples of a batch must have one kind of number; {leaf_name(path)!r} has "
            f"{', '.join(dtypes)}. Convert them, such as with np.float32 (data.MappedExamples)."
        )
    try:
        stack = np.stack(arrays)
    except ValueError as error:
        shapes = sorted({np.shape(leaf) for leaf in leaves})
        raise BatchError(
            f"All examples of a batch must have one shape; {leaf_name(path)!r} has {shapes}. Pad "
            "or cut them (data.MappedExamples), or use data.bucketed or data.packed for sequences."
        ) from error
    return as_held_by_jax(stack, path)


class _ExampleBatches:
    """Examples, stacked in their order: the number of the batch is the position."""

    def __init__(self, examples: Examples, order: Order, batch_size: int, length: int) -> None:
        self._order, self._batch_size, self._length = order, batch_size, length
        self._read_batch = _reader_of(examples)

    def start(self, epoch: int, batch: int, saved: Any) -> Iterator[Batch]:
        if batch > self._length:
            raise ValueError(f"an epoch has {self._length} batches")
        return self._read(self._order.epoch(epoch, batch * self._batch_size), batch)

    def position(self) -> None:
        """Nothing that the number of the batch does not say."""

    def _read(self, indices: Iterator[int], batch: int) -> Iterator[Batch]:
        for _ in range(batch, self._length):
            yield self._read_batch(list(islice(indices, self._batch_size)))


def _reader_of(examples: Any) -> Callable[[Sequence[int]], Batch]:
    """Returns `read_batch`, but not that of a class whose subclass has another `__getitem__`."""
    for kind in type(examples).__mro__:
        if "read_batch" in vars(kind):
            return examples.read_batch
        if "__getitem__" in vars(kind):
            break
    return lambda indices: stacked([examples[index] for index in indices])
