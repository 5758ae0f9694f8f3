"""Metrics of regression, scores and probabilities: those of scikit-learn over any batches."""

from __future__ import annotations

import json
import math
import warnings
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics
from sklearn.calibration import calibration_curve

from distaff import Callback, EvalStep, Monitor, TrainerModule, data, metrics
from distaff.errors import ConfigError, LossError, MetricError
from distaff.metrics import (
    AUROC,
    MAE,
    R2,
    RMSE,
    AveragePrecision,
    BalancedAccuracy,
    CalibrationError,
    TopK,
)

SIZE, CLASSES, BINS = 5, 4, 5


class Drawn(NamedTuple):
    """Examples in columns, and the batches of `SIZE` indices they come in: -1 is a masked row."""

    columns: dict[str, np.ndarray]
    batches: list[np.ndarray]
    order: list[int]

    def parts(self, is_weighted: bool) -> list[dict[str, metrics.Metric]]:
        """Reduces each batch under its mask, whose masked rows hold nonsense."""
        garbage = {
            name: np.full_like(column[:1], np.nan if column.dtype.kind == "f" else 99)
            for name, column in self.columns.items()
        }
        rows = {
            name: np.concatenate([column, garbage[name]]) for name, column in self.columns.items()
        }
        program = declared(is_weighted)
        return [
            metrics.to_host(program(batch >= 0, {name: row[batch] for name, row in rows.items()}))
            for batch in self.batches
        ]

    def merged(self, is_weighted: bool) -> dict[str, metrics.Metric]:
        """Merges the batches in an order and with brackets that are drawn."""
        parts = self.parts(is_weighted)
        for place in self.order:
            if len(parts) > 1:
                place %= len(parts) - 1
                parts[place : place + 2] = [metrics.merge(parts[place + 1], parts[place])]
        for part in parts[1:]:
            parts[0] = metrics.merge(parts[0], part)
        return parts[0]


@cache
def declared(is_weighted: bool) -> Any:
    """Returns one program that reduces a batch to all metrics."""

    def program(mask: jax.Array, rows: dict[str, jax.Array]) -> dict[str, metrics.Metric]:
        weight = rows["weight"] if is_weighted else None
        labels, logits = rows["labels"], rows["logits"]
        declared = {
            "mae": MAE.per_example(rows["y"], rows["z"], weight=weight),
            "rmse": RMSE.per_example(rows["y"], rows["z"], weight=weight),
            "r2": R2.per_example(rows["y"], rows["z"], weight=weight),
            "topk": TopK.per_example(labels, logits, k=2, weight=weight),
            "balanced": BalancedAccuracy.per_example(
                labels, logits.argmax(-1), num_classes=CLASSES, weight=weight
            ),
            "ap": AveragePrecision.per_example(rows["binary"], rows["p"], weight=weight),
            "ece": CalibrationError.per_example(
                rows["binary"], rows["p"], bins=BINS, weight=weight
            ),
        }
        return {name: metric.reduce(mask) for name, metric in declared.items()}

    return jax.jit(program)


def eighths(low: int, high: int) -> Any:
    return st.integers(low, high).map(lambda i: i / 8)


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    n = draw(st.integers(1, 12))

    def column(each: Any, dtype: Any = np.float32) -> np.ndarray:
        return np.array(draw(st.lists(each, min_size=n, max_size=n)), dtype)

    targets = draw(st.sampled_from([eighths(-20, 20), eighths(8000, 8010), st.just(0.3)]))
    scores = st.permutations(range(CLASSES))
    columns = {
        "y": column(targets),
        "z": column(draw(st.sampled_from([targets, eighths(-20, 20)]))),
        "labels": column(st.integers(0, draw(st.integers(0, CLASSES - 1))), np.int32),
        "logits": column(scores),
        "binary": column(st.integers(0, 1), np.int32),
        "p": column(st.integers(0, 16).map(lambda i: i / 16)),
        "weight": column(st.integers(1, 6).map(lambda i: i / 16)),
    }
    order, batches = list(draw(st.permutations(range(n)))), []
    while order:
        size = draw(st.integers(1, min(SIZE, len(order))))
        taken, order = order[:size], order[size:]
        batches.append(np.array(draw(st.permutations(taken + [-1] * (SIZE - size)))))
    return Drawn(columns, batches, draw(st.lists(st.integers(0, 11), max_size=12)))


