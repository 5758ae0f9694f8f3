"""Standardized inputs: the statistics against scikit-learn's, and a trainer that saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, RobustScaler, StandardScaler

import distaff
from distaff import data, tasks
from distaff.data import Standardize
from distaff.errors import BatchError, ConfigError
from distaff.models import as_model, standardized
from distaff.testing.loaders import assert_batches_equal
from model_kinds import KINDS, NAMES
from scripted import Break, InterruptError

RNG = np.random.default_rng(0)
X = (RNG.normal(size=(100, 3)) * [1, 50, 0.01] + [5, -300, 0.2]).astype(np.float32)
Y = ((X[:, 1] + 300) / 50).astype(np.float32)[:, None]
ARRAYS = (X, Y)


def make(model: Any = None, **options: Any) -> tasks.Regressor:
    options = {"root": None, "enable_progress_bar": False, "tune_process": False, **options}
    optimizer = distaff.OptimizerConfig("adam", learning_rate=0.05, schedule="constant")
    return tasks.Regressor(model or nn.Dense(1), optimizer=optimizer, **options)


def params(trainer: Any) -> Any:
    return jax.tree.map(np.asarray, trainer.state.params)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", [1, 50, 10_000])
def test_statistics_are_those_of_scikit_learn(count, dtype):
    x = (RNG.normal(size=(count, 4)) * [1, 50, 0.01, 0] + [0, 1e4, -0.5, 0.1]).astype(dtype)
    ours, theirs = Standardize.fit(x), StandardScaler().fit(x.astype(np.float64))
    np.testing.assert_allclose(ours.mean["inputs"], theirs.mean_, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(ours.std["inputs"], theirs.scale_, rtol=1e-9)
    np.testing.assert_allclose(
        ours(x.astype(np.float64)), theirs.transform(x.astype(np.float64)), rtol=1e-6, atol=1e-9
    )


def test_sums_are_in_float64():
    x = np.full((200_000, 1), 0.1, np.float32)
    x[::2] += 1000
    assert Standardize.fit(x).std["inputs"][0] == pytest.approx(
        x.astype(np.float64).std(), rel=1e-9
    )


@pytest.mark.parametrize(
    "train",
    [
        X,
        (X, Y),
        {"y": Y, "x": X},
        data.ArrayLoader((X, Y), 32, shuffle=True),
        [(X[:30], Y[:30]), (X[30:], Y[30:])],
        jnp.asarray(X),
    ],
    ids=["inputs", "tuple", "dict", "loader", "batches", "jax"],
)
def test_inputs_of_any_data_are_fitted(train):
    ours, plain = Standardize.fit(train), Standardize.fit(X)
    np.testing.assert_allclose(ours.mean["inputs"], plain.mean["inputs"], rtol=1e-12)
    np.testing.assert_allclose(ours.std["inputs"], plain.std["inputs"], rtol=1e-12)


def test_fitting_does_not_move_a_loader():
    loader = data.ArrayLoader((X, Y), 32, shuffle=True)
    before = loader.get_state()
    Standardize.fit(loader)
    assert loader.get_state() == before


def test_axes_share_a_mean():
    images = RNG.normal(size=(50, 4, 5, 3)).astype(np.float32) + np.arange(3, dtype=np.float32)
    scale = Standardize.fit(images, axis=(0, 1, 2))
    assert np.shape(scale.mean["inputs"]) == (1, 1, 3)
    np.testing.assert_allclose(np.ravel(scale.mean["inputs"]), images.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(scale(images).std((0, 1, 2)), 1, rtol=1e-5)


def test_integers_of_a_dict_stay():
    inputs = {"numbers": X, "city": np.arange(100, dtype=np.int32)}
    scale = Standardize.fit((inputs, Y))
    assert list(scale.mean) == ["numbers"]
    found = scale(inputs)
    np.testing.assert_array_equal(found["city"], inputs["city"])
    np.testing.assert_allclose(found["numbers"].mean(0), 0, atol=1e-4)


@pytest.mark.parametrize(
    ("train", "options", "error", "complaint"),
    [
        (np.arange(9), {}, BatchError, "input of floats"),
        (np.where(X > 0, np.nan, X), {}, BatchError, r"feature \[0\] of the input 'inputs' is nan"),
        (X, {"axis": 1}, ConfigError, "axis must hold 0"),
        (X, {"axis": (0, 2)}, ConfigError, "among the 2 axes"),
        ({"a": X}, {}, BatchError, r"hold \['a'\]. Pass the inputs alone"),
        (np.zeros((2, 400, 300)), {}, ConfigError, r"120000 features.*axis=\(0, 1, 2\)"),
        (
            1.7e9 + RNG.normal(size=(50, 1)),
            {},
            BatchError,
            r"Feature \[0\].*mean 1.7e\+09.*float32 has steps of 128",
        ),
    ],
    ids=["integers", "nan", "axis", "axes", "names", "many", "offset"],
)
def test_data_that_cannot_be_standardized_are_named(train, options, error, complaint):
    with pytest.raises(error, match=complaint):
        Standardize.fit(train, **options)


def test_other_inputs_than_fitted_are_an_error():
    scale = Standardize.fit(X)
    with pytest.raises(BatchError, match=r"features \(3,\).*shape \(100, 2\)"):
        scale(X[:, :2])
    with pytest.raises(BatchError, match=r"fitted on float inputs \['inputs'\].*has \['a'\]"):
        scale({"a": X})
    with pytest.raises(ConfigError, match="must be fitted"):
        make(standardize=Standardize)
    with pytest.raises(ConfigError, match="must be of the same inputs"):
        Standardize({"a": (1.0,)}, {})


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.slow
def test_every_pass_is_standardized(kind):
    scale = Standardize.fit(ARRAYS)
    run, by_hand = make(KINDS[kind].mlp(), standardize=scale), make(KINDS[kind].mlp())
    ours = run.train_model(ARRAYS, ARRAYS, num_epochs=3)
    theirs = by_hand.train_model((scale(X), Y), (scale(X), Y), num_epochs=3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        params(run),
        params(by_hand),
    )
    assert ours.metrics["val/loss"] == pytest.approx(theirs.metrics["val/loss"], rel=1e-4)
    np.testing.assert_allclose(run.predict(X), by_hand.predict(scale(X)), rtol=1e-3, atol=1e-4)
    batches = [(X[:50], Y[:50]), (X[50:], Y[50:])]
    np.testing.assert_allclose(run.predict(batches), run.predict(X), rtol=1e-5)
    assert run.eval_model(batches)["loss"] == pytest.approx(ours.metrics["val/loss"], rel=1e-5)


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.slow
def test_numbers_are_saved_with_the_model(kind):
    model = KINDS[kind].mlp
    run = make(model(), standardize=Standardize.fit(ARRAYS), root="runs")
    result = run.train_model(ARRAYS, ARRAYS, num_epochs=1)
    loaded = tasks.Regressor.load_from_checkpoint(result.path, model())
    assert loaded.config.standardize == run.config.standardize
    np.testing.assert_array_equal(loaded.predict(X), run.predict(X))
    found = loaded.eval_model(ARRAYS)
    assert found["loss"] == pytest.approx(result.metrics["val/loss"], rel=1e-6)
    record = json.loads(Path(str(result.path), "config.json").read_text())
    assert np.shape(record["options"]["standardize"]["mean"]["inputs"]) == (3,)


def test_bound_model_takes_standardized_inputs():
    scale = Standardize.fit(ARRAYS)
    run = make(standardize=scale)
    run.train_model(ARRAYS, num_epochs=1)
    np.testing.assert_allclose(run.bind_model()(scale(X)), run.predict(X), rtol=1e-5, atol=1e-6)


def test_without_it_the_model_is_the_same_object():
    model = as_model(nn.Dense(1))
    assert standardized(model, None) is model
    run = make()
    run.train_model(ARRAYS, num_epochs=1)
    assert run.state.apply_fn == run.model.apply_fn


def test_variant_has_statistics_of_its_own():
    first = make(standardize=Standardize.fit(X[:50]))
    first.train_model(ARRAYS, num_epochs=1)
    other = first.variant(standardize=Standardize.fit(X[50:]))
    plain = make(standardize=Standardize.fit(X[50:]))
    for run in (other, plain):
        run.train_model(ARRAYS, num_epochs=1)
    assert_batches_equal(params(other), params(plain))


def test_fused_steps_are_the_same():
    runs = [make(standardize=Standardize.fit(X), steps_per_call=count) for count in (1, 2, 3)]
    for run in runs:
        run.train_model(ARRAYS, num_epochs=3)
    single, twos, threes = map(params, runs)
    assert_batches_equal(twos, threes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), single, threes)


def started(step: int | None, root: str, fitted: Any = X) -> Any:
    callbacks = [Break(step)]
    run = make(root=root, standardize=Standardize.fit(fitted), callbacks=callbacks, save_every=1e-9)
    run.train_model(ARRAYS, ARRAYS, num_epochs=3)
    return run


@pytest.mark.slow
def test_run_resumes_bit_for_bit_and_other_statistics_are_another_run():
    whole = started(None, "whole")
    with pytest.raises(InterruptError):
        started(5, "runs")
    resumed = started(None, "runs")
    assert resumed.last_run.path.name == "0001"
    assert_batches_equal(params(whole), params(resumed))
    with pytest.raises(InterruptError):
        started(5, "others")
    assert started(None, "others", X[:50]).last_run.path.name == "0002"


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.slow
def test_standardized_model_may_compute_in_bfloat16(kind):
    scale = Standardize.fit(ARRAYS)
    model = KINDS[kind].mlp
    run, plain = (make(model(), standardize=scale, precision=name) for name in ("bf16", "float32"))
    for each in (run, plain):
        each.train_model(ARRAYS, num_epochs=1)
    halved = run.predict(X)
    assert not np.array_equal(halved, plain.predict(X))
    np.testing.assert_allclose(halved, plain.predict(X), rtol=0.1, atol=0.05)


def test_forward_function_of_the_state_is_standardized():
    class OwnStep(tasks.Regressor):
        def create_functions(self):
            train_step, _ = super().create_functions()

            def eval_step(state, batch):
                found = state.apply_fn({"params": state.params}, batch[0])
                return {"loss": jnp.square(found - batch[1]).mean(axis=1)}

            return train_step, eval_step

    options = {"root": None, "enable_progress_bar": False, "tune_process": False}
    run = OwnStep(nn.Dense(1), standardize=Standardize.fit(ARRAYS), **options)
    run.train_model(ARRAYS, num_epochs=1)
    by_hand = np.mean(np.square(run.predict(X) - Y))
    assert run.eval_model(ARRAYS)["loss"] == pytest.approx(by_hand, rel=1e-4)


SCALERS = {
    "standard": StandardScaler(),
    "centred": StandardScaler(with_std=False),
    "divided": StandardScaler(with_mean=False),
    "neither": StandardScaler(with_mean=False, with_std=False),
    "range": MinMaxScaler(),
    "other range": MinMaxScaler((-1, 3)),
    "largest": MaxAbsScaler(),
    "robust": RobustScaler(),
    "robust centred": RobustScaler(with_scaling=False),
    "robust divided": RobustScaler(with_centering=False, quantile_range=(10, 80)),
    "pipeline": make_pipeline(RobustScaler(), "passthrough", MinMaxScaler((2, 3))),
}


@pytest.mark.parametrize("kind", SCALERS)
def test_scaler_of_scikit_learn_gives_its_numbers(kind):
    x = np.column_stack([X, np.full(len(X), 3.0)]).astype(np.float64)
    fitted = clone(SCALERS[kind]).fit(x)
    ours = Standardize.from_sklearn(fitted)
    np.testing.assert_allclose(ours(x), fitted.transform(x), rtol=1e-9, atol=1e-9)
    x = x.astype(np.float32)
    np.testing.assert_allclose(ours(x), fitted.transform(x), rtol=1e-3, atol=1e-4)
    named = Standardize.from_sklearn(fitted, name="x")({"x": x, "code": np.arange(len(x))})
    np.testing.assert_array_equal(named["x"], ours(x))


def test_scaler_of_scikit_learn_is_saved_with_the_model(tmp_path):
    scaler = MinMaxScaler().fit(X)
    options = {"standardize": Standardize.from_sklearn(scaler), "root": tmp_path}
    trained = make(**options)
    result = trained.train_model(ARRAYS, num_epochs=2)
    loaded = tasks.Regressor.load_from_checkpoint(result.path)
    assert loaded.config.standardize == options["standardize"]
    np.testing.assert_array_equal(loaded.predict(X), trained.predict(X))
    by_hand = scaler.transform(X) @ params(trained)["kernel"] + params(trained)["bias"]
    np.testing.assert_allclose(loaded.predict(X), by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("transformer", "complaint"),
    [
        (PCA(2).fit(X), r"takes a fitted StandardScaler, .* got a PCA.*save the transformer"),
        (make_pipeline(RobustScaler(), PCA(2)).fit(X), "got a PCA"),
        (MinMaxScaler(), r"The MinMaxScaler must be fitted. Call fit\(x_train\)"),
        (MinMaxScaler(clip=True).fit(X), "clip=True.*Fit it with clip=False"),
        (make_pipeline("passthrough").fit(X), "has no steps"),
    ],
    ids=["other", "pipeline", "not fitted", "clips", "empty"],
)
def test_transformer_that_does_not_fit_is_named(transformer, complaint):
    with pytest.raises(ConfigError, match=complaint):
        Standardize.from_sklearn(transformer)


def test_scaler_of_values_that_float32_cannot_resolve_is_an_error():
    seconds = 1.7e9 + np.arange(100.0)[:, None]
    with pytest.raises(BatchError, match="float32 has steps of 128"):
        Standardize.from_sklearn(StandardScaler().fit(seconds))
