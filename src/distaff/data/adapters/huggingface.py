"""Adapts Hugging Face datasets to loaders, without importing `datasets`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from distaff.core.config.checks import whole
from distaff.core.typing import Batch
from distaff.data.arrays import ArrayLoader
from distaff.data.loader import Loader, drops_remainder
from distaff.data.positioned import FirstEpoch, Positioned
from distaff.data.stream import Stream
from distaff.data.wrappers.mapped import MappedLoader
from distaff.errors import BatchError

_BUFFER_SIZE = 1000


def from_datasets(
    dataset: Any,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    remainder: Literal["keep", "drop"] | None = None,
) -> Loader:
    """Returns a loader over the rows of a `datasets.Dataset` or `datasets.IterableDataset`.

    First encode or remove columns of strings, or of lists of several lengths:
    `dataset.map(encode, remove_columns=["text"])`.

    A `Dataset` restores any position at once, and has the same orders as an `ArrayLoader`. An
    `IterableDataset` restores any position at once, too, unless it is shuffled: then it is read
    again up to the position, since its buffer is not saved.

    Args:
        dataset: the rows of one split.
        batch_size: rows in a batch.
        shuffle: whether each epoch has a new order; an `IterableDataset` is shuffled in a buffer of
            1000 rows.
        seed: seed of the orders, not negative.
        remainder: what to do with a short last batch; see `ArrayLoader`.

    Returns:
        A loader of dicts of arrays by column.

    Raises:
        BatchError: `dataset` is not such a dataset, or fills no batch.
        ConfigError: an option is out of range.
    """
    if not hasattr(dataset, "with_format"):
        raise BatchError(
            "from_datasets takes a datasets.Dataset or datasets.IterableDataset; got "
            f"{type(dataset).__name__}. If it is a dict of splits, pass one: dataset['train']."
        )
    batch_size = whole("batch_size", batch_size)
    if hasattr(dataset, "__len__"):
        table = dataset.with_format("numpy")
        rows = ArrayLoader(
            {"row": np.arange(len(table))},
            batch_size,
            shuffle=shuffle,
            seed=seed,
            remainder=remainder,
        )
        return MappedLoader(rows, lambda batch: _rows_of(table, batch["row"]))
    seed, drop = whole("seed", seed, least=0), drops_remainder(remainder, shuffle)
    kept = _DatasetRows(dataset, batch_size, drop=False)

    def in_order() -> Positioned:
        return Positioned(FirstEpoch(kept))

    if shuffle:
        dataset = dataset.shuffle(seed=seed, buffer_size=_BUFFER_SIZE)
    rows = _DatasetRows(dataset, batch_size, drop)
    if shuffle or getattr(dataset, "_shuffling", None) is not None:
        return Stream(_Epochs(rows), in_order=in_order)
    identity = {"batch_size": batch_size, "drop": int(drop)}
    return Positioned(rows, identity=identity, in_order=in_order)


def _rows_of(table: Any, rows: np.ndarray) -> Batch:
    is_slice = len(rows) == rows[-1] - rows[0] + 1 and bool((np.diff(rows) == 1).all())
    # Arrow reads a slice faster than a list of rows.
    return table[int(rows[0]) : int(rows[-1]) + 1] if is_slice else table[rows.tolist()]


class _DatasetRows:
    """Batches of an `IterableDataset`, read sequentially."""

    def __init__(self, dataset: Any, batch_size: int, drop: bool) -> None:
        self._dataset, self._batch_size, self._drop = dataset, batch_size, drop
        self._running: Any = None

    def start(self, epoch: int, batch: int, saved: Any) -> Iterator[Batch]:
        self._running = self._dataset.with_format("numpy")  # a copy, at its start
        self._running.set_epoch(epoch)
        if batch:
            self._running.load_state_dict(json.loads(saved))
        return iter(self._running.iter(self._batch_size, drop_last_batch=self._drop))

    def position(self) -> str:
        return json.dumps(self._running.state_dict())


class _Epochs:
    """An iterable of batches; each iteration is the next epoch."""

    def __init__(self, rows: _DatasetRows) -> None:
        self._rows, self._epoch = rows, -1

    def __iter__(self) -> Iterator[Batch]:
        self._epoch += 1
        return self._rows.start(self._epoch, 0, None)
