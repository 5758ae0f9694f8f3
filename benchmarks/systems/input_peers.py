"""The same way with torch's and Grain's loaders: augmented batches in the memory of the host.

They augment each picture by itself, as their documentation shows it, and shuffle. Nothing is copied
to a device and no step runs, which is in their favour.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.worker import Rounds
from benchmarks.workloads import Workload


def pictures() -> tuple[np.ndarray, np.ndarray]:
    """Returns uint8 `[50000, 32, 32, 3]` and int32 `[50000]`."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8)
    return images, rng.integers(0, 10, 50_000).astype(np.int32)


def augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Crops and flips one picture at random; returns float32 in [0, 1]."""
    top, left, flip = rng.integers(0, 9), rng.integers(0, 9), rng.integers(0, 2)
    padded = np.zeros((40, 40, 3), np.uint8)
    padded[4:36, 4:36] = image
    cut = padded[top : top + 32, left : left + 32]
    return np.ascontiguousarray(cut[:, ::-1] if flip else cut).astype(np.float32) / 255


class Pictures:
    """A data set of augmented pictures, for torch."""

    def __init__(self) -> None:
        self.images, self.labels = pictures()
        self._rng = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return augment(self.images[index], self._rng), self.labels[index]


def torch_loader(workload: Workload, rounds: Rounds, folder: Path) -> None:
    """A `DataLoader` with two workers that stay alive."""
    from torch.utils.data import DataLoader

    loader = DataLoader(
        Pictures(),
        batch_size=workload.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=2,
        persistent_workers=True,
    )
    _drain(workload, rounds, loader)


def grain_loader(workload: Workload, rounds: Rounds, folder: Path) -> None:
    """A `MapDataset` with the 16 read threads of its default.

    They would keep reading between the rounds: each round has an iterator of its own, and a
    buffer of 16 batches rather than of 500.
    """
    import grain

    images, labels = pictures()
    data = (
        grain.MapDataset.source(range(len(images)))
        .seed(0)
        .shuffle()
        .random_map(lambda index, rng: (augment(images[index], rng), labels[index]))
        .batch(workload.batch_size, drop_remainder=True)
    )
    _drain(workload, rounds, data.to_iter_dataset(grain.ReadOptions(prefetch_buffer_size=16)))


def _drain(workload: Workload, rounds: Rounds, loader: Any) -> None:
    """Takes the first batches of an epoch in each round."""
    for _ in rounds:
        total = 0.0
        for images, _labels in islice(loader, workload.steps):
            total += float(images[0, 0, 0, 0])
        rounds.done(total)
