"""Fingerprints of batches, and the streams that verify what they read again."""

from __future__ import annotations

import itertools
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from distaff import data
from distaff.data.examples.fingerprint import fingerprint
from distaff.errors import BatchError, ChangedBatchesError

QUICK = settings(deadline=None, max_examples=100)
NUMBERS = st.sampled_from(["uint8", "int32", "float16", "float32", "float64", "complex64", "bool"])
SHAPES = arrays.array_shapes(max_dims=4, max_side=4)  # of 2 KiB at most


def flipped(array: np.ndarray, byte: int) -> np.ndarray:
    """Returns the array with one bit of a byte changed."""
    changed = np.ascontiguousarray(array).copy()
    changed.reshape(-1).view(np.uint8)[byte] ^= 1
    return changed


@QUICK
@given(array=arrays.arrays(NUMBERS, SHAPES), place=st.integers(0))
def test_fingerprint_changes_with_any_byte_of_a_small_leaf(array, place):
    other = flipped(array, place % array.nbytes)
    assert fingerprint({"x": array}) == fingerprint({"x": array.copy()})
    assert fingerprint({"x": array}) != fingerprint({"x": other})
    assert fingerprint({"x": array, "y": array}) != fingerprint({"x": array, "y": other})


@QUICK
@given(size=st.integers(4097, 50_000), piece=st.integers(0, 30), offset=st.integers(0, 127))
def test_fingerprint_changes_with_any_byte_of_31_spread_pieces_of_a_large_leaf(size, piece, offset):
    leaf = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    assert fingerprint(leaf) != fingerprint(flipped(leaf, piece * (size // 31) + offset))


@pytest.mark.parametrize("batch_size", [1, 8, 16, 64, 100, 256])
def test_fingerprint_sees_pictures_of_one_border_in_another_order(batch_size):
    images = np.zeros((batch_size, 64, 64, 3), np.float32)
    images[:, 8:-8, 8:-8] = np.random.default_rng(0).normal(size=(batch_size, 48, 48, 3))
    assert fingerprint(images) != fingerprint(images[::-1, :, ::-1])


@QUICK
@given(
    array=arrays.arrays(NUMBERS, SHAPES),
    other_shape=SHAPES,
    other_dtype=NUMBERS,
    other_name=st.sampled_from(["x", "y"]),
)
def test_fingerprint_changes_with_name_shape_and_dtype(array, other_shape, other_dtype, other_name):
    array = np.zeros_like(array)
    other = np.zeros(other_shape, other_dtype)
    same = (array.shape, array.dtype.name, "x") == (other_shape, other_dtype, other_name)
    assert (fingerprint({"x": array}) == fingerprint({other_name: other})) == same


def test_fingerprint_of_a_row_of_batches_depends_on_each_and_on_their_order():
    batches = [np.arange(4) + start for start in range(3)]

    def of_all(order: Any) -> int:
        checksum = 0
        for index in order:
            checksum = fingerprint(batches[index], checksum)
        return checksum

    assert len({of_all(order) for order in itertools.permutations(range(3))}) == 6


def test_fingerprint_of_jax_arrays_on_the_cpu_is_that_of_their_values():
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    assert fingerprint({"x": jnp.asarray(values)}) == fingerprint({"x": values})
    mesh = jax.make_mesh((2,), ("batch",), devices=jax.devices()[:2])
    sharding = jax.NamedSharding(mesh, jax.P("batch"))
    assert fingerprint({"x": jax.device_put(values, sharding)}) == fingerprint({"x": values})


class OnAccelerator:
    platform = "gpu"


def test_fingerprint_takes_jax_arrays_by_their_form_that_it_cannot_read_at_once(monkeypatch):
    gone, other = jnp.ones(4), jnp.ones(4)
    gone.delete(), other.delete()
    assert fingerprint({"x": gone}) == fingerprint({"x": other})
    keys = jax.random.split(jax.random.key(0), 4)
    assert fingerprint(keys) == fingerprint(jax.random.split(jax.random.key(1), 4))
    assert fingerprint(keys) != fingerprint(jax.random.key_data(keys))
    monkeypatch.setattr(type(jnp.ones(1)), "devices", lambda array: {OnAccelerator()})
    assert fingerprint({"x": jnp.zeros(4)}) == fingerprint({"x": jnp.ones(4)})
    assert fingerprint({"x": jnp.zeros(4)}) != fingerprint({"x": jnp.zeros(5)})


Pair = namedtuple("Pair", "image label")


@pytest.mark.parametrize(
    "batch",
    [
        Pair(np.zeros((4, 2)), [np.zeros(4), None]),
        {
            "text": np.array(["a", "bc"]),
            "any": np.array([{}, 1], object),
            "empty": np.zeros((0, 3)),
        },
        {"deep": ({"number": 3}, 2.5, "text", np.float32(1))},
        jnp.zeros((2, 2), jnp.bfloat16),
        np.zeros((3000, 2), jnp.bfloat16),
        np.ma.masked_array(np.arange(3), [0, 1, 0]),
        np.zeros((4, 0)),
        np.asfortranarray(np.zeros((40, 60))).T[::2],
        {},
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_stream_takes_batches_of_any_kind(batch):
    stream, again = data.Stream([batch, batch]), data.Stream([batch, batch])
    next(iter(stream))
    again.set_state(stream.get_state())
    assert again.get_state() == stream.get_state()
    assert len(list(again)) == 1


def shuffling(seed: int | None, num_batches: int = 5) -> Callable[[], Iterator[np.ndarray]]:
    """Returns a function whose every call, an epoch, has another order."""
    rng = np.random.default_rng(seed)

    def batches() -> Iterator[np.ndarray]:
        for order in np.split(rng.permutation(num_batches * 8), num_batches):
            yield order.astype(np.float32)

    return batches


def after(source: Any, epochs: int, num_batches: int) -> data.Stream:
    """Returns a stream of which some epochs and batches have been taken."""
    stream = data.Stream(source)
    for _ in range(epochs):
        list(stream)
    list(itertools.islice(stream, num_batches))
    return stream


@pytest.mark.parametrize(("epochs", "num_batches"), [(0, 1), (0, 5), (1, 0), (1, 3), (3, 0)])
def test_stream_refuses_to_go_on_with_other_batches_and_says_what_to_do(epochs, num_batches):
    state = after(shuffling(1), epochs, num_batches).get_state()
    data.Stream(shuffling(1)).set_state(state)
    stream = data.Stream(shuffling(2))
    with pytest.raises(
        ChangedBatchesError,
        match=r"must yield the same batches .*this function yields others.*Seed.*data\.ArrayLoader"
        r".*get_state and set_state.*allow_inexact_resume=True",
    ):
        stream.set_state(state)
    stream.set_state(stream.get_state())
    assert len(list(stream)) == 5 - num_batches


def test_stream_of_other_jax_arrays_is_refused():
    def batches(seed: int) -> list[jax.Array]:
        return [jnp.asarray(batch) for batch in shuffling(seed)()]

    state = after(batches(1), 0, 2).get_state()
    data.Stream(batches(1)).set_state(state)
    with pytest.raises(ChangedBatchesError):
        data.Stream(batches(2)).set_state(state)


@pytest.mark.parametrize(("epochs", "num_batches"), [(0, 0), (0, 2), (1, 0), (2, 3)])
def test_stream_takes_a_position_that_was_saved_without_a_fingerprint(epochs, num_batches):
    state = after(shuffling(1), epochs, num_batches).get_state()
    del state["fingerprint"]
    stream = data.Stream(shuffling(2))
    stream.set_state(state)
    assert {**stream.get_state(), **state} == stream.get_state()


def test_stream_verifies_all_batches_of_the_epoch_and_not_the_last_alone():
    batches = [np.full(3, float(n)) for n in range(4)]
    state = after(batches, 0, 3).get_state()
    with pytest.raises(ChangedBatchesError):
        data.Stream([batches[1], batches[0], *batches[2:]]).set_state(state)
    data.Stream([*batches[:3], np.zeros(3)]).set_state(state)  # which was not seen yet


def test_stream_of_a_one_shot_iterator_is_verified():
    batches = [np.full(3, float(n)) for n in range(4)]
    state = after(iter(batches), 0, 2).get_state()
    resumed = data.Stream(iter(batches))
    resumed.set_state(state)
    assert [batch[0] for batch in resumed] == [2, 3]
    with pytest.raises(ChangedBatchesError, match="list_iterator"):
        data.Stream(iter(batches[1:])).set_state(state)


def test_stream_of_which_an_epoch_was_abandoned_goes_on():
    batches = [np.full(3, float(n)) for n in range(4)]
    stream = after(batches, 1, 2)
    next(iter(stream))
    resumed = data.Stream(lambda: iter(batches))
    resumed.set_state(stream.get_state())
    assert resumed.get_state() == stream.get_state()


def test_stream_set_to_where_it_is_reads_nothing():
    taken = []

    def source() -> Iterator[np.ndarray]:
        for number in range(4):
            taken.append(number)
            yield np.full(2, float(number))

    stream = after(source, 0, 2)
    stream.set_state(stream.get_state())
    assert taken == [0, 1]
    with pytest.raises(ChangedBatchesError):
        stream.set_state({**stream.get_state(), "fingerprint": 1})


@pytest.mark.parametrize("kind", [list, tuple])
def test_stream_of_a_list_goes_to_any_epoch_at_once(kind):
    batches = kind(np.full(3, float(n)) for n in range(4))
    far = {**after(batches, 1, 2).get_state(), "epoch": 10**12}
    stream = data.Stream(batches)
    stream.set_state(far)
    assert stream.get_state() == far
    assert [batch[0] for batch in stream] == [2, 3]
    assert len(list(stream)) == 4
    end = {**after(batches, 1, 0).get_state(), "epoch": 2 * 10**12}
    stream.set_state(end)
    assert stream.get_state() == end
    with pytest.raises(BatchError, match=r"ends at .*, 4\), before .* 10000000"):
        data.Stream(batches).set_state({"epoch": 10**12, "batch": 10**12})
    with pytest.raises(BatchError, match=r"ends at .* \(0, 0\)"):
        data.Stream(kind()).set_state({"epoch": 10**12, "batch": 0})
