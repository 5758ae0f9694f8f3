"""Chunks: every batch of an epoch once, in order, wherever the batches come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff import data
from distaff.data import ArrayLoader
from distaff.errors import BatchError
from distaff.execution.feed.chunk import Chunk, ChunkSize, Gathered, One, Stacked, pad
from distaff.execution.feed.feed import Feed
from distaff.execution.feed.feeds import Feeds


def loader(num_examples: int = 23, batch_size: int = 4, **options: Any) -> ArrayLoader:
    arrays = {"x": np.arange(num_examples * 3.0).reshape(-1, 3), "y": np.arange(num_examples)}
    return ArrayLoader(arrays, batch_size, **{"shuffle": True, "remainder": "keep", **options})


def unpacked(chunks: Iterator[Chunk]) -> list[Any]:
    """The batches of all chunks, as a program would read them."""
    found = []
    for chunk in chunks:
        assert chunk.num_steps <= chunk.source.capacity
        batches = [chunk.source.batch(index) for index in range(chunk.num_steps)]
        assert {data.num_examples(batch) for batch in batches} == {chunk.examples}
        found += batches
    return found


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert jax.tree.structure(one) == jax.tree.structure(other)
        jax.tree.map(np.testing.assert_array_equal, one, other)


@settings(deadline=None, max_examples=40)
@given(
    num_examples=st.integers(4, 40),
    batch_size=st.integers(1, 6),
    capacity=st.integers(1, 9),
    resident=st.booleans(),
    steps_per_epoch=st.none() | st.integers(1, 12),
)
def test_chunks_hold_the_batches_of_the_loader(
    num_examples, batch_size, capacity, resident, steps_per_epoch
):
    plain, chunked = (loader(num_examples, batch_size) for _ in range(2))
    feed = Feed(chunked, name="train", resident=resident)
    for _ in range(3):
        chunks = feed.epoch(lambda: ChunkSize(capacity, capacity), steps_per_epoch)
        assert_same(unpacked(chunks), list(data.epoch_of(plain, steps_per_epoch)))
        assert chunked.get_state() == plain.get_state()


def test_form_is_asked_before_each_chunk():
    forms = iter(
        [ChunkSize(1, 1), ChunkSize(1, 4), ChunkSize(3, 4), ChunkSize(9, 9), ChunkSize(9, 9)]
    )
    chunks = list(Feed(loader(), name="train", resident=True).epoch(lambda: next(forms)))
    assert [(chunk.num_steps, chunk.source.capacity) for chunk in chunks] == [
        (1, 1),
        (1, 4),
        (3, 4),
        (1, 9),
    ]
    assert [chunk.examples for chunk in chunks] == [4, 4, 4, 3]


@pytest.mark.parametrize("resident", [True, False])
def test_chunk_that_is_not_full_has_the_room_of_the_rest(resident):
    feed = Feed(loader(), name="train", resident=resident)
    chunks = list(feed.epoch(lambda: ChunkSize(2, 2, partial_capacity=8)))
    rooms = [(chunk.num_steps, chunk.source.capacity) for chunk in chunks]
    assert rooms == [(2, 2), (2, 2), (1, 8), (1, 8)]  # the last batch is smaller


def test_chunk_ends_where_the_batches_change_their_form():
    batches = [
        np.ones([2, 3]),
        np.ones([2, 3]),
        np.ones([2, 4]),
        np.ones([2, 4], int),
        np.ones([2, 4], int),
    ]
    feed = Feed(data.as_loader(batches), name="train", resident=True)
    chunks = list(feed.epoch(lambda: ChunkSize(8, 8)))
    assert [chunk.num_steps for chunk in chunks] == [2, 1, 2]
    assert [chunk.source.batch(0).dtype for chunk in chunks] == [float, float, int]


@pytest.mark.parametrize("make", [np.array, jnp.array])
def test_batches_of_other_loaders_are_stacked_with_room_for_more(make):
    batches = [{"x": make([[float(n)]])} for n in range(5)]
    chunks = list(
        Feed(data.as_loader(batches), name="train", resident=True).epoch(lambda: ChunkSize(3, 4))
    )
    assert [type(chunk.source) for chunk in chunks] == [Stacked, Stacked]
    assert [chunk.source.batches["x"].shape for chunk in chunks] == [(4, 1, 1), (4, 1, 1)]
    assert_same([chunk.source.batch(0) for chunk in chunks], [batches[0], batches[3]])


def test_padding_of_wide_floats_can_be_narrowed():
    batches = [np.full([64, 64], 1.5)]
    [chunk] = Feed(data.as_loader(batches), name="train", resident=True).epoch(
        lambda: ChunkSize(1, 8)
    )
    assert not chunk.source.batches[1:].any()


def test_single_batch_is_handed_on_as_it_is():
    batch = {"x": np.ones([2, 3])}
    [chunk] = Feed(data.as_loader([batch]), name="train", resident=True).epoch()
    assert isinstance(chunk.source, One)
    assert chunk.source.batch(0)["x"].shape == (2, 3)


def test_arrays_are_placed_once_and_not_aliased():
    arrays = np.zeros([64, 16], np.float32)
    feed = Feed(ArrayLoader(arrays, 4), name="train", resident=True)
    sources = [chunk.source for _ in range(2) for chunk in feed.epoch(lambda: ChunkSize(2, 2))]
    assert {id(source.arrays) for source in sources} == {id(sources[0].arrays)}
    assert isinstance(sources[0].arrays, jax.Array)
    arrays[:] = 1
    assert not sources[0].arrays.any()


def test_subclass_that_may_yield_something_else_is_not_gathered():
    class Doubling(ArrayLoader):
        def __iter__(self) -> Iterator[Any]:
            return (2 * batch for batch in super().__iter__())

    [chunk] = Feed(Doubling(np.ones([4, 1]), 4), name="train", resident=True).epoch()
    assert chunk.source.batch(0).tolist() == [[2]] * 4


def test_large_arrays_stay_on_the_host_and_large_chunks_are_cut(monkeypatch):
    from distaff.execution.feed import feed as module

    monkeypatch.setattr(module, "_MAX_RESIDENT_BYTES", 100)
    monkeypatch.setattr(module, "_MAX_CHUNK_BYTES", 100)
    feed = Feed(ArrayLoader(np.ones([26, 1], np.float32), 10), name="train", resident=True)
    chunks = list(feed.epoch(lambda: ChunkSize(8, 8)))
    assert [(type(c.source), c.num_steps, c.source.capacity) for c in chunks] == [
        (Stacked, 2, 3),
        (Stacked, 1, 3),
    ]


def test_chunks_are_those_of_a_whole_batch_where_a_short_one_comes_first(monkeypatch):
    monkeypatch.setattr("distaff.execution.feed.feed._MAX_CHUNK_BYTES", 100)
    whole, short = np.ones([10, 1], np.float32), np.ones([1, 1], np.float32)
    capacities = []
    for expected in ([], [whole]):
        feed = Feed(data.as_loader([short, whole, whole]), name="train", resident=True)
        for batch in expected:
            feed.expect(batch)
        chunks = feed.epoch(lambda: ChunkSize(8, 8))
        capacities.append([chunk.source.capacity for chunk in chunks])
    assert capacities == [[8, 8], [3, 3]]


def test_feeds_remember_the_loaders_seen_last():
    feeds, loaders = Feeds(), [loader() for _ in range(5)]
    first = feeds.of(loaders[0], name="train")
    assert feeds.of(loaders[0], name="train") is first
    for each in loaders[1:]:
        feeds.of(each, name="val")
    assert feeds.of(loaders[0], name="train") is not first


def test_empty_loader_is_refused():
    with pytest.raises(BatchError, match="The val loader must yield at least one batch"):
        list(Feed(data.as_loader([]), name="val", resident=True).epoch(lambda: ChunkSize(2, 2)))


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("capacity", [1, 3])
def test_padded_repeats_the_last_example_of_each_batch(capacity, resident):
    feed = Feed(loader(6, 3, shuffle=False), name="val", resident=resident)
    for chunk in feed.epoch(lambda: ChunkSize(capacity, capacity)):
        padded = chunk.source.padded(5)
        assert isinstance(padded, Gathered if resident else Stacked if capacity > 1 else One)
        for index in range(chunk.num_steps):
            batch, longer = chunk.source.batch(index), padded.batch(index)
            assert longer["y"].tolist() == [*batch["y"].tolist(), *[int(batch["y"][-1])] * 2]


def repeated(feed: Feed, capacity: int, *, even: bool) -> list[Chunk]:
    return list(feed.repeated(ChunkSize(capacity, capacity), even=lambda source: even))


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("capacity", [1, 3])
def test_repeated_chunks_are_placed_once_and_are_the_batches_of_the_loader(capacity, even):
    feed = Feed(loader(11, 4, shuffle=False), name="val", resident=False)
    first, second = repeated(feed, capacity, even=even), repeated(feed, capacity, even=even)
    assert {id(c.source) for c in first} == {id(c.source) for c in second}
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(first[0].source))
    found = [chunk.source.batch(n) for chunk in second for n in range(chunk.num_steps)]
    expected = list(loader(11, 4, shuffle=False))
    expected[-1] = pad(expected[-1], 4) if even else expected[-1]
    assert_same(found, expected)
    assert second[-1].examples == 3
    assert feed.loader.get_state()["epoch"] == 2


def test_repeated_chunks_of_another_form_or_rest_are_made_anew():
    feed = Feed(loader(20, 4, shuffle=False), name="val", resident=False)
    assert [c.num_steps for c in repeated(feed, 5, even=True)] == [5]
    assert [c.num_steps for c in repeated(feed, 3, even=True)] == [3, 2]
    feed.loader.set_state({**feed.loader.get_state(), "batch": 3})
    [rest] = repeated(feed, 3, even=True)
    assert rest.num_steps == 2
    assert float(rest.source.batch(0)["y"][0]) == 12
    assert [c.num_steps for c in repeated(feed, 3, even=True)] == [3, 2]


def test_repeated_takes_a_new_order_where_the_loader_shuffles():
    feed = Feed(loader(20, 4, shuffle=True), name="val", resident=False)
    plain = loader(20, 4, shuffle=True)
    for _ in range(2):
        assert_same(unpacked(iter(repeated(feed, 2, even=True))), list(plain))


@pytest.mark.parametrize("kind", ["arrays", "list"])
def test_short_last_batch_has_the_room_of_a_whole_one(kind):
    wide = data.ArrayLoader(np.ones((70, 20_000), np.float32), 64)
    feed = Feed(wide if kind == "arrays" else data.as_loader(list(wide)), name="", resident=False)
    chunks = list(feed.epoch(lambda: ChunkSize(256, 256)))
    assert [chunk.num_steps for chunk in chunks] == [1, 1]
    assert len({chunk.source.capacity for chunk in chunks}) == 1
    assert len(list(Feed(data.as_loader([np.ones((4, 0))]), name="", resident=False).epoch())) == 1
