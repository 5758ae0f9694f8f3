from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff import data
from distaff.errors import BatchError, ConfigError


def rows(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int32)


def place(stream: data.Stream) -> tuple[int, int]:
    state = stream.get_state()
    return state["epoch"], state["batch"]


def values(batches: Iterable[np.ndarray], count: int | None = None) -> list[list[int]]:
    return [batch.tolist() for batch in itertools.islice(batches, count)]


SIZES = st.tuples(st.integers(1, 40), st.integers(1, 12))
SEEDS = st.integers(0, 2**32)
QUICK = settings(deadline=None, max_examples=50)


@QUICK
@given(sizes=SIZES, seed=SEEDS, shuffle=st.booleans())
def test_array_loader_keep_yields_every_example_once(sizes, seed, shuffle):
    examples, batch_size = sizes
    loader = data.ArrayLoader(
        rows(examples), batch_size, shuffle=shuffle, seed=seed, remainder="keep"
    )
    for _ in range(2):
        batches = values(loader)
        assert sorted(itertools.chain(*batches)) == list(range(examples))
        assert len(batches) == len(loader)
        assert all(len(batch) == batch_size for batch in batches[:-1])


@QUICK
@given(seed=SEEDS)
def test_array_loader_order_is_new_in_each_epoch_and_equal_for_equal_seeds(seed):
    def orders(seed: int) -> list[list[list[int]]]:
        loader = data.ArrayLoader(rows(64), 64, shuffle=True, seed=seed)
        return [values(loader) for _ in range(3)]

    first, second, third = orders(seed)
    assert first != second != third != first
    assert orders(seed) == [first, second, third]
    assert orders(seed + 1)[0] != first


@QUICK
@given(sizes=SIZES, seed=SEEDS, position=st.integers(0, 60))
def test_array_loader_resumed_anywhere_equals_uninterrupted(sizes, seed, position):
    def make() -> data.ArrayLoader:
        examples, batch_size = sizes
        return data.ArrayLoader(
            rows(examples), batch_size, shuffle=True, seed=seed, remainder="keep"
        )

    def endless(loader: data.ArrayLoader) -> Iterator[np.ndarray]:
        while True:
            yield from loader

    whole = values(endless(make()), position + 50)
    stopped, resumed = make(), make()
    values(endless(stopped), position)
    resumed.set_state(stopped.get_state())
    assert values(endless(resumed), 50) == whole[position:]


def test_array_loader_set_state_does_not_read_earlier_epochs(monkeypatch):
    loader = data.ArrayLoader(rows(8), 2, shuffle=True)
    expected = data.ArrayLoader(rows(8), 2, shuffle=True)
    for _ in range(5):
        list(expected)
    made = []
    order = loader._order
    monkeypatch.setattr(loader, "_order", lambda epoch: made.append(epoch) or order(epoch))
    loader.set_state({**loader.get_state(), "epoch": 5, "batch": 1})
    assert values(loader) == values(expected)[1:]
    assert made == [5]


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        ({}, [4, 4, 2]),
        ({"shuffle": True}, [4, 4]),
        ({"shuffle": True, "remainder": "keep"}, [4, 4, 2]),
        ({"remainder": "drop"}, [4, 4]),
    ],
)
def test_array_loader_remainder_is_dropped_when_shuffled_unless_told(options, lengths):
    loader = data.ArrayLoader(rows(10), 4, **options)
    assert [len(batch) for batch in loader] == lengths
    assert len(loader) == len(lengths)


def test_array_loader_break_begins_a_new_order_but_state_stays_at_the_break():
    loader = data.ArrayLoader(rows(30), 3, shuffle=True)
    uninterrupted = data.ArrayLoader(rows(30), 3, shuffle=True)
    first, second = values(uninterrupted), values(uninterrupted)
    assert values(loader, 4) == first[:4]
    state = loader.get_state()
    assert (state["epoch"], state["batch"]) == (0, 4)
    data.first_batch(loader)
    assert loader.get_state() == state
    assert values(loader) == second


def test_array_loader_holds_64_bit_numbers_in_32_bits():
    arrays = {"x": np.zeros(4), "y": np.zeros(4, np.int64), "z": np.zeros(4, np.uint8)}
    batch = data.first_batch(data.ArrayLoader(arrays, 2))
    assert {name: leaf.dtype.name for name, leaf in batch.items()} == {
        "x": "float32",
        "y": "int32",
        "z": "uint8",
    }


