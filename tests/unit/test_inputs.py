"""Whole arrays as the data of a trainer: `train_model((x, y), (xv, yv))`, `predict(x)`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse

from distaff import Monitor, OptimizerConfig, data, tasks, zoo
from distaff.data import InputOptions
from distaff.data.inputs import loader_of
from distaff.errors import BatchError, ConfigError
from distaff.testing.loaders import assert_batches_equal
from scripted import Break, InterruptError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(100, 8)).astype(np.float32)
Y = RNG.integers(0, 3, size=100).astype(np.int32)
WEIGHTS = RNG.random(100).astype(np.float32)


class Named(NamedTuple):
    """A batch with names."""

    x: Any
    y: Any


def classifier(model: Any = None, **options: Any) -> tasks.Classifier:
    constant = OptimizerConfig("adam", learning_rate=0.05, schedule="constant")
    options = {"root": None, "enable_progress_bar": False, "tune_process": False, **options}
    return tasks.Classifier(model or nn.Dense(3), optimizer=constant, **options)


def params(trainer: Any) -> Any:
    return jax.tree.map(np.asarray, trainer.state.params)


def loader(**options: Any) -> data.ArrayLoader:
    return data.ArrayLoader((X, Y), **{"batch_size": 32, "shuffle": True, "seed": 42, **options})


@pytest.mark.slow
def test_arrays_train_as_a_shuffled_loader_with_the_seed_of_the_trainer():
    by_arrays, by_loader = classifier(seed=42), classifier(seed=42)
    ours = by_arrays.train_model((X, Y), (X[:40], Y[:40]), (X[40:], Y[40:]), num_epochs=3)
    val, test = (data.ArrayLoader((X[s], Y[s]), 32) for s in (slice(40), slice(40, None)))
    theirs = by_loader.train_model(loader(), val, test, num_epochs=3)
    assert_batches_equal(params(by_arrays), params(by_loader))
    assert ours.metrics == theirs.metrics


def test_another_seed_has_another_order():
    runs = [classifier(seed=seed) for seed in (1, 2)]
    orders = []
    for run in runs:
        run.train_model((X, Y), num_epochs=1)
        orders.append(next(iter(run.last_run.plan.train_loader))[0])
    assert not np.array_equal(*orders)


def test_batch_size_is_an_option():
    run = classifier(batch_size=10)
    run.train_model((X, Y), num_epochs=2)
    assert run.step == 20
    assert run.last_run.plan.train_loader.batch_size == 10
    assert InputOptions().batch_size == 32


def test_few_examples_are_one_batch():
    run = classifier()
    run.train_model((X[:5], Y[:5]), (X[:3], Y[:3]), num_epochs=2)
    plan = run.last_run.plan
    assert plan.train_loader.batch_size == 5
    assert plan.val_loaders["val"].batch_size == 3


def test_second_training_does_not_repeat_the_orders_of_the_first():
    run, other = classifier(), classifier()
    run.train_model((X, Y), num_epochs=2)
    run.train_model((X, Y), num_epochs=1)
    same = loader()
    other.train_model(same, num_epochs=2)
    other.train_model(same, num_epochs=1)
    assert_batches_equal(params(run), params(other))


def test_prediction_and_evaluation_read_all_rows_in_order():
    run = classifier()
    run.train_model((X, Y), num_epochs=1)
    logits = run.predict(X)
    assert logits.shape == (100, 3)
    kernel, bias = params(run)["kernel"], params(run)["bias"]
    np.testing.assert_allclose(logits, X @ kernel + bias, rtol=1e-5, atol=1e-5)
    found = run.eval_model((X, Y), "val/")
    assert found["val/accuracy"] == pytest.approx(np.mean(logits.argmax(1) == Y))
    np.testing.assert_array_equal(run.predict((X, Y)), logits)
    np.testing.assert_array_equal(run.predict({"x": X}), logits)
    np.testing.assert_array_equal(run.predict(jnp.asarray(X)), logits)
    np.testing.assert_array_equal(run.predict([X[:60], X[60:]]), logits)


@pytest.mark.slow_but("64 bits")
@pytest.mark.parametrize(
    "arrays",
    [
        (jnp.asarray(X), jnp.asarray(Y)),
        (X.astype(np.float64), Y.astype(np.int64)),
        {"x": X, "label": Y},
        {"image": X, "y": Y},
        Named(X, Y),
    ],
    ids=["jax", "64 bits", "dict", "other names", "named tuple"],
)
def test_forms_of_arrays_are_the_same_data(arrays):
    run, plain = classifier(), classifier()
    run.train_model(arrays, arrays, num_epochs=1)
    plain.train_model((X, Y), (X, Y), num_epochs=1)
    assert_batches_equal(params(run), params(plain))
    assert run.best_metrics == plain.best_metrics


@pytest.mark.slow
def test_third_array_of_a_tuple_weighs():
    run, by_name = classifier(), classifier()
    run.train_model((X, Y, WEIGHTS), num_epochs=1)
    by_name.train_model({"x": X, "y": Y, "sample_weight": WEIGHTS}, num_epochs=1)
    assert_batches_equal(params(run), params(by_name))
    unweighted = classifier()
    unweighted.train_model((X, Y), num_epochs=1)
    assert not np.array_equal(params(run)["kernel"], params(unweighted)["kernel"])


@pytest.mark.slow
def test_inputs_may_be_a_dict_within_a_tuple():
    class Both(nn.Module):
        @nn.compact
        def __call__(self, inputs, train=False):
            return nn.Dense(3)(jnp.concatenate([inputs["left"], inputs["right"]], axis=1))

    run = classifier(Both())
    run.train_model(({"left": X[:, :4], "right": X[:, 4:]}, Y), num_epochs=1)
    assert run.predict({"x": {"left": X[:, :4], "right": X[:, 4:]}}).shape == (100, 3)


@pytest.mark.slow
def test_regressor_takes_arrays():
    run = tasks.Regressor(nn.Dense(1), root=None, enable_progress_bar=False, tune_process=False)
    result = run.train_model((X, X[:, :1]), (X, X[:, :1]), num_epochs=1)
    assert result.metrics["val/loss"] == pytest.approx(
        np.mean(np.square(run.predict(X) - X[:, :1])), rel=1e-5
    )


def test_several_validation_sets_may_be_arrays():
    run = classifier()
    run.monitor = Monitor("val_a/accuracy", mode="max")
    sets = {"a": (X[:50], Y[:50]), "b": {"x": X[50:], "y": Y[50:]}}
    result = run.train_model((X, Y), sets, num_epochs=1)
    assert {"val_a/accuracy", "val_b/accuracy"} <= result.metrics.keys()


@pytest.mark.slow
def test_steps_per_epoch_and_limits_cut_epochs_of_arrays():
    run = classifier(batch_size=10)
    run.train_model((X, Y), num_epochs=4, steps_per_epoch=5)
    assert run.step == 20
    limited = classifier(batch_size=10, limit_batches=3)
    limited.train_model((X, Y), (X, Y), num_epochs=2)
    assert limited.step == 6
    fit = classifier(batch_size=10, overfit_batches=2)
    fit.train_model((X, Y), (X, Y), num_epochs=2)
    assert fit.step == 4


BATCH = {"x": X[:32], "label": Y[:32]}


@pytest.mark.parametrize(
    "batches",
    [(BATCH, BATCH), [(X[:32], Y[:32])] * 2, ((X[:32], Y[:32]), (X[:32], Y[:32])), (BATCH,)],
    ids=["tuple of dicts", "list of tuples", "tuple of tuples", "one dict"],
)
@pytest.mark.slow
def test_batches_are_still_batches(batches):
    run = classifier(batch_size=8)
    run.train_model(batches, num_epochs=1)
    assert run.step == len(batches)
    assert run.predict(batches).shape == (32 * len(batches), 3)


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ((X, Y[:99]), "same length; got 100 examples in the inputs, 99 in the labels"),
        ({"x": X, "y": Y[:99]}, "same length; got 100 examples in 'x', 99 in 'y'.*into a list"),
        ((X[:0], Y[:0]), "at least one example; got 0 in the inputs"),
        ((X, np.array([None] * 100)), "must hold numbers.*dtype object"),
        ((X, np.array(["a"] * 100)), "must hold numbers.*Encode"),
        ((X, np.float32(3)), "'1' is a scalar"),
        ([[1.0, 2.0], [3.0, 4.0]], r"got a list of Python values.*numpy.asarray"),
        (([[1.0, 2.0]], [0]), r"got a tuple of Python values.*numpy.asarray"),
        ({"x": [[1.0]], "y": [0]}, "'x/0/0' is of type float.*numpy.asarray"),
        ({}, "at least one array"),
        ((X, Y, WEIGHTS, X), "train data are 4 arrays. Pass a dict"),
        ((X, [0] * 100), "ambiguous.*tuple of ndarray, list"),
        (((X, X), Y), "ambiguous.*tuple of tuple, ndarray"),
        (({"a": X}, {"b": Y}), "ambiguous.*tuple of dict, dict"),
        ((sparse.csr_array(X), Y), "'0' is a csr_array. Convert it to a numpy.ndarray"),
        ((np.ma.masked_less(X, 0), Y), "'0' is a MaskedArray. Fill"),
        ((X, np.full(100, 2**40)), "Integers must fit"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_wrong_arrays_are_named(arrays, complaint):
    with pytest.raises(BatchError, match=complaint):
        classifier().train_model(arrays, num_epochs=1)


def test_error_names_the_data():
    run = classifier()
    with pytest.raises(BatchError, match="arrays of the val data"):
        run.train_model((X, Y), (X, Y[:9]), num_epochs=1)
    with pytest.raises(BatchError, match="arrays of the test data"):
        run.train_model((X, Y), None, (X, Y[:9]), num_epochs=1)
    run.train_model((X, Y), num_epochs=1)
    with pytest.raises(BatchError, match="The predict data must be arrays"):
        run.predict([[1.0]])


def test_batch_size_is_not_an_argument_of_a_training():
    with pytest.raises(ConfigError, match=r"'batch_size'. Write it as an option of the trainer's"):
        classifier().train_model((X, Y), num_epochs=1, batch_size=3)  # ty: ignore
    with pytest.raises(ConfigError, match="batch_size must be an integer"):
        classifier(batch_size=0)


def started(step: int | None, train: Any, root: str = "runs", **options: Any) -> Any:
    run = classifier(root=root, callbacks=[Break(step)], save_every=1e-9, **options)
    run.train_model(train, (X, Y), num_epochs=3, key="only")
    return run


@pytest.mark.parametrize("again", [lambda: (X.copy(), Y), loader], ids=["arrays", "a loader"])
@pytest.mark.slow
def test_run_on_arrays_resumes_bit_for_bit(again: Callable[[], Any]):
    whole = started(None, (X, Y), "whole")
    with pytest.raises(InterruptError):
        started(5, (X, Y))
    resumed = started(None, again())
    assert "from its checkpoint of step" in Path("runs/classifier/0001/log.txt").read_text()
    assert_batches_equal(params(whole), params(resumed))
    assert whole.best_metrics == resumed.best_metrics


@pytest.mark.parametrize(
    ("train", "options"), [((X + 1, Y), {}), ((X, Y), {"batch_size": 16})], ids=["data", "size"]
)
@pytest.mark.slow
def test_other_arrays_and_batch_sizes_are_another_run(train, options):
    with pytest.raises(InterruptError):
        started(5, (X, Y))
    run = started(None, train, **options)
    assert run.last_run.path.name == "0002"


@pytest.mark.slow
def test_finished_run_on_arrays_is_loaded():
    first = started(None, (X, Y))
    again = started(None, (X, Y))
    assert again.last_run.path == first.last_run.path
    assert_batches_equal(params(first), params(again))
    record = json.loads(Path("runs/classifier/0001/config.json").read_text())
    assert record["options"]["batch_size"] == 32


def test_loader_of_batches_is_returned_unchanged():
    mine = loader()
    assert loader_of(mine, InputOptions(), name="val") is mine


@pytest.mark.slow
def test_inputs_alone_are_one_array():
    options = {"root": None, "enable_progress_bar": False, "tune_process": False}
    run = tasks.Autoencoder(zoo.MLP((2, 8)), **options)
    result = run.train_model(X, X, num_epochs=1)
    by_hand = np.mean(np.square(run.predict(X) - X))
    assert result.metrics["val/loss"] == pytest.approx(by_hand, rel=1e-4)


def test_labels_as_a_second_argument_name_the_tuple():
    run = classifier()
    with pytest.raises(ConfigError, match="Pass arrays as one tuple"):
        run.eval_model(X, Y)
