"""Feeds: batch a loader into chunks, prefetch them, and put them on the device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, closing
from functools import partial
from itertools import chain, islice, repeat
from typing import Any, NamedTuple

import jax
import numpy as np

from distaff.core.typing import PyTree
from distaff.data.arrays import ArrayLoader
from distaff.data.loader import Loader, epoch_of, num_examples
from distaff.data.on_policy import is_on_policy, marked
from distaff.execution.feed.chunk import (
    SINGLE,
    Chunk,
    ChunkData,
    ChunkSize,
    Gathered,
    One,
    Rows,
    Stacked,
    gather,
    stack,
)
from distaff.execution.feed.prefetch import Prefetch
from distaff.execution.feed.room import Room
from distaff.execution.placement import ONE_DEVICE, Place, Placement

_log = logging.getLogger("distaff")

_MAX_RESIDENT_BYTES = 2**29
_MAX_CHUNK_BYTES = 2**25


class Feed:
    """Yields the epochs of a loader in chunks.

    Args:
        loader: yields the batches.
        name: name of the loader in errors, such as `"train"`.
        resident: whether to place the arrays of an `ArrayLoader` on the device once and gather
            batches there, rather than with NumPy. Batches of other loaders are stacked on the host.
        lock: held while a chunk is read; see `Prefetch`.
        placement: places batches.

    Attributes:
        handed_out: position after the last chunk yielded in this epoch; None outside of an epoch.
    """

    def __init__(
        self,
        loader: Loader,
        *,
        name: str,
        resident: bool,
        lock: AbstractContextManager[Any] | None = None,
        placement: Placement = ONE_DEVICE,
    ) -> None:
        self.loader = loader
        self._name, self._placement = name, placement
        self._kind: _BatchChunks | _RowChunks = _BatchChunks(name, placement.batch)
        # A subclass may yield batches other than rows of its arrays.
        if type(loader) is ArrayLoader:
            fits = resident and _is_in_memory(loader)
            arrays = placement.resident(loader.arrays) if fits else None
            self._kind = _RowChunks(loader, placement, arrays)
        self._prefetch: Prefetch[Chunk] = Prefetch(lock=lock)
        self.handed_out: Mapping[str, Any] | None = None
        self._kept: _Kept | None = None

    @property
    def position(self) -> Mapping[str, Any]:
        """Position of the loader after the last chunk yielded; it may have been read further."""
        return self.loader.get_state() if self.handed_out is None else self.handed_out

    @property
    def running(self) -> bool:
        """Whether an epoch is being read, so the loader may be ahead of `position`."""
        return self.handed_out is not None

    def epoch(
        self,
        chunk_size: Callable[[], ChunkSize] = lambda: SINGLE,
        steps_per_epoch: int | None = None,
        *,
        steady: Callable[[], bool] = lambda: True,
        keep_place: bool = False,
        done: int = 0,
        without: Set[int] = frozenset(),
        repeat: bool = True,
        room: Room | None = None,
    ) -> Generator[Chunk]:
        """Yields the chunks of one epoch. Close it, because a thread may prefetch chunks.

        Args:
            chunk_size: returns the size of the next chunk.
            steps_per_epoch: see `epoch_of`.
            steady: returns whether chunks may be prefetched, with the current chunk size.
            keep_place: whether the loader, if this is closed early, resumes with the batch after
                the last chunk yielded. A loader that was prefetched and cannot go back, such as a
                `Stream`, continues from its current position. False abandons the rest of the epoch.
            done: batches of the epoch that were drawn before; the loader is positioned after them.
                The rest may be empty.
            without: batches of the epoch to draw and skip, counted from 0.
            repeat: see `epoch_of`.
            room: ends chunks where something is due; None for no limit.

        Raises:
            BatchError: the loader is empty.
        """
        self.handed_out = self.loader.get_state()
        # Rows take microseconds, less than the hand-over from a thread.
        is_quick = isinstance(self._kind, _RowChunks) or is_on_policy(self.loader)
        rest = self._rest
        chunks = _chunks_of(
            rest(steps_per_epoch, done, without, repeat=repeat), chunk_size, self._kind, room
        )
        try:
            with closing(chunks if is_quick else self._prefetch.read(chunks, steady)) as chunks:
                for chunk in chunks:
                    self.handed_out = chunk.position
                    yield chunk
            self.handed_out = None
        except (GeneratorExit, KeyboardInterrupt):
            if keep_place:
                self._restore_position()
            else:
                self.handed_out = None
            raise

    def settle(self) -> None:
        """Waits until no thread reads the loader; its position may then be set."""
        self._prefetch.wait()
        self.handed_out = None

    def repeated(self, size: ChunkSize, *, even: Callable[[ChunkData], bool]) -> Generator[Chunk]:
        """Yields the chunks of one epoch; keeps them on the device if every epoch is the same.

        Args:
            size: size of the chunks.
            even: returns whether batches like these may be padded; short ones then get the size of
                the first batch. `Chunk.examples` does not count padding.

        Raises:
            BatchError: the loader is empty.
        """
        loader: Any = self.loader
        if not _is_in_memory(loader) or loader.shuffle:
            yield from self.epoch(lambda: size)
            return
        kept, key = self._kept, (size, loader.num_left())
        if kept is None or kept.key != key or kept.even != even(kept.chunks[0].source):
            chunks, is_even = [], False
            rows = list(loader.rows()) or list(loader.rows())
            slices = _slices(loader.arrays, rows)
            for chunk in _chunks_of(slices, lambda: size, _BatchChunks(self._name, None)):
                is_even = is_even if chunks else even(chunk.source)
                source = chunk.source.padded(len(rows[0])) if is_even else chunk.source
                chunks.append(chunk._replace(source=self._placement.resident(source)))
                yield chunks[-1]
            self._kept = _Kept(key, is_even, chunks)
        else:
            loader.skip_epoch()
            yield from kept.chunks

    def expect(self, batch: PyTree) -> None:
        """Determines the most batches per chunk from a full batch.

        A run that resumes just before the short last batch of an epoch then uses the same chunks as
        an uninterrupted run.
        """
        if isinstance(self._kind, _BatchChunks):
            self._kind.most(batch)

    def sample(self, batch: PyTree, size: ChunkSize) -> Chunk:
        """Returns a chunk as in an epoch, without reading the loader.

        Args:
            batch: a batch of the loader; the chunk repeats it.
            size: size of the chunk.
        """
        kind: Any = self._kind
        item = batch
        if isinstance(kind, _RowChunks):
            item = np.arange(num_examples(batch, name=self._name), dtype=np.int32)
        items = repeat((item, {}), size.num_steps)
        return next(_chunks_of(items, lambda: size, kind))

    def _restore_position(self) -> None:
        """Sets the loader to the end of the last chunk yielded, if it can go there."""
        position = self.position
        if self._prefetch.busy:
            return
        try:
            self.loader.set_state(position)
        except Exception:
            # A prefetched Stream continues from where it is; a checkpoint has the position.
            _log.info("the %s loader cannot return to %s", self._name, dict(position))
            self.loader.set_state(self.loader.get_state())
        else:
            self.handed_out = None

    def _rest(
        self, steps_per_epoch: int | None, done: int, without: Set[int], *, repeat: bool
    ) -> Iterator[tuple[Any, Mapping[str, Any]]]:
        """Yields the rest of an epoch, without some of its batches; see `_items`."""
        if done and done == steps_per_epoch:
            return
        items = self._items(steps_per_epoch and steps_per_epoch - done, repeat=repeat)
        waiting: list[Any] = list(islice(items, 1))
        if not waiting and not done:  # a loader may be at the end of an epoch
            items = self._items(steps_per_epoch, repeat=repeat)
        numbered = enumerate(chain(waiting, items), done)
        kept = (item for number, item in numbered if number not in without)
        yield from kept if without else chain(waiting, items)

    def _items(
        self, steps_per_epoch: int | None, *, repeat: bool
    ) -> Iterator[tuple[Any, Mapping[str, Any]]]:
        """Yields the batches of an epoch, or their rows, each with the position after it."""
        source = _LoaderRows(self.loader) if isinstance(self._kind, _RowChunks) else self.loader
        items = epoch_of(source, steps_per_epoch, name=self._name, repeat=repeat)
        # Only train loaders may read the state of a step, and array loaders read none.
        may_read_state = self._name == "train" and source is self.loader
        for item in marked(items, self.loader) if may_read_state else items:
            yield item, source.get_state()


class _BatchChunks:
    """Builds chunks from batches; without `place` they stay on the host."""

    def __init__(self, name: str, place: Place | None) -> None:
        self._name, self._place = name, place
        self._most: dict[Any, int] = {}

    def most(self, item: PyTree) -> int:
        """Most batches per chunk; a short batch uses the number of the full batch before it."""
        structure, leaves = _spec(item)
        spec = structure, tuple((shape[1:], dtype) for shape, dtype in leaves)
        return self._most.setdefault(spec, _most(self.num_bytes(item)))

    def size(self, item: PyTree) -> int:
        return num_examples(item, name=self._name)

    def batch(self, item: PyTree) -> PyTree:
        return item

    def num_bytes(self, item: PyTree) -> int:
        return _num_bytes(item)

    def source(self, items: Sequence[PyTree], capacity: int) -> ChunkData:
        source = One(items[0]) if capacity == 1 else Stacked(stack(items, capacity))
        return source if self._place is None else self._place(source)


class _RowChunks:
    """Builds chunks from rows of an array loader, gathered by NumPy or on the device."""

    def __init__(self, loader: ArrayLoader, placement: Placement, on_device: PyTree | None) -> None:
        self._loader, self._place, self._on_device = loader, placement.batch, on_device
        self._has_part = placement.is_shared
        self._row_bytes = max(1, _num_bytes(loader.arrays) // loader.num_examples)

    def most(self, item: np.ndarray) -> int:
        """Most batches per chunk; does not depend on the size of this batch."""
        return _most(self.num_bytes(item) * self._loader.batch_size // len(item))

    def size(self, item: np.ndarray) -> int:
        return len(item)

    def batch(self, item: np.ndarray) -> PyTree:
        return self._loader.gathered(item)

    def num_bytes(self, item: np.ndarray) -> int:
        return item.nbytes if self._on_device is not None else len(item) * self._row_bytes

    def source(self, items: Sequence[np.ndarray], capacity: int) -> ChunkData:
        if self._on_device is not None:
            return Gathered(self._on_device, stack(items, capacity))
        if self._has_part:
            return self._parts(items, capacity)
        if capacity == 1:
            source: ChunkData = One(self._loader.gathered(items[0]))
        else:
            source = Stacked(gather(self._loader.arrays, items, capacity))
        return source if self._place is None else self._place(source)

    def _parts(self, items: Sequence[np.ndarray], capacity: int) -> ChunkData:
        """Returns batches of which this process gathers only its own rows."""
        assert self._place is not None
        index = np.stack([*items, *repeat(items[-1], capacity - len(items))])
        rows = index[0] if capacity == 1 else index
        batches = jax.tree.map(lambda leaf: Rows(leaf, rows), self._loader.arrays)
        return self._place(One(batches) if capacity == 1 else Stacked(batches))


class _Kept(NamedTuple):
    key: tuple[ChunkSize, int]
    even: bool
    chunks: list[Chunk]


class _LoaderRows:
    """Yields the rows of an array loader's batches instead of the batches."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def get_state(self) -> dict[str, Any]:
        return self._loader.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._loader.set_state(state)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self._loader.rows()


