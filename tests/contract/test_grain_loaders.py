"""Grain's datasets under the contract of loaders, and in runs."""

from __future__ import annotations

import json
from itertools import chain, islice
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest

from distaff import OptimizerConfig, data, tasks, zoo
from distaff.errors import BatchError, CheckpointError
from distaff.testing.loaders import LoaderContract, assert_batches_equal
from scripted import Break, InterruptError

ROWS = [
    {"x": np.random.default_rng(row).normal(size=3).astype(np.float32), "label": row % 2}
    for row in range(22)
]


def mapped(num_rows: int = 11, batch_size: int = 3) -> grain.MapDataset:
    return grain.MapDataset.source(ROWS[:num_rows]).seed(7).shuffle().batch(batch_size)


def loaded(**options: Any) -> grain.DataLoader:
    sampler = grain.samplers.IndexSampler(
        11, num_epochs=1, shuffle=True, seed=3, shard_options=grain.sharding.NoSharding()
    )
    batch = grain.transforms.Batch(3)
    return grain.DataLoader(data_source=ROWS, sampler=sampler, operations=[batch], **options)


class TestMapDataset(LoaderContract):
    def make_loader(self) -> data.Loader:
        return data.as_loader(mapped())


class TestIterDataset(LoaderContract):
    def make_loader(self) -> data.Loader:
        return data.as_loader(mapped().to_iter_dataset())


class TestFilteredIterDataset(LoaderContract):
    def make_loader(self) -> data.Loader:
        rows = grain.MapDataset.source(ROWS).to_iter_dataset().filter(lambda row: row["label"] == 0)
        return data.as_loader(rows.batch(3))


def sparse() -> grain.MapDataset:
    """Returns a dataset of which every other batch is left out."""
    batches = grain.MapDataset.source(ROWS).batch(2)
    return batches.filter(lambda batch: float(batch["x"][0, 0]) > -0.3)


class TestFilteredMapDataset(LoaderContract):
    def make_loader(self) -> data.Loader:
        return data.as_loader(sparse())


class TestDataLoader(LoaderContract):
    def make_loader(self) -> data.Loader:
        return data.as_loader(loaded())


def labels(loader: Any) -> list[Any]:
    return [batch["x"][:, 0].tolist() for batch in loader]


def test_map_dataset_has_a_length_and_each_epoch_the_order_that_grain_gives_it():
    loader = data.as_loader(mapped(12))
    epochs = [labels(loader) for _ in range(3)]
    assert data.num_batches(loader) == 4
    assert list(chain(*epochs)) == labels(mapped(12).repeat(3))
    assert epochs[0] != epochs[1]


def test_map_dataset_goes_far_at_once():
    loader = data.as_loader(mapped(12))
    assert len(list(islice(loader, 2))) == 2
    state = {**loader.get_state(), "epoch": 10**9}
    loader.set_state(state)
    assert loader.get_state() == state
    far = mapped(12).repeat()[4 * 10**9 : 4 * 10**9 + 4]
    assert labels(loader) == labels(far)[2:]


@pytest.mark.slow
def test_endless_dataset_is_cut_into_epochs():
    loader = data.as_loader(mapped(12).repeat())
    assert data.num_batches(loader) is None
    epochs = [labels(data.epoch_of(loader, 3)) for _ in range(4)]
    assert list(chain(*epochs)) == labels(mapped(12).repeat(3))


@pytest.mark.slow
def test_data_loader_with_workers_goes_on_where_it_was():
    loader = data.as_loader(loaded(worker_count=1))
    running = iter(loader)
    next(running)
    state = json.loads(json.dumps(loader.get_state()))
    rest = labels(running)
    resumed = data.as_loader(loaded(worker_count=1))
    resumed.set_state(state)
    assert labels(resumed) == rest
    other = data.as_loader(loaded())
    with pytest.raises(BatchError, match="Use the number of workers"):
        other.set_state(state)


@pytest.mark.parametrize("make", [lambda: iter(mapped()), lambda: iter(loaded())])
def test_iterator_is_refused(make):
    with pytest.raises(
        BatchError, match=r"iterable again in each epoch.*rather than iter\(dataset\)"
    ):
        data.as_loader(make())


@pytest.mark.parametrize(
    "change",
    [
        {"batch": -1},
        {"batch": 5},
        {"batch": True},
        {"epoch": 10**19},
        {"epoch": "0"},
        {"num_batches": 5},
        {"more": 1},
    ],
)
def test_position_that_no_such_dataset_has_is_refused(change):
    loader = data.as_loader(mapped(12))
    state = {**loader.get_state(), "batch": 1, **change}
    with pytest.raises(BatchError):
        loader.set_state(state)


def train(loader: Any, val: Any = None, **options: Any) -> Any:
    trainer = tasks.Classifier(
        zoo.MLP((4, 2)), name="grain", enable_progress_bar=False, tune_process=False, **options
    )
    trainer.train_model(loader, val, num_epochs=3)
    return trainer


OPTIONS = {"optimizer": OptimizerConfig(schedule="constant"), "save_every": 1e-9}


@pytest.mark.parametrize(
    "make",
    [lambda: mapped(22, 2), lambda: mapped(22, 2).to_iter_dataset(), lambda: loaded()],
    ids=["map", "iter", "loader"],
)
@pytest.mark.slow
def test_run_goes_on_bit_for_bit(make):
    whole = train(make(), make(), root="whole", callbacks=[Break(None)], **OPTIONS)
    with pytest.raises(InterruptError):
        train(make(), make(), root="cut", callbacks=[Break(6)], **OPTIONS)
    resumed = train(make(), make(), root="cut", callbacks=[Break(None)], **OPTIONS)
    assert Path("cut/grain/0001/log.txt").read_text().count("from its checkpoint of step") == 1
    assert resumed.step == whole.step
    assert_batches_equal(resumed.state.params, whole.state.params)


def test_run_does_not_go_on_with_other_data():
    with pytest.raises(InterruptError):
        train(mapped(22, 2), callbacks=[Break(3)], **OPTIONS)
    with pytest.raises(CheckpointError, match="train data differs"):
        train(mapped(20, 2), callbacks=[Break(None)], resume="must", **OPTIONS)


def test_filtered_batches_are_not_counted_as_those_that_were_left_out():
    loader = data.as_loader(sparse())
    assert data.num_batches(loader) is None
    assert len(list(loader)) < len(sparse())