def calibration_error(labels: np.ndarray, p: np.ndarray, weight: np.ndarray) -> float:
    """The formula of Guo et al. (2017), with bins `(low, high]`; 0 is in the first one."""
    bins = np.maximum(np.ceil(p * BINS), 1)
    parts = [bins == i for i in range(1, BINS + 1)]
    gaps = [
        weight[part].sum()
        * abs(np.average(labels[part], weights=weight[part]) - np.average(p[part], weights=w))
        for part in parts
        if part.any()
        for w in [weight[part]]
    ]
    return sum(gaps) / weight.sum()


def expected(columns: dict[str, np.ndarray], is_weighted: bool) -> dict[str, float]:
    """The values of scikit-learn over all examples, in float64."""
    wide = {name: x.astype(np.float64) if x.dtype.kind == "f" else x for name, x in columns.items()}
    y, z, labels, logits = (wide[name] for name in ("y", "z", "labels", "logits"))
    options: Any = {"sample_weight": wide["weight"] if is_weighted else None}
    ones = wide["weight"] if is_weighted else np.ones(len(y))
    has_positives = wide["binary"].any()
    nan = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that only predictions have
        balanced = sklearn_metrics.balanced_accuracy_score(labels, logits.argmax(1), **options)
    return {
        "mae": sklearn_metrics.mean_absolute_error(y, z, **options),
        "rmse": sklearn_metrics.root_mean_squared_error(y, z, **options),
        "r2": sklearn_metrics.r2_score(y, z, **options) if len(y) > 1 else nan,
        "topk": sklearn_metrics.top_k_accuracy_score(
            labels, logits, k=2, labels=range(CLASSES), **options
        ),
        "balanced": balanced,
        "ap": sklearn_metrics.average_precision_score(wide["binary"], wide["p"], **options)
        if has_positives
        else nan,
        "ece": calibration_error(wide["binary"], wide["p"], ones),
    }


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.slow
def test_metrics_equal_sklearn_over_ragged_masked_batches_in_any_order(is_weighted: bool):
    @settings(deadline=None, max_examples=60)
    @given(drawn())
    def check(examples: Drawn):
        found = metrics.compute(examples.merged(is_weighted))
        wanted = expected(examples.columns, is_weighted)
        assert found == pytest.approx(wanted, rel=2e-5, abs=1e-6, nan_ok=True)

    check()


@settings(deadline=None, max_examples=25)
@given(drawn(), st.booleans())
def test_merge_is_that_of_rows_and_empty_changes_nothing(examples: Drawn, is_weighted: bool):
    parts = examples.parts(is_weighted)
    for name in ("mae", "rmse", "r2", "topk", "balanced", "ece"):
        total: Any = parts[0][name]
        for part in parts[1:]:
            total = total.merge(part[name])
        rows = jax.tree.map(lambda *leaves: np.stack(leaves), *[part[name] for part in parts])
        by_rows = metrics.merge_rows({name: rows})[name]
        value = pytest.approx(float(total.compute()), rel=1e-9, abs=1e-12, nan_ok=True)
        assert float(by_rows.compute()) == value
        empty = metrics.to_host({name: total.empty_like()})[name]
        for same in (empty.merge(total), total.merge(empty)):
            assert float(same.compute()) == value
        assert math.isnan(empty.compute())
        assert math.isnan(empty.merge(empty).compute())


def reduced(declared: Any, size: int) -> Any:
    """Returns the value over all examples, reduced at once."""
    return metrics.compute(metrics.to_host({"x": declared.reduce(jnp.ones(size, bool))}))["x"]


