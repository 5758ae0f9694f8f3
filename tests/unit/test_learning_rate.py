"""The learning rate range test: its curve, its suggestion, and that it leaves no trace."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distaff import Callback, OptimizerConfig, TrainerModule, data, loggers, optim, tune, zoo
from distaff.errors import BatchError, ConfigError, MetricError, NonFiniteError
from distaff.execution import execution
from distaff.tasks import Classifier
from distaff.tune import learning_rate
from distaff.tune.range_test import evaluate, smooth

# The loss is CURVATURE / 2 * (w - TARGET) ** 2: gradient descent diverges above 2 / CURVATURE.
CURVATURE, TARGET = 4.0, 3.0
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(96, 6)).astype(np.float32)
Y = (X @ RANDOM.normal(size=(6, 3))).argmax(-1).astype(np.int32)
ONES = {"x": np.zeros(8, np.float32)}
find = tune.find_learning_rate
MODEL = zoo.MLP((16, 3))
NARROW = {"low": 1e-4, "high": 1e-1, "num_steps": 10}


class Point(nn.Module):
    """One number."""

    @nn.compact
    def __call__(self, x):
        return self.param("w", nn.initializers.zeros, ()) + jnp.zeros_like(x)


class Parabola(TrainerModule):
    scale = 1.0

    def loss_fn(self, params, batch, ctx):
        distance = ctx.apply(params, batch["x"]) - TARGET
        return self.scale * CURVATURE / 2 * jnp.square(distance)


class Negative(Parabola):
    """Its loss is the same, minus a constant: as a likelihood, it is negative at its minimum."""

    def loss_fn(self, params, batch, ctx):
        return super().loss_fn(params, batch, ctx) - 100.0


def parabola(kind: type[Parabola] = Parabola, **options: Any) -> Parabola:
    options = {"optimizer": OptimizerConfig("sgd", learning_rate=0.1), **options}
    return kind(Point(), enable_progress_bar=False, **options)


def classifier(**options: Any) -> Classifier:
    options = {"optimizer": OptimizerConfig("adamw", weight_decay=0.01), **options}
    return Classifier(MODEL, batch_size=16, enable_progress_bar=False, **options)


@pytest.mark.parametrize("kind", [Parabola, Negative])
def test_suggestion_is_below_the_rate_at_which_descent_diverges(kind: type[Parabola]) -> None:
    found = find(parabola(kind), ONES, low=1e-5)
    stable = 2 / CURVATURE
    assert found.diverged
    assert found.learning_rates[-1] > stable
    assert found.losses[-1] > found.losses[0]
    assert found.suggestion is not None
    assert found.minimum is not None
    assert 1e-3 < found.suggestion < found.minimum < stable
    assert found.tenth_of_minimum == found.minimum / 10
    above = found.learning_rates > stable
    assert (np.diff(found.losses)[above[:-1]] >= 0).all()


def test_losses_are_those_of_the_formula() -> None:
    found = find(parabola(), ONES, low=1e-3, high=0.4, num_steps=20)
    expected, w = [], 0.0
    for rate in found.learning_rates:
        expected.append(CURVATURE / 2 * (w - TARGET) ** 2)
        w -= rate * CURVATURE * (w - TARGET)
    np.testing.assert_allclose(found.losses, expected, rtol=1e-4)
    np.testing.assert_allclose(found.learning_rates, np.geomspace(1e-3, 0.4, 20))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_losses_are_those_of_a_loop_by_hand(accumulate: int) -> None:
    config = OptimizerConfig("adamw", clip_norm=1.0, accumulate=accumulate, warmup_steps=50)
    trainer = classifier(optimizer=config, example_batch=(X, Y))
    loader = data.ArrayLoader((X, Y), 16, shuffle=True, seed=3)
    found = find(trainer, loader, low=1e-4, high=1e-1, num_steps=12)

    rates = jnp.asarray(found.learning_rates, jnp.float32)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(lambda n: rates[n], weight_decay=0)
    )
    params = trainer.state.params
    state, expected, batches = tx.init(params), [], data.epoch_of(loader, 12 * accumulate)

    def loss(params, batch):
        logits = MODEL.apply({"params": params}, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    step = jax.jit(jax.value_and_grad(loss))
    for _ in range(12):
        found_here = [step(params, next(batches)) for _ in range(accumulate)]
        losses, grads = zip(*found_here, strict=True)
        expected.append(np.mean(losses))
        mean = jax.tree.map(lambda *leaves: sum(leaves) / accumulate, *grads)
        updates, state = tx.update(mean, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(found.losses, expected, rtol=2e-5)


@pytest.mark.parametrize("has_trained", [pytest.param(False, marks=pytest.mark.slow), True])
def test_training_after_it_has_the_same_bits(has_trained: bool, tmp_path: Path) -> None:
    def train(folder: str, finds: bool) -> tuple[Any, Any, Any]:
        seen = loggers.MemoryLogger()
        trainer = classifier(
            root=str(tmp_path / folder), loggers=[seen], ema=0.9, callbacks=[Quiet()]
        )
        loader = data.ArrayLoader((X, Y), 16, shuffle=True, seed=3)
        if has_trained:
            trainer.train_model(loader, num_epochs=1)
        if finds:
            before = sorted((tmp_path / folder).rglob("*")) if has_trained else []
            state, position = trainer.state, loader.get_state()
            assert len(find(trainer, loader, num_steps=20).losses) > 10
            assert trainer.state is state
            assert loader.get_state() == position
            assert sorted((tmp_path / folder).rglob("*")) == before
        result = trainer.train_model(loader, num_epochs=2)
        return trainer.state, result.metrics, seen.records

    plain, other = train("plain", finds=False), train("other", finds=True)
    for one, two in zip(
        *(jax.tree.leaves(each[0].arrays()) for each in (plain, other)), strict=True
    ):
        np.testing.assert_array_equal(_bits(one), _bits(two))
    assert plain[1:] == other[1:]


class Quiet(Callback):
    """Must not be called by a range test."""

    def on_step_end(self, info: Any) -> None:
        assert info.epoch >= 1


def _bits(leaf: Any) -> np.ndarray:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_is_one_program(accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make = execution.Compiled.program

    def recorded(self: Any, function: Any, **options: Any) -> Any:
        made.append(make(self, function, **options))
        return made[-1]

    monkeypatch.setattr(execution.Compiled, "program", recorded)
    config = OptimizerConfig("sgd", accumulate=accumulate)
    found = find(parabola(optimizer=config), [ONES] * 3, low=1e-5, num_steps=40)
    assert len(found.losses) > 20
    assert sum(program._cache_size() for program in made) == 1


def test_steps_after_the_end_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(in_flight: int) -> np.ndarray:
        monkeypatch.setattr(learning_rate, "_IN_FLIGHT", in_flight)
        found = find(parabola(), ONES, low=1e-3, high=1e3, num_steps=30)
        assert found.diverged
        return found.losses

    # The host asks every few steps whether the test is over.
    asked, unasked = losses(1), losses(30)
    assert len(asked) < 30
    np.testing.assert_array_equal(asked, unasked)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "bf16-params", "fp16"])
def test_works_in_other_precisions(precision: Any) -> None:
    found = find(classifier(precision=precision), (X, Y), low=1e-5, num_steps=40)
    assert found.suggestion is not None
    assert np.isfinite(found.losses[:-1]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
        lambda total_steps: OptimizerConfig("adam", warmup_steps=total_steps - 1),
        optax.chain(optax.identity(), optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)),
    ],
)
def test_optimizers_with_a_learning_rate_work(optimizer: Any) -> None:
    expected = find(classifier(optimizer=OptimizerConfig("adam")), (X, Y), **NARROW)
    found = find(classifier(optimizer=optimizer), (X, Y), **NARROW)
    assert found.losses[-1] < 0.9 * found.losses[0]
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)


def test_make_optimizer_replaces_that_of_the_trainer() -> None:
    trainer = parabola(optimizer=optax.adam(1e-3))
    expected = find(parabola(), ONES, low=1e-3, high=0.4, num_steps=20)
    found = find(trainer, ONES, low=1e-3, high=0.4, num_steps=20, make_optimizer=optax.sgd)
    np.testing.assert_array_equal(found.losses, expected.losses)

    def make(rate: Any) -> Any:
        return lambda total_steps: OptimizerConfig("sgd", learning_rate=rate, schedule="linear")

    found = find(trainer, ONES, low=1e-3, high=0.4, num_steps=20, make_optimizer=make)
    np.testing.assert_array_equal(found.losses, expected.losses)


def test_groups_with_a_rate_of_their_own_keep_it() -> None:
    own = optim.ParamGroup("Dense_0/*", learning_rate=0.0)
    config = OptimizerConfig("sgd", groups=(own, optim.ParamGroup("Dense_1/*", learning_rate=0.0)))
    found = find(classifier(optimizer=config), (X, Y), high=1e3, num_steps=30)
    assert found.suggestion is None
    assert found.remark.startswith("no suggestion: the loss never fell between 1e-07 and 1e+03")
    assert not found.diverged


def test_groups_with_an_optimizer_of_their_own_keep_its_rate_without_its_schedule() -> None:
    own = optim.ParamGroup("Dense_0/*", optimizer=OptimizerConfig("sgd", warmup_steps=500))
    without = optim.ParamGroup("Dense_1/bias", optimizer=OptimizerConfig("optax:set_to_zero"))
    config = OptimizerConfig("adamw", groups=(own, without))
    assert len(find(classifier(optimizer=config), (X, Y), **NARROW).losses) == 10


def test_class_weights_are_in_the_loss() -> None:
    weighted = find(classifier(class_weights=[1.0, 1.0, 9.0]), (X, Y), num_steps=10)
    plain = find(classifier(), (X, Y), num_steps=10)
    assert abs(weighted.losses - plain.losses).min() > 1e-4


def test_a_loss_that_never_falls_has_no_suggestion() -> None:
    trainer = parabola()
    trainer.scale = 0.0
    found = find(trainer, ONES, num_steps=40)
    assert found.suggestion is None
    assert found.minimum is found.tenth_of_minimum is None
    assert "no suggestion: the loss never fell" in repr(found)


def test_noise_is_no_fall() -> None:
    random = np.random.default_rng(0)
    found = [
        evaluate(
            np.geomspace(1e-7, 10, num_steps),
            2.3 + 0.2 * random.normal(size=num_steps),
            highest_loss=9.0,
            diverged=False,
            smoothing=max(0.0, 1 - 20 / num_steps),
        )
        for num_steps in (20, 40, 100, 1000)
        for _ in range(50)
    ]
    assert sum(each.suggestion is not None for each in found) <= 2


def test_limits_of_the_range_are_said() -> None:
    rates = np.geomspace(1e-4, 1, 50)
    falls = np.linspace(2, 1, 50)
    found = evaluate(rates, falls, highest_loss=9.0, diverged=False, smoothing=0.5)
    assert found.minimum is None
    assert found.remark == "the loss still fell at 1: raise high"
    falls = 3 - np.linspace(0, 1, 50) ** 4
    found = evaluate(rates, falls, highest_loss=9.0, diverged=False, smoothing=0.5)
    assert found.suggestion is None
    assert found.remark == "no suggestion: the loss fell ever faster up to 1. Raise high."
    falls = np.minimum(np.geomspace(9, 1e-3, 50), 9)
    falls[-1] = 1.0
    found = evaluate(rates, falls, highest_loss=9.0, diverged=False, smoothing=0.0)
    assert found.remark == "the loss fell fastest at 0.0001: lower low"
    found = evaluate(rates[:2], falls[:2], highest_loss=9.0, diverged=True, smoothing=0.0)
    assert found.remark == "no suggestion: the loss diverged after 2 steps. Lower low."


def test_smoothing_has_no_lag() -> None:
    falls = np.r_[np.full(50, 2.0), np.linspace(2, 1, 11), np.full(39, 1.0)]
    assert abs(int(np.gradient(smooth(falls, 0.9)).argmin()) - 55) <= 1
    np.testing.assert_allclose(smooth(falls, 0.0), falls)
    np.testing.assert_allclose(smooth(np.ones(9), 0.9), 1.0)


def test_repr_has_the_result() -> None:
    text = repr(find(parabola(), ONES, low=1e-5))
    assert re.fullmatch(
        r"RangeTest\(suggestion 0\.\d+, minimum / 10 0\.\d+, diverged at [\d.]+, \d+ steps\)", text
    )


def test_figure_has_titles_axes_and_the_suggestion() -> None:
    pytest.importorskip("matplotlib")
    found = find(parabola(), ONES, low=1e-5)
    (axes,) = found.figure().axes
    assert axes.get_title() == "Learning rate range test: Parabola, seed 42"
    assert axes.get_xlabel() == "learning rate of the update, logarithmic"
    assert axes.get_ylabel() == "training loss before the update"
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert f"steepest descent: the suggestion, {found.suggestion:.3g}" in legend
    assert f"minimum / 10, {found.tenth_of_minimum:.3g}" in legend
    assert axes.get_ylim()[1] < 10 * found.losses[0]
    none = find(parabola(), ONES, high=1e-6, num_steps=10)
    (axes,) = none.figure().axes
    assert "no suggestion" in axes.get_title()


class Bad(Parabola):
    def loss_fn(self, params, batch, ctx):
        return super().loss_fn(params, batch, ctx) * jnp.nan


class Nameless(Parabola):
    def create_functions(self):
        step, evaluation = super().create_functions()

        def nameless(state, batch):
            state, metrics = step(state, batch)
            return state, {"error": metrics["loss"]}

        return nameless, evaluation


def once() -> Iterator[Any]:
    yield from [ONES] * 50


@pytest.mark.parametrize(
    ("make", "loader", "options", "error", "text"),
    [
        (parabola, ONES, {"low": 0}, ConfigError, "0 < low < high; got low=0 and high=10.0"),
        (parabola, ONES, {"low": 1, "high": 1}, ConfigError, "0 < low < high"),
        (parabola, ONES, {"high": np.inf}, ConfigError, "finite numbers"),
        (
            parabola,
            ONES,
            {"num_steps": 9},
            ConfigError,
            "num_steps must be an integer, at least 10",
        ),
        (parabola, ONES, {"smoothing": 1.0}, ConfigError, "smoothing must be a number from 0 to"),
        (lambda: 3, ONES, {}, ConfigError, "find_learning_rate takes a trainer"),
        (
            lambda: parabola(optimizer=optax.adam(1e-3)),
            *(ONES, {}, ConfigError, "make_optimizer=optax.adam"),
        ),
        (
            lambda: parabola(optimizer=optax.inject_hyperparams(optax.sgd)(lambda count: 0.1)),
            *(ONES, {}, ConfigError, "follows a schedule"),
        ),
        (
            lambda: parabola(optimizer=OptimizerConfig("velo", options={"weights": "/nowhere"})),
            *(ONES, {}, ConfigError, "'velo' has no learning rate"),
        ),
        (parabola, ONES, {"make_optimizer": lambda rate: 3}, ConfigError, "optimizer must be an"),
        (lambda: parabola(Bad), ONES, {}, NonFiniteError, "nan before the first update"),
        (lambda: parabola(Nameless), ONES, {}, MetricError, "'loss', a scalar"),
        (parabola, once(), {}, BatchError, "can be iterated only once"),
        (parabola, data.OnPolicy([ONES]), {}, BatchError, "OnPolicy"),
        (parabola, [], {}, BatchError, "must yield at least one batch"),
    ],
)
def test_bad_input_raises(make: Any, loader: Any, options: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        find(make(), loader, **options)


def test_short_batches_are_left_out_and_short_loaders_start_again() -> None:
    batches = [{"x": np.zeros(8, np.float32)}, {"x": np.zeros(3, np.float32)}]
    found = find(parabola(), batches, low=1e-3, high=0.4, num_steps=20)
    expected = find(parabola(), ONES, low=1e-3, high=0.4, num_steps=20)
    np.testing.assert_array_equal(found.losses, expected.losses)


def test_a_generator_function_is_called_again() -> None:
    calls = []

    def batches() -> Iterator[Any]:
        calls.append(1)
        yield from [ONES] * 5

    trainer = parabola()
    assert len(find(trainer, batches, num_steps=10).losses) == 10
    assert len(calls) >= 2


def test_data_in_another_order_causes_a_warning() -> None:
    loader = data.Stream([ONES] * 3, in_order=lambda: data.Stream([ONES] * 3))
    with pytest.warns(UserWarning, match="read in the order of the data"):
        found = find(parabola(), loader, num_steps=10)
    expected = find(parabola(), [ONES] * 3, num_steps=10)
    np.testing.assert_array_equal(found.losses, expected.losses)


def test_names_of_other_frameworks_lead_here() -> None:
    with pytest.raises(AttributeError, match=re.escape("tune.find_learning_rate(trainer, train)")):
        _ = parabola().lr_find
    with pytest.raises(ConfigError, match=re.escape("tune.find_batch_size(trainer, train)")):
        parabola(auto_scale_batch_size=True)
