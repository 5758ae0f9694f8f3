"""Grain: datasets and data loaders as loaders that resume without replaying batches."""

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
    """Returns a loader for a Grain dataset or data loader.

    Args:
        data: a `grain.MapDataset`, which is reshuffled in each epoch if it is shuffled; or a
            `grain.IterDataset` or `grain.DataLoader`, which is iterated once per epoch, with the
            same order in each. For endless data, set `steps_per_epoch`.

    Raises:
        BatchError: `data` is something else, such as an iterator.
    """
    if isinstance(data, grain.MapDataset):
        # A repeated dataset has no length of an epoch.
        indices = None if len(data) > sys.maxsize // 2 else len(data)
        length = None if _filters(data) else indices
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
            "Grain data must be iterable again in each epoch: a MapDataset, IterDataset or "
            f"DataLoader; got {type(data).__name__}. Pass the dataset rather than iter(dataset)."
        )
    return Positioned(_Iterated(data, *texts), in_order=lambda: Positioned(_Iterated(data, *texts)))


class _Mapped:
    """A dataset with random access, whose position is an index.

    Indices past the end belong to the next epoch, for which Grain uses other seeds. A dataset that
    filters has fewer batches than indices.
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
    """An iterable dataset or data loader, with or without workers.

    Args:
        source: the dataset or data loader.
        to_text: encodes the state of its iterator, which is opaque, as text.
        from_text: decodes it.
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


def _filters(dataset: Any) -> bool:
    """Returns whether a dataset filters, and so has fewer elements than its length."""
    is_filter = "Filter" in type(dataset).__name__
    return is_filter or any(_filters(parent) for parent in getattr(dataset, "_parents", ()))


def _allow_workers() -> None:
    """Marks absl's flags as parsed, which Grain's workers require."""
    flags: Any = sys.modules.get("absl.flags")
    if flags is not None and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
