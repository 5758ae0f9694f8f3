"""Weights in a batch: what they do to loss, metrics and gradient of each task."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import metrics as sklearn_metrics

import distaff
from distaff import data, metrics, tasks
from distaff.errors import BatchError, ConfigError, LossError

QUIET: dict[str, Any] = {"root": None, "enable_progress_bar": False}
RNG = np.random.default_rng(0)
N = 22
X = RNG.normal(size=(N, 3)).astype(np.float32)
Y = RNG.integers(0, 3, N).astype(np.int32)
W = RNG.uniform(0, 2, N).astype(np.float32)
W[[1, 8, 9, 10, 11]] = 0


def scaled(key: Any, *inputs: Any) -> dict[str, Any]:
    return {"w": jnp.full((3,), 0.5)}


MODEL = (scaled, lambda params, x: params["w"][None] * x)


def task(kind: Any, example: Any, **options: Any) -> Any:
    example = jax.tree.map(lambda leaf: leaf[:8], example)
    options = {"optimizer": optax.sgd(0.1), **options}
    return kind(MODEL, **QUIET, example_batch=example, **options)


def ready(run: Any) -> Any:
    """Returns the state of a task with its optimizer."""
    return run.state.replace(tx=run.optimizer, opt_state=run.optimizer.init(run.state.params))


def stepped(run: Any, batch: Any) -> tuple[Any, Any]:
    """Returns the parameters after one step of a task, and the metrics of the step."""
    state, found = run.create_functions()[0](ready(run), batch)
    return state, metrics.compute(metrics.to_host(found))


def test_classifier_weighs_loss_and_accuracy_as_sklearn_does_over_ragged_batches():
    arrays = {"x": X, "y": Y, "sample_weight": W}
    found = task(tasks.Classifier, arrays).eval_model(data.ArrayLoader(arrays, 8))
    odds = np.exp(0.5 * X.astype(np.float64))
    probabilities = odds / odds.sum(1, keepdims=True)
    loss = sklearn_metrics.log_loss(Y, probabilities, sample_weight=W)
    hits = sklearn_metrics.accuracy_score(Y, X.argmax(1), sample_weight=W)
    assert found == pytest.approx({"loss": loss, "accuracy": hits}, rel=1e-5)


@pytest.mark.parametrize("soft", [False, True])
def test_ignored_label_is_as_if_the_example_were_not_there(soft: bool):
    labels = np.where(W == 0, -100, Y)
    rest = W != 0
    ignored = task(tasks.Classifier, {"x": X, "y": Y}, ignore_index=-100)
    without = ignored.eval_model([{"x": X[rest], "y": Y[rest]}])
    if soft:  # for which it means nothing
        one_hot = np.eye(3, dtype=np.float32)[Y]
        assert ignored.eval_model([{"x": X[rest], "y": one_hot[rest]}]) == pytest.approx(without)
        return
    assert ignored.eval_model([{"x": X, "y": labels}]) == pytest.approx(without, rel=1e-6)
    weighted = ignored.eval_model([{"x": X, "y": labels, "weight": np.ones(N, np.float32)}])
    assert weighted == pytest.approx(without, rel=1e-6)


def batches_of(kind: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a batch whose rows without weight hold nonsense, and the batch without them."""
    bad, kept = np.where(W[:, None] == 0, np.nan, X).astype(np.float32), W != 0
    y = {tasks.Classifier: np.where(W == 0, 77, Y), tasks.Autoencoder: Y}.get(kind, bad)
    batch = {"x": bad, "y": y, "weight": W}
    return batch, {name: leaf[kept] for name, leaf in batch.items()}


@pytest.mark.parametrize("kind", [tasks.Classifier, tasks.Regressor, tasks.Autoencoder])
@pytest.mark.slow
def test_row_without_weight_changes_neither_metrics_nor_gradient_even_if_it_is_nan(kind: Any):
    batch, without = batches_of(kind)
    (state, found), (expected, wanted) = (
        stepped(task(kind, without, optimizer=optax.sgd(0.1)), each) for each in (batch, without)
    )
    assert found == pytest.approx(wanted, rel=1e-6)
    np.testing.assert_allclose(state.params["w"], expected.params["w"], rtol=1e-6)
    assert abs(np.asarray(state.params["w"]) - 0.5).max() > 1e-3
    run = task(kind, without)
    run.train_model(data.ArrayLoader(batch, N), num_epochs=1)  # the first batch is no bad input


