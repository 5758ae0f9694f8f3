"""Reading ahead: the same items in the same order, whoever gets them, and no thread left behind."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff import data
from distaff.data import ArrayLoader, Stream
from distaff.execution.feed.chunk import ChunkSize
from distaff.execution.feed.feed import Feed
from distaff.execution.feed.prefetch import DEPTH, Prefetch, ReadTimes


class Always(ReadTimes):
    """A pace that is given."""

    def __init__(self, slow: bool) -> None:
        super().__init__()
        self.given = slow

    @property
    def slow(self) -> bool:
        return self.given


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read ahead"]


def wait_until(true: Callable[[], bool]) -> None:
    gave_up = threading.Event()
    for _ in range(3000):
        if true():
            return
        gave_up.wait(0.01)
    raise AssertionError("waited for nothing")


def counting(taken: list[int], until: int = 100) -> Generator[int]:
    for number in range(until):
        taken.append(number)
        yield number


@settings(deadline=None, max_examples=30)
@given(length=st.integers(0, 12), slow=st.booleans(), steady_after=st.integers(0, 14))
def test_ahead_yields_every_item_in_order(length, slow, steady_after):
    used: list[int] = []
    ahead = Prefetch[int](Always(slow))
    items = ahead.read(counting([], length), lambda: len(used) >= steady_after)
    used.extend(items)  # grows item by item
    assert used == list(range(length))
    assert not readers()


def test_thread_gets_no_more_than_its_depth_ahead():
    taken: list[int] = []
    items = Prefetch[int](Always(True)).read(counting(taken))
    for used in range(5):
        assert next(items) == used
        wait_until(lambda used=used: len(taken) >= used + 1 + DEPTH)
        threading.Event().wait(0.02)
        assert len(taken) == used + 1 + DEPTH
    items.close()
    assert not readers()


def test_items_are_got_one_by_one_until_it_is_steady():
    taken, steady = [], []
    items = Prefetch[int](Always(True)).read(counting(taken), lambda: bool(steady))
    assert [next(items), next(items)] == taken == [0, 1]
    steady.append(True)
    assert next(items) == 2
    wait_until(lambda: len(taken) == 3 + DEPTH)
    items.close()


def test_error_is_raised_in_its_place_with_the_line_that_raised_it():
    def broken() -> Generator[int]:
        yield from (0, 1, 2)
        raise OSError("disk on fire")

    items, got = Prefetch[int](Always(True)).read(broken()), []
    with pytest.raises(OSError, match="disk on fire") as caught:
        got.extend(items)
    assert got == [0, 1, 2]
    assert any(frame.name == "broken" for frame in traceback.extract_tb(caught.tb))
    assert not readers()


def test_closed_reader_closes_the_generator_where_it_ran():
    ended = []

    def noting() -> Generator[int]:
        try:
            yield from range(100)
        finally:
            ended.append(threading.current_thread().name)

    items = Prefetch[int](Always(True)).read(noting())
    next(items)
    items.close()
    assert ended == ["read ahead"]


def test_read_that_hangs_is_left_alone_and_waited_for_before_the_next(monkeypatch):
    monkeypatch.setattr("distaff.execution.feed.prefetch._JOIN_SECONDS", 0.05)
    go_on = threading.Event()

    def hanging() -> Generator[int]:
        yield 0
        assert go_on.wait(30)
        yield 1

    ahead = Prefetch[int](Always(True))
    items = ahead.read(hanging())
    assert next(items) == 0
    items.close()
    assert ahead.busy
    assert readers()[0].daemon
    go_on.set()
    assert list(ahead.read(counting([], 3))) == [0, 1, 2]
    assert not readers()


def test_pace_is_slow_after_a_row_of_slow_items_only():
    pace = ReadTimes()
    for _ in range(1000):
        pace.record_seconds(1e-4)
    pace.record_seconds(9e-3)  # a hiccup
    assert not pace.slow
    for _ in range(100):
        pace.record_seconds(1e-4)
    for _ in range(4):
        pace.record_seconds(4e-3)
    assert pace.slow
    for _ in range(100):
        pace.record_seconds(1e-4)
    assert not pace.slow


def test_thread_takes_over_from_what_is_slow_and_no_other():
    now = [0.0]

    def slow(seconds: float, threads: set[str]) -> Generator[int]:
        for number in range(20):
            now[0] += seconds
            threads.add(threading.current_thread().name)
            yield number

    for seconds, expected in ((1e-5, 1), (5e-3, 2)):
        threads: set[str] = set()
        ahead = Prefetch[int](clock=lambda: now[0])
        assert list(ahead.read(slow(seconds, threads))) == list(range(20))
        assert len(threads) == expected


ARRAYS = {"x": np.arange(41.0), "y": np.arange(41)}


def make_loader(kind: str, num_examples: int, batch_size: int) -> Any:
    arrays = {name: array[:num_examples] for name, array in ARRAYS.items()}
    loader = ArrayLoader(arrays, batch_size, shuffle=True, remainder="keep", seed=5)
    if kind == "arrays":
        return loader
    if kind == "mapped":
        return data.MappedLoader(loader, lambda batch: {**batch, "x": batch["x"] + 1})

    def batches() -> Iterator[Any]:
        # Each epoch in the order of the first: a Stream that is made anew yields the same again.
        yield from ArrayLoader(arrays, batch_size, shuffle=True, remainder="keep", seed=5)

    return Stream(batches)


def flat(batches: Any) -> list[float]:
    return [number for batch in batches for number in np.asarray(batch["x"]).tolist()]


def of_chunk(chunk: data.Chunk) -> list[Any]:
    return [chunk.source.batch(index) for index in range(chunk.num_steps)]


@settings(deadline=None, max_examples=80)
@given(
    kind=st.sampled_from(["arrays", "mapped", "stream"]),
    num_examples=st.integers(4, 41),
    batch_size=st.integers(1, 6),
    capacity=st.integers(1, 5),
    steps_per_epoch=st.none() | st.integers(1, 12),
    stop_after=st.integers(1, 12),
    threaded=st.booleans(),
    resident=st.booleans(),
)
def test_position_is_that_of_the_last_chunk_handed_out(
    kind, num_examples, batch_size, capacity, steps_per_epoch, stop_after, threaded, resident
):
    def make() -> Any:
        return make_loader(kind, num_examples, batch_size)

    def after(loader: Any, epochs: int = 3) -> list[float]:
        return [n for _ in range(epochs) for n in flat(data.epoch_of(loader, steps_per_epoch))]

    uninterrupted = after(make(), 30)
    loader = make()
    feed = Feed(loader, name="train", resident=resident)
    feed._prefetch = Prefetch(Always(threaded))
    trained: list[float] = []
    handed_out = 0
    while handed_out < stop_after:
        chunks = feed.epoch(lambda: ChunkSize(capacity, capacity), steps_per_epoch, keep_place=True)
        for chunk in chunks:
            trained += flat(of_chunk(chunk))
            position = dict(feed.position)
            handed_out += 1
            if handed_out == stop_after:
                break
        chunks.close()
    assert not readers()

    fresh = make()
    fresh.set_state(position)
    for resumed in (fresh, loader) if kind != "stream" else (fresh,):
        assert dict(resumed.get_state()) == position
        rest = after(resumed)
        assert trained + rest == uninterrupted[: len(trained) + len(rest)]
    assert dict(feed.position) == position or kind != "stream"


def test_stream_that_was_read_ahead_stays_ahead_and_its_position_does_not():
    loader = Stream([np.full(1, float(n)) for n in range(10)])
    feed = Feed(loader, name="train", resident=False)
    feed._prefetch = Prefetch(Always(True))
    chunks = feed.epoch(keep_place=True)
    next(chunks)
    wait_until(lambda: loader.get_state()["batch"] == 1 + DEPTH)
    chunks.close()
    assert (feed.position["epoch"], feed.position["batch"]) == (0, 1)
    assert [float(batch[0]) for batch in loader] == list(range(1 + DEPTH, 10))


def test_epoch_that_is_closed_without_its_place_is_abandoned():
    loader = make_loader("arrays", 20, 4)
    feed = Feed(loader, name="val", resident=False)
    for _ in range(2):
        chunks = feed.epoch()
        next(chunks)
        chunks.close()
        assert feed.position["batch"] == 1
    assert len(list(feed.epoch())) == 5


def test_rest_of_an_epoch_that_is_empty_is_passed_over():
    loader = make_loader("arrays", 20, 4)
    loader.set_state({**loader.get_state(), "batch": 5})
    feed = Feed(loader, name="train", resident=True)
    assert len(list(feed.epoch())) == 5
    assert feed.position["epoch"] == 2
