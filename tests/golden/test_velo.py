"""Pins VeLO to trajectories of the original implementation: see velo/README.md."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff.optim import learned

GOLDEN = Path(__file__).parent / "velo"


def loss_fn(params, target):
    return sum(
        jnp.square(leaf - target[name]).mean() + 0.1 * jnp.sin(3 * leaf).mean()
        for name, leaf in params.items()
    )


def named(arrays, prefix):
    return {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}


def assert_close(found, expected):
    # The absolute term, the precision of an entry of 1, is for single entries near zero.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow_but("small_fixed")
@pytest.mark.parametrize("name", ["small", "small_fixed"])
def test_velo_follows_the_original(name, strict_dtypes):
    settings = json.loads((GOLDEN / name / "settings.json").read_text())
    tx = learned.velo(GOLDEN / name, settings["num_steps"])
    golden = np.load(GOLDEN / name / "trajectory.npz")
    target, params = named(golden, "target/"), named(golden, "params0/")

    @jax.jit
    def update(params, opt_state):
        value, grads = jax.value_and_grad(loss_fn)(params, target)
        updates, opt_state = tx.update(grads, opt_state, params, value=value)
        return optax.apply_updates(params, updates), opt_state, value, grads

    opt_state, compared = tx.init(params), 0
    for step in range(1, settings["steps"] + 1):
        params, opt_state, value, grads = update(params, opt_state)
        np.testing.assert_allclose(value, golden["losses"][step - 1], rtol=1e-6)
        for leaf in named(golden, f"params{step}/"):
            assert_close(params[leaf], golden[f"params{step}/{leaf}"])
            assert_close(grads[leaf], golden[f"grads{step}/{leaf}"])
            compared += 1
    assert compared == 20


def test_velo_has_the_shapes_of_the_released_network():
    expected = json.loads((GOLDEN / "full_size_shapes.json").read_text())
    shapes = learned.weight_shapes(learned.RELEASED)
    assert {"/".join(path): list(shape) for path, shape in shapes.items()} == expected
    weights = learned.init_weights(learned.RELEASED)
    assert sum(array.size for array in weights.arrays.values()) == 2_320_385