def test_regressor_weighs_values_and_leaves_out_missing_ones():
    targets = X[::-1].copy()
    weight = RNG.uniform(0.1, 1, (N, 3)).astype(np.float32)
    error = 0.5 * X - targets
    run = task(tasks.Regressor, {"x": X, "y": targets})
    found = run.eval_model(data.ArrayLoader({"x": X, "y": targets, "weight": weight}, 8))
    expected = {
        "loss": np.average(error**2, weights=weight),
        "mae": np.average(abs(error), weights=weight),
    }
    assert found == pytest.approx(expected, rel=1e-5)

    missing = RNG.random((N, 3)) < 0.3
    holes = np.where(missing, np.nan, targets).astype(np.float32)
    run = task(tasks.Regressor, {"x": X, "y": holes}, nan_ok=("y",), optimizer=optax.sgd(0.1))
    found = run.eval_model(data.ArrayLoader({"x": X, "y": holes}, 8))
    assert found["loss"] == pytest.approx((error**2)[~missing].mean(), rel=1e-5)
    state, _ = stepped(run, {"x": X, "y": holes})
    gradient = (2 * error * X * ~missing).sum(0) / (~missing).sum()
    np.testing.assert_allclose(state.params["w"], 0.5 - 0.1 * gradient, rtol=1e-5)


@pytest.mark.slow
def test_nan_is_missing_in_the_leaves_that_are_named_and_bad_elsewhere():
    def train(batch: Any, **options: Any) -> None:
        tasks.Regressor(MODEL, **QUIET, **options).train_model([batch], num_epochs=1)

    holes = X.copy()
    holes[3, 1] = np.nan
    train({"x": X, "y": holes}, nan_ok=("y",))
    train((X, holes), nan_ok=("1",))
    with pytest.raises(BatchError, match=r"'y' has 1 NaN.*pass nan_ok=\('y',\)"):
        train({"x": X, "y": holes})
    with pytest.raises(BatchError, match=r"'x' has 1 NaN"):
        train({"x": holes, "y": X}, nan_ok=("y",))
    with pytest.raises(BatchError, match=r"'y' has 1 infinite"):
        train({"x": X, "y": np.where(np.isnan(holes), np.inf, X)}, nan_ok=("y",))
    with pytest.raises(ConfigError, match=r"'z' is not one\. .*Known: 'x', 'y'"):
        train({"x": X, "y": X}, nan_ok=("z",))
    with pytest.raises(ConfigError, match="nan_ok must be a tuple of leaf names"):
        train({"x": X, "y": X}, nan_ok="y")


def test_autoencoder_weighs_loss_and_psnr():
    run = task(tasks.Autoencoder, {"x": X}, data_range=2.0)
    error = (0.25 * X**2).mean(1)
    psnr = -10 * np.log10(error / 4)
    wanted = {"loss": np.average(error, weights=W), "psnr": np.average(psnr, weights=W)}
    found = run.eval_model(data.ArrayLoader({"x": X, "weight": W}, 8))
    assert found == pytest.approx(wanted, rel=1e-5)
    assert run.eval_model(data.ArrayLoader((X, Y, W), 8)) == pytest.approx(wanted, rel=1e-5)


TOKENS = RNG.integers(0, 7, (6, 6)).astype(np.int32)
TABLE = RNG.normal(size=(7, 7)).astype(np.float32)
NLL = -np.take_along_axis(
    np.asarray(jax.nn.log_softmax(TABLE))[TOKENS[:, :-1]], TOKENS[:, 1:, None], axis=2
)[..., 0].astype(np.float64)
OF_TOKENS = RNG.uniform(0, 1, (6, 5)).astype(np.float32)
OF_TOKENS[2] = 0


