"""Transformers of scikit-learn in the forward pass, by their numbers, against scikit-learn."""

from __future__ import annotations

import json
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA, FastICA, TruncatedSVD
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    Normalizer,
    PowerTransformer,
    QuantileTransformer,
    StandardScaler,
)

from distaff import OptimizerConfig, data, tasks
from distaff.data import Standardize, Transform
from distaff.errors import BatchError, ConfigError
from distaff.zoo import MLP

KINDS: dict[str, Any] = {
    "pca": lambda: PCA(2),
    "whitened": lambda: PCA(2, whiten=True),
    "svd": lambda: TruncatedSVD(2, random_state=0),
    "l1": lambda: Normalizer("l1"),
    "l2": lambda: Normalizer(),
    "max": lambda: Normalizer("max"),
    "yeo-johnson": lambda: PowerTransformer(),
    "not scaled": lambda: PowerTransformer(standardize=False),
    "box-cox": lambda: PowerTransformer("box-cox"),
    "mean": lambda: SimpleImputer(),
    "median": lambda: SimpleImputer(strategy="median"),
    "frequent": lambda: SimpleImputer(strategy="most_frequent", missing_values=-1),
    "constant": lambda: SimpleImputer(strategy="constant", fill_value=7.0),
    "all": lambda: make_pipeline(
        SimpleImputer(), StandardScaler(), "passthrough", PowerTransformer(), PCA(2), Normalizer()
    ),
}
IMPUTED = ("mean", "median", "constant", "all")


def table(seed: int, count: int, *, positive: bool = False) -> np.ndarray:
    """Skewed columns of several sizes, with equal values and zeros."""
    rng = np.random.default_rng(seed)
    x = rng.gamma(2.0, size=(count, 4)) * [1, 30, 0.1, 5] + [0.1, 0, 1e-3, 2]
    if not positive:
        x = (x - [2, 60, 0, 9]).round(2) * (rng.random((count, 1)) > 0.1)
    return x


