"""Parameters and Adam's moments in bfloat16: what float32 would have kept is not lost."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff import OptimizerConfig, PrecisionConfig, data, optim, zoo
from distaff.errors import ConfigError
from model_kinds import KINDS
from scripted import Break, InterruptError, Regression

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 3)).astype(np.float32)
HALF = PrecisionConfig("bf16-params", moments="bfloat16")


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def dtypes(tree):
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


def moments_of(opt_state):
    def is_adam(node):
        return isinstance(node, optax.ScaleByAdamState)

    (adam,) = filter(is_adam, jax.tree.leaves(opt_state, is_leaf=is_adam))
    return adam


def trained(*, model=None, root=None, epochs=3, **options):
    defaults = {"precision": "bf16-params", "steps_per_call": 1, "seed": 1}
    defaults |= {"enable_progress_bar": False, "optimizer": OptimizerConfig("adam")}
    trainer = Regression(model or zoo.MLP((4, 1)), **{"root": root, **defaults, **options})
    loader = data.ArrayLoader({"x": X, "y": X.sum(1)}, batch_size=8, seed=0)
    return trainer, trainer.train_model(loader, num_epochs=epochs)


def test_small_updates_add_up_in_the_copy():
    params = {"w": jnp.ones(3, jnp.bfloat16)}

    def after(tx, steps=10):
        state, moved = tx.init(params), params
        for _ in range(steps):
            grads = {"w": jnp.ones(3, jnp.bfloat16)}
            changes, state = tx.update(grads, state, moved)
            moved = optax.apply_updates(moved, changes)
        return np.asarray(moved["w"], np.float32), state

    assert (after(optax.sgd(1e-3))[0] == 1).all()
    moved, state = after(optim.with_master_copy(optax.sgd(1e-3)))
    np.testing.assert_allclose(state.params["w"], 0.99, rtol=1e-6)
    np.testing.assert_array_equal(moved, np.asarray(jnp.bfloat16(0.99), np.float32))


def test_updates_are_those_of_float32_rounded():
    kernel = jnp.asarray(RNG.normal(size=(4, 3)), jnp.bfloat16)
    params = {"kernel": kernel, "bias": jnp.zeros(3)}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    plain = optax.adamw(0.1, weight_decay=0.1)
    tx = optim.with_master_copy(plain)
    state, expected_state = tx.init(params), plain.init(wide)
    for n in range(5):
        grads = jax.tree.map(
            lambda x, n=n: jnp.asarray(np.random.default_rng(n).normal(size=x.shape), x.dtype),
            params,
        )
        changes, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, changes)
        expected, expected_state = jax.jit(plain.update)(
            jax.tree.map(lambda x: x.astype(jnp.float32), grads), expected_state, wide
        )
        wide = optax.apply_updates(wide, expected)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), state.params, wide)
        assert_equal(params["kernel"], state.params["kernel"].astype(jnp.bfloat16))
        np.testing.assert_allclose(params["bias"], state.params["bias"], rtol=1e-6)
    assert params["kernel"].dtype == jnp.bfloat16


def test_state_can_be_donated():
    params = {"w": jnp.ones(3, jnp.bfloat16), "v": jnp.ones(3)}
    tx = optim.with_master_copy(optim.with_half_moments(optax.adam(1e-3)))
    update = jax.jit(tx.update, donate_argnums=(1, 2))
    _, state = update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    assert dtypes(state.params) == {"float32"}


def test_parameter_that_is_loaded_replaces_its_copy():
    tx = optim.with_master_copy(optax.sgd(1e-3))
    state = tx.init({"w": jnp.ones(2, jnp.bfloat16)})
    loaded = {"w": jnp.asarray([1, 3], jnp.bfloat16)}
    state = state._replace(params={"w": jnp.asarray([1.001, 1.001])})
    _, after = tx.update({"w": jnp.ones(2, jnp.bfloat16)}, state, loaded)
    np.testing.assert_allclose(after.params["w"], [1.0, 2.999], rtol=1e-6)


@pytest.mark.parametrize("family", ["linen", "nnx", "equinox", "functions"])
@pytest.mark.slow
def test_parameters_and_moments_are_stored_in_half_precision(family):
    trainer, _ = trained(model=KINDS[family].mlp(0.1, True), precision=HALF)
    state = trainer.state
    adam = moments_of(state.opt_state)
    assert dtypes(state.params) == dtypes(adam.mu) == dtypes(adam.nu) == {"bfloat16"}
    assert dtypes(state.opt_state.params) == {"float32"}
    assert dtypes(state.batch_stats) <= {"float32"}
    assert_equal(
        state.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.opt_state.params)
    )
    assert trainer.predict([{"x": X}]).dtype == np.float32


def test_exceptions_are_stored_in_float32():
    precision = PrecisionConfig("bf16-params", float32=("Dense_1/*",))
    params = trained(precision=precision)[0].state.params
    assert (dtypes(params["Dense_0"]), dtypes(params["Dense_1"])) == ({"bfloat16"}, {"float32"})


@pytest.mark.slow
def test_training_is_close_to_that_with_float32_parameters():
    """Of a learning rate whose updates bfloat16 alone would lose."""
    optimizer = OptimizerConfig("sgd", learning_rate=2e-4, schedule="constant")
    runs = [
        trained(precision=precision, optimizer=optimizer, epochs=40)[0].state
        for precision in ("bf16", "bf16-params")
    ]
    first = trained(optimizer=optimizer, epochs=1)[0].state.opt_state.params
    wide, half = runs[0].params, runs[1].opt_state.params
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, wide, first))
    apart = optax.tree.norm(jax.tree.map(jnp.subtract, wide, half))
    # Both start at different roundings of the same weights.
    assert apart < 0.2 * moved


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits(accumulate):
    def run(root, fails=None):
        optimizer = OptimizerConfig("adam", accumulate=accumulate)
        options = {"callbacks": [Break(fails)], "optimizer": optimizer, "precision": HALF}
        return trained(root=root, name="run", **options)

    whole, _ = run("whole")
    with pytest.raises(InterruptError):
        run("broken", fails=6)
    resumed, result = run("broken")
    assert (result.path.name, result.first_step) == ("0001", 4)
    assert_equal(resumed.state.params, whole.state.params)
    assert_equal(resumed.state.opt_state, whole.state.opt_state)


@pytest.mark.slow
def test_rest_of_an_accumulation_is_applied():
    """Of four batches in an epoch, the last makes an update by itself."""
    optimizer = OptimizerConfig("adam", accumulate=3)
    state = trained(optimizer=optimizer, epochs=1)[0].state
    assert int(optim.num_updates(state.opt_state)) == 2


@pytest.mark.slow
def test_loaded_model_has_the_dtypes_of_its_run():
    trainer, result = trained(root="runs", name="run", precision=HALF)
    loaded = Regression.load_from_checkpoint(result.path)
    assert_equal(loaded.state.params, trainer.state.params)
    assert dtypes(loaded.state.params) == {"bfloat16"}
    np.testing.assert_array_equal(loaded.predict([{"x": X}]), trainer.predict([{"x": X}]))


@pytest.mark.slow
def test_moments_decay_to_their_mean():
    """To the nearest number, neither would move: 0.999 is less than half a unit from 1."""
    tx = optim.with_half_moments(optax.adam(0.0, b1=0.999, b2=0.999))
    params = {"w": jnp.zeros(20_000)}
    state = tx.init(params)
    _, state = tx.update({"w": jnp.ones(20_000)}, state, params)
    start = np.asarray(moments_of(state).nu["w"], np.float64).mean()
    update = jax.jit(lambda state: tx.update({"w": jnp.zeros(20_000)}, state, params)[1])
    for _ in range(200):
        state = update(state)
    for moment in (moments_of(state).mu, moments_of(state).nu):
        assert moment["w"].dtype == jnp.bfloat16
        mean = np.asarray(moment["w"], np.float64).mean()
        np.testing.assert_allclose(mean, start * 0.999**200, rtol=5e-3)


def test_first_update_is_that_of_adam_in_float32():
    params = {"w": jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32)}
    grads = {"w": jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32)}
    tx, plain = optim.with_half_moments(optax.adam(0.1)), optax.adam(0.1)
    found, state = tx.update(grads, tx.init(params), params)
    expected, expected_state = plain.update(grads, plain.init(params), params)
    assert_equal(found, expected)
    for name in ("mu", "nu"):
        a, b = (getattr(moments_of(each), name)["w"] for each in (state, expected_state))
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=2**-7)


def test_numbers_that_are_not_finite_stay_so():
    tx = optim.with_half_moments(optax.adam(0.1))
    params = {"w": jnp.zeros(3)}
    _, state = tx.update({"w": jnp.asarray([np.nan, np.inf, 1])}, tx.init(params), params)
    nu = np.asarray(moments_of(state).nu["w"], np.float32)
    assert np.isnan(nu[0])
    assert np.isinf(nu[1])
    assert np.isfinite(nu[2])


def test_optimizer_without_moments_is_an_error():
    with pytest.raises(ConfigError, match="needs an optimizer with the moments of Adam"):
        trained(precision=HALF, optimizer=OptimizerConfig("sgd"))
    with pytest.raises(ConfigError, match="moments has no value 'bf16'"):
        PrecisionConfig(moments="bf16")


class OwnOptimizer(Regression):
    def init_optimizer(self, total_steps):
        tx = optax.adam(1e-3)
        self.state = self.state.replace(tx=tx, opt_state=tx.init(self.state.params))


def test_optimizer_of_ones_own_without_a_copy_is_an_error():
    trainer = OwnOptimizer(zoo.MLP((4, 1)), precision="bf16-params", root=None)
    with pytest.raises(ConfigError, match="needs an optimizer with a float32 copy"):
        trainer.train_model([{"x": X, "y": X.sum(1)}], num_epochs=1)


@pytest.mark.slow
def test_fused_steps_are_those_one_by_one():
    one, four = (trained(steps_per_call=k, precision=HALF)[0].state for k in (1, 4))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        one.opt_state.params,
        four.opt_state.params,
    )
