"""Loaders of sequences of many lengths: packed into rows, or sorted into buckets."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff import data
from distaff.data.sequences.sequences import parts_of
from distaff.errors import BatchError, ConfigError
from distaff.testing.loaders import LoaderContract, assert_batches_equal

LENGTHS = (3, 9, 1, 4, 7, 2, 8, 5, 5, 6, 2, 9, 4, 3, 1, 8, 7, 2, 6, 5)


def documents(lengths: Any) -> list[np.ndarray]:
    """Tokens that tell which example they are of, and where they stand in it."""
    return [100 * row + 1 + np.arange(length) for row, length in enumerate(lengths)]


def sequences(lengths: Any = LENGTHS) -> list[dict[str, Any]]:
    return [
        {"tokens": tokens, "frames": np.ones((len(tokens), 2)) * row, "label": row}
        for row, tokens in enumerate(documents(lengths))
    ]


class TestBucketed(LoaderContract):
    def make_loader(self) -> data.Loader:
        return data.bucketed(sequences(), (3, 6, 9), (4, 3, 2))


class TestShuffledBucketed(LoaderContract):
    def make_loader(self) -> data.Loader:
        return data.bucketed(
            documents(LENGTHS), (4, 8), 3, shuffle=True, seed=5, overlong="cut", pad_value=-1
        )


class TestPacked(LoaderContract):
    def make_loader(self) -> data.Loader:
        return data.packed(documents(LENGTHS), 10, 2, open_rows=3)


class TestSplit(LoaderContract):
    """One example fills several batches: a position lies within it."""

    def make_loader(self) -> data.Loader:
        return data.packed(documents((2, 47, 1, 0, 31)), 4, 2, overlong="split", open_rows=2)


class TestShuffledPacked(LoaderContract):
    def make_loader(self) -> data.Loader:
        return data.packed(documents(LENGTHS), 10, 2, shuffle=True, seed=4, remainder="keep")


LOADERS = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(0, 12), min_size=1, max_size=25),
        "batch_size": st.integers(1, 3),
        "shuffle": st.booleans(),
        "seed": st.integers(0, 5),
    }
)


def unpacked(batches: list[Any]) -> dict[int, list[int]]:
    """Returns the tokens of each example, in the order in which they are met."""
    found: dict[int, list[int]] = defaultdict(list)
    for batch in batches:
        for tokens, segments, positions in zip(
            batch["tokens"], batch["segment_ids"], batch["positions"], strict=True
        ):
            numbers = segments[segments > 0]
            assert (segments[len(numbers) :] == 0).all()
            assert (tokens[len(numbers) :] == 0).all()
            assert (positions[len(numbers) :] == 0).all()
            assert sorted(set(numbers)) == list(range(1, len(set(numbers)) + 1))
            assert (np.diff(numbers) >= 0).all()
            for number in set(numbers.tolist()):
                own = segments == number
                assert positions[own].tolist() == list(range(own.sum()))
                (row,) = {(token - 1) // 100 for token in tokens[own].tolist()}
                assert (np.diff(tokens[own]) == 1).all()
                found[row] += tokens[own].tolist()
    return found


@settings(max_examples=60, deadline=None)
@given(options=LOADERS, length=st.integers(1, 12), extra=st.integers(0, 4), stop=st.integers(0, 60))
def test_packed_epoch_holds_every_token_once_and_resumes(options, length, extra, stop):
    def make() -> data.Loader:
        return data.packed(
            documents(options["lengths"]),
            length,
            options["batch_size"],
            shuffle=options["shuffle"],
            seed=options["seed"],
            remainder="keep",
            overlong="split",
            open_rows=options["batch_size"] + extra,
        )

    if not sum(options["lengths"]):
        with pytest.raises(BatchError, match="at least one batch"):
            list(make())
        return
    whole = list(make())
    assert all(batch["tokens"].shape[1] == length for batch in whole)
    expected = {
        i: each.tolist() for i, each in enumerate(documents(options["lengths"])) if len(each)
    }
    assert {row: sorted(tokens) for row, tokens in unpacked(whole).items()} == expected
    assert resumed(make, min(stop, len(whole))) == len(whole)


@settings(max_examples=60, deadline=None)
@given(
    options=LOADERS,
    boundaries=st.sets(st.integers(1, 11), max_size=3).map(lambda found: [*sorted(found), 12]),
    stop=st.integers(0, 60),
)
def test_bucketed_epoch_holds_whole_examples_once_and_resumes(options, boundaries, stop):
    def make() -> data.Loader:
        examples = sequences(options["lengths"])
        chosen = {name: options[name] for name in ("shuffle", "seed")}
        return data.bucketed(
            examples, boundaries, options["batch_size"], remainder="keep", **chosen
        )

    whole, found = list(make()), {}
    for batch in whole:
        assert batch["tokens"].dtype == np.int32
        for tokens, mask, frames, label in zip(
            batch["tokens"], batch["mask"], batch["frames"], batch["label"], strict=True
        ):
            found[int(label)] = tokens[mask].tolist()
            assert min(each for each in boundaries if each >= mask.sum()) == len(tokens)
            assert (mask[: mask.sum()]).all()
            assert not tokens[~mask].any()
            assert (frames[mask] == label).all()
            assert not frames[~mask].any()
    assert found == {i: each.tolist() for i, each in enumerate(documents(options["lengths"]))}
    assert sum(len(batch["label"]) for batch in whole) == len(found)
    assert {batch["tokens"].shape[1] for batch in whole} <= set(boundaries)
    assert resumed(make, min(stop, len(whole))) == len(whole)


def resumed(make: Any, stop: int) -> int:
    """Resumes after some batches, and returns how many an epoch has by then."""
    loader = make()
    running = iter(loader)
    count = len(list(islice(running, stop)))
    state = json.loads(json.dumps(loader.get_state()))
    again = make()
    again.set_state(state)
    rest = list(again)
    assert_batches_equal(rest, list(running))
    assert_batches_equal(list(again), list(loader))
    return count + len(rest)


def test_packed_order_within_an_example_is_kept_where_rows_are_handed_out_in_turn():
    loader = data.packed(documents((9, 8)), 3, 1, overlong="split", open_rows=1)
    assert unpacked(list(loader))[0] == list(range(1, 10))
    pieces = [batch["tokens"][0].tolist() for batch in loader]
    assert pieces == [
        [1, 2, 3],
        [4, 5, 6],
        [7, 8, 9],
        [101, 102, 103],
        [104, 105, 106],
        [107, 108, 0],
    ]


def test_fullest_rows_are_handed_out_first_and_memory_is_bounded():
    loader = data.packed(documents((2, 6, 5, 9, 4)), 10, 1, open_rows=3)
    rows = [row[row > 0].tolist() for batch in loader for row in batch["tokens"]]
    assert rows == [
        [*range(201, 206), *range(401, 405)],
        [*range(301, 310)],
        [1, 2, *range(101, 107)],
    ]
    many = data.packed(documents([1 + i % 7 for i in range(500)]), 8, 2, open_rows=5)
    for _ in many:
        assert len(many.get_state()["source"]["groups"]) <= 5


def test_short_batches_are_dropped_where_the_order_is_new():
    kept, dropped = (
        [len(batch["mask"]) for batch in data.bucketed(documents(LENGTHS), (4, 9), 4, shuffle=each)]
        for each in (False, True)
    )
    assert set(dropped) == {4}
    assert sum(kept) == len(LENGTHS)
    rows = [len(batch["tokens"]) for batch in data.packed(documents(LENGTHS), 10, 4, shuffle=True)]
    assert set(rows) == {4}


@pytest.mark.parametrize(
    ("overlong", "expected"),
    [
        ("cut", [[1, 2, 3, 4], [101, 102, 0, 0]]),
        ("drop", [[101, 102, 0, 0]]),
    ],
)
def test_overlong_examples(overlong, expected):
    examples = documents((6, 2))
    for loader in (
        data.bucketed(examples, [4], 2, overlong=overlong),
        data.packed(examples, 4, 2, overlong=overlong),
    ):
        (batch,) = loader
        assert batch["tokens"].tolist() == expected


def test_masks_of_examples_are_kept():
    examples = [{"tokens": np.arange(1, n), "mask": np.arange(1, n) > 2} for n in (4, 6)]
    (batch,) = data.bucketed(examples, [6], 2, pad_value=7)
    assert batch["tokens"].tolist() == [[1, 2, 3, 7, 7, 7], [1, 2, 3, 4, 5, 7]]
    assert batch["mask"].astype(int).tolist() == [[0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0]]
    (batch,) = data.packed(examples, 9, 1)
    assert batch["mask"].astype(int).tolist() == [[0, 0, 1, 0, 0, 1, 1, 1, 0]]


def test_held_examples_are_read_again_and_no_others():
    class Counted:
        def __init__(self) -> None:
            self.reads: list[int] = []

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, index: int, /) -> np.ndarray:
            self.reads.append(index)
            return np.ones(1 + index % 5, np.int32)

    first, second = Counted(), Counted()
    loader = data.bucketed(first, (2, 5), 8, shuffle=True)
    list(islice(loader, 80))
    again = data.bucketed(second, (2, 5), 8, shuffle=True)
    again.set_state(loader.get_state())
    held = [index for group in loader.get_state()["source"]["groups"] for index, _ in group]
    assert second.reads == sorted(held)
    assert 0 < len(held) < 14


def packed(examples: Any, length: int = 8, batch_size: int = 2, **options: Any) -> Any:
    return next(iter(data.packed(examples, length, batch_size, **options)))


def bucketed(examples: Any, boundaries: Any = (4, 8), batch_size: Any = 2, **options: Any) -> Any:
    return next(iter(data.bucketed(examples, boundaries, batch_size, **options)))


ROW = np.arange(4)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: packed(iter([ROW])), BatchError, "have a length"),
        (lambda: packed([ROW], 0), ConfigError, "length must be an integer, at least 1; got 0"),
        (lambda: packed([ROW], 4.0), ConfigError, "length must be .* got 4.0"),
        (lambda: packed([np.array([2**31])]), BatchError, "to 2147483648"),
        (
            lambda: packed([(ROW, 1)]),
            BatchError,
            "of type tuple, holds a value that is not an array",
        ),
        (lambda: packed([ROW], open_rows=1), ConfigError, "open_rows must be .* at least 2; got 1"),
        (lambda: packed([ROW], overlong="splt"), ConfigError, "Did you mean 'split'"),
        (lambda: packed([ROW], 3), BatchError, "at most 3 entries; example 0 has 4"),
        (lambda: packed([ROW], remainder="drop"), BatchError, "fill at least one batch"),
        (lambda: packed([ROW * 0.5]), BatchError, "dtype float64"),
        (lambda: packed([{"tokens": ROW[None]}]), BatchError, r"shape \(1, 4\)"),
        (lambda: packed([{"tokens": ROW, "label": 1}]), BatchError, "'label' has the shapes"),
        (lambda: packed([{"tokens": ROW, "positions": ROW}]), BatchError, r"\['positions'\]"),
        (lambda: packed([{"a": ROW}, {"b": ROW}]), BatchError, "one structure"),
        (lambda: packed([{"a": ROW}, {"a": np.ones((4, 2))}]), BatchError, r"'a' has the shapes"),
        (lambda: bucketed([ROW], ()), ConfigError, "increasing lengths"),
        (lambda: bucketed([ROW], (8, 4)), ConfigError, r"\(8, 4\)"),
        (lambda: bucketed([ROW], batch_size=(1, 2, 3)), ConfigError, r"\(1, 2, 3\) for 2"),
        (lambda: bucketed([ROW], batch_size=0), ConfigError, "batch_size must be .* got 0"),
        (lambda: bucketed([ROW], batch_size="2"), ConfigError, "batch_size='2' for 2"),
        (lambda: bucketed([ROW], 4), ConfigError, "got 4"),
        (lambda: bucketed([ROW], (3.9,)), ConfigError, "each of boundaries must be .* got 3.9"),
        (lambda: bucketed([ROW[:3]], pad_value=0.5, batch_size=1), BatchError, "cannot hold 0.5"),
        (lambda: bucketed([ROW[:3]], pad_value=np.nan, batch_size=1), BatchError, "hold nan"),
        (
            lambda: bucketed([{"x": np.ones(3, np.uint8)}], pad_value=-1, batch_size=1),
            BatchError,
            "'x' is uint8",
        ),
        (lambda: bucketed([ROW], overlong="split"), ConfigError, "'split'"),
        (lambda: bucketed([ROW], (2, 3)), BatchError, "at most 3 entries"),
        (lambda: bucketed([{"x": ROW, "y": ROW[1:]}]), BatchError, "'x': 4, 'y': 3"),
        (lambda: bucketed([{"x": 1}]), BatchError, "scalars only"),
        (lambda: bucketed([{"x": ROW, "mask": ROW}]), BatchError, "bool"),
    ],
)
def test_what_is_refused(make, error, said):
    with pytest.raises(error, match=said):
        make()


def test_position_is_refused_by_a_loader_made_otherwise():
    state = data.packed(documents(LENGTHS), 10, 2).get_state()
    for other in (
        data.packed(documents(LENGTHS), 11, 2),
        data.packed(documents(LENGTHS), 10, 2, open_rows=9),
        data.bucketed(documents(LENGTHS), (10,), 2),
    ):
        with pytest.raises(BatchError, match="loader with the same options and data"):
            other.set_state(state)


def test_lists_are_sequences():
    batch = packed([[1, 2], [], [3]], 4, 1)
    assert batch["tokens"].tolist() == [[1, 2, 3, 0]]
    batch = bucketed([{"tokens": [1, 2, 3], "tags": [4, 5, 6]}] * 2)
    assert batch["tags"].tolist() == [[4, 5, 6, 0]] * 2


def test_numbers_of_numpy_are_options():
    for loader in (
        data.packed([ROW] * 8, np.int64(9), np.int32(2), open_rows=np.int64(4)),
        data.bucketed([ROW] * 8, np.array([4, 8]), [np.int64(2), np.int64(2)]),
        data.bucketed([{"x": ROW * 1.0}] * 8, [4], 2, pad_value=float("nan")),
    ):
        state = json.loads(json.dumps(loader.get_state()))
        first = next(iter(loader))
        loader.set_state(state)
        assert_batches_equal([next(iter(loader))], [first])


def test_bucket_that_never_fills_a_batch_is_warned_of():
    documents = [np.arange(3)] * 8 + [np.arange(10)] * 3
    loader = data.bucketed(documents, (4, 16), 4, shuffle=True)
    with pytest.warns(UserWarning, match="omits all 3 examples of the bucket of 16"):
        assert len(list(loader)) == 2
    assert len(list(data.bucketed(documents, (4, 16), (4, 3), shuffle=True))) == 3


def test_parts_do_not_keep_the_whole_in_memory():
    long = np.arange(10_000, dtype=np.int32)
    loader = data.packed([long, ROW], 8, 1, overlong="cut", open_rows=4)
    batch = next(iter(loader))
    assert batch["tokens"].tolist() == [list(range(8))]
    part = parts_of(long, 0, 8, "cut")[0]
    assert part.leaves["tokens"].base is None


@pytest.mark.parametrize("inner", [None, 5])
def test_wrappers_tell_how_many_shapes_there_are(inner):
    class Wrapper(data.MappedLoader):
        if inner is not None:
            num_shapes = inner

    buckets = data.bucketed([np.arange(n) for n in (2, 7, 3, 8)], (4, 8), 2)
    assert data.num_shapes(Wrapper(buckets, dict)) == (inner or 2)
    other = data.bucketed([np.arange(n) for n in (12, 17, 13, 18)], (14, 18), 2)
    both = {"a": buckets, "b": other}
    assert data.num_shapes(data.Mixture(both, {"a": 1, "b": 1}, by="batch")) == 4
    arrays = {name: data.ArrayLoader(np.ones((8, 3)), 2) for name in "ab"}
    assert data.num_shapes(data.Mixture(arrays, {"a": 1, "b": 1}, by="batch")) == 1
