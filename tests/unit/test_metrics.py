"""Metrics: exact over any split into batches, whatever is masked, on the device and on the host."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff import metrics
from distaff.errors import LossError, MetricError
from distaff.metrics import (
    Last,
    Max,
    Mean,
    Metric,
    Min,
    PerExample,
    Sum,
    as_json,
    compute,
    declare,
    merge,
    to_host,
)
from distaff.metrics.accumulators import pytree

# Small whole numbers: their sums are exact in float32, so that order cannot matter.
whole = st.integers(-100, 100).map(float)
weights = st.integers(0, 5).map(float)
means = st.builds(lambda total, weight: Mean(np.float64(total), np.float64(weight)), whole, weights)
kinds = st.one_of(
    st.tuples(means, means, means),
    *(
        st.tuples(*[whole.map(lambda value, kind=kind: kind(np.float64(value)))] * 3)
        for kind in (Sum, Min, Max)
    ),
)


def leaves(metric: Metric) -> list[float]:
    return [float(leaf) for leaf in jax.tree.leaves(metric)]


@settings(deadline=None)
@given(kinds)
def test_merge_is_associative_and_commutative(metrics):
    a, b, c = metrics
    assert leaves(a.merge(b).merge(c)) == leaves(a.merge(b.merge(c)))
    assert leaves(a.merge(b)) == leaves(b.merge(a))


@settings(deadline=None, max_examples=25)
@given(kinds)
def test_empty_is_neutral_and_computes_to_nothing(metrics):
    metric = metrics[0]
    empty = metric.empty_like()
    assert leaves(metric.merge(empty)) == leaves(empty.merge(metric)) == leaves(metric)
    value = compute(to_host({"empty": empty}))["empty"]
    np.testing.assert_equal(value, 0.0 if isinstance(metric, Sum) else np.nan)


@settings(deadline=None)
@given(st.lists(st.tuples(whole, st.booleans()), min_size=1, max_size=6))
def test_last_is_associative_and_skips_what_is_empty(entries):
    metrics = [Last(np.float64(v)) if full else Last(np.float64(v), 0) for v, full in entries]
    left = metrics[0]
    for metric in metrics[1:]:
        left = left.merge(metric)
    right = metrics[-1]
    for metric in reversed(metrics[:-1]):
        right = metric.merge(right)
    expected = [value for value, full in entries if full]
    for merged in (left, right):
        assert merged.count == len(expected)
        np.testing.assert_equal(float(merged.compute()), (expected or [np.nan])[-1])


@st.composite
def split_examples(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Values `[n, 2]` and weights `[n]`, and batches of four indices, -1 for a masked row."""
    n = draw(st.integers(1, 9))
    values = np.array(draw(st.lists(whole, min_size=2 * n, max_size=2 * n)), np.float32)
    weight = np.array(draw(st.lists(st.integers(1, 9), min_size=n, max_size=n)), np.float32)
    order, batches = list(draw(st.permutations(range(n)))), []
    while order:
        size = draw(st.integers(1, min(4, len(order))))
        taken, order = order[:size], order[size:]
        batches.append(np.array(draw(st.permutations(taken + [-1] * (4 - size)))))
    return values.reshape(n, 2), weight, batches