EDGES = st.sampled_from([0, -(2**31), 2**31 - 1, -(2**31) - 1, 2**31, 2**32 - 1, 2**32])


@given(
    values=st.lists(EDGES | st.integers(-(2**63), 2**63 - 1), min_size=1), unsigned=st.booleans()
)
def test_array_loader_holds_integers_as_they_are_or_refuses_them(values, unsigned):
    array = np.array(values).astype(np.uint64 if unsigned else np.int64)
    limits = np.iinfo(np.uint32 if unsigned else np.int32)
    if limits.min <= int(array.min()) and int(array.max()) <= limits.max:
        loader = data.ArrayLoader({"id": array}, len(values))
        assert data.first_batch(loader)["id"].tolist() == array.tolist()
        return
    with pytest.raises(BatchError, match=f"'id' has values from {array.min()} to {array.max()}"):
        data.ArrayLoader({"id": array}, len(values))


@pytest.mark.parametrize(
    ("arrays", "options", "error", "message"),
    [
        (
            rows(3),
            {"batch_size": 8, "remainder": "drop"},
            BatchError,
            "3 examples, batch_size is 8",
        ),
        (rows(0), {"batch_size": 8}, BatchError, "hold at least one example"),
        (rows(3), {"batch_size": 0}, ConfigError, "batch_size must be .* got 0"),
        (rows(3), {"batch_size": 1.0}, ConfigError, "batch_size must be .* got 1.0"),
        (rows(3), {"batch_size": 1, "seed": -1}, ConfigError, "seed must be .* got -1"),
        (
            rows(3),
            {"batch_size": 1, "seed": None},
            ConfigError,
            "seed must be .* got None",
        ),
        (rows(3), {"batch_size": 1, "remainder": "kep"}, ConfigError, "Did you mean 'keep'"),
        ({"x": rows(3), "y": rows(4)}, {"batch_size": 1}, BatchError, r"'y' has shape \(4,\)"),
    ],
)
def test_array_loader_refuses_bad_arguments(arrays, options, error, message):
    with pytest.raises(error, match=message):
        data.ArrayLoader(arrays, **options)


@pytest.mark.parametrize("other", [{"seed": 1}, {"batch_size": 3}, {"remainder": "keep"}])
def test_array_loader_refuses_the_state_of_another_order(other):
    options: dict[str, Any] = {"batch_size": 2, "shuffle": True}
    state = data.ArrayLoader(rows(9), **options).get_state()
    loader = data.ArrayLoader(rows(9), **(options | other))
    with pytest.raises(BatchError, match=r"saved: .*'batch_size': 2.*this loader"):
        loader.set_state(state)


@pytest.mark.parametrize("position", [{"batch": 6}, {"batch": -1}, {"epoch": -1}])
def test_array_loader_refuses_a_position_outside_the_epoch(position):
    loader = data.ArrayLoader(rows(9), 2)
    with pytest.raises(BatchError, match="has 5 batches"):
        loader.set_state({**loader.get_state(), **position})


def test_num_examples_reads_only_shape_and_dtype():
    batch = {
        "numpy": np.zeros((6, 2)),
        "jax": (jnp.zeros((6,), jnp.bfloat16), jax.random.split(jax.random.key(0), 6)),
        "abstract": jax.ShapeDtypeStruct((6, 3), np.float32),
    }
    assert data.num_examples(batch) == 6
    assert jax.jit(lambda x: x * data.num_examples(x))(rows(4)).tolist() == [0, 4, 8, 12]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"image": np.zeros((4, 8)), "deep": {"label": rows(3)}},
            "'image' has shape (4, 8), 'deep/label' has shape (3,)",
        ),
        ({}, "got dict without leaves"),
        ({"x": rows(3), "scale": np.float32(1)}, "'scale' is a scalar"),
        ({"x": rows(3), "y": [1, 2, 3]}, "'y/0' is of type int"),
        ({"x": rows(3), "name": np.array(["a", "b", "c"])}, "'name' has dtype <U1"),
        ({"x": rows(3), "any": np.array([{}, 1, "c"], object)}, "'any' has dtype object"),
    ],
)
def test_num_examples_names_the_offending_leaf(batch, message):
    with pytest.raises(BatchError, match=re.escape(message)):
        data.num_examples(batch)


