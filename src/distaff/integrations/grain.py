"""Grain: its datasets and data loaders as loaders, at whose positions a run goes on at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import grain

from distaff.core.typing import Batch
from distaff.data import Loader
from distaff.data.positioned import FirstEpoch, Positioned
from distaff.errors import BatchError


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
        indices = None if len(data) > sys.maxsize // 2 else len(data)
        length = None if _leaves_out(data) else indices
        return Positioned(
            _Mapped(data, indices),
            length=length,
            identity={"num_batches": indices},
            in_order=lambda: Positioned(FirstEpoch(_Mapped(data, indices)), length=length),
        )
    if isinstance(data, grain.IterDataset):
        texts: Any = (json.dumps, json.loads)
    elif isinstance(data, grain.DataLoader):
        texts = (bytes.decode, str.encode)
    else:
        raise BatchError(
            "Of Grain, a run takes what it can iterate anew in each epoch: a MapDataset, "
            f"IterDataset or DataLoader; got {type(data).__name__}. Pass the dataset, rather than "
            "iter(dataset)."
        )
    return Positioned(_Iterated(data, *texts), in_order=lambda: Positioned(_Iterated(data, *texts)))


class _Mapped:
    """A dataset with random access: the position is the index, and an epoch goes on from another.

    Indices behind the end are those of the next epoch, which Grain gives seeds of its own. There
    may be fewer batches than indices, where some are filtered out.
    """

    def __init__(self, dataset: grain.MapDataset, length: int | None) -> None:
        self._dataset, self._length = dataset, length
        self._iterator: Any = None

    def start(self, epoch: int, batch: int, saved: Any) -> Iterator[Batch]:
        index = int(saved) if batch else 0
        if self._length is None:
            iterator = iter(self._dataset)
        else:
            first = epoch * self._length
            if not batch <= index <= self._length or first > sys.maxsize // 2:
                raise ValueError(f"an epoch has {self._length} batches")
            iterator = iter(self._dataset.repeat()[first : first + self._length])
        if index:
            iterator.set_state({"next_index": index})
        self._iterator = iterator
        return iterator

    def position(self) -> int:
        return self._iterator.get_state()["next_index"]


class _Iterated:
    """What is read in a row: an iterable dataset, or a data loader, with workers or without.

    Args:
        source: it is iterated.
        to_text: makes text of its iterator's state, which is Grain's own matter.
        from_text: makes that state again.
    """

    def __init__(
        self, source: Any, to_text: Callable[[Any], str], from_text: Callable[[str], Any]
    ) -> None:
        self._source, self._to_text, self._from_text = source, to_text, from_text
        self._iterator: Any = None

    def start(self, epoch: int, batch: int, saved: Any) -> Iterator[Batch]:
        _allow_workers()
        self._iterator = iter(self._source)
        if batch:
            self._iterator.set_state(self._from_text(saved))
        return self._iterator

    def position(self) -> str:
        return self._to_text(self._iterator.get_state())


def _leaves_out(dataset: Any) -> bool:
    """Whether a dataset filters: it then has fewer elements than its length says."""
    is_filter = "Filter" in type(dataset).__name__
    return is_filter or any(_leaves_out(parent) for parent in getattr(dataset, "_parents", ()))


def _allow_workers() -> None:
    """Grain's workers read flags of absl, which a program that has none never parses."""
    flags: Any = sys.modules.get("absl.flags")
    if flags is not None and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
