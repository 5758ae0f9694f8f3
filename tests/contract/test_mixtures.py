"""Mixtures keep the contract of a loader, whatever is mixed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from distaff.data import ArrayLoader, Limited, Loader, MappedLoader, Mixture, Stream
from distaff.testing.loaders import LoaderContract

WEIGHTS = {"web": 3, "books": 1.5}


def rows(count: int, start: int = 0) -> dict[str, np.ndarray]:
    label = np.arange(start, start + count, dtype=np.int32)
    return {"x": np.stack([label, -label], axis=1).astype(np.float32), "label": label}


def arrays(count: int, batch_size: int, start: int = 0, **options: Any) -> ArrayLoader:
    return ArrayLoader(rows(count, start), batch_size, **options)


def shuffled_on_and_on() -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    while True:
        yield rows(3, int(rng.integers(1000)))


class TestMixtureOfShuffledArrays(LoaderContract):
    def make_loader(self) -> Loader:
        web = arrays(11, 3, shuffle=True, seed=1)
        books = arrays(5, 2, 100, shuffle=True, remainder="keep")
        return Mixture({"web": web, "books": books}, WEIGHTS)


class TestMixtureOfManyInLargeBatchesWithTheirSource(LoaderContract):
    def make_loader(self) -> Loader:
        loaders = {f"n{count}": arrays(count, 2) for count in range(2, 6)}
        weights = {name: 0.1 * index for index, name in enumerate(loaders, 1)}
        return Mixture(loaders, weights, batch_size=13, num_batches=4, with_source=True)


class TestMixtureOfStreamsAndArrays(LoaderContract):
    web = tuple(arrays(11, 3))

    def make_loader(self) -> Loader:
        own = Stream(lambda: iter(self.web), length=4)
        loaders = {"web": own, "books": list(self.web[:2]), "code": arrays(6, 2, 100)}
        return Mixture(loaders, {**WEIGHTS, "code": 1}, batch_size=4)


class TestMixtureOfGrain(LoaderContract):
    def make_loader(self) -> Loader:
        found = [{"x": np.float32(i)} for i in range(11)]
        web = grain.MapDataset.source(found).seed(7).shuffle().batch(3)
        books = grain.MapDataset.source(found[:5]).to_iter_dataset().batch(2)
        return Mixture({"web": web, "books": books}, WEIGHTS, num_batches=5)


class TestMixtureOfWholeBatches(LoaderContract):
    def make_loader(self) -> Loader:
        short = [{"x": np.full((2, 3), index)} for index in range(3)]
        return Mixture({"web": arrays(9, 2), "short": short}, {"web": 2, "short": 1}, by="batch")


class TestMixtureOfMixtures(LoaderContract):
    def make_loader(self) -> Loader:
        inner = Mixture({"web": arrays(7, 2), "books": [rows(2, 50)]}, WEIGHTS, num_batches=3)
        mapped = MappedLoader(arrays(4, 1, shuffle=True), lambda batch: batch)
        return Mixture({"inner": inner, "mapped": mapped}, {"inner": 2, "mapped": 1})


class TestLimitedMixture(LoaderContract):
    def make_loader(self) -> Loader:
        mixture = Mixture({"web": arrays(7, 2), "books": [rows(2, 50)]}, WEIGHTS, num_batches=5)
        return Limited(mixture, 3)


class TestLimitedMappedMixtureWithoutEnd(LoaderContract):
    def make_loader(self) -> Loader:
        loaders = {"web": shuffled_on_and_on, "books": arrays(7, 2)}
        return Limited(MappedLoader(Mixture(loaders, WEIGHTS), lambda batch: batch["x"]), 3)