def test_stream_copies_a_buffer_that_is_filled_again():
    def refill() -> Iterator[np.ndarray]:
        buffer = np.empty(1, np.int32)
        for value in range(3):
            buffer[:] = value
            yield buffer

    assert values(list(data.Stream(refill))) == [[0], [1], [2]]


def test_stream_peek_copies_too():
    array = rows(3)
    assert not np.shares_memory(data.first_batch(data.Stream([array])), array)


def test_stream_hands_out_jax_arrays_as_they_are():
    array = jnp.zeros(3)
    assert next(iter(data.Stream([array]))) is array


def test_stream_one_shot_iterator_has_one_epoch_that_a_break_does_not_lose():
    stream = data.Stream(iter([rows(1), rows(2), rows(3)]))
    assert values([data.first_batch(stream)]) == [[0]]
    assert values(stream, 1) == [[0]]
    assert values(stream) == [[0, 1], [0, 1, 2]]
    assert place(stream) == (1, 0)
    with pytest.raises(BatchError, match=r"only once.*list.*generator.*steps_per_epoch"):
        next(iter(stream))


def test_stream_peek_in_the_middle_and_at_the_end_of_an_epoch_takes_nothing_from_it():
    stream = data.Stream([rows(1), rows(2)])
    running = iter(stream)
    seen = []
    for expected in ([0], [0, 1], [0]):
        assert data.first_batch(stream).tolist() == data.first_batch(stream).tolist() == expected
        seen += values(running, 1)
    assert seen == [[0], [0, 1]]
    assert place(stream) == (1, 0)
    next(iter(stream))
    data.first_batch(stream)
    assert values(stream) == seen


def test_stream_function_must_return_batches():
    with pytest.raises(BatchError, match="returned NoneType"):
        list(data.Stream(lambda: None))  # ty: ignore[invalid-argument-type]  the error under test


def test_stream_set_state_refuses_what_it_cannot_reach():
    stream = data.Stream([rows(1), rows(2)])
    with pytest.raises(BatchError, match=r"ends at .* = \(1, 2\), before .* \(1, 3\)"):
        stream.set_state({"epoch": 1, "batch": 3})
    with pytest.raises(BatchError, match=r"cannot go back from .* \(2, 0\) to \(0, 1\)"):
        stream.set_state({"epoch": 0, "batch": 1})
    with pytest.raises(BatchError, match="another kind of loader"):
        stream.set_state(data.ArrayLoader(rows(2), 1).get_state())
    with pytest.raises(BatchError, match=r"ends at .* \(0, 0\)"):
        data.Stream([]).set_state({"epoch": 0, "batch": 1})


def test_num_batches_is_none_where_the_length_is_unknown():
    assert data.num_batches(data.Stream(iter([rows(1)]))) is None
    assert data.num_batches(data.Stream([rows(1), rows(2)])) == 2
    assert data.num_batches(data.Stream(lambda: [rows(1)], length=1)) == 1


def test_as_loader_keeps_a_loader_and_wraps_other_iterables():
    loader = data.ArrayLoader(rows(2), 1)
    assert data.as_loader(loader) is loader
    assert values(data.as_loader([rows(1), rows(2)])) == [[0], [0, 1]]
    assert values(data.as_loader(lambda: (rows(n) for n in (1, 2)))) == [[0], [0, 1]]


@pytest.mark.parametrize(
    "wrong", [3, "path", rows(4), {"x": rows(4)}, (rows(4), rows(4)), jnp.zeros(4)]
)
def test_as_loader_names_array_loader_for_what_is_no_loader(wrong):
    with pytest.raises(BatchError, match=r"train loader .*data\.ArrayLoader"):
        data.as_loader(wrong, name="train")


class Bare:
    """A loader without `peek` and `len`, whose state is a plain count."""

    def __init__(self, length: int) -> None:
        self.length, self.done, self.start = length, 0, 0

    def __iter__(self) -> Iterator[np.ndarray]:
        for batch in range(self.start, self.length):
            self.start, self.done = 0, batch + 1
            yield rows(batch + 1)
        self.start = self.done = 0

    def get_state(self) -> dict[str, int]:
        return {"done": self.done}

    def set_state(self, state) -> None:
        self.start = self.done = state["done"]


@pytest.mark.parametrize("done", [0, 1, 2])
def test_first_batch_leaves_a_loader_without_peek_where_it_is(done):
    loader = Bare(2)
    loader.set_state({"done": done})
    assert len(data.first_batch(loader)) == done % 2 + 1
    assert loader.get_state() == {"done": done}
    assert len(list(loader)) == 2 - done


