from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from distaff.data import (
    ArrayLoader,
    Loader,
    MappedLoader,
    Stream,
    held_out_windows,
    shuffled_windows,
)
from distaff.testing.loaders import LoaderContract

ARRAYS = {"image": np.arange(44.0, dtype=np.float32).reshape(11, 2, 2), "label": np.arange(11)}


class TestArrayLoader(LoaderContract):
    def make_loader(self) -> Loader:
        return ArrayLoader(ARRAYS, batch_size=3)


class TestShuffledArrayLoader(LoaderContract):
    def make_loader(self) -> Loader:
        return ArrayLoader(ARRAYS, batch_size=3, shuffle=True, seed=7)


class TestMappedLoader(LoaderContract):
    def make_loader(self) -> Loader:
        loader = ArrayLoader(ARRAYS, batch_size=3, shuffle=True, seed=7)
        return MappedLoader(loader, lambda batch: {**batch, "image": batch["image"] / 2})


class TestMappedStream(LoaderContract):
    batches = tuple(ArrayLoader(ARRAYS, batch_size=3))

    def make_loader(self) -> Loader:
        return MappedLoader(Stream(list(self.batches)), lambda batch: batch["image"] + 1)


class TestShuffledWindows(LoaderContract):
    def make_loader(self) -> Loader:
        return shuffled_windows(bytes(range(40)), length=4, batch_size=2, stride=3, seed=7)


class TestHeldOutWindows(LoaderContract):
    def make_loader(self) -> Loader:
        return held_out_windows(bytes(range(40)), length=4, batch_size=3, stride=3)


class TestStreamOfAList(LoaderContract):
    batches = tuple(ArrayLoader(ARRAYS, batch_size=3))

    def make_loader(self) -> Loader:
        return Stream(list(self.batches))


class TestStreamOfAGeneratorFunctionWithItsOwnRandomOrder(LoaderContract):
    def make_loader(self) -> Loader:
        random = np.random.default_rng(0)
        buffer = np.empty((4, 2))

        def batches() -> Iterator[np.ndarray]:
            for _ in range(5):
                buffer[:] = random.normal(size=buffer.shape)
                yield buffer

        return Stream(batches, length=5)
