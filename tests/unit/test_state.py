"""TrainState: every member and method, through each of JAX's transformations and onto the disk."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff import TrainState
from distaff.checkpoint import CheckpointStore
from distaff.core.pytrees import static
from distaff.errors import StateError
from distaff.execution.placement import owned
from distaff.metrics import Mean

TARGET = jnp.array([1.0, -2.0, 0.5])


class ExtendedState(TrainState):
    new_param: Any
    epoch: jax.Array
    metrics: Any = None
    label: str = static(default="a")


def loss_of(params: Any) -> jax.Array:
    return jnp.square(params["kernel"] - TARGET).sum() + jnp.square(params["bias"])


def parameters() -> dict[str, jax.Array]:
    return {"kernel": jnp.array([0.1, 0.2, 0.3]), "bias": jnp.float32(0.4)}


def extended(tx: optax.GradientTransformation, seed: int = 0) -> ExtendedState:
    return ExtendedState.create(
        params=jax.tree.map(lambda leaf: leaf * (seed + 1), parameters()),
        tx=tx,
        rng=jax.random.key(seed),
        batch_stats={"mean": jnp.full(2, float(seed))},
        new_param={"anything": jnp.arange(3)},
        epoch=jnp.int32(4),
        metrics={"loss": Mean(jnp.float32(6.0), jnp.float32(2.0))},
    )


S = TypeVar("S", bound=TrainState)


def update(state: S) -> S:
    return state.apply_gradients(grads=jax.grad(loss_of)(state.params))


def numbers(tree: Any) -> list[np.ndarray]:
    keys = jax.dtypes.prng_key
    return [
        np.array(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, keys) else leaf)
        for leaf in jax.tree.leaves(tree)
    ]


def assert_same(tree: Any, other: Any) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, numbers(tree), numbers(other))


def assert_extras_survived(state: ExtendedState, original: ExtendedState) -> None:
    names = ("new_param", "epoch", "metrics", "rng", "batch_stats")
    for name in names:
        assert_same(getattr(state, name), getattr(original, name))


def test_create_fills_every_member():
    model, tx, x = nn.Dense(2), optax.adam(1e-3), jnp.ones((4, 3))
    params = model.init(jax.random.key(0), x)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    assert (state.step.dtype, state.step.shape, int(state.step)) == (jnp.int32, (), 0)
    assert state.params is params
    assert state.tx is tx
    assert_same(state.opt_state, tx.init(params))
    assert (state.batch_stats, state.collections, state.rng) == (None, None, None)
    assert state.apply_fn is not None
    assert_same(state.apply_fn({"params": params}, inputs=x), model.apply({"params": params}, x))


def test_create_without_an_optimizer_has_no_optimizer_state():
    state = TrainState.create(params=parameters())
    assert (state.tx, state.opt_state) == (None, None)
    with pytest.raises(StateError, match=re.escape("TrainState.create(params=..., tx=optax.adam")):
        update(state)


def test_create_makes_any_given_step_a_strong_int32():
    state = TrainState.create(params=parameters(), tx=optax.sgd(0.1), step=7)
    assert (state.step.dtype, state.step.weak_type) == (jnp.int32, False)
    assert jax.eval_shape(update, state).step == jax.eval_shape(lambda: state.step)


def test_apply_gradients_is_the_optax_update_and_leaves_the_old_state():
    tx = optax.adam(0.1)
    state = extended(tx)
    before = numbers(state)
    grads = jax.grad(loss_of)(state.params)
    after = state.apply_gradients(grads=grads)
    updates, opt_state = tx.update(grads, tx.init(state.params), state.params)
    assert_same(after.params, optax.apply_updates(state.params, updates))
    assert_same(after.opt_state, opt_state)
    assert (after.step.dtype, int(after.step)) == (jnp.int32, 1)
    jax.tree.map(np.testing.assert_array_equal, numbers(state), before)


def test_other_members_change_by_replace_or_keyword_only():
    state = extended(optax.sgd(0.1))
    assert_extras_survived(update(state), state)
    stats = {"mean": jnp.ones(2)}
    grads = jax.grad(loss_of)(state.params)
    changed = state.apply_gradients(grads=grads, epoch=jnp.int32(5), batch_stats=stats)
    assert (int(changed.epoch), changed.batch_stats) == (5, stats)
    assert_same(changed.params, update(state).params)
    replaced = state.replace(epoch=jnp.int32(6), new_param=None)
    assert (int(replaced.epoch), replaced.new_param, int(state.epoch)) == (6, None, 4)
    assert type(replaced) is ExtendedState


def test_replace_takes_an_optimizer_that_knows_no_extra_arguments():
    def negated(updates: Any, state: Any, params: Any = None) -> Any:
        return jax.tree.map(jnp.negative, updates), state

    plain = optax.GradientTransformation(lambda params: optax.EmptyState(), negated)
    state = TrainState.create(params=parameters()).replace(tx=plain, opt_state=optax.EmptyState())
    grads = jax.grad(loss_of)(state.params)
    after = state.apply_gradients(grads=grads, value=jnp.float32(1.0))
    assert_same(after.params, jax.tree.map(jnp.subtract, state.params, grads))


def test_members_survive_jit_with_donation():
    state = owned(extended(optax.adam(0.1)))
    expected, original = update(extended(optax.adam(0.1))), extended(optax.adam(0.1))
    after = jax.jit(update, donate_argnums=0)(state)
    assert state.params["kernel"].is_deleted()
    assert_extras_survived(after, original)
    np.testing.assert_allclose(after.params["kernel"], expected.params["kernel"], rtol=1e-6)
    assert int(after.step) == 1


def test_states_of_one_optimizer_stack_and_train_under_vmap():
    tx = optax.adam(0.1)
    singles = [extended(tx, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *singles)
    trained = jax.jit(jax.vmap(update))(stacked)
    assert trained.step.tolist() == [1, 1, 1]
    for index, single in enumerate(singles):
        member = jax.tree.map(lambda leaf, index=index: leaf[index], trained)
        assert_extras_survived(member, single)
        expected = update(single)
        np.testing.assert_allclose(
            member.params["kernel"], expected.params["kernel"], rtol=1e-6, atol=1e-7
        )


def test_eval_shape_gives_a_state_of_shapes():
    state = extended(optax.adam(0.1))
    abstract = jax.eval_shape(update, state)
    assert type(abstract) is ExtendedState
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    shapes = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(s)] for s in (abstract, state)]
    assert shapes[0] == shapes[1]
    made = jax.eval_shape(lambda: extended(optax.sgd(0.1)))
    assert made.params["kernel"].shape == (3,)


def test_arrays_survive_saving_and_loading(tmp_path):
    state = update(extended(optax.adam(0.1)))
    assert {"params", "opt_state", "rng", "new_param", "epoch", "metrics"} <= state.arrays().keys()
    assert state.arrays().keys().isdisjoint({"tx", "apply_fn", "label"})
    with CheckpointStore(tmp_path / "checkpoints") as store:
        store.save(1, state.arrays(), {})
        store.wait()
        other = extended(optax.adam(0.1), seed=9)
        other = other.replace(tx=state.tx)
        loaded = other.replace(**store.load(1, jax.eval_shape(lambda: other.arrays())))
    assert_same(loaded, state)
    assert_same(update(loaded), update(state))


def test_static_members_belong_to_the_program():
    traces = 0

    @jax.jit
    def count(state: ExtendedState) -> jax.Array:
        nonlocal traces
        traces += 1
        return state.step

    state = extended(optax.sgd(0.1))
    for label in ("a", "a", "b"):
        count(state.replace(label=label))
    assert traces == 2


def by_hand(tx: Any, **extra_args: Any) -> Any:
    params = parameters()
    grads = jax.grad(loss_of)(params)
    updates, _ = tx.update(grads, tx.init(params), params, **extra_args)
    return optax.apply_updates(params, updates)


@pytest.mark.parametrize(
    ("tx", "names"),
    [
        (optax.polyak_sgd(), ("value",)),
        (optax.contrib.momo(0.5), ("value",)),
        (optax.contrib.reduce_on_plateau(patience=1), ("value",)),
        (optax.lbfgs(), ("value", "grad", "value_fn")),
        (
            optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
            ("value", "grad", "value_fn"),
        ),
        (optax.sgd(0.1), ()),
    ],
    ids=["polyak_sgd", "momo", "reduce_on_plateau", "lbfgs", "linesearch", "sgd"],
)
@pytest.mark.slow
def test_apply_gradients_hands_extra_arguments_to_the_optimizer(tx, names):
    state = TrainState.create(params=parameters(), tx=tx)
    value, grads = jax.value_and_grad(loss_of)(state.params)
    offered = {"value": value, "grad": grads, "value_fn": loss_of}
    after = state.apply_gradients(grads=grads, value=value, value_fn=loss_of)
    assert_same(after.params, by_hand(tx, **{name: offered[name] for name in names}))


def test_reduce_on_plateau_sees_the_values_of_several_steps():
    tx = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=2, factor=0.5))
    state = TrainState.create(params=parameters(), tx=tx)
    grads = jax.tree.map(jnp.zeros_like, state.params)
    for value in (1.0, 1.0, 1.0, 1.0):
        state = state.apply_gradients(grads=grads, value=jnp.float32(value))
    assert float(optax.tree.get(state.opt_state, "scale")) == 0.5


def test_optimizer_args_reach_an_optimizer_of_ones_own():
    def pulled(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        return jax.tree.map(lambda leaf: extra_args["pull"] * leaf, updates), state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), pulled)
    state = TrainState.create(params=parameters(), tx=tx)
    grads = jax.grad(loss_of)(state.params)
    after = state.apply_gradients(grads=grads, optimizer_args={"pull": jnp.float32(3.0)})
    assert_same(after.params, jax.tree.map(lambda p, g: p + 3 * g, state.params, grads))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.replace(epock=1), "no member 'epock' to set here. Did you mean 'epoch'?"),
        (lambda s: s.apply_gradients(grads=s.params, batch_stat={}), "Did you mean 'batch_stats'?"),
        (lambda s: s.apply_gradients(grads=s.params, step=3), "no member 'step' to set here"),
        (lambda s: ExtendedState.create(params=s.params, metric=1), "Did you mean 'metrics'?"),
        (lambda s: ExtendedState.create(params={}, opt_state=()), "no member 'opt_state'"),
        (lambda s: TrainState.create(params={}, new_param=1), "class MyState(TrainState): new_par"),
    ],
)
def test_unknown_members_are_refused_with_the_nearest_name(call, message):
    with pytest.raises(StateError, match=re.escape(message)):
        call(extended(optax.sgd(0.1)))


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ({"kernel": jnp.ones(3)}, "'bias' is missing in grads, () in params"),
        ({**parameters(), "scale": 1.0}, "'scale' is () in grads, missing in params"),
        ({"kernel": jnp.ones(()), "bias": 0.0}, "'kernel' is () in grads, (3,) in params"),
        (nn.FrozenDict(parameters()), "FrozenDict"),
    ],
)
def test_gradients_unlike_the_parameters_are_refused(grads, message):
    with pytest.raises(StateError, match=re.escape(message)):
        extended(optax.sgd(0.1)).apply_gradients(grads=grads)