def _chunks_of(
    items: Iterator[tuple[Any, Any]],
    chunk_size: Callable[[], ChunkSize],
    kind: _BatchChunks | _RowChunks,
    room: Room | None = None,
) -> Generator[Chunk]:
    """Yields chunks of items, each with the position after it."""
    waiting, num_done, counts = list(islice(items, 1)), 0, {}
    while waiting:
        chosen = chunk_size()
        chosen = chosen if room is None else chosen.at_most(room.num_steps(num_done))
        num_steps, capacity, partial_capacity = chosen
        size, num_bytes = kind.size(waiting[0][0]), kind.num_bytes(waiting[0][0])
        most = kind.most(waiting[0][0])
        num_steps, capacity = min(num_steps, capacity, most), min(capacity, most)
        waiting.extend(islice(items, max(num_steps - len(waiting), 0)))
        group = _equal_prefix([item for item, _ in waiting[:num_steps]])
        if room is not None:
            batches = ((kind.size(each), partial(kind.batch, each)) for each in group)
            group, counts = group[: room.take(batches)], {**room.counts}
        if len(group) < num_steps and partial_capacity:
            capacity = min(partial_capacity, most)
        position = waiting[len(group) - 1][1]
        num_done += len(group)
        del waiting[: len(group)]
        source = kind.source(group, capacity)
        yield Chunk(len(group), size, source, position, num_bytes * capacity, counts)
        del group, source
        if not waiting:
            waiting.extend(islice(items, 1))


