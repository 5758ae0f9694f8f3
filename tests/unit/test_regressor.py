from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import mean_pinball_loss

from distaff import OptimizerConfig, data, tasks
from distaff.errors import BatchError, ConfigError, LossError
from distaff.step.context import Context


class Outputs(nn.Module):
    """Returns its one parameter, whatever it is given: the loss is then known exactly."""

    values: tuple
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        values = jnp.array(self.values, jnp.float32)
        return self.param("outputs", lambda _: values).astype(self.dtype)


class Pair(NamedTuple):
    x: np.ndarray
    target: np.ndarray


def make(model: nn.Module, batch, cls: type = tasks.Regressor, **options):
    options = {"root": None, "enable_progress_bar": False, **options}
    return cls(model, example_batch=batch, **options)


def loss_of(values, y, dtype: str = "float32", cls: type = tasks.Regressor):
    """The losses and metrics of a model that returns `values` for the targets `y`."""
    batch = {"x": np.zeros((len(y), 1), np.float32), "y": np.asarray(y)}
    trainer = make(Outputs(values, dtype), batch, cls)
    state = trainer.state
    return trainer.loss_fn(state.params, batch, Context(state, train=False))


def test_regressor_averages_squares_and_magnitudes_over_all_but_the_batch():
    values = (((1.0, 2.0), (3.0, 4.0)), ((0.0, 0.0), (0.0, -3.0)))
    loss, metrics = loss_of(values, [[[1, 0], [3, 8]], [[0, 0], [1, 0]]])
    np.testing.assert_array_equal(loss, [(4 + 16) / 4, (1 + 9) / 4])
    np.testing.assert_array_equal(metrics["mae"], [(2 + 4) / 4, (1 + 3) / 4])


def test_regressor_takes_one_number_per_example():
    loss, metrics = loss_of((1.0, 5.0), np.array([3.0, 4.0], np.float32))
    np.testing.assert_array_equal(loss, [4, 1])
    np.testing.assert_array_equal(metrics["mae"], [2, 1])


@pytest.mark.parametrize("targets", [np.int32, np.uint8, np.float16])
@pytest.mark.usefixtures("strict_dtypes")
def test_regressor_compares_in_float32_whatever_the_dtypes(targets):
    loss, _ = loss_of((1000.0, 0.0), np.array([40, 255], targets), dtype="float16")
    assert loss.dtype == jnp.float32
    np.testing.assert_array_equal(loss, [960**2, 255**2])


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 1, 1), (1, 1)])
def test_regressor_refuses_targets_that_would_be_broadcast(shape):
    x, y = np.ones((4, 3), np.float32), np.ones((4, *shape[1:]), np.float32)
    trainer = tasks.Regressor(nn.Dense(1), enable_progress_bar=False)
    if shape[0] == 1:
        trainer.targets = lambda batch: batch["y"][:1]
    with pytest.raises(LossError) as raised:
        trainer.train_model([{"x": x, "y": y}], num_epochs=1)
    message = str(raised.value)
    assert f"Got outputs (4, 1) and targets {(shape[0], *shape[1:])}" in message
    assert "have the shape of the model's outputs" in message
    assert "Reshape the targets to (4, 1)" in message
    assert ("y[:, None]" in message) == (shape == (4,))


@pytest.mark.parametrize(
    ("outputs", "named"),
    [(lambda x: (x, x), "tuple"), (lambda x: x.astype(int), "int32"), (lambda x: {"a": x}, "dict")],
)
def test_regressor_refuses_outputs_that_are_no_floats(outputs, named):
    class Strange(nn.Module):
        @nn.compact
        def __call__(self, x):
            return outputs(nn.Dense(1)(x))

    trainer = tasks.Regressor(Strange(), enable_progress_bar=False)
    batch = (np.ones((4, 3), np.float32), np.ones((4, 1), np.float32))
    with pytest.raises(LossError, match=f"one array of floats.*it returned {named}"):
        trainer.train_model([batch], num_epochs=1)