def fitted(kind: str, x: np.ndarray) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return KINDS[kind]().fit(x)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32), count=st.integers(5, 40), missing=st.floats(0, 0.4))
def test_numbers_are_those_of_scikit_learn(kind, seed, count, missing):
    x, new = (table(seed + i, count, positive=kind == "box-cox") for i in range(2))
    if kind in IMPUTED:
        x, new = (np.where(table(seed + 2, count) < 60 * missing - 60, np.nan, x) for x in (x, new))
        x[0] = 1.0
    if kind == "frequent":
        x, new = np.round(x), np.round(new)
    theirs = fitted(kind, x)
    ours, expected = Transform.from_sklearn(theirs), theirs.transform(new)
    np.testing.assert_allclose(ours(new), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_float32_on_the_device_is_close_to_scikit_learn():
    x = {kind: table(0, 40, positive=kind == "box-cox") for kind in KINDS}
    theirs = {kind: fitted(kind, x[kind]) for kind in KINDS}
    ours = {kind: Transform.from_sklearn(each) for kind, each in theirs.items()}
    single = {kind: jnp.asarray(each, jnp.float32) for kind, each in x.items()}
    found = jax.jit(lambda single: {kind: ours[kind](single[kind]) for kind in KINDS})(single)
    for kind, each in found.items():
        expected = theirs[kind].transform(x[kind])
        assert each.dtype == jnp.float32
        np.testing.assert_allclose(each, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_an_empty_column_is_dropped_or_kept_as_in_scikit_learn():
    x = table(0, 9)
    x[:, 1] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for keep in (False, True):
            theirs = SimpleImputer(keep_empty_features=keep).fit(x)
            ours = Transform.from_sklearn(theirs)
            np.testing.assert_allclose(ours(x), theirs.transform(x), rtol=1e-12)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run on a table with missing values, and the pipeline that fills and projects them."""
    x = table(1, 64).astype(np.float32)
    y = x[:, :1] - x[:, 3:]
    x[::7, 1] = np.nan
    theirs = fitted("all", x)
    trainer = tasks.Regressor(
        MLP((8, 1)),
        standardize=Transform.from_sklearn(theirs),
        nan_ok=("0",),
        root=tmp_path_factory.mktemp("runs"),
        optimizer=OptimizerConfig("adam", learning_rate=0.01),
        enable_progress_bar=False,
        tune_process=False,
    )
    return trainer, trainer.train_model((x, y), num_epochs=2), theirs, x


def test_every_pass_is_transformed_and_a_loaded_trainer_has_the_numbers(trained):
    trainer, result, theirs, x = trained
    kernel = trainer.state.params["Dense_0"]["kernel"]
    assert kernel.shape[0] == 2  # components of the PCA
    by_hand = trainer.bind_model()(theirs.transform(x).astype(np.float32))
    np.testing.assert_allclose(trainer.predict(x), by_hand, rtol=1e-3, atol=1e-3)
    loaded = tasks.Regressor.load_from_checkpoint(result.path)
    assert loaded.config.standardize == trainer.config.standardize
    np.testing.assert_array_equal(loaded.predict(x), trainer.predict(x))
    steps = json.loads((result.path / "config.json").read_text())["options"]["standardize"]["steps"]
    kinds = ["fill", "scale", "yeo-johnson", "scale", "project", "normalize"]
    assert [step["kind"] for step in steps] == kinds


def test_other_leaves_of_a_dict_stay_and_other_shapes_are_named():
    x = table(0, 20)
    theirs = fitted("pca", x)
    ours, code = Transform.from_sklearn(theirs, name="x"), np.arange(20)
    found = ours({"x": x, "code": code})
    np.testing.assert_allclose(found["x"], theirs.transform(x), rtol=1e-9, atol=1e-9)
    assert found["code"] is code
    assert repr(ours) == "Transform(project)"
    with pytest.raises(BatchError, match=r"fitted on 4 features.*'x' has shape \(20, 3\)"):
        ours({"x": x[:, :3]})
    with pytest.raises(BatchError, match=r"for the input 'x', but.*\['inputs'\]"):
        ours(x)


@pytest.mark.parametrize(
    ("transformer", "complaint"),
    [
        (
            QuantileTransformer(n_quantiles=9),
            r"PCA, .*got a QuantileTransformer. Transform the arrays before",
        ),
        (make_pipeline(StandardScaler(), FastICA(2)), "got a FastICA"),
        (SimpleImputer(add_indicator=True), "add_indicator=True, which adds features"),
        (make_pipeline("passthrough"), "has no steps"),
    ],
)
def test_transformer_that_does_not_fit_is_named(transformer, complaint):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformer.fit(table(0, 20))
    with pytest.raises(ConfigError, match=complaint):
        Transform.from_sklearn(transformer)


def test_numbers_that_do_not_fit_are_named():
    with pytest.raises(ConfigError, match=r"The PCA must be fitted. Call fit\(x_train\)"):
        Transform.from_sklearn(PCA(2))
    texts = SimpleImputer(strategy="most_frequent").fit(np.array([["a"], ["b"]], object))
    with pytest.raises(ConfigError, match="must fill numbers with numbers"):
        Transform.from_sklearn(texts)
    wide = PCA(2).fit(np.random.default_rng(0).normal(size=(3, 40_000)))
    with pytest.raises(ConfigError, match="120001 numbers, more than the 100000"):
        Transform.from_sklearn(wide)
    seconds = 1.7e9 + np.arange(100.0)[:, None]
    with pytest.raises(BatchError, match="float32 has steps of 128"):
        Transform.from_sklearn(make_pipeline(StandardScaler(), PCA(1)).fit(seconds))
    with pytest.raises(ConfigError, match=r"has steps of the kinds .*got \['ica'\]"):
        Transform(2, ({"kind": "ica"},))
    with pytest.raises(ConfigError, match=r"got a PCA.*Try data.Transform"):
        Standardize.from_sklearn(PCA(1).fit(seconds))
    with pytest.raises(ConfigError, match=r"standardize must be fitted.*data.Transform"):
        tasks.Regressor(MLP((1,)), standardize=PCA(2))
    assert data.Transform is Transform