@pytest.mark.parametrize("make", [lambda: Bare(0), lambda: data.Stream([])])
@pytest.mark.parametrize("steps", [None, 2])
def test_empty_loader_is_refused_by_name(make, steps):
    with pytest.raises(BatchError, match="The val loader must yield at least one"):
        data.first_batch(make(), name="val")
    with pytest.raises(BatchError, match="The val loader must yield at least one"):
        list(data.epoch_of(make(), steps, name="val"))


def test_epoch_of_runs_until_the_loader_is_exhausted():
    loader = data.Stream([rows(1), rows(2)])
    assert [values(data.epoch_of(loader)) for _ in range(2)] == [[[0], [0, 1]]] * 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: iter([rows(n) for n in (1, 2, 3, 1, 2, 3)]),
        lambda: [rows(n) for n in (1, 2, 3)],
        lambda: map(rows, itertools.cycle((1, 2, 3))),
    ],
    ids=["one-shot", "list", "infinite"],
)
def test_epoch_of_steps_goes_on_and_starts_again(make):
    loader = data.as_loader(make())
    epochs = [[len(batch) for batch in data.epoch_of(loader, 2)] for _ in range(3)]
    assert epochs == [[1, 2], [3, 1], [2, 3]]


def test_epoch_of_steps_beyond_one_epoch_of_an_array_loader():
    loader = data.ArrayLoader(rows(3), 1)
    epochs = [values(data.epoch_of(loader, 4)) for _ in range(2)]
    assert epochs == [[[0], [1], [2], [0]], [[1], [2], [0], [1]]]


def test_epoch_of_resumes_behind_the_last_batch_with_an_empty_rest():
    for make in (lambda: data.ArrayLoader(rows(2), 1), lambda: data.Stream([rows(1), rows(1)])):
        stopped, resumed = make(), make()
        values(stopped, 2)
        resumed.set_state(stopped.get_state())
        assert len(data.first_batch(resumed)) == 1
        assert values(data.epoch_of(resumed)) == []
        assert len(values(data.epoch_of(resumed))) == 2


def test_epoch_of_refuses_fewer_than_one_step():
    with pytest.raises(ConfigError, match="got 0"):
        next(data.epoch_of(data.Stream([rows(1)]), 0))


def test_digits_split_is_fixed_stratified_and_whole():
    parts = data.digits(batch_size=32, seed=0)
    assert [part.num_examples for part in parts] == [1257, 180, 360]
    for part in parts:
        share = np.bincount(part.arrays["label"]) / part.num_examples
        assert np.all(np.abs(share - 0.1) < 0.01)
    images = [image.tobytes() for part in parts for image in part.arrays["image"]]
    assert len(set(images)) == 1797
    other = data.digits(batch_size=32, seed=1)
    for part, same in zip(parts, other, strict=True):
        np.testing.assert_array_equal(part.arrays["label"], same.arrays["label"])
    assert (
        data.first_batch(parts[0])["label"].tolist() != data.first_batch(other[0])["label"].tolist()
    )
    assert zlib.crc32(parts[2].arrays["label"].tobytes()) == 2847544504


def test_digits_batches_have_the_stated_form():
    train, val, test = data.digits(batch_size=64)
    batch = data.first_batch(train)
    assert (batch["image"].shape, batch["image"].dtype) == ((64, 8, 8, 1), np.float32)
    assert (batch["label"].shape, batch["label"].dtype) == ((64,), np.int32)
    assert (train.arrays["image"].min(), train.arrays["image"].max()) == (0.0, 1.0)
    assert [len(loader) for loader in (train, val, test)] == [19, 3, 6]
    assert sum(len(batch["label"]) for batch in test) == 360


@pytest.mark.parametrize("batch", [0, 1, 2, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_skipped_epoch_ends_where_a_read_one_does(batch, shuffle):
    read, skipped = (
        data.ArrayLoader({"x": rows(5)}, 2, shuffle=shuffle, remainder="keep") for _ in range(2)
    )
    for loader in (read, skipped):
        loader.set_state({**loader.get_state(), "epoch": 4, "batch": batch})
    passed = list(read.rows()) or list(read.rows())
    assert skipped.num_left() == len(passed)
    skipped.skip_epoch()
    assert skipped.get_state() == read.get_state()
    for one, other in zip(read, skipped, strict=True):
        np.testing.assert_array_equal(one["x"], other["x"])
