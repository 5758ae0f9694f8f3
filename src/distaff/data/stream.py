"""Stream: turns any iterable of batches into a loader."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sized
from contextlib import suppress
from functools import cached_property
from typing import Any

import jax
import numpy as np

from distaff.core.digest import digest, sample_digest
from distaff.core.typing import Batch
from distaff.core.views.brief import brief, length
from distaff.data.entry import register_dataclasses
from distaff.data.examples.fingerprint import fingerprint
from distaff.errors import BatchError, ChangedBatchesError

_EPOCH_END = object()
_FINGERPRINT = "fingerprint"
_SAMPLED_BATCHES = 8
_SEVERAL_EPOCHS = (
    "Pass a list, a function that returns a new generator (the function, not its call), or the "
    "number of batches in an epoch (steps_per_epoch)."
)
_MORE = (
    "Yield more batches, train for fewer steps, or pass a list or a function that returns a new "
    "generator (the function, not its call)."
)


class Stream:
    """A loader over any iterable of batches: a list, a generator function, a torch-style loader.

    Every `iter()` is one epoch: it iterates over the source again (and calls a generator function
    again). Breaking out of a loop abandons the rest of that epoch. A one-shot iterator cannot
    start again: it continues where it stopped, and has only one epoch.

    Arrays are copied, because a source may refill its buffer while the device still reads it. JAX
    arrays are not copied.

    `set_state` reads all batches up to the position, including earlier epochs, since their order
    may depend on a random generator that the source advances. This takes as long as reading them
    the first time; `ArrayLoader` resumes at once. For a list or tuple, whose epochs are equal, at
    most one epoch is read. A position includes a fingerprint of the batches of its epoch:
    `set_state` raises if the source yields other batches.

    Args:
        source: an iterable of batches, or a function without arguments that returns one.
        length: number of batches in an epoch; default: `len(source)`.
        in_order: returns a loader of the same data for evaluation; see `Loader`. Default: another
            `Stream` over the source.

    Raises:
        BatchError: the source is neither.
    """

    def __init__(
        self,
        source: Iterable[Batch] | Callable[[], Iterable[Batch]],
        *,
        length: int | None = None,
        in_order: Callable[[], Any] | None = None,
    ) -> None:
        if not isinstance(source, Iterable) and not callable(source):
            raise BatchError(
                "A Stream needs an iterable of batches, or a function that returns one; "
                f"got {type(source).__name__}."
            )
        self._source = source
        self._length = length
        self._in_order = in_order
        self._fingerprint = self._num_yielded = 0
        self._wanted = ""
        self._begin(0)
        self._resumed = False

    def __repr__(self) -> str:
        source = getattr(self._source, "__name__", type(self._source).__name__)
        return brief(self, source, length(self))

    def __len__(self) -> int:
        if self._length is not None:
            return self._length
        if isinstance(self._source, Sized):
            return len(self._source)
        raise TypeError("The number of batches is unknown: pass length=... to Stream.")

    def __iter__(self) -> Iterator[Batch]:
        one_shot = isinstance(self._source, Iterator)
        if self._batch and not self._resumed and not one_shot:
            self._begin(self._epoch + 1)
        self._resumed = False
        while (batch := self._pull()) is not _EPOCH_END:
            yield batch

    def in_order(self) -> Any:
        """Returns a loader for evaluation; for a one-shot iterator, this loader itself."""
        if self._in_order is not None:
            return self._in_order()
        if isinstance(self._source, Iterator):
            return self
        return type(self)(self._source, length=self._length)

    @property
    def has_one_order(self) -> bool:
        """Whether the source is a list or tuple of batches; see `Loader`."""
        return type(self._source) in (list, tuple)

    @property
    def is_read_again(self) -> bool:
        """Whether restoring a position reads the source again, which may yield other batches."""
        is_own = self._in_order is None and type(self._source) not in (list, tuple)
        return getattr(self._source, "is_read_again", is_own)

    def shares_source(self, other: Any) -> bool:
        """Whether another loader reads the same source, such as one `tf.data.Dataset`."""
        return isinstance(other, Stream) and self._source is other._source

    @property
    def has_own_order(self) -> bool:
        """Whether `in_order` may yield the batches in another order."""
        return self._in_order is not None

    @cached_property
    def num_shapes(self) -> int:
        """Number of distinct shapes of the batches; counted for a list or tuple."""
        source: Any = self._source
        if type(source) in (list, tuple):
            return _num_signatures([_signature(batch) for batch in source])
        return getattr(source, "num_shapes", 1)

    def check_passes(self, count: int, name: str, num_batches: int | None = None) -> None:
        """Checks that the source can be iterated for this number of epochs.

        Args:
            count: number of epochs.
            name: name of the loader for the error, such as `"train"`.
            num_batches: number of batches that the run needs, for a later error; None if unknown.

        Raises:
            BatchError: `count` is more than 1, and the source is a one-shot iterator.
        """
        self._num_yielded = 0
        self._wanted = "" if num_batches is None else f" of {num_batches} that are needed"
        if count > 1 and isinstance(self._source, Iterator):
            raise BatchError(
                f"The {name} loader must yield its batches again in each of {count} epochs; the "
                f"{type(self._source).__name__} can be iterated only once. {_SEVERAL_EPOCHS}"
            )

    def peek(self) -> Batch | None:
        """Returns the next batch without consuming it, or None if the source is empty."""
        while not self._ahead or self._ahead[-1] is _EPOCH_END:
            item = next(self._line, None)
            if item is None:
                return None
            self._ahead.append(item)
        return jax.tree.map(_copied, register_dataclasses(self._ahead[-1]))

    def get_state(self) -> dict[str, int]:
        """Returns the position after the last yielded batch, with a fingerprint."""
        return {"epoch": self._epoch, "batch": self._batch, _FINGERPRINT: self._fingerprint}

    def identity(self) -> dict[str, Any]:
        """Returns the type of the source, or for a list or tuple a digest of some batches."""
        source = self._source
        if not isinstance(source, list | tuple):
            return {"source": type(source).__qualname__}
        picked = source[:: max(1, len(source) // _SAMPLED_BATCHES)]
        leaves = (leaf for batch in picked for leaf in jax.tree.leaves(batch))
        return {"batches": digest(*map(sample_digest, leaves))}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Reads up to a position; the next `iter()` yields the rest of that epoch.

        Restoring the current position reads nothing, and continues the running iteration.

        Args:
            state: the result of `get_state`. Without a fingerprint, the batches are not verified.

        Raises:
            BatchError: the position is already past, or the source ends before it.
            ChangedBatchesError: the source yields other batches than before.
        """
        if set(state) - {_FINGERPRINT} != {"epoch", "batch"}:
            raise BatchError(
                f"The state of a Stream has the keys 'epoch' and 'batch'; got {dict(state)}, saved "
                "by another kind of loader. Resume with that one."
            )
        target = (int(state["epoch"]), int(state["batch"]))
        here = (self._epoch, self._batch)
        if target < here:
            raise BatchError(
                f"A Stream cannot go back from (epoch, batch) = {here} to {target}, since its "
                "source may have changed since then. Make a new Stream, or use data.ArrayLoader."
            )
        self._read_to(target)
        if state.get(_FINGERPRINT, self._fingerprint) != self._fingerprint:
            raise ChangedBatchesError(
                "A source without a position is read again up to the saved one, and must yield the "
                f"same batches as before; this {type(self._source).__name__} yields others up to "
                f"(epoch, batch) = {target}. Seed its shuffling and augmentation, use "
                "data.ArrayLoader, write a loader with get_state and set_state, or pass "
                "allow_inexact_resume=True to the trainer."
            )
        self._resumed = True

    def abandon(self) -> None:
        """Makes the next `iter()` begin a new epoch; a one-shot iterator continues."""
        self._resumed = False

    def close(self) -> None:
        """Stops the running iteration, such as its workers, and abandons the epoch."""
        with suppress(ValueError):  # another thread is still reading
            self._line.close()
        self._begin(self._epoch + (self._batch > 0))

    def _read_to(self, target: tuple[int, int]) -> None:
        here = (self._epoch, self._batch)
        if type(self._source) in (list, tuple) and self._source and target[0] > here[0] + 1:
            self._begin(target[0] - 1)  # its epochs are equal
            here = (self._epoch, self._batch)
        while here < target:
            self._pull()
            last, here = here, (self._epoch, self._batch)
            if here > target or here == last:
                raise BatchError(
                    f"The source ends at (epoch, batch) = {last}, before the saved position "
                    f"{target}. Resume with the data that the run was started with."
                )

    def _begin(self, epoch: int) -> None:
        self._epoch, self._batch = epoch, 0
        self._line = self._read()
        self._ahead: list[Any] = []

    def _pull(self) -> Any:
        """Consumes and returns the next batch, or `_EPOCH_END`."""
        item = self._ahead.pop(0) if self._ahead else next(self._line, _EPOCH_END)
        if item is not _EPOCH_END:
            item = jax.tree.map(_copied, register_dataclasses(item))
            self._num_yielded += 1
            # The fingerprint of an epoch is kept until the next one begins.
            self._fingerprint = fingerprint(item, self._fingerprint if self._batch else 0)
            self._batch += 1
        elif self._batch:
            self._epoch, self._batch = self._epoch + 1, 0
        return item

    def _read(self) -> Generator[Any]:
        """Yields the batches of all epochs, and `_EPOCH_END` after each."""
        while True:
            empty = True
            for batch in self._open():
                empty = False
                yield batch
            if empty and (self._epoch or self._batch):
                raise BatchError(
                    f"The {type(self._source).__name__} ran out: it yielded {self._num_yielded} "
                    f"batches{self._wanted}, and none for epoch {self._epoch}. It can be iterated "
                    f"only once. {_MORE if self._wanted else _SEVERAL_EPOCHS}"
                )
            if empty:
                return
            yield _EPOCH_END

    def _open(self) -> Iterable[Batch]:
        if isinstance(self._source, Iterable):
            return self._source
        batches = self._source()
        if not isinstance(batches, Iterable):
            raise BatchError(
                "The function given to a Stream must return an iterable of batches; "
                f"it returned {type(batches).__name__}. Use yield instead of return."
            )
        return batches


def _signature(batch: Batch) -> Any:
    leaves, structure = jax.tree.flatten(register_dataclasses(batch))
    return structure, tuple((np.shape(leaf), getattr(leaf, "dtype", None)) for leaf in leaves)


def _num_signatures(signatures: list[Any]) -> int:
    """Returns the number of distinct signatures, not counting a short last batch."""
    distinct = set(signatures[:-1])
    if signatures and not any(_is_shorter(signatures[-1], other) for other in distinct):
        distinct.add(signatures[-1])
    return max(1, len(distinct))


def _is_shorter(signature: Any, other: Any) -> bool:
    """Whether batches differ only in that the first has fewer examples."""
    pairs = zip(signature[1], other[1], strict=False)
    return signature[0] == other[0] and all(
        a[1] == b[1] and a[0][1:] == b[0][1:] and a[0][:1] < b[0][:1] for a, b in pairs
    )


def _copied(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else np.array(leaf)