def test_r2_of_several_outputs_is_the_mean_of_each():
    random = np.random.default_rng(0)
    y, z = random.normal(size=(2, 9, 3)).astype(np.float32)
    weight = random.uniform(0.1, 1, 9).astype(np.float32)
    options: Any = {"sample_weight": weight}
    found = reduced(R2.per_example(y, z, weight=weight), 9)
    assert found == pytest.approx(sklearn_metrics.r2_score(y, z, **options), rel=1e-5)
    each = reduced(R2.per_example(y, z, weight=weight, average=False), 9)
    wanted = sklearn_metrics.r2_score(y, z, multioutput="raw_values", **options)
    np.testing.assert_allclose(each, wanted, rtol=1e-5)
    holes = np.where(random.random((9, 3)) < 0.3, np.nan, y).astype(np.float32)
    known = np.isfinite(holes)
    found = reduced(R2.per_example(holes, z, weight=known, average=False), 9)
    wanted = [sklearn_metrics.r2_score(y[known[:, i], i], z[known[:, i], i]) for i in range(3)]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    error = np.where(known, z - y, 0)
    found = reduced(RMSE.per_example(holes, z, weight=known), 9)
    assert found == pytest.approx(np.sqrt((error**2).sum() / known.sum()), rel=1e-6)


def test_r2_keeps_its_digits_far_from_zero_and_over_many_batches():
    random = np.random.default_rng(0)
    y = (1e5 + random.normal(size=(40, 16))).astype(np.float32)
    z = (y + random.normal(size=y.shape) / 2).astype(np.float32)
    declare = jax.jit(lambda y, z: R2.per_example(y, z).reduce(jnp.ones(16, bool)))
    parts = [declare(*pair) for pair in zip(y, z, strict=True)]
    wanted = sklearn_metrics.r2_score(y.ravel().astype(float), z.ravel().astype(float))
    rows = jax.tree.map(lambda *leaves: np.stack(leaves), *parts)
    host = metrics.merge_rows(metrics.to_host({"r2": rows}))["r2"].compute()
    assert host == pytest.approx(wanted, rel=1e-5)
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    assert float(total.compute()) == pytest.approx(wanted, rel=1e-4)  # on the device, in float32


@pytest.mark.parametrize(
    ("y", "z", "score"),
    [([0.1] * 3, [0.1] * 3, 1.0), ([0.1] * 3, [0.1, 0.1, 0.2], 0.0), ([2.0], [2.0], math.nan)],
)
def test_r2_of_constant_targets_is_that_of_sklearn(y: Any, z: Any, score: float):
    found = reduced(R2.per_example(np.float32(y), np.float32(z)), len(y))
    assert found == pytest.approx(score, nan_ok=True)
    if len(y) > 1:
        assert sklearn_metrics.r2_score(np.float32(y), np.float32(z)) == score
        one = {"x": R2.per_example(np.float32(y), np.float32(z)).reduce(jnp.ones(len(y), bool))}
        host = metrics.to_host(one)
        assert metrics.merge(host, host)["x"].compute() == score


@pytest.mark.slow
def test_r2_of_a_population_has_one_value_for_each_member():
    random = np.random.default_rng(0)
    y, z = random.normal(size=(2, 3, 8)).astype(np.float32)
    stacked = jax.vmap(lambda y, z: R2.per_example(y, z).reduce(jnp.ones(8, bool)))(y, z)
    wanted = [sklearn_metrics.r2_score(*pair) for pair in zip(y, z, strict=True)]
    np.testing.assert_allclose(stacked.compute(), wanted, rtol=1e-5)
    rows = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), stacked)
    np.testing.assert_allclose(rows.over_rows().compute(), wanted, rtol=1e-5)