def _most(num_bytes: int) -> int:
    return 1 + _MAX_CHUNK_BYTES // max(1, num_bytes)


def _slices(arrays: PyTree, rows: Sequence[np.ndarray]) -> Iterator[tuple[PyTree, None]]:
    """Yields the batches of an array loader that does not shuffle, as views."""
    for batch in rows:
        part = slice(batch[0], batch[-1] + 1)
        yield jax.tree.map(lambda leaf, part=part: leaf[part], arrays), None


def _equal_prefix(items: Sequence[PyTree]) -> Sequence[PyTree]:
    """Returns the first items that have equal structures, shapes and dtypes."""
    if len(items) == 1:
        return items[:1]
    spec = _spec(items[0])
    return next((items[:n] for n, item in enumerate(items) if _spec(item) != spec), items[:])


def _spec(item: PyTree) -> Any:
    leaves, structure = jax.tree.flatten(item)
    return structure, [(np.shape(leaf), getattr(leaf, "dtype", None)) for leaf in leaves]


def resident_bytes(loader: Any, placement: Placement) -> int:
    """Returns the bytes of a loader's arrays that its feed keeps on the device."""
    is_resident = placement.gathers and _is_in_memory(loader)
    return _num_bytes(loader.arrays) if is_resident else 0


def _is_in_memory(loader: Any) -> bool:
    return type(loader) is ArrayLoader and _num_bytes(loader.arrays) <= _MAX_RESIDENT_BYTES


def _num_bytes(tree: PyTree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
