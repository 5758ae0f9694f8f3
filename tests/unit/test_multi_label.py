"""Multi-label classification: losses of PyTorch's formulas and Optax, metrics of scikit-learn."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import metrics as sklearn_metrics

from distaff import data, tasks
from distaff.errors import BatchError, ConfigError, LossError

RNG = np.random.default_rng(0)
N, CLASSES = 22, 3
X = RNG.normal(size=(N, CLASSES)).astype(np.float32)
Y = (RNG.random((N, CLASSES)) < 0.4).astype(np.int32)
W = RNG.uniform(0, 2, N).astype(np.float32)
OF_LABELS = (0.5, 2.0, 1.0)
OF_POSITIVES = (5.0, 1.0, 3.0)
LOGITS = 0.5 * X.astype(np.float64)
MODEL = (
    lambda key, *inputs: {"w": jnp.full((CLASSES,), 0.5)},
    lambda params, x: params["w"][None] * x,
)


def task(**options: Any) -> tasks.MultiLabelClassifier:
    fixed: dict[str, Any] = {"enable_progress_bar": False, "example_batch": {"x": X, "y": Y}}
    options = {"optimizer": optax.sgd(0.1), "root": None, **options}
    return tasks.MultiLabelClassifier(MODEL, **fixed, **options)


def evaluated(run: Any, labels: Any = Y, **leaves: Any) -> dict[str, float]:
    """Evaluates in batches of 8, 8 and 6 examples."""
    return run.eval_model(data.ArrayLoader({"x": X, "y": labels, **leaves}, 8))


def losses(labels: np.ndarray = Y) -> np.ndarray:
    """`torch.nn.BCEWithLogitsLoss(reduction="none")`, by the formula of its documentation."""
    p = 1 / (1 + np.exp(-LOGITS))
    return -(labels * np.log(p) + (1 - labels) * np.log(1 - p))


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, bool, np.float32])
def test_loss_and_metrics_are_means_over_all_labels(dtype: Any):
    guesses = X > 0
    expected = {
        "loss": losses().mean(),
        "accuracy": sklearn_metrics.accuracy_score(Y.ravel(), guesses.ravel()),
        "f1": sklearn_metrics.f1_score(Y, guesses, average="micro"),
    }
    assert evaluated(task(), Y.astype(dtype)) == pytest.approx(expected, rel=1e-5)


def test_weights_multiply_and_the_loss_is_divided_by_their_sum():
    run = task(label_weights=OF_LABELS, positive_weights=OF_POSITIVES)
    weight = W[:, None] * np.array(OF_LABELS) * np.where(Y, OF_POSITIVES, 1)
    found = evaluated(run, weight=W)
    expected = {
        "loss": np.average(losses(), weights=weight),
        "accuracy": np.average(((X > 0) == Y).mean(1), weights=W),
        "f1": sklearn_metrics.f1_score(
            Y.ravel(), (X > 0).ravel(), sample_weight=np.repeat(W, CLASSES)
        ),
    }
    assert found == pytest.approx(expected, rel=1e-5)
    # PyTorch's pos_weight: the same terms, divided by the number of values.
    by_torch = (losses() * np.where(Y, OF_POSITIVES, 1)).mean()
    positive = evaluated(task(positive_weights=OF_POSITIVES))["loss"]
    assert positive * np.where(Y, OF_POSITIVES, 1).mean() == pytest.approx(by_torch, rel=1e-5)


@pytest.mark.parametrize("kind", ["index", "nan", "weight"])
def test_unknown_labels_are_left_out(kind: str):
    known = RNG.random((N, CLASSES)) < 0.7
    known[3] = False
    expected = {
        "loss": losses()[known].mean(),
        "accuracy": ((X > 0) == Y)[known].mean(),
        "f1": sklearn_metrics.f1_score(Y[known], (X > 0)[known]),
    }
    found = {
        "index": lambda: evaluated(task(ignore_index=-1), np.where(known, Y, -1)),
        "nan": lambda: evaluated(
            task(nan_ok=("y",)), np.where(known, Y, np.nan).astype(np.float32)
        ),
        "weight": lambda: evaluated(task(), np.where(known, Y, 7), weight=known),
    }[kind]()
    assert found == pytest.approx(expected, rel=1e-5)


def test_input_of_an_ignored_example_may_be_nan_and_of_an_ignored_label_not():
    x, labels = X.copy(), Y.copy()
    x[3], labels[3] = np.nan, -1
    rest = np.arange(N) != 3
    found = task(ignore_index=-1).eval_model([{"x": x, "y": labels}])
    assert found["loss"] == pytest.approx(losses()[rest].mean(), rel=1e-5)
    x[4, 1], labels[4, 1] = np.nan, -1
    sums = (lambda key, *inputs: {"w": jnp.eye(CLASSES)}, lambda p, x: jnp.matmul(x, p["w"]))
    run = tasks.MultiLabelClassifier(
        sums, root=None, ignore_index=-1, enable_progress_bar=False, example_batch={"x": X, "y": Y}
    )
    assert np.isnan(run.eval_model([{"x": x, "y": labels}])["loss"])


@pytest.mark.slow
def test_smoothing_and_focal_loss_are_those_of_optax():
    found = evaluated(task(label_smoothing=0.2))["loss"]
    assert found == pytest.approx(losses(0.8 * Y + 0.1).mean(), rel=1e-5)
    logits = jnp.asarray(LOGITS, jnp.float32)
    focal = optax.sigmoid_focal_loss(logits, Y.astype(np.float32), gamma=2.0)
    assert evaluated(task(focal=2.0))["loss"] == pytest.approx(float(focal.mean()), rel=1e-5)


def stepped(run: Any, batch: Any) -> Any:
    """Returns the parameters after one step."""
    state = run.state.replace(tx=run.optimizer, opt_state=run.optimizer.init(run.state.params))
    return run.create_functions()[0](state, batch)[0].params["w"]


@pytest.mark.slow
def test_gradient_is_that_of_the_weighted_mean():
    weight = np.where(Y, OF_POSITIVES, 1.0)
    residual = 1 / (1 + np.exp(-LOGITS)) - Y
    gradient = (weight * residual * X).sum(0) / weight.sum()
    found = stepped(task(positive_weights=OF_POSITIVES), {"x": X, "y": Y})
    np.testing.assert_allclose(found, 0.5 - 0.1 * gradient, rtol=1e-5)
    huge = {"x": 1e4 * X, "y": Y}
    assert np.isfinite(stepped(task(focal=0.5), huge)).all()


@pytest.mark.slow
def test_run_trains_fused_and_keeps_the_model_with_the_highest_f1():
    loader = data.ArrayLoader({"x": X, "y": Y}, 6, seed=1)
    found = []
    for steps_per_call in (1, 3):
        run = task(positive_weights=OF_POSITIVES, root="runs", steps_per_call=steps_per_call)
        result = run.train_model(loader, loader, num_epochs=3)
        found.append((result.metrics, jax.device_get(run.state.params["w"]).tolist()))
    assert found[0] == found[1]
    assert run.monitor.name == "val/f1"
    loaded = tasks.MultiLabelClassifier.load_from_checkpoint(result.path, model=MODEL)
    assert loaded.config.positive_weights == OF_POSITIVES
    assert loaded.predict(data.ArrayLoader({"x": X}, 8)).shape == (N, CLASSES)


def test_labels_of_another_form_and_other_weights_are_errors():
    with pytest.raises(LossError, match=r"logits \(8, 3\) and labels \(8,\)"):
        evaluated(task(), Y[:, 0])
    with pytest.raises(BatchError, match=r"A label is 0, 1, or a probability .* one is 2"):
        evaluated(task(), np.where(X > 1, 2, Y))
    with pytest.raises(LossError, match=r"positive_weights has 2 weights, .* 3 logits"):
        evaluated(task(positive_weights=(1, 2)))
    with pytest.raises(LossError, match=r"label_weights has 4 weights, .* 3 logits"):
        evaluated(task(label_weights=(1, 2, 3, 4)))
    with pytest.raises(ConfigError, match="positive_weights must be a list"):
        task(positive_weights=[-1, 2, 3])
    with pytest.raises(ConfigError, match="contradict each other"):
        task(focal=1, label_smoothing=0.5)
    with pytest.raises(ConfigError, match="ignore_index must be a 32-bit integer"):
        task(ignore_index=0.5)