@pytest.mark.slow
def test_top_1_is_the_accuracy_whatever_the_ties():
    random = np.random.default_rng(0)
    logits = random.integers(0, 2, (40, 4)).astype(np.float32)
    labels = random.integers(0, 4, 40).astype(np.int32)
    found = reduced(TopK.per_example(labels, logits, k=1), 40)
    assert found == pytest.approx((logits.argmax(1) == labels).mean(), rel=1e-6)
    constant = TopK.per_example(labels, np.zeros((40, 4), np.float32), k=2)
    assert reduced(constant, 40) == pytest.approx((labels < 2).mean(), rel=1e-6)


@pytest.mark.slow
def test_top_k_of_sequences_leaves_out_what_has_no_weight():
    random = np.random.default_rng(0)
    logits = random.normal(size=(6, 5, 4)).astype(np.float32)
    labels = random.integers(0, 4, (6, 5)).astype(np.int32)
    labels[:2] = -100
    found = reduced(TopK.per_example(labels, logits, k=3, weight=labels >= 0), 6)
    wanted = sklearn_metrics.top_k_accuracy_score(
        labels[2:].ravel(), logits[2:].reshape(-1, 4), k=3, labels=range(4)
    )
    assert found == pytest.approx(wanted, rel=1e-6)
    assert math.isnan(reduced(TopK.per_example(labels, logits, k=3), 6))
    nan = np.where(np.arange(4) == 1, np.nan, logits).astype(np.float32)
    assert reduced(TopK.per_example(labels, nan, k=3, weight=labels >= 0), 6) == 0


@pytest.mark.slow
def test_calibration_error_is_that_of_the_reliability_diagram_of_sklearn():
    random = np.random.default_rng(0)
    p = random.uniform(size=300).astype(np.float32)
    labels = (random.uniform(size=300) < p**2).astype(np.int32)
    true, predicted = calibration_curve(labels, p, n_bins=10)
    counts = np.bincount(np.minimum((p * 10).astype(int), 9), minlength=10)
    wanted = (counts * abs(true - predicted)).sum() / 300
    found = reduced(CalibrationError.per_example(labels, p, bins=10), 300)
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_calibration_error_of_several_classes_is_that_of_the_largest_probability():
    random = np.random.default_rng(0)
    p = random.dirichlet(np.ones(3), size=200).astype(np.float32)
    labels = random.integers(0, 3, 200).astype(np.int32)
    weight = random.uniform(size=200).astype(np.float32)
    wanted = calibration_error(labels == p.argmax(1), p.max(1).astype(float), weight.astype(float))
    found = reduced(CalibrationError.per_example(labels, p, bins=BINS, weight=weight), 200)
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_logits_and_unknown_labels_make_the_calibration_error_nan():
    labels, p = np.array([0, 1, 1]), np.array([0.25, 0.5, 1.0], np.float32)
    assert reduced(CalibrationError.per_example(labels, p), 3) == pytest.approx(0.75 / 3)
    assert math.isnan(reduced(CalibrationError.per_example(labels, 4 * p - 2), 3))
    assert math.isnan(reduced(CalibrationError.per_example(labels + 1, p), 3))
    ignored = CalibrationError.per_example([0, 1, 7], 2 * p, weight=np.array([1, 1, 0]))
    assert reduced(ignored, 3) == pytest.approx(0.5 / 2)
    rows = np.stack([1 - p, p], axis=1)
    assert math.isnan(reduced(CalibrationError.per_example(labels - 1, rows), 3))


def test_balanced_accuracy_of_an_unknown_class_is_nan_and_ignored_without_weight():
    labels, guesses = np.array([0, 0, 1, 5]), np.array([0, 1, 1, 1])
    assert math.isnan(reduced(BalancedAccuracy.per_example(labels, guesses, num_classes=3), 4))
    known = BalancedAccuracy.per_example(labels, guesses, num_classes=3, weight=labels < 3)
    assert reduced(known, 4) == 0.75


