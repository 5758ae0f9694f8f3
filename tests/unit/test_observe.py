from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff import OptimizerConfig, TrainState
from distaff.data import ArrayLoader
from distaff.errors import StateError
from distaff.optim import build_optimizer, geometry, observed
from distaff.tasks import Classifier
from distaff.zoo import MLP

PARAMS = {"kernel": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "bias": jnp.ones(3)}
GRADS = {"kernel": jnp.linspace(0.5, -2.0, 6).reshape(2, 3), "bias": jnp.array([3.0, 0.0, -1.0])}


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def loss_of(params):
    return jnp.sum((params["kernel"] - 0.3) ** 4) + jnp.sum(jnp.square(params["bias"]))


def trained(tx, steps=5):
    @jax.jit
    def step(state):
        value, grads = jax.value_and_grad(loss_of)(state.params)
        return state.apply_gradients(grads=grads, value=value, value_fn=loss_of)

    state = TrainState.create(params=PARAMS, tx=tx)
    for _ in range(steps):
        state = step(state)
    return state


def after_one(tx, grads=GRADS):
    updates, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    return updates, geometry(state)


def test_steepest_descent_has_cosine_one_and_ascent_minus_one():
    _, down = after_one(observed(optax.sgd(0.25)))
    np.testing.assert_allclose(down, [1, np.linalg.norm(flat(GRADS)), down.grad_norm / 4], 1e-6)
    _, up = after_one(observed(optax.scale(0.25)))
    np.testing.assert_allclose(up.cosine, -1, 1e-6)


@pytest.mark.parametrize("name", ["adam", "lion", "muon", "rmsprop"])
def test_geometry_is_that_of_gradient_and_update(name):
    tx = observed(build_optimizer(OptimizerConfig(name, learning_rate=0.1), 10).tx)
    updates, found = after_one(tx)
    gradient, update = flat(GRADS), flat(updates)
    lengths = np.linalg.norm(gradient), np.linalg.norm(update)
    np.testing.assert_allclose(found.cosine, -gradient @ update / np.prod(lengths), rtol=1e-5)
    np.testing.assert_allclose((found.grad_norm, found.update_norm), lengths, rtol=1e-6)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=2), st.integers(0, 1))
@settings(deadline=None, max_examples=30)
def test_cosine_stays_within_one_and_is_zero_where_a_length_is(gradient, freeze):
    tx = observed(optax.set_to_zero() if freeze else optax.sgd(1e-3))
    grads = jnp.array(gradient)
    _, state = tx.update(grads, tx.init(grads), grads)
    found = geometry(state)
    assert -1 <= found.cosine <= 1
    if freeze or not np.square(np.array(gradient, np.float32)).any():
        assert found.cosine == 0
    assert np.isfinite(found).all()


@pytest.mark.slow_but("adamw")
@pytest.mark.parametrize(
    "tx",
    [
        optax.adamw(0.1),
        optax.lbfgs(),
        optax.contrib.prodigy(0.5),
        optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1)),
    ],
    ids=["adamw", "lbfgs", "prodigy", "plateau"],
)
def test_observing_changes_nothing_else_and_hands_on_extra_arguments(tx):
    plain, watched = trained(tx), trained(observed(tx))
    np.testing.assert_array_equal(flat(watched.params), flat(plain.params))
    np.testing.assert_array_equal(flat(watched.opt_state.inner), flat(plain.opt_state))
    assert jax.tree.structure(watched.opt_state.inner) == jax.tree.structure(plain.opt_state)
    assert geometry(watched.opt_state).grad_norm > 0


def test_geometry_is_found_inside_a_chain_and_a_partition():
    clipped = optax.chain(optax.clip_by_global_norm(1.0), observed(optax.sgd(0.1)))
    parts = {"watched": clipped, "frozen": optax.set_to_zero()}
    tx = optax.partition(parts, {"kernel": "watched", "bias": "frozen"})
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(geometry(state), [1, 1, 0.1], rtol=1e-5)


def test_geometry_is_float32_and_zero_at_first_and_costs_three_numbers():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    tx = observed(optax.sgd(0.1))
    before = tx.init(params)
    _, after = tx.update(params, before, params)
    np.testing.assert_array_equal(geometry(before), [0, 0, 0])
    assert {leaf.dtype for state in (before, after) for leaf in jax.tree.leaves(state)} == {
        jnp.dtype("float32")
    }
    assert len(jax.tree.leaves(after)) == 3


def test_geometry_of_short_floats_is_summed_in_float32():
    grads = jnp.asarray(np.random.default_rng(0).normal(size=1001), jnp.bfloat16)
    tx = observed(optax.sgd(1.0))
    _, state = tx.update(grads, tx.init(grads), grads)
    norm = np.linalg.norm(np.asarray(grads, np.float64))
    np.testing.assert_allclose(geometry(state), [1, norm, norm], rtol=1e-5)


@pytest.mark.parametrize(("times", "count"), [(0, 0), (2, 2)])
def test_geometry_of_no_or_several_observed_optimizers_is_refused(times, count):
    tx = optax.chain(optax.scale(1.0), *[observed(optax.sgd(0.1))] * times)
    with pytest.raises(StateError, match=f"holds {count}"):
        geometry(tx.init(PARAMS))


@pytest.mark.slow
def test_observed_optimizer_trains_in_the_trainer():
    rng = np.random.default_rng(0)
    arrays = {"x": rng.normal(size=(24, 4)).astype(np.float32), "label": np.arange(24) % 3}
    options = {"root": None, "enable_progress_bar": False}
    loader = ArrayLoader(arrays, batch_size=8)
    plain, watched = (
        Classifier(MLP((8, 3)), optimizer=tx, **options)
        for tx in (optax.adam(1e-2), observed(optax.adam(1e-2)))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for trainer in (plain, watched):
            trainer.train_model(loader, loader, num_epochs=2)
    np.testing.assert_array_equal(flat(watched.state.params), flat(plain.state.params))
    assert 0 < geometry(watched.state.opt_state).cosine < 1
