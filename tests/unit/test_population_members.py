"""What looks at a whole model sees one member of a population, and never the stack.

For clipping by the global norm, batch statistics, accumulation and EMA, see `test_multi_seed.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff import OptimizerConfig, TrainerModule, data, tune
from distaff.optim.learned import read_weights, velo

WEIGHTS = read_weights(Path(__file__).parents[1] / "golden" / "velo" / "small")
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(48, 4)).astype(np.float32)
SEED, EPOCHS = 3, 2

CASES: dict[str, Any] = {
    # Orthogonalizes each matrix, by sums over all of it.
    "muon": {"optimizer": OptimizerConfig("muon", learning_rate=0.02, weight_decay=0.1)},
    # Evaluates and validates other weights than it trains.
    "schedule-free": {"optimizer": OptimizerConfig("schedule_free_adamw", learning_rate=0.05)},
    # Takes the statistics of arrays, of the loss and of time.
    "velo": {"optimizer": lambda total: velo(WEIGHTS, total)},
    # Skips steps that overflow, and lowers the scale, of this member alone.
    "loss scale": {
        "precision": "fp16",
        "optimizer": OptimizerConfig("sgd", learning_rate=0.05),
    },
}


class Net(nn.Module):
    is_deep: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        if self.is_deep:
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8, use_bias=False)(x))
        return nn.Dense(1)(nn.tanh(x))[:, 0]


class Regression(TrainerModule):
    def loss_fn(self, params: Any, batch: Any, ctx: Any) -> Any:
        noise = 0.1 * jax.random.normal(ctx.rng, batch["x"].shape) * ctx.train
        return jnp.square(ctx.apply(params, batch["x"] + noise) - batch["x"].sum(axis=1))


def loaders() -> tuple[Any, Any]:
    return data.ArrayLoader({"x": X[:32]}, 8), data.ArrayLoader({"x": X[32:]}, 16)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_stacked_member_is_the_run_of_its_seed_alone(case: str) -> None:
    options = {"root": None, "enable_progress_bar": False, **CASES[case]}
    trainer = Regression(Net(is_deep=case != "velo"), **options)
    found = tune.multi_seed(trainer, *loaders(), seeds=[1, SEED], num_epochs=EPOCHS, form="stacked")
    own = trainer.variant(seed=SEED)
    result = own.train_model(*loaders(), num_epochs=EPOCHS)
    member, rounding = found.members[1], 2e-2 if case == "loss scale" else 2e-5
    assert member.step == result.step
    assert dict(member.metrics) == pytest.approx(dict(result.metrics), rel=rounding, abs=rounding)
    mine, its = (x.replace(rng=None).arrays() for x in (member.state, own.state))
    assert jax.tree.structure(mine) == jax.tree.structure(its)
    for x, y in zip(*map(jax.tree.leaves, (mine, its)), strict=True):
        np.testing.assert_allclose(x, y, rtol=rounding, atol=rounding)
    if case == "loss scale":
        assert 0 < int(member.state.opt_state.num_skipped) < member.step
        assert float(member.state.opt_state.scale) == float(own.state.opt_state.scale)
    other, one = (x.state.params["Dense_0"]["kernel"] for x in found.members)
    assert not np.allclose(other, one, atol=0.1)
