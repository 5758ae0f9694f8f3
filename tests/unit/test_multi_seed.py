"""Several seeds at once: each member is the run that its seed would have alone."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff import Callback, EarlyStopping, OptimizerConfig, TrainerModule, data, tune
from distaff.errors import BatchError, ConfigError, MetricError, StateError
from distaff.optim import Plateau
from distaff.tune.population import chosen_form
from distaff.tune.population.result import spread

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(70, 4)).astype(np.float32)
Y = (X.sum(axis=1) > 0).astype(np.float32)
SEEDS, EPOCHS = [7, 3], 2
OPTIMIZER = OptimizerConfig("adamw", learning_rate=0.02, clip_norm=0.1, accumulate=2)


class Net(nn.Module):
    """A net with everything that is not elementwise: batch statistics, and random numbers."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5, use_bias=False)(x))
        x = nn.Dropout(0.2, deterministic=not train)(nn.tanh(x))
        return nn.Dense(1)(x)[:, 0]


class Regression(TrainerModule):
    traces: ClassVar[Counter[bool]] = Counter()

    def loss_fn(self, params: Any, batch: Any, ctx: Any) -> Any:
        self.traces[ctx.train] += 1
        return jnp.square(ctx.apply(params, batch["x"]) - batch["y"])


class Touchy(TrainerModule):
    """The loss is NaN from the second epoch on, if the seed says so."""

    def loss_fn(self, params: Any, batch: Any, ctx: Any) -> Any:
        is_bad = (ctx.state.step >= 4) & (params["unlucky"] > 0)
        loss = jnp.square(batch["x"] @ params["w"] - batch["y"])
        return jnp.where(is_bad, jnp.nan, loss)


def touchy(kind: type[Touchy] = Touchy, **options: Any) -> Touchy:
    def init(key: Any, x: Any) -> Any:
        # Of the seeds 1 to 3, only the first one has more.
        return {"w": jax.random.normal(key, (4,)), "unlucky": jax.random.normal(key) - 0.4}

    options = {"optimizer": OptimizerConfig("sgd"), **options}
    model = init, lambda params, x: x @ params["w"]
    return kind(model, root=None, enable_progress_bar=False, **options)


def loaders() -> tuple[Any, Any]:
    """Returns new loaders: three batches of training, and two that are not equal."""
    train = data.ArrayLoader({"x": X[:48], "y": Y[:48]}, 16, shuffle=True, seed=5)
    return train, data.ArrayLoader({"x": X[48:], "y": Y[48:]}, 16)


def regression(**options: Any) -> Regression:
    options = {"root": None, "enable_progress_bar": False, "optimizer": OPTIMIZER, **options}
    return Regression(Net(), **options)


class Alone(NamedTuple):
    """A trainer of one seed that was trained, and how often its step was traced."""

    trainer: Any
    result: Any
    traces: int


def arrays(state: Any) -> Any:
    """Returns the arrays of a state, with the data of its key."""
    return state.replace(rng=jax.random.key_data(state.rng)).arrays()


@pytest.fixture(scope="module")
def trainer() -> Regression:
    return regression(ema=0.8, log_every_n_steps=2)


@pytest.fixture(scope="module")
def alone(trainer: Regression) -> list[Any]:
    """The trainers of the seeds, each trained alone, with their results."""
    found = []
    for seed in SEEDS:
        trainer.traces.clear()
        own = trainer.variant(seed=seed)
        result = own.train_model(*loaders(), loaders()[1], num_epochs=EPOCHS)
        found.append(Alone(own, result, trainer.traces[True]))
    return found


@pytest.fixture(scope="module", params=["in turn", "stacked"])
def population(request: Any, trainer: Regression) -> Any:
    train, val = loaders()
    trainer.traces.clear()
    found = tune.multi_seed(
        trainer, train, val, loaders()[1], seeds=SEEDS, num_epochs=EPOCHS, form=request.param
    )
    return found, train


