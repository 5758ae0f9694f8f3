"""Several settings at once: numbers of the optimizer are traced, other values make groups."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff import OptimizerConfig, TrainerModule, data, tune
from distaff.errors import ConfigError

RATE, DECAY = "optimizer.learning_rate", "optimizer.weight_decay"
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(56, 4)).astype(np.float32)
OPTIMIZER = OptimizerConfig("adamw", learning_rate=0.02, warmup_steps=1, accumulate=2)


class Line(TrainerModule):
    traces: ClassVar[Counter[str]] = Counter()

    def loss_fn(self, params: Any, batch: Any, ctx: Any) -> Any:
        self.traces[type(self.optimizer).__name__] += ctx.train
        return jnp.square(ctx.apply(params, batch["x"]) - batch["x"].sum(axis=1))


def line(**options: Any) -> Line:
    def init(key: Any, x: Any) -> Any:
        return {"w": jax.random.normal(key, (4, 1)), "bias": jnp.zeros((1, 1))}

    model = init, lambda params, x: (x @ params["w"] + params["bias"])[:, 0]
    options = {"root": None, "enable_progress_bar": False, "optimizer": OPTIMIZER, **options}
    return Line(model, **options)


def loaders() -> tuple[Any, Any]:
    """Returns new loaders: three batches of training, so that accumulation has a rest."""
    train = data.ArrayLoader({"x": X[:48]}, 16, shuffle=True, seed=5)
    return train, data.ArrayLoader({"x": X[48:]}, 16)


def check(found: Any, index: int, own: TrainerModule) -> None:
    """Compares a member with a run of its own."""
    result = own.train_model(*loaders(), num_epochs=2)
    member = found.members[index]
    assert member.metrics == pytest.approx(result.metrics, rel=1e-5)
    for x, y in zip(*map(jax.tree.leaves, (member.state.params, own.state.params)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["stacked", pytest.param("in turn", marks=pytest.mark.slow)])
def test_numbers_of_the_optimizer_share_a_program(form: str) -> None:
    trainer = line(ema=0.5)
    vary = {RATE: [0.1, 0.01], DECAY: [0.0, 0.3]}
    found = tune.train_population(
        trainer, *loaders(), vary=vary, seeds=[1, 2], num_epochs=2, form=form
    )
    assert [(each.settings[RATE], each.settings[DECAY], each.seed) for each in found.members] == [
        (rate, decay, seed) for rate in (0.1, 0.01) for decay in (0.0, 0.3) for seed in (1, 2)
    ]
    config = dataclasses.replace(OPTIMIZER, learning_rate=0.01, weight_decay=0.3)
    check(found, 6, trainer.variant(optimizer=config, seed=1))
    assert found.member(6).optimizer == config
    spread = found.summary({RATE: 0.1, DECAY: 0.3})["val/loss"]
    assert spread.count == 2
    assert f"{RATE}=0.1, {DECAY}=0.3  {spread}" in str(found)
    slow, fast = ({RATE: rate, DECAY: 0.0} for rate in (0.01, 0.1))
    values = [each.metrics["val/loss"] for each in found.members]
    difference = found.difference(slow, fast)
    assert difference.spread.mean == pytest.approx(np.mean(values[4:6]) - np.mean(values[:2]))
    apart = np.std([values[4] - values[0], values[5] - values[1]], ddof=1)
    needed = np.ceil(2.8016**2 * (apart / difference.spread.mean) ** 2)
    assert difference.seeds_needed == max(needed, 2)
    with pytest.raises(ConfigError, match="several members of one seed"):
        found.difference({RATE: 0.1}, fast)
    with pytest.raises(ConfigError, match="name no member"):
        found.difference({RATE: 0.3}, fast)
    with pytest.raises(ConfigError, match="No member has the settings"):
        found.summary({RATE: 5.0})


def test_static_values_make_groups_that_read_the_same_batches() -> None:
    train, val = loaders()
    vary = [
        {"optimizer.name": "sgd", RATE: 0.05, "ema": None},
        {"optimizer.name": "adam", RATE: 0.02, "ema": 0.5},
    ]
    trainer = line(optimizer=OptimizerConfig(learning_rate=0.1))
    found = tune.train_population(trainer, train, val, vary=vary, num_epochs=2)
    assert [each.settings["optimizer.name"] for each in found.members] == ["sgd", "adam"]
    assert train.get_state() == {**loaders()[0].get_state(), "epoch": 2}
    adam = trainer.variant(optimizer=OptimizerConfig("adam", learning_rate=0.02), ema=0.5)
    check(found, 1, adam)
    assert "val_ema/loss" in found.members[1].metrics
    assert "val_ema/loss" not in found.members[0].metrics


@pytest.mark.slow
@pytest.mark.parametrize("form", ["stacked", "in turn"])
def test_more_members_are_not_traced_again(form: str) -> None:
    counts = []
    for rates in ([0.1, 0.2], [0.1, 0.2, 0.3, 0.4]):
        trainer = line()
        trainer.traces.clear()
        tune.train_population(trainer, *loaders(), vary={RATE: rates}, num_epochs=1, form=form)
        counts.append(trainer.traces["OptimizerConfig"])
    assert counts[0] == counts[1]


@pytest.mark.slow
def test_one_rate_that_is_too_high_diverges_alone() -> None:
    trainer = line(optimizer=OptimizerConfig("sgd", learning_rate=0.05, schedule="constant"))
    vary = [{DECAY: 0.0}, {RATE: 1e25}]
    found = tune.train_population(trainer, *loaders(), vary=vary, num_epochs=2)
    assert [each.status for each in found.members] == ["finished", "diverged"]
    config = OptimizerConfig("sgd", learning_rate=0.05, schedule="constant")
    check(found, 0, trainer.variant(optimizer=config))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vary": {}}, "vary must be a dict from paths to lists"),
        ({"vary": {RATE: 0.1}}, "values of 'optimizer.learning_rate' must be a list; got 0.1"),
        ({"vary": {"optimizer.rate": [1]}}, "no path 'optimizer.rate'"),
        ({"vary": {"seed": [1, 2]}}, "no path 'seed'. Pass seeds="),
        ({"vary": {"model.width": [1]}}, "'model.width', which needs a Flax Linen module"),
        ({"vary": {"emu": [0.5]}}, "emu"),
        ({"vary": {RATE: [-1.0]}}, "learning_rate must be a finite"),
        ({"vary": [{}]}, "or a list of settings"),
    ],
)
def test_wrong_settings_raise(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tune.train_population(line(), *loaders(), num_epochs=1, **options)


def test_a_field_needs_a_config() -> None:
    with pytest.raises(ConfigError, match=r"needs an OptimizerConfig"):
        tune.train_population(
            line(optimizer=optax.sgd(0.1)), *loaders(), vary={RATE: [0.1]}, num_epochs=1
        )
