"""Loaders over examples that are read by index, one by one or in blocks."""

from __future__ import annotations

import json
import tracemalloc
import weakref
from collections.abc import Sequence
from itertools import chain, islice
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distaff import data
from distaff.data.examples.examples import stacked
from distaff.data.examples.order import Order
from distaff.errors import BatchError, ConfigError
from distaff.testing.loaders import LoaderContract

ROWS = [{"x": np.full(3, row, np.float32), "label": row} for row in range(23)]


class Blocks(data.BlockExamples):
    """Rows in blocks of uneven sizes, which counts its reads."""

    def __init__(self, sizes: Sequence[int] = (5, 1, 7, 0, 10), **options: Any) -> None:
        super().__init__(sizes, **options)
        self.reads: list[int] = []

    def read_block(self, block: int) -> Sequence[Any]:
        self.reads.append(block)
        return ROWS[self.starts[block] : self.starts[block + 1]]


class Gathered(Blocks):
    """Makes batches itself, and says of which data."""

    fingerprint = 7

    def read_batch(self, indices: Sequence[int]) -> Any:
        return {"label": 100 + stacked([self[index] for index in indices])["label"]}


class Negative:
    """Changes the examples of the class behind it."""

    def __getitem__(self, index: int, /) -> Any:
        return {"label": -super().__getitem__(index)["label"]}


class GatheredNegative(Negative, Gathered):
    pass


class Subset:
    """Has some of other examples, and all else from them."""

    def __init__(self, examples: Any, indices: Sequence[int]) -> None:
        self.examples, self.indices = examples, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> Any:
        return self.examples[self.indices[index]]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.examples, name)


class Started(list):
    """Rows that state where their blocks begin."""

    def __init__(self, starts: Sequence[int]) -> None:
        super().__init__(ROWS)
        self.starts = starts


class Watched(Blocks):
    """Tells the most blocks that were in memory at once."""

    class Block(list):
        pass

    def __init__(self, **options: Any) -> None:
        super().__init__([3] * 7 + [2], **options)
        self.blocks: list[Any] = []
        self.most = 0

    def read_block(self, block: int) -> Sequence[Any]:
        found = self.Block(super().read_block(block))
        self.blocks.append(weakref.ref(found))
        self.most = max(self.most, sum(block() is not None for block in self.blocks))
        return found


def labels(loader: data.Loader) -> list[int]:
    return list(chain.from_iterable(batch["label"].tolist() for batch in loader))


class TestExamples(LoaderContract):
    def make_loader(self) -> data.Loader:
        return data.from_examples(ROWS, 4)


class TestShuffledExamples(LoaderContract):
    def make_loader(self) -> data.Loader:
        return data.from_examples(ROWS, 4, shuffle=True, seed=3)


class TestBlocks(LoaderContract):
    def make_loader(self) -> data.Loader:
        examples = data.MappedExamples(
            Blocks(blocks_in_memory=2), lambda row: {**row, "label": row["label"] + 1}
        )
        return data.from_examples(examples, 4, shuffle=True, remainder="keep")


def test_epoch_reads_each_block_once_and_keeps_few():
    examples = Blocks(blocks_in_memory=2)
    loader = data.from_examples(examples, 4, shuffle=True, remainder="keep")
    for epoch in range(3):
        assert sorted(labels(loader)) == list(range(23)), epoch
    assert len(examples.reads) <= 3 * 4
    together = data.from_examples(Blocks(blocks_in_memory=5), 4, shuffle=True, remainder="keep")
    apart = data.from_examples(Blocks(blocks_in_memory=1), 4, shuffle=True, remainder="keep")
    assert max(np.diff(labels(apart)[:5])) < 10 < max(np.diff(labels(together)))


@given(
    sizes=st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=6),
    window=st.integers(1, 7),
    epoch=st.integers(0, 2**40),
    seed=st.integers(0, 2**40),
    start=st.integers(0, 60),
    slice_size=st.integers(1, 70),
)
def test_order_is_a_permutation_that_begins_anywhere(sizes, window, epoch, seed, start, slice_size):
    starts = None if sizes is None else np.concatenate([[0], np.cumsum(sizes)])
    count = 17 if sizes is None else sum(sizes)
    order = Order(count, shuffle=True, seed=seed, starts=starts, window=window)
    whole = list(order.epoch(epoch))
    assert sorted(whole) == list(range(count))
    with mock.patch("distaff.data.examples.order._SLICE", slice_size):
        assert list(order.epoch(epoch, start)) == whole[start:]