def test_member_is_the_run_of_its_seed_alone(
    population: Any, alone: list[Any], trainer: Regression
) -> None:
    found, train = population
    assert [each.seed for each in found.members] == SEEDS
    exact = found.form == "in turn"
    for each, (own, result, _) in zip(found.members, alone, strict=True):
        mine = dict(each.metrics), dict(each.best.metrics), dict(each.history), arrays(each.state)
        history = {name: result.history[name] for name in each.history}
        its = dict(result.metrics), result.best.metrics, history, arrays(own.state)
        for x, y in zip(jax.tree.leaves(mine), jax.tree.leaves(its), strict=True):
            np.testing.assert_allclose(x, y, rtol=0 if exact else 2e-5, atol=0 if exact else 1e-5)
        assert (each.status, each.step, each.epoch) == ("finished", 6, EPOCHS)
        assert each.best.step == result.best.step
    a, b = (each.state.params["Dense_0"]["kernel"] for each in found.members)
    assert not np.allclose(a, b)
    assert trainer.state is None
    assert trainer.config.seed == 42
    assert train.get_state() == {**loaders()[0].get_state(), "epoch": EPOCHS}
    # Both members share the programs, so that two are traced as often as one.
    assert exact * trainer.traces[True] <= alone[0].traces


def test_member_is_ready_to_predict(population: Any, alone: list[Any]) -> None:
    (found, _), val = population, loaders()[1]
    member, own = found.member(1), alone[1].trainer
    np.testing.assert_allclose(member.predict(val), own.predict(val), rtol=1e-4, atol=1e-5)
    metrics = member.eval_model(val, "test/")
    assert metrics["test/loss"] == pytest.approx(found.members[1].metrics["test/loss"], rel=1e-6)
    assert (member.step, member.config.seed) == (found.members[1].best.step, 3)
    with pytest.raises(ConfigError, match=r"index below 2; got 2. The seeds are \[7, 3\]"):
        found.member(2)


def test_statistics_and_table(population: Any) -> None:
    found, _ = population
    values = [each.metrics["val/loss"] for each in found.members]
    summary = found.summary()
    assert summary["val/loss"].mean == pytest.approx(np.mean(values))
    assert summary["val/loss"].deviation == pytest.approx(np.std(values, ddof=1))
    assert {"val/loss", "val_ema/loss", "test/loss"} <= summary.keys()
    assert found.best.metrics["val/loss"] == min(values)
    first, *_ = found.table(by="test/loss").splitlines()[1:]
    best = min(found.members, key=lambda each: each.metrics["test/loss"])
    assert first.split()[0] == str(best.seed)
    assert "±" in str(found)
    assert "<table" in found._repr_html_()
    assert found.form in repr(found)
    with pytest.raises(MetricError, match="'val/los'"):
        found.table(by="val/los")


@pytest.mark.parametrize("form", ["stacked", pytest.param("in turn", marks=pytest.mark.slow)])
def test_member_that_diverges_is_reported_and_disturbs_no_other(form: str) -> None:
    found = tune.multi_seed(touchy(), *loaders(), seeds=range(1, 4), num_epochs=3, form=form)
    assert [each.status for each in found.members] == ["diverged", "finished", "finished"]
    for each in found.members:
        if each.status == "diverged":
            assert each.reason == "the loss became NaN or infinite at step 5 (epoch 2)"
            assert each.best.epoch == 1
            assert np.isfinite(each.state.params["w"]).all()
            assert f"seed {each.seed}: {each.reason}" in str(found)
        else:
            own = found.member(each.seed - 1).variant()
            result = own.train_model(*loaders(), num_epochs=3)
            assert each.metrics == pytest.approx(result.metrics, rel=1e-5)
    assert found.summary()["val/loss"].count == 2
    assert found.best.status == "finished"


class Graded(Touchy):
    """Adds the seed to what it validates, so that each member has to be asked."""

    def eval_model(self, loader: Any, prefix: str = "", **weights: Any) -> dict[str, Any]:
        return {**super().eval_model(loader, prefix, **weights), f"{prefix}seed": self.config.seed}


@pytest.mark.parametrize("kind", [Touchy, pytest.param(Graded, marks=pytest.mark.slow)])
def test_stacked_members_are_validated_in_one_pass_over_the_data(kind: Any) -> None:
    trainer, passes = touchy(kind), []

    def val() -> Any:
        passes.append(len(passes))
        yield {"x": X[48:], "y": Y[48:]}

    found = tune.multi_seed(trainer, loaders()[0], val, seeds=[2, 3], num_epochs=2, form="stacked")
    assert [each.step for each in found.members] == [6, 6]
    if kind is Graded:
        assert [each.metrics["val/seed"] for each in found.members] == [2, 3]
    else:
        assert len(passes) == 2  # one after each epoch


def test_early_stopping_ends_each_member_by_itself() -> None:
    stop = EarlyStopping(patience=1, min_delta=0.02)
    trainer = touchy(callbacks=[stop], optimizer=OptimizerConfig("sgd", learning_rate=0.1))
    found = tune.multi_seed(trainer, *loaders(), seeds=[2, 3], num_epochs=9, form="in turn")
    for each in found.members:
        own = trainer.variant(seed=each.seed, callbacks=[EarlyStopping(patience=1, min_delta=0.02)])
        result = own.train_model(*loaders(), num_epochs=9)
        assert (each.status, each.reason) == (result.status, result.reason)
        assert (each.epoch, each.metrics) == (result.epoch, result.metrics)
    assert "stopped" in {each.status for each in found.members}


