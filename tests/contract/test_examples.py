"""Loaders over examples that are read by index, one by one or in blocks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distaff import data
from distaff.data.order import Order
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
)
def test_order_is_a_permutation_that_begins_anywhere(sizes, window, epoch, seed, start):
    starts = None if sizes is None else np.concatenate([[0], np.cumsum(sizes)])
    count = 17 if sizes is None else sum(sizes)
    order = Order(count, shuffle=True, seed=seed, starts=starts, window=window)
    whole = list(order.epoch(epoch))
    assert sorted(whole) == list(range(count))
    assert list(order.epoch(epoch, start)) == whole[start:]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [labels(data.from_examples(ROWS, 4, shuffle=True, seed=seed)) for seed in (0, 1)]
    loader = data.from_examples(ROWS, 4, shuffle=True, seed=0)
    assert labels(loader) == orders[0] != labels(loader)
    assert orders[0] != orders[1]
    assert labels(data.from_examples(ROWS, 4)) == list(range(23))


def test_position_is_refused_where_the_blocks_are_others():
    state = data.from_examples(Blocks(), 4, shuffle=True).get_state()
    with pytest.raises(BatchError, match="loader like the one that saved it"):
        data.from_examples(Blocks((5, 1, 6, 1, 10)), 4, shuffle=True).set_state(state)
    data.from_examples(Blocks(), 4, shuffle=True).set_state(state)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: data.from_examples(iter(ROWS), 4), BatchError, "have a length"),
        (lambda: data.from_examples({"x": np.ones(3)}, 4), BatchError, "got dict"),
        (lambda: data.from_examples(ROWS, 0), ConfigError, "batch_size=0"),
        (lambda: data.from_examples(ROWS, 4, seed=-1), ConfigError, "seed=-1"),
        (lambda: data.from_examples(ROWS, 4, remainder="cut"), ConfigError, "'cut'"),
        (lambda: data.from_examples(ROWS, 24, remainder="drop"), BatchError, "at least one batch"),
        (lambda: Blocks(blocks_in_memory=0), ConfigError, "blocks_in_memory"),
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