@settings(deadline=None, max_examples=50)
@given(split_examples())
def test_metrics_over_any_split_with_masked_nan_rows_equal_numpy_over_all(examples):
    values, weight, batches = examples
    padded = np.concatenate([values, np.full((1, 2), np.nan, np.float32)])
    weights = np.concatenate([weight, np.full(1, np.nan, np.float32)])
    total = None
    for batch in batches:
        declared = {
            "mean": Mean.per_example(padded[batch]),
            "weighted": Mean.per_example(padded[batch], weights[batch]),
            "sum": Sum.per_example(padded[batch]),
            "min": Min.per_example(padded[batch]),
            "max": Max.per_example(padded[batch]),
        }
        metrics = to_host({n: m.reduce(jnp.array(batch >= 0)) for n, m in declared.items()})
        total = metrics if total is None else merge(total, metrics)
    assert total is not None
    computed, exact = compute(total), values.astype(np.float64)
    np.testing.assert_allclose(computed["mean"], exact.mean(0), rtol=1e-12)
    weighted = np.average(exact, axis=0, weights=weight)
    np.testing.assert_allclose(computed["weighted"], weighted, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(computed["sum"], exact.sum(0))
    np.testing.assert_array_equal(computed["min"], exact.min(0))
    np.testing.assert_array_equal(computed["max"], exact.max(0))


def test_sum_adds_up_a_confusion_matrix():
    labels, predictions = np.array([0, 1, 2, 1]), np.array([0, 2, 2, 1])
    cells = np.eye(3)[labels][:, :, None] * np.eye(3)[predictions][:, None, :]
    metric = Sum.per_example(cells).reduce(jnp.array([True, True, True, False]))
    np.testing.assert_array_equal(metric.compute(), [[1, 0, 0], [0, 0, 1], [0, 0, 1]])


def test_mean_does_not_count_an_example_without_weight():
    declared = Mean.per_example(jnp.array([2.0, jnp.nan, 4.0]), jnp.array([1.0, 0.0, 3.0]))
    assert float(declared.reduce(jnp.ones(3, bool)).compute()) == 3.5


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_means_in_half_precision_are_added_up_in_float32(dtype):
    metric = declare("x", jnp.full(301, 300, dtype), 301)
    assert isinstance(metric, PerExample)
    reduced = metric.reduce(jnp.ones(301, bool))
    assert float(reduced.compute()) == 300
    scalar: Any = declare("x", jnp.asarray(2, dtype), 301)
    assert (scalar.total.dtype, float(scalar.total)) == (jnp.float32, 602)


def test_metrics_of_stacked_states_compute_one_by_one():
    total, weight = np.array([[2.0, 4.0], [9.0, 3.0]]), np.array([2.0, 3.0])
    np.testing.assert_array_equal(Mean(total, weight).compute(), [[1, 2], [3, 1]])
    older, newer = Last(total, np.array([1, 1])), Last(-total, np.array([0, 1]))
    np.testing.assert_array_equal(older.merge(newer).compute(), [[2, 4], [-9, -3]])


def test_to_host_keeps_sums_that_float32_would_lose():
    metrics = {"x": Sum(jnp.float32(2**24)), "n": Sum(jnp.int32(1))}
    host = to_host(metrics)
    for _ in range(3):
        host = merge(host, to_host({"x": Sum(jnp.float32(1)), "n": Sum(jnp.int32(2**31 - 1))}))
    assert compute(host) == {"n": 3 * (2.0**31 - 1) + 1, "x": 2.0**24 + 3}
    assert {leaf.dtype for leaf in jax.tree.leaves(host)} == {np.dtype(np.float64)}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (jnp.array([1.0, 2.0, 6.0]), 3.0),
        (np.array([True, False, False]), 1 / 3),
        (jnp.array([[1, 2], [3, 4], [5, 6]]), [3, 4]),
        (jnp.float32(2.5), 2.5),
        (2, 2.0),
        (Mean.per_example(jnp.array([1.0, 2.0, 6.0]), jnp.array([1, 0, 1])), 3.5),
        (Max.per_example(jnp.array([1, 7, 6])), 7.0),
        (Sum(5), 5),
    ],
)
def test_declare_accepts_every_form_of_a_metric(value, expected):
    metric = declare("x", value, 3)
    if isinstance(metric, PerExample):
        metric = metric.reduce(jnp.ones(3, bool))
    np.testing.assert_allclose(compute(to_host({"x": metric}))["x"], expected, rtol=1e-7)


