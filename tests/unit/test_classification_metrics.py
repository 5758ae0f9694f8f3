"""Metrics of classification: those of scikit-learn, whatever the batches, weights and masks."""

from __future__ import annotations

import json
import math
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from distaff import EvalStep, Monitor, TrainerModule, TrainState, metrics, zoo
from distaff.checkpoint import CheckpointStore
from distaff.data import ArrayLoader
from distaff.errors import ConfigError, LossError, MetricError
from distaff.execution.execution import Compiled, Eager
from distaff.execution.feed.chunk import Chunk, One
from distaff.metrics import AUROC, F1, ConfusionMatrix, IoU, Perplexity, Precision, Recall
from distaff.run.evaluation import Evaluator

SKLEARN: Any = {
    Precision: partial(sklearn_metrics.precision_score, zero_division=0),
    Recall: partial(sklearn_metrics.recall_score, zero_division=0),
    F1: partial(sklearn_metrics.f1_score, zero_division=0),
    IoU: partial(sklearn_metrics.jaccard_score, zero_division=0),
}
AVERAGES: Any = ("macro", "micro", "weighted", None)
SIZE = 5


class Drawn(NamedTuple):
    """Examples, and the batches of `SIZE` indices they come in: -1 is a masked row."""

    labels: np.ndarray
    predictions: np.ndarray
    scores: np.ndarray
    weight: np.ndarray
    batches: list[np.ndarray]

    def total(self, declare: Any) -> metrics.Metric:
        """Reduces each batch under its mask in one program, and merges them on the host."""
        garbage = (np.int32(-7), np.int32(99), np.float32(np.nan), np.float32(np.nan))
        columns = [np.append(column, bad) for column, bad in zip(self[:4], garbage, strict=True)]
        program = jax.jit(lambda mask, *rows: {"x": declare(*rows).reduce(mask)})
        parts = [
            metrics.to_host(program(batch >= 0, *(column[batch] for column in columns)))
            for batch in self.batches
        ]
        total = parts[0]
        for part in parts[1:]:
            total = metrics.merge(total, part)
        return total["x"]


@st.composite
def drawn(draw: st.DrawFn, num_classes: int) -> Drawn:
    n = draw(st.integers(1, 12))
    classes = st.lists(st.integers(0, num_classes - 1), min_size=n, max_size=n)
    # Few different scores, so that there are ties; sixteenths, whose sums are exact.
    sixteenths = st.lists(st.integers(1, 6).map(lambda i: i / 16), min_size=n, max_size=n)
    order, batches = list(draw(st.permutations(range(n)))), []
    while order:
        size = draw(st.integers(1, min(SIZE, len(order))))
        taken, order = order[:size], order[size:]
        batches.append(np.array(draw(st.permutations(taken + [-1] * (SIZE - size)))))
    ints = [np.array(draw(classes), np.int32) for _ in range(2)]
    floats = [np.array(draw(sixteenths), np.float32) for _ in range(2)]
    return Drawn(ints[0], ints[1], floats[0], floats[1], batches)


@settings(deadline=None, max_examples=15)
@given(drawn(num_classes=4), st.booleans())
@pytest.mark.slow
def test_scores_of_many_classes_equal_sklearn(examples: Drawn, is_weighted: bool):
    labels, predictions, weight = examples.labels, examples.predictions, examples.weight

    def declare(labels: Any, predictions: Any, scores: Any, weight: Any) -> metrics.PerExample:
        chosen = weight if is_weighted else None
        return ConfusionMatrix.per_example(labels, predictions, num_classes=4, weight=chosen)

    matrix: Any = examples.total(declare)
    options: Any = {"labels": range(4), "sample_weight": weight if is_weighted else None}
    expected = sklearn_metrics.confusion_matrix(labels, predictions, **options)
    np.testing.assert_array_equal(matrix.compute(), expected)
    for metric, reference in SKLEARN.items():
        for average in AVERAGES:
            score = reference(labels, predictions, average=average, **options)
            found = metric(matrix.counts, average=average).compute()
            np.testing.assert_allclose(found, score, rtol=1e-12, err_msg=f"{metric} {average}")


@pytest.mark.parametrize("metric", SKLEARN)
@pytest.mark.slow
def test_score_of_binary_labels_equals_sklearn(metric: Any):
    @settings(deadline=None, max_examples=10)
    @given(drawn(num_classes=2))
    def check(examples: Drawn):
        found = examples.total(lambda y, guess, *_: metric.per_example(y, guess, num_classes=2))
        expected = SKLEARN[metric](examples.labels, examples.predictions)
        np.testing.assert_allclose(found.compute(), expected, rtol=1e-12)

    check()


