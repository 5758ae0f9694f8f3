"""Adapts `tf.data.Dataset` to a loader, without importing TensorFlow."""

from __future__ import annotations

import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from distaff.core.typing import Batch
from distaff.core.warnings import warn
from distaff.data.stream import Stream

_ENDLESS, _ATTRIBUTE = -1, "_distaff_passes"


def tensorflow_loader(dataset: Any) -> Stream:
    """Returns a loader over a `tf.data.Dataset` of batches.

    Restoring a position reads the dataset again, and verifies the batches: give `shuffle` a seed.
    """
    # An attribute, since TensorFlow, too, keeps what the passes share with the dataset.
    passes = vars(dataset).setdefault(_ATTRIBUTE, _Passes(dataset))
    count = int(dataset.cardinality())  # negative if endless or unknown
    length = count if count >= 0 else None
    return Stream(passes, length=length, in_order=lambda: Stream(passes.evaluation, length=length))


class _Passes:
    """The passes over a dataset; passes of evaluations do not change the orders of training.

    All passes over a shuffled dataset draw their seeds from one generator, which TensorFlow does
    not show. The checkpoint of an iterator includes the state of the generator, and reading it into
    another iterator of the dataset resets the generator.

    Attributes:
        is_read_again: see `Stream`.
    """

    is_read_again = True

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._is_endless = int(dataset.cardinality()) == _ENDLESS
        self._num_read = 0  # batches for training
        self._running: Any = None
        self._next: tuple[Any, Batch | None] | None = None
        self._rewind: Callable[[], None] = _nothing

    def __iter__(self) -> Iterator[Batch]:
        iterator, batch = self._next or (self._started() if self._num_read else self._first())
        self._running, self._next = iterator, None
        while batch is not None:
            self._num_read += 1
            yield batch
            batch = next(iterator, None)

    def evaluation(self) -> Iterator[Batch]:
        """Yields the batches of one pass for an evaluation, in the order of all evaluations."""
        directory = Path(mkdtemp(prefix="distaff-"))
        try:
            reset = self._saved(directory) if self._num_read else _nothing
            self._rewind()
            iterator, batch = self._started()
            reset()
            num_read = self._num_read
            while batch is not None:
                yield batch
                batch = next(iterator, None)
            if num_read == self._num_read:  # a dataset that repeats draws within a pass, too
                reset()
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _started(self) -> tuple[Any, Batch | None]:
        """Starts a pass; transformations draw their seeds before they yield the first batch."""
        iterator = iter(self._dataset.as_numpy_iterator())
        return iterator, next(iterator, None)

    def _first(self) -> tuple[Any, Batch | None]:
        """Starts the first pass, whose state at the start decides the order of evaluations."""
        iterator = iter(self._dataset.as_numpy_iterator())
        directory = mkdtemp(prefix="distaff-")
        weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        with suppress(sys.modules["tensorflow"].errors.OpError):
            self._rewind = self._resetting(iterator, Path(directory))
        return iterator, next(iterator, None)

    def _saved(self, directory: Path) -> Callable[[], None]:
        """Saves the state of the generators; returns a function that resets them.

        An iterator saves nothing of a transformation whose end it has seen. So the next pass for
        training is started, and saved, unless the dataset is endless.
        """
        if not self._is_endless and self._next is None:
            self._next = self._started()
        tf: Any = sys.modules["tensorflow"]
        try:
            return self._resetting(
                self._running if self._next is None else self._next[0], directory
            )
        except tf.errors.OpError as error:
            warn(
                "An evaluation of the tf.data.Dataset that is being trained on may change the "
                "order of its later epochs, because TensorFlow cannot save its position: "
                f"{error.message.splitlines()[0]}. Evaluate with a Dataset of its own.",
                stacklevel=2,
            )
            return _nothing

    def _resetting(self, iterator: Any, directory: Path) -> Callable[[], None]:
        checkpoint: Any = sys.modules["tensorflow"].train.Checkpoint
        path = checkpoint(iterator=iterator).write(str(directory / "iterator"))
        return lambda: checkpoint(iterator=self._dataset.as_numpy_iterator()).read(path)


def _nothing() -> None: ...
