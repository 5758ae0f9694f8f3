"""SOAP against the algorithm of its paper (arXiv:2409.11321), written step by step in NumPy."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff import OptimizerConfig, TrainState
from distaff.optim import SoapState, build_optimizer, scale_by_soap, soap
from distaff.step.step import train_step

B1, B2, EPS, FREQUENCY = 0.9, 0.8, 1e-8, 3


def gradients(shape, steps=12, seed=0):
    return np.random.default_rng(seed).normal(size=(steps, *shape)).astype(np.float32)


def run(grads, params=None, **options):
    """Returns the updates of all steps, and the states after them."""
    options = {"precondition_frequency": FREQUENCY, **options}
    tx = scale_by_soap(B1, B2, EPS, **options)
    state = tx.init(jnp.zeros(grads.shape[1:]) if params is None else params)
    update = jax.jit(tx.update)
    updates, states = [], []
    for grad in grads:
        step, state = update(jnp.asarray(grad), state)
        updates.append(np.asarray(step))
        states.append(state)
    return updates, states


class Paper:
    """Algorithm 3 of the paper for one matrix, in float64, with Adam's correction of the bias.

    Args:
        grad: the first gradient, which makes the factors only.
        left: the eigenvectors of the first left factor, as columns; None for an axis without one.
        right: those of the right factor.
    """

    def __init__(self, grad, left, right):
        self.left, self.right, self.t = left, right, 0
        self.moment, self.square = np.zeros(grad.shape), np.zeros(grad.shape)
        self.L = (1 - B2) * grad @ grad.T
        self.R = (1 - B2) * grad.T @ grad

    def forth(self, matrix):
        matrix = matrix if self.left is None else self.left.T @ matrix
        return matrix if self.right is None else matrix @ self.right

    def back(self, matrix):
        matrix = matrix if self.left is None else self.left @ matrix
        return matrix if self.right is None else matrix @ self.right.T

    def step(self, grad):
        self.t += 1
        rotated = self.forth(grad)
        self.moment = B1 * self.moment + (1 - B1) * grad
        rotated_moment = self.forth(self.moment)
        self.square = B2 * self.square + (1 - B2) * rotated * rotated
        moment = rotated_moment / (1 - B1**self.t)
        square = self.square / (1 - B2**self.t)
        update = self.back(moment / (np.sqrt(square) + EPS))
        self.L = B2 * self.L + (1 - B2) * grad @ grad.T
        self.R = B2 * self.R + (1 - B2) * grad.T @ grad
        if self.t % FREQUENCY == 0:
            if self.left is not None:
                self.left = np.linalg.qr(self.L @ self.left)[0]
            if self.right is not None:
                self.right = np.linalg.qr(self.R @ self.right)[0]
        return update


@pytest.mark.parametrize(
    ("shape", "longest"),
    [((4, 4), 10), ((5, 3), 10), ((3, 5), 10), ((8, 3), 4), ((3, 8), 4)],
    ids=["square", "tall", "wide", "long left side", "long right side"],
)
@pytest.mark.slow
def test_updates_are_those_of_the_paper_step_by_step(shape, longest):
    grads = gradients(shape)
    updates, states = run(grads, max_preconditioned=longest)
    np.testing.assert_array_equal(updates[0], np.zeros(shape))
    bases = iter(np.asarray(basis, np.float64) for basis in states[0].bases)
    sides = [next(bases) if length <= longest else None for length in shape]
    paper = Paper(grads[0].astype(np.float64), *sides)
    for factor, basis, given in zip((paper.L, paper.R), sides, shape, strict=True):
        if basis is not None:
            values = basis.T @ factor @ basis
            np.testing.assert_allclose(values, np.diag(np.diag(values)), atol=1e-5)
            assert (np.diff(np.diag(values)) < 1e-5).all()
            np.testing.assert_allclose(basis.T @ basis, np.eye(given), atol=1e-5)
    for number, grad in enumerate(grads[1:], 1):
        np.testing.assert_allclose(updates[number], paper.step(grad), rtol=2e-3, atol=2e-4)
        factors = [f for f, side in zip((paper.L, paper.R), sides, strict=True) if side is not None]
        for found, expected in zip(states[number].factors, factors, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert int(states[-1].count) == len(grads)


def test_bases_change_only_each_so_many_updates():
    _, states = run(gradients((4, 3)))
    changes = [
        bool((np.asarray(old.bases[0]) != np.asarray(new.bases[0])).any())
        for old, new in itertools.pairwise(states)
    ]
    assert changes == [number % FREQUENCY == 0 for number in range(1, len(states))]


def test_bases_come_close_to_eigenvectors():
    spread = np.diag([8.0, 4.0, 2.0, 1.0]).astype(np.float32)
    turn = np.linalg.qr(gradients((4, 4), 1, seed=3)[0])[0].astype(np.float32)
    grads = turn @ spread @ gradients((4, 4), 200, seed=1)
    _, states = run(grads, precondition_frequency=1)
    basis, factor = states[-1].bases[0], states[-1].factors[0]
    values = np.asarray(basis.T @ factor @ basis)
    rest = np.linalg.norm(values - np.diag(np.diag(values))) / np.linalg.norm(values)
    assert rest < 0.1
    first = np.asarray(factor)
    assert rest < np.linalg.norm(first - np.diag(np.diag(first))) / np.linalg.norm(first)


@pytest.mark.parametrize("shape", [(5,), (), (1, 5), (6, 7)], ids=str)
@pytest.mark.slow
def test_parameters_without_factors_are_trained_by_adam(shape):
    grads = gradients(shape)
    updates, states = run(grads, max_preconditioned=5)
    assert jax.tree.leaves(states[-1].factors) == []
    adam = optax.scale_by_adam(B1, B2, EPS)
    state = adam.init(jnp.zeros(shape))
    for found, grad in zip(updates, grads, strict=True):
        expected, state = adam.update(jnp.asarray(grad), state)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_an_array_of_three_axes_has_a_factor_for_each():
    grads = gradients((3, 4, 2))
    updates, states = run(grads)
    assert [factor.shape[0] for factor in states[-1].factors] == [3, 4, 2]
    q = [np.asarray(basis, np.float64) for basis in states[0].bases]
    rotated = np.einsum("abc,ax,by,cz->xyz", grads[1], *q)
    # The first update of Adam is the sign of its gradient.
    expected = np.einsum("xyz,ax,by,cz->abc", np.sign(rotated), *q)
    np.testing.assert_allclose(updates[1], expected, rtol=1e-4, atol=1e-4)
    rows = np.moveaxis(grads[0], 1, 0).reshape(4, -1)
    np.testing.assert_allclose(states[0].factors[1], (1 - B2) * rows @ rows.T, rtol=1e-5)


def test_state_is_float32_for_parameters_of_fewer_bits():
    grads = gradients((4, 3))
    tx = scale_by_soap()
    params = {"w": jnp.zeros((4, 3), jnp.bfloat16), "b": jnp.zeros(3, jnp.bfloat16)}
    state = tx.init(params)
    for grad in grads[:3]:
        updates, state = tx.update(
            {"w": jnp.asarray(grad, jnp.bfloat16), "b": jnp.asarray(grad[0], jnp.bfloat16)}, state
        )
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert {leaf.dtype for leaf in arrays} == {jnp.dtype("float32")}


def test_a_config_equals_soap_by_hand_with_its_schedule_and_mask():
    params = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "bias": jnp.ones(3)}
    config = OptimizerConfig(
        "soap", weight_decay=0.2, options={"precondition_frequency": 2, "b1": 0.8}
    )
    assert (config.learning_rate, config.schedule) == (3e-3, "cosine")
    cosine = optax.cosine_decay_schedule(3e-3, 20, alpha=0.01)
    mask = {"w": True, "bias": False}
    by_hand = soap(cosine, b1=0.8, weight_decay=0.2, mask=mask, precondition_frequency=2)

    def trained(tx):
        def update(params, state, step):
            grads = jax.tree.map(lambda leaf: jnp.sin(3 * leaf + step), params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        trained, state = params, tx.init(params)
        for step in range(5):
            trained, state = update(trained, state, step)
        return trained

    found = trained(build_optimizer(config, 20).tx)
    jax.tree.map(np.testing.assert_array_equal, found, trained(by_hand))
    assert float(jnp.abs(found["w"] - params["w"]).max()) > 0


def test_soap_descends_faster_than_adam_where_axes_are_mixed():
    turn = [np.linalg.qr(gradients((6, 6), 1, seed=n)[0])[0] for n in (1, 2)]
    scales = np.outer(10.0 ** np.linspace(-1, 0, 6), 10.0 ** np.linspace(-1, 0, 6))
    goal = gradients((6, 6), 1, seed=4)[0]
    left, right, scales, goal = (jnp.asarray(x, jnp.float32) for x in (*turn, scales, goal))

    def loss(params, batch, ctx):
        return jnp.sum(jnp.square(scales * (left.T @ (params - goal) @ right)))

    def final(tx):
        state = TrainState.create(params=jnp.zeros((6, 6)), tx=tx)
        step = jax.jit(train_step(loss))
        for _ in range(150):
            state, metrics = step(state, {"x": jnp.zeros(1)})
        return float(metrics["loss"].compute())

    rate = optax.cosine_decay_schedule(0.05, 150)
    found = final(soap(rate, precondition_frequency=5))
    assert found < 0.5 * final(optax.adam(rate, b1=0.95, b2=0.95))


def test_the_state_is_found_in_a_chain():
    state = build_optimizer(OptimizerConfig("soap"), 10).tx.init({"w": jnp.ones((2, 2))})
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, SoapState))
    assert sum(isinstance(node, SoapState) for node in nodes) == 1
