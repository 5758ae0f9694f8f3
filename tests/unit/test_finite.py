"""Finite checks and fingerprints: the same answers from NumPy and from programs on the device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff import TrainState
from distaff.step import finite
from distaff.step.finite import all_finite, evidence_of_learning, what_is_missing


@pytest.fixture(params=["numpy", "device"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On the CPU, NumPy reads all arrays; large ones of an accelerator are read by programs."""
    if request.param == "device":
        monkeypatch.setattr(finite, "are_near", lambda leaves: not leaves)
    return request.param


@pytest.mark.parametrize(("bad", "found"), [(1.0, True), (jnp.nan, False), (-jnp.inf, False)])
def test_all_finite_looks_at_every_float_and_at_nothing_else(bad, found):
    tree = {"ok": jnp.ones(2), "key": jax.random.key(0), "int": jnp.arange(2), "x": jnp.array(bad)}
    assert all_finite(tree) is found
    tree = {**tree, "half": jnp.zeros((0, 3), jnp.bfloat16), "complex": jnp.ones(2, jnp.complex64)}
    assert all_finite(tree) is found


def state_of(params: Any) -> TrainState:
    return TrainState.create(params=params, tx=optax.adamw(0.1))


DTYPES = ["float16", "bfloat16", "float32", "complex64", "float8_e4m3fn"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_fingerprints_change_with_any_one_element_and_are_0_for_zeros(dtype):
    values = jnp.arange(24, dtype=jnp.float32).reshape(2, 3, 4).astype(dtype)
    changed = [values.at[index].set(100) for index in np.ndindex(2, 3, 4)]
    arrays = [values, *changed, values.T.reshape(2, 3, 4), jnp.zeros_like(values)]
    found = finite._fingerprints(arrays)
    assert found.dtype == np.uint32
    assert len({*found.tolist()}) == len(arrays)
    assert found[-1] == 0
    assert (finite._fingerprints(arrays) == found).all()


def test_fingerprints_of_64_bits_change_with_their_last_ones():
    with jax.enable_x64():
        one = jnp.float64(1)
        first, second = finite._fingerprints([one, jnp.nextafter(one, 2)])
    assert first != second


def test_a_missing_sign_of_learning_is_named():
    state = state_of({"w": jnp.ones((2, 3)), "b": jnp.zeros(3), "none": jnp.zeros((0,))})
    before = evidence_of_learning(state)
    assert what_is_missing(before, before) == "No parameter has changed"
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    decayed = evidence_of_learning(state.apply_gradients(grads=zeros))
    assert what_is_missing(before, decayed) == "Every gradient has been zero"
    ones = jax.tree.map(jnp.ones_like, state.params)
    assert what_is_missing(before, evidence_of_learning(state.apply_gradients(grads=ones))) == ""
    nothing = evidence_of_learning(state_of({}))
    assert what_is_missing(nothing, nothing) == ""


def test_arrays_of_several_devices_are_read(way: str):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    values = jnp.arange(32.0).reshape(8, 4)
    spread = jax.device_put(values, rows)
    assert finite._fingerprints([spread]) == finite._fingerprints([values])
    assert all_finite([spread])
    assert not all_finite([spread.at[7, 3].set(jnp.nan)])


def test_small_arrays_of_an_accelerator_are_fetched_and_large_ones_are_not(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.undo()
    leaves = [jnp.zeros(2**10)]
    assert finite.are_near(leaves)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert finite.are_near(leaves)
    monkeypatch.setattr(finite, "_SMALL_BYTES", 2**11)
    assert not finite.are_near(leaves)
