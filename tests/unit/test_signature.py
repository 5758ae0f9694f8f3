"""Signatures: exactly the leaves that changed are named, with what they were and what they are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff.execution.compile.signature import difference, signature
from distaff.execution.feed.chunk import Gathered, One, Stacked

DTYPES = (np.float32, np.int32, np.uint8, np.bool_)
leaves = st.tuples(st.lists(st.integers(1, 3), max_size=3), st.sampled_from(DTYPES))
trees = st.dictionaries(st.sampled_from("abcdef"), leaves, min_size=1)


def of(tree: Any) -> Any:
    return signature({"state": {n: np.zeros(shape, dtype) for n, (shape, dtype) in tree.items()}})


@settings(deadline=None)
@given(trees, trees)
def test_difference_names_exactly_the_leaves_that_changed(old, new):
    changed = {f"state/{name}" for name in old | new if old.get(name) != new.get(name)}
    found = difference([of(old)], of(new))
    assert set(found.leaves) == changed
    for name in found.leaves[:4]:
        assert name in found.text
    assert not found.is_resized


def text(old: Any, new: Any, name: str = "batch") -> str:
    return difference([signature({name: old})], signature({name: new})).text


def test_text_says_shape_dtype_and_weak_type():
    old, new = np.zeros((64, 8), np.float32), np.zeros((37, 8), np.float32)
    assert text({"image": old}, {"image": new}) == (
        "batch/image was float32[64,8], is float32[37,8]"
    )
    assert text(old, old.astype(np.int32)) == "batch was float32[64,8], is int32[64,8]"
    assert text(jnp.float32(1), jnp.asarray(1.0)) == (
        "batch was float32[], is float32[] (weakly typed)"
    )
    assert text({"x": old}, {"x": old, "y": 1.0}) == ("batch/y is new: float32[] (weakly typed)")
    assert text({"x": old, "y": new}, {"x": old}) == "batch/y is missing: it was float32[37,8]"
    many = dict.fromkeys("abcdef", old)
    assert text(many, dict.fromkeys(many, new)).endswith("; and 2 more")


def test_dtypes_that_jax_narrows_alike_are_no_difference():
    wide, narrow = np.zeros(2, np.float64), jnp.zeros(2, jnp.float32)
    assert "all arguments are the same as" in text(wide, narrow)
    assert "all arguments are the same as" in text(jax.random.key(0), jax.random.key(1))
    assert "key<fry>[]" in text(jax.random.key(0), jnp.zeros(2))


def test_text_says_where_an_array_is():
    one, other = jax.devices()[:2]
    free = jnp.ones(2)
    assert text(free, jax.device_put(free, one)).startswith(
        "batch was on JAX's default device, is on SingleDeviceSharding("
    )
    assert "id=1" in text(jax.device_put(free, one), jax.device_put(free, other))
    assert (
        "device_put"
        in difference(
            [signature({"batch": free})], signature({"batch": jax.device_put(free, one)})
        ).remedy
    )


def test_array_that_was_given_away_is_known():
    program = jax.jit(lambda x: x + 1, donate_argnums=0)
    given_away = jnp.ones((2, 3))
    program(given_away)
    assert given_away.is_deleted()
    assert text(given_away, jnp.ones((2, 4))) == "batch was float32[2,3], is float32[2,4]"


def test_tree_that_changed_around_the_same_leaves_is_named():
    found = difference([signature({"state": [1, 2]})], signature({"state": (1, 2)}))
    assert "tree structure differs" in found.text
    assert "tx" in found.remedy


def test_nearest_signature_is_the_one_that_is_compared_with():
    earlier = [
        signature({"batch": {"x": np.zeros(a, np.float32), "y": np.zeros(b, np.float32)}})
        for a, b in ((1, 2), (5, 6), (7, 8))
    ]
    now = signature({"batch": {"x": np.zeros(5, np.float32), "y": np.zeros(9, np.float32)}})
    assert difference(earlier, now).text == "batch/y was float32[6], is float32[9]"


def images(size: int, length: int = 8) -> dict[str, np.ndarray]:
    return {"image": np.zeros((size, length), np.float32), "label": np.zeros(size, np.int32)}


def stacked(size: int, length: int = 8) -> Stacked:
    return Stacked(jax.tree.map(lambda leaf: np.stack([leaf] * 4), images(size, length)))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (One(images(6)), One(images(5)), "batch/image was float32[6,8], is float32[5,8]"),
        (stacked(6), stacked(5), "batches/image was float32[4,6,8], is float32[4,5,8]"),
        (
            Gathered(images(9), np.zeros((4, 6), np.int32)),
            Gathered(images(9), np.zeros((4, 5), np.int32)),
            "rows was int32[4,6], is int32[4,5]",
        ),
    ],
)
def test_batches_of_another_size_are_recognised(old, new, expected):
    for one, other in ((old, new), (new, old)):
        found = difference([signature({"source": one})], signature({"source": other}))
        assert found.is_resized
        assert "remainder='drop'" in found.remedy
    assert difference([signature({"source": old})], signature({"source": new})).text.startswith(
        expected
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (One(images(6)), One(images(6, 7))),
        (One(images(6)), One(images(5, 7))),
        (stacked(6), stacked(6, 7)),
        (One(images(6)), One({**images(5), "mask": np.zeros(5)})),
        (One(images(6)), One({n: v.astype(np.uint8) for n, v in images(5).items()})),
    ],
)
def test_other_changes_of_a_batch_are_no_resizing(old, new):
    assert not difference([signature({"source": old})], signature({"source": new})).is_resized