@settings(deadline=None, max_examples=40)
@given(drawn(num_classes=2), st.booleans())
def test_auroc_equals_sklearn_with_ties_weights_and_masks(examples: Drawn, is_weighted: bool):
    labels, scores, weight = examples.labels, examples.scores, examples.weight
    found = examples.total(
        lambda y, _, score, w: AUROC.per_example(y, score, weight=w if is_weighted else None)
    ).compute()
    if len(set(labels)) < 2:
        assert math.isnan(found)
    else:
        options: Any = {"sample_weight": weight if is_weighted else None}
        expected = sklearn_metrics.roc_auc_score(labels, scores, **options)
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)


@settings(deadline=None, max_examples=15)
@given(drawn(num_classes=3))
def test_perplexity_is_the_exponential_of_the_mean_over_all_tokens(examples: Drawn):
    found = examples.total(lambda y, _, loss, tokens: Perplexity.per_example(loss, weight=tokens))
    mean = np.average(examples.scores.astype(np.float64), weights=examples.weight)
    assert found.compute() == pytest.approx(np.exp(mean), rel=1e-12)


def test_perplexity_beyond_float64_is_infinite():
    assert Perplexity(np.float64(1000), np.float64(1)).compute() == math.inf


@pytest.mark.slow
def test_iou_of_segmentation_leaves_void_pixels_out():
    random = np.random.default_rng(0)
    labels, masks = random.integers(0, 3, (2, 4, 6, 5)).astype(np.uint8)
    labels[0, :2] = 255
    found = IoU.per_example(labels, masks, num_classes=3, average="macro", weight=labels != 255)
    shown = labels[:3] != 255
    expected = sklearn_metrics.jaccard_score(labels[:3][shown], masks[:3][shown], average="macro")
    total = metrics.to_host({"iou": found.reduce(jnp.arange(4) < 3)})
    assert metrics.compute(total)["iou"] == pytest.approx(expected, rel=1e-12)


def test_counts_of_one_batch_are_exact_beyond_float32():
    declared = ConfusionMatrix.per_example(
        jnp.ones((3,), bool), jnp.ones((3,), bool), num_classes=2, weight=jnp.array([2**24, 1, 1])
    )
    matrix: Any = declared.reduce(jnp.ones(3, bool))
    assert int(matrix.counts[1, 1]) == 2**24 + 2


@pytest.mark.parametrize("bad", [-1, 3])
def test_class_out_of_range_makes_the_metric_nan_unless_it_does_not_count(bad: int):
    for pair in ([0, bad], [1, 2]), ([1, 2], [0, bad]):
        labels, predictions = jnp.array(pair)
        declared = F1.per_example(labels, predictions, num_classes=3, average="macro")
        assert math.isnan(declared.reduce(jnp.array([True, True])).compute())
        assert not math.isnan(declared.reduce(jnp.array([True, False])).compute())


