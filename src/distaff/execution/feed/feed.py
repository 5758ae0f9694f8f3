"""Feeds: the epochs of a loader in chunks, got ahead and placed where the programs want them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, closing
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
    Stacked,
    gather,
    stack,
)
from distaff.execution.feed.prefetch import Prefetch
from distaff.execution.placement import ONE_DEVICE, Place, Placement

_log = logging.getLogger("distaff")

_MAX_RESIDENT_BYTES = 2**29
_MAX_CHUNK_BYTES = 2**25


class Feed:
    """Hands out the epochs of a loader in chunks.

    Args:
        loader: where the batches come from.
        name: what errors call it, such as `"train"`.
        resident: whether to place arrays in memory on the device once, and gather there, rather
            than with NumPy. What other loaders yield is stacked on the host.
        lock: held while a chunk is read; see `Prefetch`.
        placement: where batches go.

    Attributes:
        handed_out: position after the last chunk of the epoch that is read; None outside of one.
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
        # A subclass may yield something else than the rows of its arrays.
        if type(loader) is ArrayLoader:
            fits = resident and _is_in_memory(loader)
            arrays = placement.resident(loader.arrays) if fits else None
            self._kind = _RowChunks(loader, placement.batch, arrays)
        self._ahead: Prefetch[Chunk] = Prefetch(lock=lock)
        self.handed_out: Mapping[str, Any] | None = None
        self._kept: _Kept | None = None

    @property
    def position(self) -> Mapping[str, Any]:
        """Where the loader stood after the last chunk handed out: it may have been read further."""
        return self.loader.get_state() if self.handed_out is None else self.handed_out

    @property
    def running(self) -> bool:
        """Whether the loader stands elsewhere than what was handed out of it."""
        return self.handed_out is not None

    def epoch(
        self,
        form: Callable[[], ChunkSize] = lambda: SINGLE,
        steps_per_epoch: int | None = None,
        *,
        steady: Callable[[], bool] = lambda: True,
        keep_place: bool = False,
        done: int = 0,
        without: Set[int] = frozenset(),
        repeat: bool = True,
    ) -> Generator[Chunk]:
        """Yields the chunks of one epoch. Close it: chunks may be got ahead, by a thread.

        Args:
            form: asked before each chunk.
            steps_per_epoch: as `epoch_of` takes it.
            steady: whether chunks may be got ahead, in the form that is asked for then.
            keep_place: whether the loader, if this is closed before its end, goes on with the
                batch after the last one handed out. A loader that has been read ahead and cannot
                go back, such as a `Stream`, goes on where it is. Otherwise what is left of the
                epoch is abandoned.
            done: batches of the epoch that were drawn before: the loader stands after them. What is
                left of it may be nothing.
            without: which batches of the epoch are drawn and left out, counted from 0.
            repeat: as `epoch_of` takes it.

        Raises:
            BatchError: the loader is empty.
        """
        self.handed_out = self.loader.get_state()
        # Rows take microseconds; a thread takes longer than they do.
        is_quick = isinstance(self._kind, _RowChunks) or is_on_policy(self.loader)
        read = _as_it_is if is_quick else self._ahead.read
        try:
            with closing(
                read(self._chunks(form, steps_per_epoch, done, without, repeat=repeat), steady)
            ) as chunks:
                for chunk in chunks:
                    self.handed_out = chunk.position
                    yield chunk
            self.handed_out = None
        except (GeneratorExit, KeyboardInterrupt):
            if keep_place:
                self._go_back()
            else:
                self.handed_out = None
            raise

    def settle(self) -> None:
        """Returns when no thread reads the loader any more, which may then be put elsewhere."""
        self._ahead.wait()
        self.handed_out = None

    def repeated(self, form: ChunkSize, *, even: Callable[[ChunkData], bool]) -> Generator[Chunk]:
        """Yields the chunks of one epoch, placed once where it is the same each time.

        Args:
            form: of the chunks.
            even: whether batches like those of a source may be padded: a short one then has the
                size of the first one. `Chunk.examples` is the number without the padding.

        Raises:
            BatchError: the loader is empty.
        """
        if not _is_repeated(self.loader):
            yield from self.epoch(lambda: form)
            return
        loader: Any = self.loader
        kept, key = self._kept, (form, loader.num_left())
        if kept is None or kept.key != key or kept.even != even(kept.chunks[0].source):
            chunks, is_even = [], False
            rows = list(loader.rows()) or list(loader.rows())
            slices = _slices(loader.arrays, rows)
            for chunk in _chunks_of(slices, lambda: form, _BatchChunks(self._name, None)):
                is_even = is_even if chunks else even(chunk.source)
                source = chunk.source.padded(len(rows[0])) if is_even else chunk.source
                chunks.append(chunk._replace(source=self._placement.resident(source)))
                yield chunks[-1]
            self._kept = _Kept(key, is_even, chunks)
        else:
            loader.skip_epoch()
            yield from kept.chunks

    def expect(self, batch: PyTree) -> None:
        """Takes over how many batches suit a chunk from a whole one.

        A run that resumes before the short batch of an epoch's end has the chunks of one that did
        not stop.
        """
        if isinstance(self._kind, _BatchChunks):
            self._kind.most(batch)

    def sample(self, batch: PyTree, form: ChunkSize) -> Chunk:
        """Returns a chunk like those of an epoch, without reading the loader.

        Args:
            batch: like those that it yields; the chunk holds it as often as it has steps.
            form: of the chunk.
        """
        size = num_examples(batch, name=self._name)
        kind: Any = self._kind
        item = np.arange(size, dtype=np.int32) if isinstance(kind, _RowChunks) else batch
        items = repeat((item, {}), form.num_steps)
        return next(_chunks_of(items, lambda: form, kind))

    def _go_back(self) -> None:
        """Puts the loader where the last chunk handed out ends, if it can go there."""
        position = self.position
        if self._ahead.busy:
            return
        try:
            self.loader.set_state(position)
        except Exception:
            # A Stream has been read ahead, and goes on from there; a checkpoint keeps the place.
            _log.info("the %s loader cannot go back to %s", self._name, dict(position))
            self.loader.set_state(self.loader.get_state())
        else:
            self.handed_out = None

    def _chunks(
        self,
        form: Callable[[], ChunkSize],
        steps_per_epoch: int | None,
        done: int,
        without: Set[int],
        *,
        repeat: bool,
    ) -> Generator[Chunk]:
        if done and done == steps_per_epoch:
            return
        items = self._items(steps_per_epoch and steps_per_epoch - done, repeat=repeat)
        waiting: list[Any] = list(islice(items, 1))
        if not waiting and not done:  # a loader may stand at the end of an epoch
            items = self._items(steps_per_epoch, repeat=repeat)
        numbered = enumerate(chain(waiting, items), done)
        kept = (item for number, item in numbered if number not in without)
        yield from _chunks_of(kept if without else chain(waiting, items), form, self._kind)

    def _items(
        self, steps_per_epoch: int | None, *, repeat: bool
    ) -> Iterator[tuple[Any, Mapping[str, Any]]]:
        """Yields the batches of an epoch, or their rows, each with the position after it."""
        source = _LoaderRows(self.loader) if isinstance(self._kind, _RowChunks) else self.loader
        items = epoch_of(source, steps_per_epoch, name=self._name, repeat=repeat)
        # An evaluation changes no state, and arrays read none: only others may ask for it.
        may_read_state = self._name == "train" and source is self.loader
        for item in marked(items, self.loader) if may_read_state else items:
            yield item, source.get_state()