def linear(examples: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(examples)
    x = random.normal(size=(examples, 3)).astype(np.float32)
    y = x @ np.array([[1, 0], [-2, 1], [0.5, 3]], np.float32) + 0.3
    return x, y + random.normal(size=y.shape).astype(np.float32) / 4


BATCHES = {
    "tuple": lambda x, y: (x, y),
    "named tuple": Pair,
    **{
        name: lambda x, y, name=name: {"x": x, name: y}
        for name in ("y", "target", "targets", "label", "labels")
    },
}


@pytest.mark.parametrize("form", BATCHES)
def test_regressor_finds_the_targets_of_a_batch(form):
    x, y = linear(8)
    batch = BATCHES[form](x, y)
    np.testing.assert_array_equal(make(nn.Dense(2), batch).targets(batch), y)


def test_regressor_says_where_it_looked_for_targets():
    batch = {"x": np.ones((4, 3), np.float32), "goal": np.ones((4, 1), np.float32)}
    trainer = tasks.Regressor(nn.Dense(1), enable_progress_bar=False)
    with pytest.raises(BatchError, match=r"The target .*'y'.*'goal'.*targets\(self, batch\)"):
        trainer.train_model([batch], num_epochs=1)


def test_regressor_reaches_least_squares_exactly_over_a_short_last_batch():
    x, y = linear(24)
    val_x, val_y = linear(11)
    design = np.column_stack([x, np.ones(24)])
    solution = np.linalg.lstsq(design, y, rcond=None)[0]
    errors = np.column_stack([val_x, np.ones(11)]) @ solution - val_y

    trainer = tasks.Regressor(
        nn.Dense(2),
        optimizer=OptimizerConfig("sgd", learning_rate=0.4, schedule="constant"),
        root=None,
        enable_progress_bar=False,
        check_val_every_n_epoch=200,
    )
    val = data.ArrayLoader((val_x, val_y), batch_size=4)
    result = trainer.train_model([(x, y)], val, num_epochs=200)
    np.testing.assert_allclose(result.metrics["val/loss"], np.square(errors).mean(), rtol=1e-4)
    np.testing.assert_allclose(result.metrics["val/mae"], np.abs(errors).mean(), rtol=1e-4)
    predictions = trainer.predict(val)
    np.testing.assert_allclose(predictions - val_y, errors, rtol=1e-3, atol=1e-3)


def test_regressor_keeps_the_model_with_the_lowest_validation_loss():
    assert (tasks.Regressor.monitor.name, tasks.Regressor.monitor.mode) == ("val/loss", "min")


def test_regressor_targets_can_be_overridden():
    class Doubled(tasks.Regressor):
        def targets(self, batch):
            return 2 * super().targets(batch)

    loss, _ = loss_of((1.0, 5.0), np.array([3.0, 4.0], np.float32), cls=Doubled)
    np.testing.assert_array_equal(jax.device_get(loss), [25, 9])


OUTPUTS = np.random.default_rng(1).normal(size=(12, 2)).astype(np.float32)
TARGETS = np.random.default_rng(2).normal(size=(12, 2)).astype(np.float32) * 2
WEIGHT = np.random.default_rng(3).uniform(0, 2, 12).astype(np.float32)
QUANTILES = (0.1, 0.5, 0.75)


def scored(outputs: np.ndarray, y: np.ndarray, weight: np.ndarray | None = None, **options):
    """Evaluates a model that returns its input, in batches of 5, 5 and 2."""
    arrays = {"x": outputs, "y": y}
    if weight is not None:
        arrays["weight"] = weight
    model = (lambda key, *inputs: {"w": jnp.float32(1)}, lambda params, x: params["w"] * x)
    example = jax.tree.map(lambda leaf: leaf[:5], arrays)
    run = tasks.Regressor(
        model, root=None, enable_progress_bar=False, example_batch=example, **options
    )
    return run.eval_model(data.ArrayLoader(arrays, 5))


@pytest.mark.parametrize("delta", [0.5, 1.0, 3.0])
def test_huber_loss_is_that_of_torch(delta: float):
    error = abs(OUTPUTS - TARGETS)
    losses = np.where(error <= delta, error**2 / 2, delta * (error - delta / 2))
    found = scored(OUTPUTS, TARGETS, WEIGHT, loss="huber", huber_delta=delta)
    expected = {
        "loss": np.average(losses.mean(1), weights=WEIGHT),
        "mae": np.average(error.mean(1), weights=WEIGHT),
    }
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("is_weighted", [False, True])
def test_quantile_loss_is_that_of_sklearn(is_weighted: bool):
    y, weight = TARGETS[:, 0], WEIGHT if is_weighted else None
    outputs = np.stack([OUTPUTS[:, 0] - 1, OUTPUTS[:, 0], OUTPUTS[:, 0] + 0.5], axis=1)
    found = scored(outputs, y, weight, loss="quantile", quantiles=QUANTILES)
    each = [
        mean_pinball_loss(y, outputs[:, i], alpha=level, sample_weight=weight)
        for i, level in enumerate(QUANTILES)
    ]
    is_inside = (outputs[:, 0] <= y) & (y <= outputs[:, 2])
    expected = {
        "loss": np.mean(each),
        "mae": np.average(abs(y - outputs[:, 1]), weights=weight),
        "coverage": np.average(is_inside, weights=weight),
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_one_quantile_has_the_shape_of_the_targets_and_missing_targets_are_left_out():
    y = np.where(TARGETS > 1.5, np.nan, TARGETS).astype(np.float32)
    known = np.isfinite(y)
    found = scored(OUTPUTS, y, loss="quantile", quantiles=[0.9], nan_ok=("y",))
    expected = mean_pinball_loss(y[known], OUTPUTS[known], alpha=0.9)
    assert found == {"loss": pytest.approx(expected, rel=1e-5)}


@pytest.mark.slow
def test_model_learns_the_quantiles_of_its_targets():
    y = np.random.default_rng(0).exponential(size=512).astype(np.float32)
    model = (lambda key, *inputs: {"w": jnp.ones(3)}, lambda params, x: x @ params["w"][None])
    run = tasks.Regressor(
        model,
        loss="quantile",
        quantiles=QUANTILES,
        optimizer=OptimizerConfig("adam", learning_rate=0.03),
        root=None,
        enable_progress_bar=False,
    )
    loader = data.ArrayLoader({"x": np.ones((512, 1), np.float32), "y": y}, 64, seed=0)
    run.train_model(loader, num_epochs=40)
    np.testing.assert_allclose(run.state.params["w"], np.quantile(y, QUANTILES), atol=0.08)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "hubber"}, "Did you mean 'huber'"),
        ({"loss": "quantile"}, r"needs the quantiles to predict\. Pass quantiles="),
        ({"quantiles": (0.5,)}, r"quantiles=\(0\.5,\) needs loss='quantile'; loss is 'squared'"),
        ({"huber_delta": 2}, "huber_delta=2 needs loss='huber'"),
        ({"loss": "huber", "huber_delta": 0}, "huber_delta must be a positive number"),
        ({"loss": "quantile", "quantiles": (0.9, 0.1)}, "increasing numbers between 0 and 1"),
        ({"loss": "quantile", "quantiles": (0.5, 1)}, "increasing numbers between 0 and 1"),
        ({"loss": "quantile", "quantiles": []}, "increasing numbers between 0 and 1"),
        ({"loss": "quantile", "quantiles": 0.5}, "increasing numbers between 0 and 1"),
    ],
)
def test_option_of_another_loss_is_an_error(options: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        tasks.Regressor(nn.Dense(1), **options)


def test_outputs_that_are_no_quantiles_are_errors():
    with pytest.raises(LossError, match=r"shape \(5, 2, 3\) for targets of shape \(5, 2\)"):
        scored(OUTPUTS, TARGETS, loss="quantile", quantiles=QUANTILES)
