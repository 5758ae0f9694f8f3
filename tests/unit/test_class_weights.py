"""A classifier's class weights, label smoothing and focal loss, next to PyTorch's formulas."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import metrics as sklearn_metrics
from sklearn.utils.class_weight import compute_class_weight

import distaff
from distaff import Callback, OptimizerConfig, data, tasks
from distaff.errors import ConfigError, LossError

RNG = np.random.default_rng(0)
N, CLASSES = 22, 3
X = RNG.normal(size=(N, CLASSES)).astype(np.float32)
Y = RNG.integers(0, CLASSES, N).astype(np.int32)
W = RNG.uniform(0, 2, N).astype(np.float32)
OF_CLASSES = (0.5, 4.0, 1.25)


def scaled(key: Any, *inputs: Any) -> dict[str, Any]:
    return {"w": jnp.full((CLASSES,), 0.5)}


MODEL = (scaled, lambda params, x: params["w"][None] * x)
LOGITS = 0.5 * X.astype(np.float64)
QUIET: dict[str, Any] = {"enable_progress_bar": False, "log_every_n_steps": 1}


def task(**options: Any) -> tasks.Classifier:
    options = {"optimizer": optax.sgd(0.1), "root": None, **options}
    return tasks.Classifier(MODEL, **QUIET, example_batch={"x": X[:8], "y": Y[:8]}, **options)


def evaluated(run: tasks.Classifier, labels: Any = Y, **leaves: Any) -> dict[str, float]:
    """Evaluates in batches of 8, 8 and 6 examples."""
    return run.eval_model(data.ArrayLoader({"x": X, "y": labels, **leaves}, 8))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def torch_cross_entropy(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    weight: Any = (1.0,) * CLASSES,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> float:
    """`torch.nn.CrossEntropyLoss` with `reduction="mean"`, by the formulas of its documentation."""
    kept, weight = labels != ignore_index, np.asarray(weight)
    log_p, labels = log_softmax(logits)[kept], labels[kept]
    of_label = -weight[labels] * log_p[np.arange(len(labels)), labels]
    of_all = -(weight * log_p).sum(-1) / logits.shape[-1]
    total = ((1 - label_smoothing) * of_label + label_smoothing * of_all).sum()
    return total / weight[labels].sum()


def test_class_weights_and_ignored_labels_are_those_of_torch():
    labels = np.where(W < 0.5, -100, Y)
    assert (labels < 0).any()
    found = evaluated(task(class_weights=OF_CLASSES, ignore_index=-100), labels)
    expected = torch_cross_entropy(LOGITS, labels, weight=OF_CLASSES)
    hits = (X.argmax(1) == labels)[labels >= 0].mean()
    assert found == pytest.approx({"loss": expected, "accuracy": hits}, rel=1e-5)


def test_class_weights_multiply_sample_weights_of_the_loss_alone():
    found = evaluated(task(class_weights=OF_CLASSES), weight=W)
    probabilities = np.exp(log_softmax(LOGITS))
    weight = W * np.take(OF_CLASSES, Y)
    expected = {
        "loss": sklearn_metrics.log_loss(Y, probabilities, sample_weight=weight),
        "accuracy": sklearn_metrics.accuracy_score(Y, X.argmax(1), sample_weight=W),
    }
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.1, 0.9])
def test_label_smoothing_is_that_of_torch_and_optax(smoothing: float):
    found = evaluated(task(label_smoothing=smoothing))["loss"]
    assert found == pytest.approx(
        torch_cross_entropy(LOGITS, Y, label_smoothing=smoothing), rel=1e-5
    )
    one_hot = np.eye(CLASSES, dtype=np.float32)[Y]
    labels = optax.smooth_labels(jnp.asarray(one_hot), smoothing)
    by_optax = optax.softmax_cross_entropy(jnp.asarray(LOGITS, jnp.float32), labels).mean()
    assert found == pytest.approx(float(by_optax), rel=1e-5)
    assert evaluated(task(label_smoothing=smoothing), one_hot)["loss"] == pytest.approx(found)


def test_class_weight_of_a_smoothed_label_is_that_of_its_class():
    smoothing = 0.2
    log_p = log_softmax(LOGITS)
    labels = (1 - smoothing) * np.eye(CLASSES)[Y] + smoothing / CLASSES
    losses = -(labels * log_p).sum(1)
    found = evaluated(task(class_weights=OF_CLASSES, label_smoothing=smoothing))["loss"]
    assert found == pytest.approx(np.average(losses, weights=np.take(OF_CLASSES, Y)), rel=1e-5)
    by_torch = torch_cross_entropy(LOGITS, Y, weight=OF_CLASSES, label_smoothing=smoothing)
    assert abs(found - by_torch) > 1e-3  # it weighs the classes within a label, too


def test_class_weight_of_probabilities_is_their_mean():
    one_hot = np.eye(CLASSES, dtype=np.float32)[Y]
    run = task(class_weights=OF_CLASSES)
    assert evaluated(run, one_hot) == pytest.approx(evaluated(run), rel=1e-6)
    labels = 0.75 * one_hot + 0.25 * np.roll(one_hot, 1, axis=1)
    losses = -(labels * log_softmax(LOGITS)).sum(1)
    expected = np.average(losses, weights=labels @ np.array(OF_CLASSES))
    assert evaluated(run, labels)["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.slow
def test_focal_loss_is_that_of_optax_for_two_classes(gamma: float):
    pair = np.stack([np.zeros(N), LOGITS[:, 0]], axis=1).astype(np.float32)
    labels = (Y > 0).astype(np.int32)
    model = (lambda key, *inputs: {"w": jnp.ones((2,))}, lambda params, x: params["w"][None] * x)
    run = tasks.Classifier(
        model,
        **QUIET,
        root=None,
        focal=gamma,
        class_weights=(0.75, 0.25),
        example_batch=(pair[:8], labels[:8]),
    )
    found = run.eval_model(data.ArrayLoader((pair, labels), 8))["loss"]
    losses = optax.sigmoid_focal_loss(pair[:, 1], labels, gamma=gamma)
    expected = np.average(losses, weights=np.where(labels, 0.25, 0.75))
    assert found == pytest.approx(expected, rel=1e-5)


def test_focal_loss_is_that_of_the_paper_and_has_finite_gradients():
    p = np.exp(log_softmax(LOGITS))[np.arange(N), Y]
    found = evaluated(task(focal=2.0))["loss"]
    assert found == pytest.approx((-((1 - p) ** 2) * np.log(p)).mean(), rel=1e-5)

    def loss(logits: jax.Array) -> jax.Array:
        return tasks.cross_entropy.cross_entropy(logits, jnp.array([0, 1]), focal=0.5).sum()

    gradient = jax.grad(loss)(jnp.array([[200.0, 0.0, -300.0], [90.0, -90.0, 0.0]]))
    assert np.isfinite(gradient).all()
    assert gradient[1, 1] < -0.9


def stepped(run: tasks.Classifier, batch: Any) -> Any:
    """Returns the parameters after one step."""
    state = run.state.replace(tx=run.optimizer, opt_state=run.optimizer.init(run.state.params))
    return run.create_functions()[0](state, batch)[0].params["w"]


@pytest.mark.slow
def test_gradient_is_divided_by_the_sum_of_the_weights():
    weight = W * np.take(OF_CLASSES, Y)
    residual = np.exp(log_softmax(LOGITS)) - np.eye(CLASSES)[Y]
    gradient = (weight[:, None] * residual * X).sum(0) / weight.sum()
    batch = {"x": X, "y": Y, "weight": W}
    found = stepped(task(class_weights=OF_CLASSES), batch)
    np.testing.assert_allclose(found, 0.5 - 0.1 * gradient, rtol=1e-5)
    tenfold = task(class_weights=[10 * each for each in OF_CLASSES])
    np.testing.assert_allclose(stepped(tenfold, batch), found, rtol=1e-6)


@pytest.mark.slow
def test_class_of_weight_0_teaches_nothing_and_counts_in_the_accuracy():
    kept = Y != 1
    run, options = task(class_weights=(1, 0, 1), label_smoothing=0.1), {"label_smoothing": 0.1}
    found = evaluated(run)
    alone = task(**options).eval_model([{"x": X[kept], "y": Y[kept]}])["loss"]
    assert found == pytest.approx({"loss": alone, "accuracy": (X.argmax(1) == Y).mean()}, rel=1e-6)
    batch, rest = {"x": X, "y": Y}, {"x": X[kept], "y": Y[kept]}
    np.testing.assert_allclose(stepped(run, batch), stepped(task(**options), rest), rtol=1e-6)


CHOICES = [{"class_weights": OF_CLASSES, "label_smoothing": 0.1}, {"focal": 2.0}]


class Interrupt(Callback):
    """Interrupts a run in its second epoch, or does nothing."""

    def __init__(self, *, cuts: bool = True) -> None:
        self.cuts = cuts

    def on_step_end(self, info: Any) -> None:
        if self.cuts and info.step == 5:
            raise KeyboardInterrupt


def trained(name: str, options: Any, **more: Any) -> Any:
    run = task(root="runs", name=name, **options, **more)
    loader = data.ArrayLoader({"x": X, "y": Y}, 6, seed=1)
    return run, run.train_model(loader, loader, num_epochs=3)


@pytest.mark.parametrize("options", CHOICES)
@pytest.mark.slow
def test_run_is_fused_and_resumed_bit_for_bit(options: Any):
    whole, result = trained("whole", options, steps_per_call=1)
    _, fused = trained("fused", options, steps_per_call=3)
    assert fused.metrics == result.metrics
    with pytest.raises(KeyboardInterrupt):
        trained("cut", options, callbacks=[Interrupt()])
    resumed, after = trained("cut", options, callbacks=[Interrupt(cuts=False)])
    assert after.first_step > 0
    assert after.metrics == result.metrics
    np.testing.assert_array_equal(resumed.state.params["w"], whole.state.params["w"])


@pytest.mark.slow
def test_other_class_weights_are_another_run():
    with pytest.raises(KeyboardInterrupt):
        trained("cut", CHOICES[0], callbacks=[Interrupt()])
    _, other = trained("cut", {**CHOICES[0], "class_weights": (0.5, 4, 1.5)})
    assert other.first_step == 0
    loaded = tasks.Classifier.load_from_checkpoint(other.path, model=MODEL)
    assert loaded.config.class_weights == (0.5, 4.0, 1.5)


@pytest.mark.slow
def test_accumulated_batches_are_one_large_batch():
    arrays = {"x": X[:16], "y": Y[:16]}
    found = []
    for size, accumulate in ((16, 1), (4, 4)):
        optimizer = OptimizerConfig("sgd", learning_rate=0.1, accumulate=accumulate)
        run = task(class_weights=OF_CLASSES, optimizer=optimizer)
        run.train_model(data.ArrayLoader(arrays, size, shuffle=False), num_epochs=2)
        found.append(run.state.params["w"])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_balanced_weights_are_those_of_sklearn():
    labels = np.array([0, 2, 2, 1, 2, 2, 0])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert tasks.balanced_weights(labels) == pytest.approx(tuple(expected), rel=1e-12)
    weights = tasks.balanced_weights(Y, num_classes=CLASSES)
    recalls = [(X.argmax(1) == Y)[c == Y].mean() for c in range(CLASSES)]
    hits = np.average(X.argmax(1) == Y, weights=np.take(weights, Y))
    assert hits == pytest.approx(np.mean(recalls), rel=1e-12)
    with pytest.raises(ConfigError, match=r"\[3\] have no examples"):
        tasks.balanced_weights(labels, num_classes=4)
    with pytest.raises(ConfigError, match="from 0 to 1; the labels range from 0 to 2"):
        tasks.balanced_weights(labels, num_classes=2)
    with pytest.raises(ConfigError, match=r"from -1 to 2\. Leave ignored"):
        tasks.balanced_weights([-1, *labels])
    with pytest.raises(ConfigError, match=r"int \[examples\]; got dtype float64"):
        tasks.balanced_weights(np.eye(3)[labels])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"class_weights": "balanced"}, r"tasks\.balanced_weights\(labels\)"),
        ({"class_weights": {0: 1.0}}, r"Pass \[weights\[c\] for c in range"),
        ({"class_weights": [1, -1]}, r"at least 0 and not all 0; got \[1, -1\]"),
        ({"class_weights": [1, np.nan]}, "one finite number per class"),
        ({"class_weights": [0, 0]}, "not all 0"),
        ({"class_weights": []}, "one finite number per class"),
        ({"class_weights": 2.0}, "one finite number per class"),
        ({"label_smoothing": 1.0}, r"at least 0 and less than 1; got 1\.0"),
        ({"label_smoothing": -0.1}, "label_smoothing must be at least 0"),
        ({"label_smoothing": "0.1"}, "label_smoothing must be at least 0"),
        ({"focal": -1}, "focal, the focusing parameter .* got -1"),
        ({"focal": np.inf}, "finite number"),
        ({"focal": 2, "label_smoothing": 0.1}, "contradict each other"),
        ({"class_weight": [1, 2]}, "Did you mean 'class_weights'"),
    ],
)
def test_option_of_another_kind_is_an_error(options: Any, words: str):
    with pytest.raises(ConfigError, match=words):
        task(**options)


def test_weights_of_other_classes_and_focal_loss_of_probabilities_are_errors():
    with pytest.raises(LossError, match="2 weights, but the model returns 3 logits"):
        evaluated(task(class_weights=(1, 2)))
    with pytest.raises(LossError, match=r"probabilities \(8, 3\)\. Pass class indices"):
        evaluated(task(focal=2), np.eye(CLASSES, dtype=np.float32)[Y])


TOKENS = RNG.integers(0, 7, (6, 6)).astype(np.int32)
TABLE = RNG.normal(size=(7, 7)).astype(np.float32)


def test_language_model_smooths_the_loss_and_not_the_perplexity():
    model = (lambda key, *inputs: {"w": TABLE}, lambda params, tokens: params["w"][tokens])
    batches, rows = data.ArrayLoader({"tokens": TOKENS}, 4), TABLE[TOKENS[:, :-1]].reshape(-1, 7)
    options: dict[str, Any] = {"ignore_index": 3, "example_batch": {"tokens": TOKENS}}
    plain, smooth = (
        tasks.LanguageModel(model, **QUIET, root=None, label_smoothing=smoothing, **options)
        for smoothing in (0.0, 0.1)
    )
    expected, found = plain.eval_model(batches), smooth.eval_model(batches)
    loss = torch_cross_entropy(
        rows, TOKENS[:, 1:].ravel(), ignore_index=3, label_smoothing=0.1, weight=(1.0,) * 7
    )
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    for name in ("perplexity", "bits_per_token"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6)
    with pytest.raises(ConfigError, match="label_smoothing must be at least 0"):
        tasks.LanguageModel(model, label_smoothing=2)


def test_options_are_described_once():
    doc = tasks.Classifier.Config.__doc__ or ""
    assert "class_weights: Weight of the examples" in doc
    assert "steps_per_call" not in doc
    assert "steps_per_call" in (distaff.TrainerConfig.__doc__ or "")