class _BatchChunks:
    """Chunks of what a loader yields; they stay on the host where nothing places them."""

    def __init__(self, name: str, place: Place | None) -> None:
        self._name, self._place = name, place
        self._most: dict[Any, int] = {}

    def most(self, item: PyTree) -> int:
        """How many suit a chunk; as many of a short batch as of a whole one, which came before."""
        structure, leaves = _form(item)
        form = structure, tuple((shape[1:], dtype) for shape, dtype in leaves)
        return self._most.setdefault(form, _most(self.num_bytes(item)))

    def size(self, item: PyTree) -> int:
        return num_examples(item, name=self._name)

    def num_bytes(self, item: PyTree) -> int:
        return _num_bytes(item)

    def source(self, items: Sequence[PyTree], capacity: int) -> ChunkData:
        source = One(items[0]) if capacity == 1 else Stacked(stack(items, capacity))
        return source if self._place is None else self._place(source)


class _RowChunks:
    """Chunks of rows of an array loader: gathered by NumPy, or on the device if they are there."""

    def __init__(self, loader: ArrayLoader, place: Place | None, on_device: PyTree | None) -> None:
        self._loader, self._place, self._on_device = loader, place, on_device
        self._row_bytes = max(1, _num_bytes(loader.arrays) // loader.num_examples)

    def most(self, item: np.ndarray) -> int:
        """How many suit a chunk, whatever the size of the batch."""
        return _most(self.num_bytes(item) * self._loader.batch_size // len(item))

    def size(self, item: np.ndarray) -> int:
        return len(item)

    def num_bytes(self, item: np.ndarray) -> int:
        return item.nbytes if self._on_device is not None else len(item) * self._row_bytes

    def source(self, items: Sequence[np.ndarray], capacity: int) -> ChunkData:
        if self._on_device is not None:
            return Gathered(self._on_device, stack(items, capacity))
        if capacity == 1:
            source: ChunkData = One(self._loader.gathered(items[0]))
        else:
            source = Stacked(gather(self._loader.arrays, items, capacity))
        return source if self._place is None else self._place(source)


class _Kept(NamedTuple):
    key: tuple[ChunkSize, int]
    even: bool
    chunks: list[Chunk]


class _LoaderRows:
    """An array loader that hands out the rows of its batches."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def get_state(self) -> dict[str, Any]:
        return self._loader.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._loader.set_state(state)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self._loader.rows()


def _chunks_of(
    items: Iterator[tuple[Any, Any]], form: Callable[[], ChunkSize], kind: _BatchChunks | _RowChunks
) -> Generator[Chunk]:
    """Yields chunks of items, each with the position after it."""
    waiting = list(islice(items, 1))
    while waiting:
        num_steps, capacity, rest = form()
        size, num_bytes = kind.size(waiting[0][0]), kind.num_bytes(waiting[0][0])
        most = kind.most(waiting[0][0])
        num_steps, capacity = min(num_steps, capacity, most), min(capacity, most)
        waiting.extend(islice(items, max(num_steps - len(waiting), 0)))
        group = _of_one_form([item for item, _ in waiting[:num_steps]])
        if len(group) < num_steps and rest:
            capacity = min(rest, most)
        position = waiting[len(group) - 1][1]
        del waiting[: len(group)]
        source = kind.source(group, capacity)
        yield Chunk(len(group), size, source, position, num_bytes * capacity)
        del group, source
        if not waiting:
            waiting.extend(islice(items, 1))


def _most(num_bytes: int) -> int:
    return 1 + _MAX_CHUNK_BYTES // max(1, num_bytes)


def _as_it_is(chunks: Generator[Chunk], steady: Callable[[], bool]) -> Generator[Chunk]:
    return chunks


def _slices(arrays: PyTree, rows: Sequence[np.ndarray]) -> Iterator[tuple[PyTree, None]]:
    """Yields the batches of an array loader that does not shuffle, without copying them."""
    for batch in rows:
        part = slice(batch[0], batch[-1] + 1)
        yield jax.tree.map(lambda leaf, part=part: leaf[part], arrays), None


def _of_one_form(items: Sequence[PyTree]) -> Sequence[PyTree]:
    """Returns the first items, as far as they are of one form."""
    if len(items) == 1:
        return items[:1]
    form = _form(items[0])
    return next((items[:n] for n, item in enumerate(items) if _form(item) != form), items[:])


def _form(item: PyTree) -> Any:
    leaves, structure = jax.tree.flatten(item)
    return structure, [(np.shape(leaf), getattr(leaf, "dtype", None)) for leaf in leaves]


def _is_repeated(loader: Any) -> bool:
    """Whether each epoch of a loader is the same, and small enough to be kept on the device."""
    return _is_in_memory(loader) and not loader.shuffle


def _is_in_memory(loader: Any) -> bool:
    return type(loader) is ArrayLoader and _num_bytes(loader.arrays) <= _MAX_RESIDENT_BYTES


def _num_bytes(tree: PyTree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