class Shouting(Callback):
    def on_epoch_end(self, info: Any) -> None:
        print(info.epoch)


class Hooked(Regression):
    def on_training_epoch_end(self, epoch: int, metrics: Any) -> None:
        metrics["more"] = 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"callbacks": [Shouting()]}, "calls no callbacks but EarlyStopping.* has Shouting"),
        ({"debug": True}, "does not support debug=True"),
        ({"max_time": "1h"}, "does not support max_time='1h'"),
        ({"on_bad_numbers": "rollback"}, "does not support on_bad_numbers='rollback'"),
        ({"val_every": "2 steps"}, "validates every 2 steps"),
        ({"optimizer": OptimizerConfig(plateau=Plateau())}, "on a plateau"),
    ],
)
def test_what_a_population_cannot_do_raises(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tune.multi_seed(regression(**options), *loaders(), seeds=2, num_epochs=1)


def test_wrong_arguments_raise() -> None:
    with pytest.raises(ConfigError, match=r"Hooked.on_training_epoch_end"):
        tune.multi_seed(Hooked(Net(), root=None), *loaders(), num_epochs=1)
    with pytest.raises(ConfigError, match=r"a number of epochs or steps; got .*'9 examples'"):
        tune.multi_seed(regression(), *loaders(), num_epochs="9 examples")
    with pytest.raises(ConfigError, match="takes a trainer"):
        tune.multi_seed(Net(), *loaders(), num_epochs=1)
    for seeds in ([], [1, 1], "12", 0, [1.5]):
        with pytest.raises(ConfigError, match="seeds must be"):
            tune.multi_seed(regression(), *loaders(), seeds=seeds, num_epochs=1)
    with pytest.raises(ConfigError, match="form must be one of 'auto'"):
        tune.multi_seed(regression(), *loaders(), num_epochs=1, form="vmap")
    with pytest.raises(BatchError):
        tune.multi_seed(regression(), [], num_epochs=1)


def test_spread_is_known_for_two_values_or_more() -> None:
    found = spread([1.0, 2.0, 3.0])
    assert (found.mean, found.deviation, found.count) == (2.0, 1.0, 3)
    assert 1 <= found.low < 2 < found.high <= 3
    assert spread([1.0, 2.0, 3.0]) == found
    one = spread([1.5])
    assert one.mean == 1.5
    assert np.isnan(one.deviation)
    assert str(one) == "1.5 (1)"
    assert np.isnan(spread([]).mean)


@pytest.mark.slow
def test_measured_form_is_the_faster_one_and_is_remembered(monkeypatch: Any) -> None:
    def train(seeds: Any) -> Any:
        return tune.multi_seed(
            touchy(), *loaders(), seeds=seeds, num_epochs=1, form="measured"
        ).form

    def timed(stacked: float, in_turn: float) -> None:
        times = iter([stacked, stacked, 9.0, in_turn, 9.0, in_turn])
        monkeypatch.setattr(chosen_form, "timer", lambda *_: lambda size: next(times))

    assert train([2, 3, 4]) in ("stacked", "in turn")  # by the clock
    timed(stacked=1.0, in_turn=0.6)
    assert train([2, 3]) == "stacked"
    timed(stacked=0.0, in_turn=0.0)
    assert train([5, 7]) == "stacked"
    timed(stacked=1.0, in_turn=0.2)
    assert train([2, 3, 4, 5]) == "in turn"
    assert train([6, 7, 8, 9]) == "in turn"
    trainer = touchy(deterministic=True)
    with pytest.raises(ConfigError, match="'measured' and deterministic=True contradict"):
        tune.multi_seed(trainer, *loaders(), seeds=2, num_epochs=1, form="measured")


@pytest.mark.slow
def test_many_members_without_convolutions_are_stacked() -> None:
    found = tune.multi_seed(regression(), *loaders(), seeds=16, num_epochs=1)
    assert found.form == "stacked"


def test_without_survivors_there_is_no_best() -> None:
    found = tune.multi_seed(touchy(), *loaders(), seeds=[1], num_epochs=2)
    assert found.form == "in turn"  # few members on a CPU
    with pytest.raises(StateError, match="All members diverged"):
        _ = found.best