def test_declare_weighs_a_scalar_with_its_batch():
    first, second = (declare("x", jnp.float32(mean), size) for mean, size in ((1, 6), (4, 3)))
    assert isinstance(first, Mean)
    assert isinstance(second, Mean)
    assert compute(merge(to_host({"x": first}), to_host({"x": second}))) == {"x": 2.0}


@pytest.mark.parametrize(
    "value", [jnp.ones(4), jnp.ones((2, 3)), Mean.per_example(jnp.ones(1)), Sum.per_example(1.0)]
)
def test_declare_refuses_what_is_not_one_value_per_example(value):
    shape = value.values[0].shape if isinstance(value, PerExample) else value.shape
    with pytest.raises(LossError, match=re.escape(f"'hits' has shape {shape}")) as error:
        declare("hits", value, 3)
    assert "[3, ...]" in str(error.value)
    assert "metrics.Sum(hits)" in str(error.value)


@pytest.mark.parametrize("weight", [jnp.ones((3, 1)), jnp.ones(1), jnp.float32(1.0)])
def test_mean_refuses_weights_that_are_not_one_per_example(weight):
    with pytest.raises(LossError, match=re.escape(f"of a mean has shape {weight.shape}")):
        Mean.per_example(jnp.ones(3), weight)


def test_last_refuses_values_per_example():
    with pytest.raises(MetricError, match=re.escape("Return Last(value)")):
        Last.reduce(jnp.ones(2, bool), jnp.ones(2))


def test_merge_refuses_other_names_and_other_kinds():
    first = {"loss": Sum(1.0), "accuracy": Sum(1.0)}
    message = "one returned ['accuracy', 'loss'], another ['loss']"
    with pytest.raises(MetricError, match=re.escape(message)):
        merge(first, {"loss": Sum(1.0)})
    with pytest.raises(
        MetricError, match="'accuracy' must be of one kind in every step; got Sum and Max"
    ):
        merge(first, {"loss": Sum(1.0), "accuracy": Max(1.0)})


def test_compute_puts_the_loss_first_and_a_prefix_before_each_name():
    metrics = to_host({"a": Sum(1), "loss": Sum(jnp.float32(2)), "b": Sum(jnp.ones(2))})
    computed = compute(metrics, "val/")
    assert list(computed) == ["val/loss", "val/a", "val/b"]
    assert (type(computed["val/loss"]), computed["val/loss"]) == (float, 2.0)
    assert (computed["val/b"].dtype, computed["val/b"].tolist()) == (np.float64, [1.0, 1.0])


def test_as_json_is_strict_and_reads_back():
    values = {"x": np.nan, "y": np.array([[1.0, -np.inf]]), "z": jnp.float32(0.5), "n": 3}
    written = as_json(values)
    assert written == {"x": "nan", "y": [[1.0, "-inf"]], "z": 0.5, "n": 3.0}
    assert json.loads(json.dumps(written, allow_nan=False)) == written
    assert np.isnan(float(written["x"]))
    with pytest.raises(MetricError, match="'x' is not a number: 'high'"):
        as_json({"x": "high"})


@pytree
class Largest(Mean):
    """Merges in its own way, and inherits how a mean is merged over rows."""

    def merge(self, other: Any) -> Any:
        return self if self.total >= other.total else other


def test_merge_rows_is_the_merge_of_the_rows():
    rng = np.random.default_rng(0)
    numbers, table, ones = rng.normal(size=7), rng.normal(size=(7, 3)), np.ones(7)
    rows = {
        "mean": Mean(numbers, ones),
        "means": Mean(table, ones),
        "sum": Sum(table),
        "min": Min(table, ones),
        "max": Max(numbers, ones),
        "last": Last(numbers, ones),
        "own": Largest(numbers, ones),
    }
    merged = metrics.merge_rows(rows)
    each = [jax.tree.map(lambda leaf, row=row: leaf[row], rows) for row in range(7)]
    expected = functools.reduce(metrics.merge, each)
    assert jax.tree.structure(merged) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_allclose, merged, expected)
    assert merged["own"].total == numbers.max() != numbers.sum()