@pytest.mark.parametrize(
    ("leaves", "weight", "options"),
    [
        ({"mask": OF_TOKENS > 0.5}, OF_TOKENS > 0.5, {}),
        ({"mask": OF_TOKENS}, OF_TOKENS, {}),
        ({"weight": OF_TOKENS}, OF_TOKENS, {}),
        ({"weight": np.pad(OF_TOKENS, ((0, 0), (1, 0)))}, OF_TOKENS, {}),
        ({"sample_weight": W[:6]}, np.repeat(W[:6, None], 5, 1), {}),
        (
            {"mask": OF_TOKENS > 0.5, "weight": W[:6]},
            (OF_TOKENS > 0.5) * W[:6, None],
            {},
        ),
        ({}, TOKENS[:, 1:] != 3, {"ignore_index": 3}),
        ({"tokens": np.where(TOKENS == 6, -100, TOKENS)}, None, {"ignore_index": -100}),
    ],
)
@pytest.mark.slow
def test_language_model_weighs_each_token(leaves: Any, weight: Any, options: Any):
    arrays, losses = {"tokens": TOKENS, **leaves}, NLL
    if weight is None:  # the model sees token 0 where there is none
        seen, weight = np.where(TOKENS == 6, 0, TOKENS), TOKENS[:, 1:] != 6
        chances = np.asarray(jax.nn.log_softmax(TABLE))[seen[:, :-1]]
        losses = -np.take_along_axis(chances, seen[:, 1:, None], axis=2)[..., 0]
    model = (lambda key, *inputs: {"w": TABLE}, lambda params, tokens: params["w"][tokens])
    run = tasks.LanguageModel(model, **QUIET, example_batch=arrays, **options)
    found = run.eval_model(data.ArrayLoader(arrays, 4))
    loss = np.average(losses, weights=weight)
    wanted = {"loss": loss, "perplexity": math.exp(loss), "bits_per_token": loss / math.log(2)}
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_batch_without_weight_teaches_nothing_and_counts_in_no_metric():
    plateau = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1))
    run = task(tasks.Classifier, {"x": X, "y": Y}, optimizer=plateau)
    state, found = stepped(run, {"x": X, "y": Y, "weight": np.zeros(N, np.float32)})
    np.testing.assert_array_equal(state.params["w"], 0.5)
    assert int(state.step) == 1
    assert math.isnan(found["loss"])
    # A loss of 0 would be the best for ever.
    assert optax.tree_utils.tree_get(state.opt_state, "best_value") == np.inf
    mask = np.repeat([1, 0, 1, 1], 8).astype(np.float32)
    arrays = {"x": np.resize(X, (32, 3)), "y": np.resize(Y, 32)}
    run = tasks.Classifier(MODEL, optimizer=optax.sgd(1e-6), **QUIET, on_bad_numbers="skip")
    weighted = run.train_model(data.ArrayLoader({**arrays, "weight": mask}, 8), num_epochs=1)
    some = {name: leaf[mask > 0] for name, leaf in arrays.items()}
    assert weighted.metrics["train/loss"] == pytest.approx(run.eval_model([some])["loss"], rel=1e-6)
    assert weighted.metrics["train/skipped"] == 0


def test_loss_of_ones_own_may_have_no_weight_in_a_batch():
    class Weighted(distaff.TrainerModule):
        def loss_fn(self, params: Any, batch: Any, ctx: Any) -> Any:
            error = params["w"][None] * batch["x"]
            return metrics.Mean.per_example(error**2, weight=batch["m"])

    mask = np.ones((N, 3), np.float32)
    mask[4:8] = 0
    run = Weighted(MODEL, optimizer=optax.sgd(1e-6), **QUIET)
    result = run.train_model(
        data.ArrayLoader({"x": X, "m": mask}, 4, remainder="keep"), num_epochs=1
    )
    expected = np.average((0.5 * X) ** 2, weights=mask)
    assert result.metrics["train/loss"] == pytest.approx(expected, rel=1e-5)


