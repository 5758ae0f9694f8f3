"""Grain: its datasets and data loaders as loaders, at whose positions a run goes on at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import grain

from distaff.data import Loader
from distaff.data.positioned import Positioned
from distaff.errors import BatchError
from distaff.typing import Batch


def make_loader(data: Any) -> Loader:
    """Returns a loader of what Grain yields.

    Args:
        data: a `grain.MapDataset`, whose epochs are shuffled anew where it is shuffled; or a
            `grain.IterDataset` or `grain.DataLoader`, of which one iteration is one epoch, each
            like the first. Of one that repeats without end, an epoch is `steps_per_epoch` batches.

    Raises:
        BatchError: it is none of them, such as an iterator of one.
    """
    if isinstance(data, grain.MapDataset):
        # What was repeated already has a length that no epoch has.
        is_endless = len(data) > sys.maxsize // 2
        length = None if is_endless else len(data)
        return Positioned(_Mapped(data, length), length=length, identity={"num_batches": length})
    if isinstance(data, grain.IterDataset):
        return Positioned(_Iterated(data))
    if isinstance(data, grain.DataLoader):
        return Positioned(_Loaded(data))
    raise BatchError(
        "Of Grain, a run takes what it can iterate anew in each epoch: a MapDataset, IterDataset "
        f"or DataLoader; got {type(data).__name__}. Pass the dataset, rather than iter(dataset)."
    )


class _Mapped:
    """A dataset with random access: the position is the index, and an epoch goes on from another.

    Indices behind the end are those of the next epoch, which Grain gives seeds of its own.
    """

    def __init__(self, dataset: grain.MapDataset, length: int | None) -> None:
        self._dataset, self._length = dataset, length

    def start(self, epoch: int, batch: int, saved: Any) -> Iterator[Batch]:
        if self._length is None:
            iterator = iter(self._dataset)
        else:
            first = epoch * self._length
            if batch > self._length or first > sys.maxsize // 2:
                raise ValueError(f"an epoch has {self._length} batches")
            iterator = iter(self._dataset.repeat()[first : first + self._length])
        if batch:
            iterator.set_state({"next_index": batch})
        return iterator

    def position(self) -> None:
        """Nothing that the number of the batch does not say."""


class _Iterated:
    """A dataset that is read in a row."""

    def __init__(self, dataset: grain.IterDataset) -> None:
        self._dataset = dataset
        self._iterator: Any = None

    def start(self, epoch: int, batch: int, saved: Any) -> Iterator[Batch]:
        _allow_workers()
        self._iterator = iter(self._dataset)
        if batch:
            self._iterator.set_state(json.loads(saved))
        return self._iterator

    def position(self) -> str:
        # As text: what the position of a nested dataset holds is Grain's own matter.
        return json.dumps(self._iterator.get_state())


class _Loaded:
    """A `grain.DataLoader`, with workers or without."""

    def __init__(self, loader: grain.DataLoader) -> None:
        self._loader = loader
        self._iterator: Any = None

    def start(self, epoch: int, batch: int, saved: Any) -> Iterator[Batch]:
        _allow_workers()
        self._iterator = iter(self._loader)
        if batch:
            self._iterator.set_state(saved.encode())
        return self._iterator

    def position(self) -> str:
        return self._iterator.get_state().decode()


def _allow_workers() -> None:
    """Grain's workers read flags of absl, which a program that has none never parses."""
    flags: Any = sys.modules.get("absl.flags")
    if flags is not None and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
