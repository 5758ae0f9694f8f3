"""Loaders alone: batches of shuffled rows in the memory of the host; nobody trains on them.

Every loader is what `distaff.data.as_loader` makes of it, and is read for an epoch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rounds import ROOT
from benchmarks.worker import Rounds
from benchmarks.workloads import Workload, digits


def arrays(workload: Workload) -> dict[str, np.ndarray]:
    """Returns the digits of an epoch: `x` float32 `[examples, 64]`, `label` int32 `[examples]`."""
    inputs, labels = digits(workload.steps * workload.batch_size)
    return {"x": inputs, "label": labels}


def by_hand(workload: Workload, rounds: Rounds, folder: Path) -> None:
    """Rows of a permutation, taken from NumPy's arrays."""
    held = arrays(workload)
    _drain(rounds, lambda epoch: _batches(held, workload, epoch))


def loader(workload: Workload, rounds: Rounds, folder: Path, *, kind: str) -> None:
    """A loader of Distaff.

    Args:
        workload: says how many rows, and of how many a batch.
        rounds: says when.
        folder: not used.
        kind: a function of this file that makes the loader.
    """
    sys.path.insert(0, str(ROOT / "src"))  # for environments in which Distaff is not installed
    from distaff import data

    made = data.as_loader(globals()[kind](arrays(workload), workload))
    _drain(rounds, lambda epoch: made)


def array_loader(held: dict[str, np.ndarray], workload: Workload) -> Any:
    """Returns an `ArrayLoader`."""
    from distaff import data

    return data.ArrayLoader(held, workload.batch_size, shuffle=True)


def stream(held: dict[str, np.ndarray], workload: Workload) -> Any:
    """Returns a generator function that does what the loop by hand does."""
    return lambda: _batches(held, workload, 0)


def grain_map(held: dict[str, np.ndarray], workload: Workload) -> Any:
    """Returns a `grain.MapDataset`, which Distaff reads with Grain's 16 threads."""
    import grain

    return grain.MapDataset.source(_Rows(held)).seed(0).shuffle().batch(workload.batch_size)


def grain_iter(held: dict[str, np.ndarray], workload: Workload) -> Any:
    """Returns a `grain.IterDataset`, with the 16 threads of Grain's default."""
    import grain

    rows = grain.MapDataset.source(_Rows(held)).seed(0).shuffle()
    return rows.to_iter_dataset().batch(workload.batch_size)


def grain_no_threads(held: dict[str, np.ndarray], workload: Workload) -> Any:
    """Returns a `grain.IterDataset` that reads in the thread that asks."""
    import grain

    rows = grain.MapDataset.source(_Rows(held)).seed(0).shuffle()
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return rows.to_iter_dataset(options).batch(workload.batch_size)


def torch(held: dict[str, np.ndarray], workload: Workload) -> Any:
    """Returns a torch `DataLoader` in this process."""
    import torch.utils.data

    generator = torch.Generator().manual_seed(0)
    return torch.utils.data.DataLoader(
        _Rows(held), workload.batch_size, shuffle=True, generator=generator
    )


def hugging_face(held: dict[str, np.ndarray], workload: Workload) -> Any:
    """Returns rows of a `datasets.Dataset`."""
    import datasets

    from distaff import data

    table = datasets.Dataset.from_dict(held)
    return data.from_datasets(table, workload.batch_size, shuffle=True)


class _Rows:
    """Examples one by one."""

    def __init__(self, held: dict[str, np.ndarray]) -> None:
        self._held = held

    def __len__(self) -> int:
        return len(self._held["label"])

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: array[row] for name, array in self._held.items()}


def _batches(held: dict[str, np.ndarray], workload: Workload, epoch: int) -> Iterator[Any]:
    order = np.random.default_rng([0, epoch]).permutation(len(held["label"]))
    for rows in order.reshape(-1, workload.batch_size):
        yield {name: array[rows] for name, array in held.items()}


def _drain(rounds: Rounds, epoch_of: Callable[[int], Iterable[Any]]) -> None:
    for epoch in rounds:
        total = 0.0
        for batch in epoch_of(epoch):
            total += float(batch["label"][0]) + float(batch["x"][-1, -1])
        rounds.done(total)