def test_weights_of_a_wrong_shape_or_kind_are_errors():
    run = task(tasks.Classifier, {"x": X, "y": Y})
    with pytest.raises(LossError, match=r"shape \(22,\); got \(22, 1\)"):
        run.eval_model([{"x": X, "y": Y, "weight": W[:, None]}])
    with pytest.raises(BatchError, match=r"third item of a tuple.*got int32"):
        run.eval_model([(X, Y, Y)])
    with pytest.raises(BatchError, match=r"sample weight is .* at least 0; in batch 1 .* one is -"):
        run.eval_model([{"x": X, "y": Y, "weights": -W}])
    one = run.eval_model([{"x": X, "y": Y, "weights": W}])
    assert run.eval_model([(X, Y, W)]) == one
    assert run.eval_model([{"x": X, "y": Y, "sample_weights": W > 0}])["loss"] != one["loss"]


@pytest.mark.slow_but("bfloat16")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_losses_of_half_precision_logits_are_those_of_float32(dtype: Any):
    logits = jnp.asarray(4 * X, dtype)
    wide = np.asarray(logits, np.float64)
    expected = sklearn_metrics.log_loss(Y, np.exp(wide) / np.exp(wide).sum(1, keepdims=True))
    model = (lambda key, *inputs: {"w": jnp.ones((1, 3), dtype)}, lambda p, x: p["w"] * x)
    for labels in (Y, np.eye(3)[Y].astype(dtype)):
        batch = {"x": logits, "y": labels}
        run = tasks.Classifier(model, **QUIET, example_batch=batch)
        assert run.eval_model([batch])["loss"] == pytest.approx(expected, rel=1e-6)
    batch = {"tokens": np.stack([Y, Y])}
    row = jnp.asarray([0.0, 0.01, 0.02], dtype)
    rows = (lambda key, *inputs: {"w": row}, lambda p, x: p["w"][None, None] + 0 * x[..., None])
    run = tasks.LanguageModel(rows, **QUIET, example_batch=batch)
    wide = np.asarray(row, np.float64)
    expected = (np.log(np.exp(wide).sum()) - wide[Y[1:]]).mean()
    assert run.eval_model([batch])["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("labels", [Y.astype(np.uint8), Y > 0, Y.astype(np.int8)])
def test_labels_of_other_dtypes_are_indices(labels: np.ndarray):
    run = task(tasks.Classifier, {"x": X, "y": labels})
    assert run.eval_model([{"x": X, "y": labels}]) == run.eval_model(
        [{"x": X, "y": labels.astype(np.int32)}]
    )


@pytest.mark.parametrize("of_values", [False, True])
def test_loss_of_ones_own_fills_what_has_no_weight(of_values: bool):
    targets = X[::-1].copy()
    weight = np.ones((N, 3), np.float32)
    weight[4:6] = 0
    if of_values:
        weight[9, 1] = 0
    holes = np.where(weight == 0, np.nan, targets)
    inputs = np.where(weight.any(1, keepdims=True), X, np.inf)

    class Own(distaff.TrainerModule):
        def loss_fn(self, params: Any, batch: Any, ctx: Any) -> Any:
            weight = batch["m"] if of_values else batch["m"][:, 0]
            batch = metrics.filled(batch, weight)
            error = ctx.apply(params, batch["x"]) - batch["y"]
            values = error**2 if of_values else (error**2).mean(1)
            return metrics.Mean.per_example(values, weight=weight)

    run = task(Own, {"x": inputs, "y": holes, "m": weight}, optimizer=optax.sgd(0.1))
    state, _ = stepped(run, {"x": inputs, "y": holes, "m": weight})
    gradient = np.where(weight > 0, 2 * (0.5 * X - targets) * X, 0).sum(0) / weight.sum()
    np.testing.assert_allclose(state.params["w"], 0.5 - 0.1 * gradient, rtol=1e-5)


@pytest.mark.parametrize("kind", [tasks.Classifier, tasks.Regressor, tasks.Autoencoder])
def test_tracing_a_loss_leaves_the_task_as_it_was(kind: Any):
    batch = {"x": X, "y": Y if kind is tasks.Classifier else X, "weight": W}
    run = task(kind, batch)
    before = dict(vars(run))
    jax.eval_shape(run.create_functions()[0], ready(run), batch)
    assert vars(run) == before