def test_order_takes_the_memory_of_its_array_alone():
    count = 200_000
    order = Order(count, shuffle=True, seed=0)
    tracemalloc.start()
    first = next(order.epoch(0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 <= first < count
    assert peak < 2.5 * 8 * count


@pytest.mark.parametrize("blocks_in_memory", [1, 3, 8])
def test_no_more_blocks_are_in_memory_than_are_kept(blocks_in_memory):
    examples = Watched(blocks_in_memory=blocks_in_memory)
    loader = data.from_examples(examples, 4, shuffle=True, remainder="keep")
    for _ in range(3):
        assert sorted(labels(loader)) == list(range(23))
    assert examples.most == blocks_in_memory


def test_examples_are_freed_with_their_last_reference():
    examples = Watched(blocks_in_memory=2)
    assert examples[0]["label"] == 0
    freed, (block,) = weakref.ref(examples), examples.blocks
    del examples
    assert freed() is None
    assert block() is None


def test_a_batch_is_read_at_once_only_by_the_class_that_reads_its_examples():
    assert labels(data.from_examples(Gathered(), 4)) == list(range(100, 123))
    assert labels(data.from_examples(GatheredNegative(), 4)) == [-row for row in range(23)]


@pytest.mark.parametrize("wrap", [lambda each: each, lambda each: data.MappedExamples(each, dict)])
def test_what_other_examples_have_is_not_believed(wrap):
    examples = wrap(Subset(Gathered(blocks_in_memory=2), [20, 3, 11]))
    assert labels(data.from_examples(examples, 2)) == [20, 3, 11]
    shuffled = data.from_examples(examples, 2, shuffle=True, remainder="keep")
    assert sorted(labels(shuffled)) == [3, 11, 20]
    assert not {"fingerprint", "window", "blocks"} & shuffled.get_state().keys()
    assert data.from_examples(wrap(Gathered()), 2).get_state()["fingerprint"] == 7


def test_starts_may_be_a_list():
    loader = data.from_examples(Started([0, 20, 23]), 1, shuffle=True)
    found = labels(loader)
    assert sorted(found) == list(range(23))
    assert max(found[:3]) < 20 or min(found[:3]) >= 20


def test_options_of_numpy_are_those_of_json():
    def states(size: Any, seed: Any, shuffle: Any, blocks_in_memory: Any) -> list[str]:
        examples = Blocks(blocks_in_memory=blocks_in_memory)
        loaders = [
            data.from_examples(examples, size, shuffle=shuffle, seed=seed),
            data.ArrayLoader(np.arange(9), size, shuffle=shuffle, seed=seed),
        ]
        return [json.dumps(loader.get_state()) for loader in loaders]

    numpy = states(np.int64(4), np.uint8(3), np.bool_(True), np.int32(2))
    assert numpy == states(4, 3, True, 2)


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [labels(data.from_examples(ROWS, 4, shuffle=True, seed=seed)) for seed in (0, 1)]
    loader = data.from_examples(ROWS, 4, shuffle=True, seed=0)
    assert labels(loader) == orders[0] != labels(loader)
    assert orders[0] != orders[1]
    assert labels(data.from_examples(ROWS, 4)) == list(range(23))


@pytest.mark.parametrize(
    ("examples", "options"),
    [
        (Blocks(), {"batch_size": 5}),
        (Blocks(), {"seed": 1}),
        (Blocks(), {"remainder": "drop"}),
        (Blocks(blocks_in_memory=3), {}),
        (Blocks((5, 1, 7, 0, 11)), {}),
        (ROWS, {}),
    ],
)
def test_position_is_refused_with_other_options(examples, options):
    def make(examples: Any, **options: Any) -> data.Positioned:
        given = {"batch_size": 4, "shuffle": True, "remainder": "keep", **options}
        return data.from_examples(examples, **given)

    state = make(Blocks()).get_state()
    make(Blocks()).set_state(state)
    with pytest.raises(BatchError, match="loader with the same options and data"):
        make(examples, **options).set_state(state)


def test_position_of_another_order_is_refused():
    state = data.from_examples(ROWS, 4, shuffle=True, remainder="keep").get_state()
    with pytest.raises(BatchError, match="loader with the same options and data"):
        data.from_examples(ROWS, 4, remainder="keep").set_state(state)


def test_position_is_refused_where_the_blocks_are_others():
    state = data.from_examples(Blocks(), 4, shuffle=True).get_state()
    with pytest.raises(BatchError, match="loader with the same options and data"):
        data.from_examples(Blocks((5, 1, 6, 1, 10)), 4, shuffle=True).set_state(state)
    data.from_examples(Blocks(), 4, shuffle=True).set_state(state)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: data.from_examples(iter(ROWS), 4), BatchError, "have a length"),
        (lambda: data.from_examples({"x": np.ones(3)}, 4), BatchError, "got dict"),
        (
            lambda: data.from_examples(ROWS, 0),
            ConfigError,
            "batch_size must be .* got 0",
        ),
        (
            lambda: data.from_examples(ROWS, 2.5),
            ConfigError,
            "batch_size must be .* got 2.5",
        ),
        (
            lambda: data.from_examples(ROWS, 4, seed=-1),
            ConfigError,
            "seed must be .* got -1",
        ),
        (
            lambda: data.from_examples(ROWS, 4, seed=0.0),
            ConfigError,
            "seed must be .* got 0.0",
        ),
        (lambda: data.from_examples(Started([0, 20]), 4), BatchError, "there are 23"),
        (lambda: data.from_examples(Started([1, 23]), 4), BatchError, r"\[ 1 23\]"),
        (lambda: data.from_examples(Started([]), 4), BatchError, "begin with 0"),
        (lambda: data.MappedExamples(iter(ROWS), dict), BatchError, "list_iterator.* list"),
        (lambda: data.from_examples(ROWS, 4, remainder="cut"), ConfigError, "'cut'"),
        (lambda: data.from_examples(ROWS, 24, remainder="drop"), BatchError, "at least one batch"),
        (lambda: Blocks(blocks_in_memory=0), ConfigError, "blocks_in_memory"),
        (
            lambda: Blocks(blocks_in_memory=2.0),
            ConfigError,
            "blocks_in_memory must be .* got 2.0",
        ),
        (lambda: Blocks((0, 0)), BatchError, "at least one example"),
        (lambda: next(iter(data.from_examples([1.0, [2.0]], 2))), BatchError, "one structure"),
        (
            lambda: next(iter(data.from_examples([{"x": np.ones(2)}, {"x": np.ones(3)}], 2))),
            BatchError,
            r"'x' has \[\(2,\), \(3,\)\]",
        ),
        (lambda: next(iter(data.from_examples(["a", "b"], 2))), BatchError, "dtype <U1"),
    ],
)
def test_what_is_refused(make, error, said):
    with pytest.raises(error, match=said):
        make()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((1, 2.5), "'x' has float64, int64"),
        ((True, 2), "'x' has bool, int64"),
        ((np.int32(1), np.uint64(2)), "'x' has int32, uint64"),
        (("a", 2), "'x' has int64, str"),
        ((2**40, 7), "'x' has values from 7 to 1099511627776"),
        ((np.uint64(2**32), np.uint64(7)), "fit into uint32.* from 7 to 4294967296"),
    ],
)
def test_numbers_that_fill_no_batch(values, said):
    loader = data.from_examples([{"x": value} for value in values], 2)
    with pytest.raises(BatchError, match=said):
        next(iter(loader))


def test_numbers_have_the_width_that_arrays_have():
    batch = next(iter(data.from_examples([{"x": 1.0, "y": 2, "z": np.float64(3)}] * 2, 2)))
    assert {name: leaf.dtype for name, leaf in batch.items()} == {
        "x": np.float32,
        "y": np.int32,
        "z": np.float32,
    }


def test_a_loader_goes_far_at_once():
    examples = Blocks(blocks_in_memory=2)
    loader = data.from_examples(examples, 4, shuffle=True)
    loader.set_state({**loader.get_state(), "epoch": 10**12, "batch": 4})
    assert len(list(islice(loader, 9))) == 1
    assert len(set(examples.reads)) <= 3
