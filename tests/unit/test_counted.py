"""Steps of one's own that make several updates: steps, schedules and random numbers count right."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distaff
from distaff import OptimizerConfig, data
from distaff.errors import StateError
from distaff.loggers import MemoryLogger

MODEL = (lambda key, x: {"w": jnp.ones(())}, lambda params, x: params["w"] * x)
LINEAR = OptimizerConfig("sgd", learning_rate=1.0, schedule="linear", end_fraction=0.0)


def noisy(state, batch):
    """One update, by a random number of its own."""
    number = jax.random.normal(jax.random.fold_in(state.rng, state.step))
    return state.apply_gradients(grads={"w": number + batch["x"].mean()})


def twice(state, batch):
    return noisy(noisy(state, batch), batch), {"loss": state.params["w"]}


def never(state, batch):
    return noisy(state, batch).replace(step=state.step), {"loss": state.params["w"]}


def sometimes(state, batch):
    after = noisy(state, batch)
    after = jax.lax.cond(state.step % 2 == 0, lambda s: noisy(s, batch), lambda s: s, after)
    return after, {"loss": state.params["w"]}


def trained(step, **options):
    class Own(distaff.TrainerModule):
        def create_functions(self):
            return step, lambda state, batch: {"loss": state.params["w"]}

    log = MemoryLogger()
    defaults = {"root": None, "enable_progress_bar": False, "log_every_n_steps": 1}
    trainer = Own(MODEL, optimizer=LINEAR, loggers=[log], **{**defaults, **options})
    loader = data.ArrayLoader({"x": np.ones(16, np.float32)}, 4)
    result = trainer.train_model(loader, num_epochs=2)
    return trainer, result, log


@pytest.mark.parametrize("step", [twice, jax.jit(twice)], ids=["plain", "jitted"])
def test_two_updates_per_step_are_those_of_a_plain_loop_over_a_schedule_of_all(step):
    trainer, result, log = trained(step)
    assert result.step == trainer.step == int(trainer.state.step) == 8
    state = trainer.state.replace(
        step=jnp.int32(0), params={"w": jnp.ones(())}, opt_state=trainer.state.tx.init({"w": 1.0})
    )
    for _ in range(8):
        state, _ = twice(state, {"x": np.ones(4, np.float32)})
    np.testing.assert_allclose(trainer.state.params["w"], state.params["w"], rtol=1e-6)
    rates = [r.metrics["step/learning_rate"] for r in log.records if "step/loss" in r.metrics]
    np.testing.assert_allclose(rates, 1 - np.arange(1, 16, 2) / 16, rtol=1e-6)


def test_a_step_that_does_not_count_is_counted():
    trainer, result, _ = trained(never)
    assert result.step == int(trainer.state.step) == 8


def test_a_step_whose_updates_depend_on_the_step_is_refused():
    with pytest.raises(StateError, match=r"by 1 or 2, depending on the step.*replace\(step="):
        trained(sometimes)
