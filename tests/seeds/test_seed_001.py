"""The second source document, TrainState: each of its members, and what changes it.

What other files prove is not repeated here:

    create, tx, apply_fn, step,     unit/test_state.py: create_fills_every_member
      params, opt_state
    apply_gradients                 unit/test_state.py: apply_gradients_is_the_optax_update_and_...
    epoch, batch_stats, metrics     unit/test_state.py: other_members_change_by_replace_or_...
    jit; save and load by a store   unit/test_state.py: members_survive_jit_with_donation,
                                      arrays_survive_saving_and_loading
    unknown members                 unit/test_state.py: unknown_members_are_refused_with_...
    members in load_from_checkpoint unit/test_inference.py: members_of_ones_own_state_are_loaded_too
    train_step(.) or TrainStep      test_seed_000.py, golden/test_step.py
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distaff
from distaff import Monitor, TrainState, data
from distaff.metrics import Mean

X = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
BATCH = {"x": X, "y": X.sum(1)}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        return nn.Dense(1)(nn.BatchNorm(use_running_average=not train)(x))


class Extended(TrainState):
    """The members that the document adds, and the `new_param` of the next one."""

    epoch: Any = None
    metrics: Any = None
    new_param: Any = None


class Keeping(distaff.TrainerModule):
    """Its hooks change the state's own members as the document says: by `replace`."""

    state_class = Extended
    monitor = Monitor("val/score", mode="max")

    def init_model(self, example_batch):
        super().init_model(example_batch)
        self.state = self.state.replace(
            epoch=jnp.int32(0),
            metrics={"loss": Mean(jnp.float32(0), jnp.float32(0))},
            new_param=jnp.zeros(3),
        )

    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])

    def create_functions(self):
        step, eval_step = super().create_functions()

        def counting(state: Any, batch: Any) -> Any:
            new_state, metrics = step(state, batch)
            seen = {"loss": state.metrics["loss"].merge(metrics["loss"])}
            return new_state.replace(metrics=seen, new_param=state.new_param + 1), metrics

        return counting, eval_step

    def on_training_epoch_end(self, epoch, metrics):
        state: Any = self.state
        self.state = state.replace(epoch=state.epoch + 1)

    def on_validation_epoch_end(self, epoch, metrics, val_loader):
        metrics["val/score"] = (0.0, 2.0, 1.0)[epoch - 1]


def keeping(**options: Any) -> tuple[Any, Any]:
    loader = data.ArrayLoader(BATCH, batch_size=4)
    trainer = Keeping(
        Net(), optimizer=optax.adam(0.05), name="kept", enable_progress_bar=False, **options
    )
    return trainer, trainer.train_model(loader, loader, num_epochs=3)


def host(tree: Any) -> list[np.ndarray]:
    keys = jax.dtypes.prng_key
    return [
        np.array(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, keys) else leaf)
        for leaf in jax.tree.leaves(tree)
    ]


@pytest.mark.parametrize("root", ["runs", None])
def test_all_members_survive_training_saving_and_load_model(root):
    trainer, result = keeping(root=root)
    assert result.best.epoch == 2
    best = trainer.state
    assert (int(best.step), int(best.epoch), best.new_param.tolist()) == (6, 2, [6.0] * 3)
    assert float(best.metrics["loss"].weight) == 24
    assert best.batch_stats["BatchNorm_0"]["mean"].any()
    kept = host(best.arrays())
    trainer.state = best.replace(
        params=jax.tree.map(jnp.zeros_like, best.params),
        opt_state=jax.tree.map(jnp.zeros_like, best.opt_state),
        batch_stats=jax.tree.map(jnp.zeros_like, best.batch_stats),
        epoch=jnp.int32(9),
        new_param=jnp.ones(3),
    )
    trainer.load_model()
    assert jax.tree.structure(trainer.state) == jax.tree.structure(best)
    jax.tree.map(np.testing.assert_array_equal, host(trainer.state.arrays()), kept)
    assert type(trainer.state) is Extended


def test_a_loaded_state_trains_on_as_the_saved_one_would():
    trainer, _ = keeping()
    loader = data.ArrayLoader(BATCH, batch_size=4)
    step = jax.jit(trainer.create_functions()[0])
    expected, state = trainer.state, trainer.state
    for batch in loader:
        expected, _ = step(expected, batch)
    trainer.state = state.replace(params=jax.tree.map(jnp.zeros_like, state.params))
    trainer.load_model()
    resumed = trainer.state
    for batch in loader:
        resumed, _ = step(resumed, batch)
    jax.tree.map(np.testing.assert_array_equal, host(resumed), host(expected))
    assert int(resumed.step) == 9


def test_step_counts_every_update_of_params_and_opt_state_and_of_nothing_else():
    trainer, _ = keeping(root=None)
    state = trainer.state
    grads = jax.tree.map(jnp.ones_like, state.params)
    after = state.apply_gradients(grads=grads).apply_gradients(grads=grads)
    changed = {
        name
        for name, value in state.arrays().items()
        if any((a != b).any() for a, b in zip(host(value), host(after.arrays()[name]), strict=True))
    }
    assert changed == {"step", "params", "opt_state"}
    assert int(after.step) == int(state.step) + 2


def test_a_state_is_a_dataclass_that_nothing_is_assigned_to():
    state = TrainState.create(params={"w": jnp.ones(2)}, tx=optax.sgd(0.1))
    assert dataclasses.is_dataclass(state)
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.step = jnp.int32(3)  # ty: ignore[invalid-assignment]
