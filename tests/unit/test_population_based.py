"""Population-based training, beside a loop over NumPy arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff import EarlyStopping, OptimizerConfig, TrainerModule, data, tune
from distaff.errors import ConfigError
from distaff.tune.evolution.rules import Evolution

RATE = "optimizer.learning_rate"
SPACE = {RATE: tune.Float(1e-3, 0.2, log=True)}
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(48, 3)).astype(np.float32)
Y = X @ np.array([1.0, -2.0, 0.5], np.float32)
TRAIN, VAL, BATCH = slice(0, 32), slice(32, 48), 8
OPTIONS = {"space": SPACE, "size": 5, "fraction": 0.4, "num_epochs": 4}


class Line(TrainerModule):
    def loss_fn(self, params: Any, batch: Any, ctx: Any) -> Any:
        return jnp.square(ctx.apply(params, batch["x"]) - batch["y"])


def line(**options: Any) -> Line:
    def init(key: Any, x: Any) -> Any:
        return {"w": jax.random.normal(key, (3,))}

    sgd = OptimizerConfig("sgd", learning_rate=0.1, schedule="constant")
    given = {"optimizer": sgd, "root": None, "enable_progress_bar": False, "seed": 7}
    return Line((init, lambda params, x: x @ params["w"]), **{**given, **options})


def loaders() -> tuple[Any, Any]:
    train, val = ({"x": X[part], "y": Y[part]} for part in (TRAIN, VAL))
    return data.ArrayLoader(train, BATCH), data.ArrayLoader(val, 16)


def evolve(trainer: Line, **options: Any) -> tune.Population:
    return tune.population_based_training(trainer, *loaders(), **{**OPTIONS, **options})


def by_hand(first: list[np.ndarray], num_epochs: int, every: int) -> tuple[Any, Any, Any]:
    """Returns the weights, the losses and the rates of all members, `[epochs, members]`."""
    rules = Evolution(SPACE, every, OPTIONS["fraction"], seed=7)
    weights, values = [w.astype(np.float64) for w in first], rules.initial(len(first))
    losses, rates = [], []
    for epoch in range(1, num_epochs + 1):
        for n, each in enumerate(values):
            for start in range(0, 32, BATCH):
                x, y = (np.float64(a[start : start + BATCH]) for a in (X, Y))
                weights[n] = weights[n] - each[RATE] * 2 / BATCH * x.T @ (x @ weights[n] - y)
        losses.append([np.mean((X[VAL] @ w - Y[VAL]) ** 2) for w in weights])
        rates.append([each[RATE] for each in values])
        if rules.is_due(epoch) and epoch < num_epochs:
            sources, values = rules.next(values, [-loss for loss in losses[-1]], epoch)
            weights = [weights[source] for source in sources]
    return weights, np.array(losses), np.array(rates)


@pytest.mark.parametrize(("form", "every"), [("in turn", 1), ("stacked", 2)])
def test_members_train_as_a_loop_by_hand(form: str, every: int) -> None:
    trainer = line()
    batch = next(iter(loaders()[0]))
    each_alone = [line(seed=7 + n, example_batch=batch) for n in range(5)]
    first = [np.asarray(each.state.params["w"]) for each in each_alone]
    found = evolve(trainer, form=form, every=every)
    weights, losses, rates = by_hand(first, 4, every)
    assert found.form == form
    assert len({tuple(row) for row in rates.tolist()}) > 1  # members were replaced
    for n, member in enumerate(found.members):
        np.testing.assert_allclose(member.history["val/loss"], losses[:, n], rtol=1e-4)
        np.testing.assert_allclose(member.history[RATE], rates[:, n], rtol=1e-6)
        assert member.settings == {RATE: pytest.approx(rates[-1, n])}
        assert member.seed == 7 + n
        best = int(np.argmin(losses[:, n]))
        assert member.best.epoch == best + 1
        if best == 3:
            np.testing.assert_allclose(member.state.params["w"], weights[n], rtol=1e-4)
    keys = [jax.random.key_data(each.state.rng).tolist() for each in found.members]
    assert len(set(map(tuple, keys))) == 5  # else copies would draw the same dropout masks


@pytest.mark.parametrize("form", ["in turn", pytest.param("stacked", marks=pytest.mark.slow)])
def test_a_member_that_diverged_continues_from_a_good_one(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = [1e25, 0.1, 0.05]
    monkeypatch.setattr(Evolution, "initial", lambda self, size: [{RATE: x} for x in rates])
    found = evolve(line(), size=3, fraction=0.34, form=form)
    first = found.members[0]
    assert (first.status, first.reason) == ("finished", "")
    assert 1e-3 <= first.settings[RATE] <= 0.2
    assert first.metrics["val/loss"] < 0.1
    assert first.best.epoch > 1


@pytest.mark.slow
@pytest.mark.parametrize("form", ["stacked", "in turn"])
def test_an_interrupted_population_resumes_exactly(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distaff.tune.population.directory._SAVE_SECONDS", 0.0)
    whole = evolve(line(root=str(tmp_path / "whole")), form=form)
    call = tune.evolution.training.Replacing.__call__

    def cut(self: Any, epoch: int) -> None:
        if epoch == 3:
            raise KeyboardInterrupt
        call(self, epoch)

    trainer = line(root=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        patch.setattr(tune.evolution.training.Replacing, "__call__", cut)
        with pytest.raises(KeyboardInterrupt):
            evolve(trainer, form=form)
    for found in (evolve(trainer, form=form), evolve(trainer, form=form)):  # resumed, and loaded
        for one, other in zip(found.members, whole.members, strict=True):
            assert one.settings == other.settings
            assert one.metrics == other.metrics
            np.testing.assert_array_equal(one.state.params["w"], other.state.params["w"])
            np.testing.assert_array_equal(one.history[RATE], other.history[RATE])
    assert len(list((tmp_path / "cut").rglob("population.json"))) == 1
    evolve(trainer, form=form, every=2)  # another population
    assert len(list((tmp_path / "cut").rglob("population.json"))) == 2


@pytest.mark.parametrize("form", ["in turn", "stacked"])
def test_a_range_of_one_value_leaves_it_to_the_seeds(form: str) -> None:
    found = evolve(line(), space={RATE: tune.Float(0.1, 0.1)}, form=form, num_epochs=2)
    assert {each.settings[RATE] for each in found.members} == {0.1}
    assert {each.status for each in found.members} == {"finished"}


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"space": {}}, "needs a space"),
        ({}, {"space": {RATE: tune.Choice(0.1, 0.2)}}, "must be a Float"),
        ({}, {"space": {RATE: tune.Float(0.1, "optimizer.b")}}, "must be a Float"),
        ({}, {"space": {"ema": tune.Float(0.1, 0.9)}}, "'ema' is static"),
        ({}, {"space": {"no_option": tune.Float(0.1, 0.9)}}, "no_option"),
        ({}, {"size": 1}, "size=1"),
        ({}, {"fraction": 0.6}, "fraction must be"),
        ({}, {"every": 0}, "every"),
        ({}, {"every": 4}, "no member would be replaced"),
        ({}, {"forms": "stacked"}, "no option 'forms'"),
        ({"val_every": "2 epochs"}, {}, "every=1 epochs"),
        ({"callbacks": [EarlyStopping()]}, {}, "EarlyStopping"),
    ],
)
def test_what_cannot_be_done_is_an_error(changes: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evolve(line(**changes), **options)