def test_metrics_of_other_shapes_are_errors():
    labels, logits = np.zeros(4, np.int32), np.zeros((4, 3), np.float32)
    for metric in (MAE, RMSE, R2):
        with pytest.raises(LossError, match=rf"{metric.__name__} needs one output per target"):
            metric.per_example(np.zeros((4, 1), np.float32), np.zeros(4, np.float32))
    with pytest.raises(ConfigError, match=r"TopK\(k=3\) of 3 classes is always 1"):
        TopK.per_example(labels, logits, k=3)
    with pytest.raises(ConfigError, match="k must be an integer, at least 1"):
        TopK.per_example(labels, logits, k=0)
    with pytest.raises(LossError, match=r"scores \[batch, classes\]; got \(4, 3\)"):
        TopK.per_example(logits.astype(np.int32), logits, k=1)
    with pytest.raises(LossError, match=r"must be class indices.*got float32"):
        CalibrationError.per_example(labels.astype(np.float32), logits)
    with pytest.raises(ConfigError, match="bins must be an integer"):
        CalibrationError.per_example(labels, logits, bins=0)
    with pytest.raises(LossError, match="AveragePrecision needs one score per label"):
        AveragePrecision.per_example(labels, logits)
    with pytest.raises(LossError, match="weight of a mean has shape"):
        MAE.per_example(labels, labels, weight=np.ones(3))


def test_average_precision_is_for_evaluation():
    declared = AveragePrecision.per_example(np.array([0, 2]), np.array([0.5, 1.0], np.float32))
    with pytest.raises(MetricError, match=r"AveragePrecision needs labels 0 and 1; got \[2"):
        reduced(declared, 2)
    one = declared.reduce(jnp.ones(2, bool))
    with pytest.raises(MetricError, match="AveragePrecision stores every score"):
        one.merge(one)
    assert Monitor("val/average_precision").mode == Monitor("val/r2").mode == "max"
    assert Monitor("val/ece").mode == Monitor("val/calibration_error").mode == "min"


@pytest.mark.parametrize("is_weighted", [False, True])
def test_scores_of_several_labels_are_averaged_as_sklearn_does(is_weighted: bool):
    random = np.random.default_rng(0)
    labels = (random.random((30, 4)) < 0.3).astype(np.int32)
    scores = random.integers(0, 8, (30, 4)).astype(np.float32)
    weight = random.uniform(0.1, 1, 30).astype(np.float32) if is_weighted else None
    mask = jnp.arange(10) < 9
    references: Any = {
        AveragePrecision: sklearn_metrics.average_precision_score,
        AUROC: sklearn_metrics.roc_auc_score,
    }
    kept = np.flatnonzero(np.arange(30) % 10 < 9)
    options: Any = {"sample_weight": None if weight is None else weight[kept]}
    for metric, reference in references.items():
        for average in ("micro", "macro", None):
            total: Any = None
            for start in range(0, 30, 10):
                part = slice(start, start + 10)
                own = None if weight is None else weight[part]
                declared = metric.per_example(
                    labels[part], scores[part], weight=own, average=average
                )
                one = metrics.to_host({"x": declared.reduce(mask)})
                total = one if total is None else metrics.merge(total, one)
            wanted = reference(labels[kept], scores[kept], average=average, **options)
            found = metrics.compute(total)["x"]
            np.testing.assert_allclose(found, wanted, rtol=1e-6, err_msg=f"{metric} {average}")
    labels[:, 2] = 0
    found = reduced(AveragePrecision.per_example(labels, scores, average="macro"), 30)
    present = [0, 1, 3]
    wanted = sklearn_metrics.average_precision_score(labels[:, present], scores[:, present])
    assert found == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(ConfigError, match="'weighted' is not 'micro' or 'macro'"):
        AUROC.per_example(labels, scores, average="weighted")
    with pytest.raises(LossError, match=r"needs labels \[batch, classes\]; got \(30,\)"):
        AUROC.per_example(labels[:, 0], scores[:, 0], average=None)