def test_nothing_accumulated_computes_to_nothing():
    empty = np.zeros((2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for average in (*AVERAGES, "binary"):
            assert np.isnan(F1(empty, average=average).compute()).all()
        assert math.isnan(AUROC(()).compute())
        assert math.isnan(AUROC((np.zeros((3, 2)),)).compute())
    found = IoU(np.eye(2), average="macro").empty_like()
    assert (found.average, np.asarray(found.counts).tolist()) == ("macro", [[0, 0], [0, 0]])


def test_metrics_of_stacked_states_compute_one_by_one():
    counts = np.arange(1.0, 9.0).reshape(2, 2, 2)
    for average in (*AVERAGES, "binary"):
        each = [F1(matrix, average=average).compute() for matrix in counts]
        np.testing.assert_array_equal(F1(counts, average=average).compute(), each)
    parts = np.array([[[1.0, 2, 2], [0, 1, 0], [1, 1, 1]], [[2, 1, 0], [0, 1, 0], [1, 1, 1]]])
    np.testing.assert_array_equal(AUROC((parts,)).compute(), [0.75, 0.5])


def test_auroc_of_a_score_that_is_nan_is_nan():
    declared = AUROC.per_example(jnp.array([0, 1, 1]), jnp.array([0.1, 0.2, jnp.nan]))
    assert math.isnan(declared.reduce(jnp.ones(3, bool)).compute())
    assert declared.reduce(jnp.array([True, True, False])).compute() == 1


def test_auroc_refuses_labels_of_other_classes_unless_they_do_not_count():
    declared = AUROC.per_example(jnp.array([0, 1, -1]), jnp.array([0.1, 0.2, 0.3]))
    with pytest.raises(MetricError, match=re.escape("got [-1.0]")):
        declared.reduce(jnp.ones(3, bool)).compute()
    assert declared.reduce(jnp.array([True, True, False])).compute() == 1


TWO = jnp.array([0, 1])
MISSPELT: Any = "makro"


@pytest.mark.parametrize(
    ("declare", "error", "message"),
    [
        (
            lambda: F1.per_example(TWO, TWO, num_classes=2, average=MISSPELT),
            ConfigError,
            "None for one score per class. Did you mean 'macro'?",
        ),
        (lambda: F1(np.eye(2), average=MISSPELT), ConfigError, "average='makro' is not one of"),
        (lambda: F1.per_example(TWO, TWO, num_classes=3), ConfigError, "num_classes is 3"),
        (
            lambda: ConfusionMatrix.per_example(TWO, TWO, num_classes=1),
            ConfigError,
            "num_classes must be at least 2; got 1",
        ),
        (
            lambda: IoU.per_example(TWO, jnp.ones((2, 3)), num_classes=2),
            LossError,
            "predictions must be integers or booleans; they have dtype float32 and shape (2, 3)",
        ),
        (
            lambda: IoU.per_example(TWO, jnp.ones((2, 3), int), num_classes=2),
            LossError,
            "must have the same shape; got (2,) and (2, 3)",
        ),
        (
            lambda: IoU.per_example(TWO, TWO, num_classes=2, weight=jnp.ones(3)),
            LossError,
            "weight has shape (3,)",
        ),
        (
            lambda: AUROC.per_example(TWO, jnp.ones((2, 2))),
            LossError,
            "labels have shape (2,), scores (2, 2)",
        ),
    ],
)
def test_bad_input_is_refused(declare: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=re.escape(message)):
        declare()


X = np.random.default_rng(2).normal(size=(22, 3)).astype(np.float32)
Y = (X.sum(1) + np.sin(9 * X[:, 0]) > 0).astype(np.int32)


class Binary(TrainerModule):
    """A binary classifier whose metrics differ between training and evaluation."""

    monitor = Monitor("val/auroc", mode="max")

    def loss_fn(self, params: Any, batch: Any, ctx: Any) -> Any:
        logits = ctx.apply(params, batch["x"])[:, 0]
        labels, guesses = batch["label"], logits > 0
        loss = optax.sigmoid_binary_cross_entropy(logits, labels.astype(jnp.float32))
        if ctx.train:
            return loss, {"f1": F1.per_example(labels, guesses, num_classes=2)}
        matrix = ConfusionMatrix.per_example(labels, guesses, num_classes=2)
        return loss, {"auroc": AUROC.per_example(labels, logits), "matrix": matrix}


class AurocInTraining(Binary):
    def loss_fn(self, params: Any, batch: Any, ctx: Any) -> Any:
        logits = ctx.apply(params, batch["x"])[:, 0]
        return jnp.square(logits), {"auroc": AUROC.per_example(batch["label"], logits)}


@pytest.mark.slow
def test_training_and_evaluation_have_metrics_of_their_own():
    train = ArrayLoader({"x": X, "label": Y}, 5, shuffle=True)
    val = ArrayLoader({"x": X, "label": Y}, 8)
    trainer = Binary(zoo.MLP((4, 1)), enable_progress_bar=False)
    result = trainer.train_model(train, val, val, num_epochs=1)
    assert {n for n in result.metrics if n.startswith("train/")} == {"train/loss", "train/f1"}
    tested = {"test/loss", "test/auroc", "test/matrix"}
    assert {n for n in result.metrics if n.startswith("test/")} == tested

    logits: Any = trainer.predict(val)[:, 0]
    matrix = sklearn_metrics.confusion_matrix(Y, logits > 0)
    assert result.metrics["test/matrix"].tolist() == matrix.tolist()
    area = sklearn_metrics.roc_auc_score(Y, logits)
    assert result.metrics["test/auroc"] == pytest.approx(area, rel=1e-12)
    lines = Path(result.path or "", "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["test/matrix"] == matrix.tolist()


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.slow
def test_auroc_in_training_is_refused_before_anything_is_written(debug: bool):
    trainer = AurocInTraining(zoo.MLP((4, 1)), enable_progress_bar=False, debug=debug)
    with pytest.raises(MetricError, match=re.escape("only if not ctx.train")):
        trainer.train_model(ArrayLoader({"x": X, "label": Y}, 5), num_epochs=1)
    assert not Path("runs").exists()


def test_auroc_on_the_device_is_not_merged():
    metric = AUROC((jnp.ones((3, 2)),))
    for first, second in ((metric, AUROC(())), (AUROC(()), metric)):
        with pytest.raises(MetricError, match="merge what metrics"):
            first.merge(second)


@pytest.mark.parametrize("execution", [Compiled(), Eager()])
def test_evaluation_pads_the_last_batch_where_it_is_traced(execution: Any):
    calls = []

    def loss_fn(params: Any, batch: Any, ctx: Any) -> Any:
        calls.append(batch["x"].shape)
        logits = ctx.apply(params, batch["x"])
        declared = AUROC.per_example(batch["label"], logits)
        return jnp.square(logits), {"auroc": declared, "perplexity": Perplexity.per_example(logits)}

    state = TrainState.create(
        params=jnp.ones(3), apply_fn=lambda variables, x: x @ variables["params"]
    )
    batches = [{"x": X[i : i + 8], "label": Y[i : i + 8]} for i in range(0, 22, 8)]
    chunks = [Chunk(1, len(batch["x"]), One(batch)) for batch in batches]
    evaluated = metrics.compute(Evaluator(EvalStep(loss_fn), execution)(state, chunks))
    logits = X @ np.ones(3, np.float32)
    expected = sklearn_metrics.roc_auc_score(Y, logits)
    assert evaluated["auroc"] == pytest.approx(expected, rel=1e-12)
    assert evaluated["perplexity"] == pytest.approx(np.exp(logits.mean()), rel=1e-5)
    # Plain Python is not traced, so that nothing is known of its rows: each batch has its own size.
    assert set(calls) == ({(8, 3)} if isinstance(execution, Compiled) else {(8, 3), (6, 3)})
    assert len(calls) == 1 or isinstance(execution, Eager)


class CountingState(TrainState):
    metrics: ConfusionMatrix
    f1: F1


def counting_state() -> CountingState:
    empty = jnp.zeros((2, 2))
    return CountingState.create(
        params={"w": jnp.zeros(3)},
        tx=optax.sgd(0.1),
        metrics=ConfusionMatrix(empty),
        f1=F1(empty, average="macro"),
    )


@jax.jit
def counting_step(state: CountingState, batch: Any) -> CountingState:
    def objective(params: Any) -> Any:
        logits = batch["x"] @ params["w"]
        targets = batch["label"].astype(jnp.float32)
        return optax.sigmoid_binary_cross_entropy(logits, targets).mean(), logits

    grads, logits = jax.grad(objective, has_aux=True)(state.params)
    declared = ConfusionMatrix.per_example(batch["label"], logits > 0, num_classes=2)
    new: Any = declared.reduce(jnp.ones(len(logits), bool))
    return state.apply_gradients(
        grads=grads,
        metrics=state.metrics.merge(new),
        f1=state.f1.merge(F1(new.counts, average="macro")),
    )


@pytest.mark.slow
def test_metrics_live_in_a_state_and_survive_a_checkpoint(tmp_path: Path):
    state, guesses = counting_state(), []
    batches = [{"x": X[part], "label": Y[part]} for part in np.split(np.arange(22), [8, 16])]
    for batch in batches[:2]:
        guesses.append(batch["x"] @ np.asarray(state.params["w"]) > 0)
        state = counting_step(state, batch)
    with CheckpointStore(tmp_path) as store:
        store.save(2, state.arrays(), {})
    restored = counting_state().replace(
        **CheckpointStore(tmp_path).load(2, counting_state().arrays())
    )
    guesses.append(batches[2]["x"] @ np.asarray(state.params["w"]) > 0)
    for last in (counting_step(state, batches[2]), counting_step(restored, batches[2])):
        expected = sklearn_metrics.confusion_matrix(Y, np.concatenate(guesses))
        np.testing.assert_array_equal(last.metrics.compute(), expected)
        score = sklearn_metrics.f1_score(Y, np.concatenate(guesses), average="macro")
        assert float(last.f1.compute()) == pytest.approx(score, rel=1e-6)
