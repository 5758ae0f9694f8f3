from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from distaff.errors import ConfigError, LossError
from distaff.optim import accumulate

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.array([-0.0, jnp.nan, 1e-30])}


def gradients(seed):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {"w": jax.random.normal(keys[0], (2, 3)), "b": jax.random.normal(keys[1], (3,))}


def run(tx, micro_steps, params=PARAMS, **extra_args):
    """Returns the updates of each micro-step, and the last state."""

    @jax.jit
    def update(grads, state, value):
        return tx.update(grads, state, params, value=value, **extra_args)

    state, updates = tx.init(params), []
    for grads, value in micro_steps:
        update_, state = update(grads, state, value)
        updates.append(update_)
    return updates, state


def recorder():
    """An optimizer whose state is what its latest update was given, and how often."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return {
            "count": jnp.zeros([], jnp.int32),
            "value": jnp.zeros([]),
            "g": zeros,
            "grad": zeros,
        }

    def update(updates, state, params=None, *, value, grad, **extra_args):
        state = {"count": state["count"] + 1, "value": value, "g": updates, "grad": grad}
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)


def test_gradients_and_losses_are_averaged():
    micro_steps = [(gradients(i), jnp.float32(value)) for i, value in enumerate([1, 2, 6, 0, 0, 3])]
    grads = gradients(9)
    _, state = run(accumulate(recorder(), 3), micro_steps, grad=grads)
    mean = jax.tree.map(lambda *each: sum(each) / 3, *(g for g, _ in micro_steps[3:]))
    assert int(state.inner["count"]) == 2
    assert float(state.inner["value"]) == 1.0
    for name in ("g", "grad"):
        jax.tree.map(np.testing.assert_allclose, state.inner[name], mean)


@pytest.mark.slow
def test_an_optimizer_sees_the_averaged_loss_and_multi_steps_the_last():
    losses = [8.0, 0.0, 4.0, 0.0, 4.0, 0.0]  # The means fall, then stay; the last are all zero.
    micro_steps = [(gradients(i), jnp.float32(value)) for i, value in enumerate(losses)]
    plateau = optax.contrib.reduce_on_plateau(accumulation_size=1)
    _, averaged = run(accumulate(plateau, 2), micro_steps)
    _, last = run(optax.MultiSteps(plateau, 2).gradient_transformation(), micro_steps)
    assert float(averaged.inner.best_value) == 2.0
    assert float(last.inner_opt_state.best_value) == 0.0


def test_updates_are_those_of_the_average_gradient():
    micro_steps = [(gradients(i), jnp.float32(0)) for i in range(6)]
    updates, _ = run(accumulate(optax.adam(0.1), 2), micro_steps)
    means = [
        (jax.tree.map(lambda a, b: (a + b) / 2, micro_steps[i][0], micro_steps[i + 1][0]), value)
        for i, value in ((0, 0.0), (2, 0.0), (4, 0.0))
    ]
    expected, _ = run(optax.adam(0.1), means)
    for found, wanted in zip(updates[1::2], expected, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, wanted)


@pytest.mark.slow
def test_parameters_keep_every_bit_between_updates():
    tx = accumulate(optax.sgd(1.0), 2)
    with jax.disable_jit():  # XLA drops the addition of zero, of either sign.
        updates, _ = tx.update(gradients(0), tx.init(PARAMS), PARAMS)
        kept = optax.apply_updates(PARAMS, updates)
    for name, before in PARAMS.items():
        assert np.asarray(kept[name]).tobytes() == np.asarray(before).tobytes()


def test_low_precision_is_summed_in_float32_and_updates_keep_its_dtype():
    # 1 + 2**-8 is 1 in bfloat16, where a sum of 257 ones is 256.
    tx, params = accumulate(optax.sgd(1.0), 257), jnp.zeros([], jnp.bfloat16)
    updates, state = run(tx, [(jnp.ones([], jnp.bfloat16), 0.0)] * 257, params)
    assert state.grads.dtype == jnp.float32
    assert updates[0].dtype == updates[-1].dtype == jnp.bfloat16
    assert float(updates[-1]) == -1.0


def test_schedules_count_updates():
    tx = accumulate(optax.sgd(lambda step: 1.0 + step), 2)
    updates, _ = run(tx, [({"w": jnp.ones(1)}, 0.0)] * 4, {"w": jnp.ones(1)})
    assert [float(update["w"][0]) for update in updates] == [0.0, -1.0, 0.0, -2.0]


def test_one_step_is_the_optimizer_itself():
    tx = accumulate(optax.adam(0.1), 1)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    assert jax.tree.structure(tx.init(PARAMS)) == jax.tree.structure(optax.adam(0.1).init(PARAMS))


@pytest.mark.slow
def test_vmap_equals_separate_runs():
    tx = accumulate(optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1)), 2)

    def final(seed):
        state = tx.init(PARAMS)
        for step in range(4):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(1), 7 * seed + step), 2)
            grads = {"w": jax.random.normal(keys[0], (2, 3)), "b": jax.random.normal(keys[1], (3,))}
            updates, state = tx.update(grads, state, PARAMS, value=1.0)
        return updates

    together = jax.jit(jax.vmap(final))(jnp.arange(3))
    for seed in range(3):
        alone = jax.jit(final)(jnp.int32(seed))
        jax.tree.map(
            lambda a, b, seed=seed: np.testing.assert_allclose(a[seed], b, rtol=1e-6),
            together,
            alone,
        )


def test_it_works_within_a_chain_and_a_mask():
    tx = optax.masked(optax.chain(accumulate(recorder(), 2)), {"w": True, "b": False})
    _, state = run(tx, [(gradients(i), jnp.float32(i)) for i in range(2)], grad=gradients(3))
    (inner,) = state.inner_state
    assert float(inner.inner["value"]) == 0.5
    assert isinstance(inner.grads["b"], optax.MaskedNode)


@pytest.mark.parametrize("every", [0, -1, 2.0, True, "2"])
def test_accumulate_refuses_what_is_no_number_of_steps(every):
    with pytest.raises(ConfigError, match=r"every, the number .* >= 1; got"):
        accumulate(optax.sgd(1.0), every)


def test_a_loss_that_is_no_scalar_is_refused():
    tx = accumulate(optax.sgd(1.0), 2)
    with pytest.raises(LossError, match=r"`value` has shape \(4,\)"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=jnp.ones(4))
