"""A trainer that is gone leaves nothing behind: no compiled program, no array, not itself."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import distaff
from distaff import data, models

X = np.random.default_rng(0).normal(size=(24, 4)).astype(np.float32)


class Regression(distaff.TrainerModule):
    def loss_fn(self, params: Any, batch: Any, ctx: distaff.Context) -> Any:
        return jnp.square(ctx.apply(params, batch["x"])[:, 0])


class Broken(distaff.Callback):
    def on_epoch_end(self, info: distaff.StepInfo) -> None:
        raise RuntimeError("broken")


class Stopped(distaff.Callback):
    def on_step_end(self, info: distaff.StepInfo) -> None:
        raise distaff.StopTraining("enough")


def loader() -> data.ArrayLoader:
    return data.ArrayLoader({"x": X}, 8)


def trained(model: Any = None, optimizer: Any = None, **options: Any) -> Regression:
    trainer = Regression(
        nn.Dense(1) if model is None else model,
        optimizer=optax.adam(1e-3) if optimizer is None else optimizer,
        enable_progress_bar=False,
        **{"root": None, **options},
    )
    with suppress(RuntimeError):
        trainer.train_model(loader(), loader(), num_epochs=1)
    return trainer


def evaluated() -> Regression:
    trainer = trained(steps_per_call=1)
    trainer.eval_model(loader())
    trainer.predict(loader())
    trainer.bind_model()
    return trainer


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense, self.drop = nnx.Linear(4, 1, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(self.dense(x))


def equinox() -> eqx.Module:
    return eqx.nn.Linear(4, 1, key=jax.random.key(0))


MAKE: dict[str, Callable[[], Regression]] = {
    "evaluated": evaluated,
    "schedule-free": lambda: trained(
        optimizer=distaff.OptimizerConfig("schedule_free_sgd", learning_rate=1e-2)
    ),
    "nnx": lambda: trained(Net(nnx.Rngs(0))),
    "nnx, lora": lambda: trained(models.Lora(Net(nnx.Rngs(0)), "*/kernel", rank=1)),
    "equinox": lambda: trained(equinox()),
    "linen, bound": lambda: trained(nn.Dense(1).bind(nn.Dense(1).init(jax.random.key(0), X))),
    "recorded": lambda: trained(root="runs"),
    "failed": lambda: trained(callbacks=[Broken()]),
    "stopped": lambda: trained(callbacks=[Stopped()]),
    "measured": lambda: trained(steps_per_call="measure", tune_process=False),
}


def left_after(make: Callable[[], Regression]) -> tuple[int, int]:
    """Returns how many programs and arrays live when a trainer is gone."""
    trainer = make()
    gone = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert gone() is None
    return len(jax.devices()[0].client.live_executables()), len(jax.live_arrays())


@pytest.mark.slow_but("failed")
@pytest.mark.parametrize("make", MAKE.values(), ids=list(MAKE))
def test_trainer_that_is_gone_leaves_nothing_behind(make: Callable[[], Regression]) -> None:
    first = left_after(make)  # with what a process compiles and keeps once
    assert [left_after(make) for _ in range(2)] == [first] * 2