class Several(TrainerModule):
    """Its loss returns the metrics in training and in evaluation."""

    def loss_fn(self, params: Any, batch: Any, ctx: Any) -> Any:
        logits, labels = ctx.apply(params, batch["x"]), batch["y"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        numbers = logits[:, 0], labels.astype(jnp.float32)
        found = {
            "mae": MAE.per_example(*numbers),
            "rmse": RMSE.per_example(*numbers),
            "r2": R2.per_example(*numbers),
            "top2": TopK.per_example(labels, logits, k=2),
            "balanced": BalancedAccuracy.per_example(labels, logits.argmax(-1), num_classes=3),
            "ece": CalibrationError.per_example(labels, jax.nn.softmax(logits)),
        }
        if not ctx.train:
            found["ap"] = AveragePrecision.per_example(labels == 1, logits[:, 1])
        return loss, found


class Interrupt(Callback):
    """Interrupts a run within its second epoch, or does nothing."""

    def __init__(self, *, cuts: bool) -> None:
        self.cuts = cuts

    def on_step_end(self, info: Any) -> None:
        if self.cuts and info.step == 7:
            raise KeyboardInterrupt


RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(22, 3)).astype(np.float32)
Y = RANDOM.integers(0, 3, 22).astype(np.int32)
# A product by elements would be contracted with the differences of the metrics, or not, depending
# on the program: XLA's rounding, and not the metrics'.
MODEL = (lambda key, *inputs: {"w": 0.5 * jnp.eye(3)}, lambda params, x: jnp.matmul(x, params["w"]))


def trained(name: str, *, cuts: bool = False, **options: Any) -> Any:
    fixed: dict[str, Any] = {"log_every_n_steps": 5, "enable_progress_bar": False}
    run = Several(
        MODEL, name=name, callbacks=[Interrupt(cuts=cuts)], save_every=1e-6, **fixed, **options
    )
    loader = data.ArrayLoader({"x": X, "y": Y}, 5, seed=1)
    result = run.train_model(loader, data.ArrayLoader({"x": X, "y": Y}, 8), num_epochs=3)
    lines = map(json.loads, (result.path / "metrics.jsonl").read_text().splitlines())
    return result, [{key: x for key, x in line.items() if "time" not in key} for line in lines]


@pytest.mark.slow
def test_run_merges_windows_fused_and_resumed_bit_for_bit():
    whole, log = trained("whole", steps_per_call=1)
    fused, fused_log = trained("fused", steps_per_call=4)
    assert fused.metrics == whole.metrics
    assert fused_log == log
    with pytest.raises(KeyboardInterrupt):
        trained("cut", cuts=True)
    resumed, resumed_log = trained("cut")
    assert resumed.first_step > 4
    assert resumed.metrics == whole.metrics
    assert resumed_log == log
    assert math.isfinite(whole.metrics["train/r2"])


@pytest.mark.slow
def test_evaluation_masks_padded_rows():
    example = {"x": X, "y": Y}
    run = Several(MODEL, root=None, example_batch=example, enable_progress_bar=False)
    step, padded = EvalStep(run.loss_fn), {"x": X[[*range(22), 21]], "y": Y[[*range(22), 21]]}
    found = metrics.compute(metrics.to_host(step(run.state, padded, jnp.arange(23) < 22)))
    wanted = metrics.compute(metrics.to_host(step(run.state, example)))
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.slow
def test_metric_of_whole_arrays_is_computed_on_the_host():
    labels, guesses = np.array([0, 1, 2, 2, 1]), np.array([0, 2, 2, 2, 1])
    recall = metrics.Recall.per_example(labels, guesses, num_classes=3, average=None).compute()
    assert isinstance(recall, np.ndarray)
    np.testing.assert_array_equal(
        recall, sklearn_metrics.recall_score(labels, guesses, average=None)
    )
    targets, outputs = np.random.default_rng(0).normal(size=(2, 50)).astype(np.float32)
    found = metrics.R2.per_example(targets, outputs).compute()
    assert isinstance(found, float)
    assert found == pytest.approx(sklearn_metrics.r2_score(targets, outputs), rel=1e-5)
    assert metrics.Mean.per_example(np.array([1.0, 2.0, 6.0])).compute() == 3
