"""Exact sums: counts and sums that plain float32 would lose, beside NumPy in 64 bits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff import metrics
from distaff.errors import LossError
from distaff.metrics import ConfusionMatrix, Max, Mean, Min, Perplexity, Sum
from distaff.metrics.exact_sums import sum_by_cell, sum_integers
from distaff.optim import l2_loss

MANY = 600_000
"""More than two blocks of a count."""


def reduced(declared: Any, size: int, mask: Any = None) -> Any:
    metric = jax.jit(declared.reduce)(jnp.ones(size, bool) if mask is None else mask)
    return metrics.compute(metrics.to_host({"x": metric}))["x"]


@pytest.mark.parametrize(
    "weights", [[0.1, 0.7], [1e-4, 1.0], [1.0, 1.0], [3.7e5, 2e-3], [0.0, 0.0], [-0.3, 0.2]]
)
def test_counts_of_float_weights_are_those_of_float64(weights: Any):
    cells = np.arange(MANY) % 4
    weight = np.asarray(weights, np.float32)[cells % 2]
    found = jax.jit(sum_by_cell, static_argnums=2)(jnp.asarray(cells), jnp.asarray(weight), 4)
    np.testing.assert_allclose(found, np.bincount(cells, weight.astype(float)), rtol=2e-7)


@pytest.mark.parametrize("dtype", [bool, np.int32])
def test_counts_of_whole_weights_are_exact(dtype: Any):
    cells, weight = np.zeros(MANY, np.int32), np.full(MANY, 5001).astype(dtype)
    found = sum_by_cell(jnp.asarray(cells), jnp.asarray(weight), 2)
    assert float(found[0]) == np.float32(weight.sum(dtype=np.int64))


def test_weight_that_is_not_finite_makes_counts_nan():
    labels = np.array([0, 1, 1])
    for weight in (np.array([1.0, np.nan, 0.0]), np.array([1.0, np.inf, 0.0])):
        declared = ConfusionMatrix.per_example(labels, labels, num_classes=2, weight=weight)
        assert np.isnan(reduced(declared, 3)).all()
        mask = jnp.array([True, False, True])
        np.testing.assert_array_equal(reduced(declared, 3, mask), [[1, 0], [0, 0]])


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.uint8, np.int16, bool])
@pytest.mark.slow
def test_sums_of_integers_neither_round_nor_overflow(dtype: Any):
    rng = np.random.default_rng(0)
    high = 2 if dtype is bool else min(np.iinfo(dtype).max, 2**31)
    values = rng.integers(0, high, (70_000, 2)).astype(dtype)
    if dtype is np.int32:
        values[::3] *= -1
    exact = values.sum(0, dtype=np.int64)
    np.testing.assert_array_equal(reduced(Sum.per_example(values), len(values)), exact)
    high, low = sum_integers(jnp.asarray(values[:5]))
    total = np.asarray(high, np.float64) + np.asarray(low)
    np.testing.assert_array_equal(total, values[:5].sum(0, dtype=np.int64))


def test_sums_of_integers_merge_over_rows_as_one_by_one():
    each = [Sum.per_example(np.full(3, n)).reduce(jnp.ones(3, bool)) for n in (2**24, 1, 2**30)]
    host = [metrics.to_host({"x": one}) for one in each]
    rows = jax.tree.map(lambda *leaves: np.stack(leaves), *host)
    merged = metrics.merge(metrics.merge(host[0], host[1]), host[2])
    expected = {"x": 3.0 * (2**24 + 1 + 2**30)}
    assert metrics.compute(metrics.merge_rows(rows)) == metrics.compute(merged) == expected
    assert metrics.compute({"x": host[0]["x"].empty_like()}) == {"x": 0}


@pytest.mark.parametrize("kind", [Min, Max])
def test_extremes_of_infinities_integers_and_nothing(kind: Any):
    sign = 1 if kind is Max else -1
    assert reduced(kind.per_example(np.array([-sign * np.inf] * 2)), 2) == -sign * np.inf
    assert np.isnan(reduced(kind.per_example(np.array([1.0, np.nan])), 2))
    assert np.isnan(reduced(kind.per_example(np.ones(2)), 2, jnp.zeros(2, bool)))
    whole = np.array([sign * (2**24 + 1), 0], np.int32)
    assert reduced(kind.per_example(whole), 2) == sign * (2**24 + 1)
    assert reduced(kind.per_example(np.array([3, 250], np.uint8)), 2) == (250 if sign > 0 else 3)
    host = metrics.to_host({"x": kind.per_example(whole).reduce(jnp.ones(2, bool))})
    empty = metrics.to_host({"x": kind.per_example(whole).reduce(jnp.zeros(2, bool))})
    assert metrics.compute(metrics.merge(empty, host)) == metrics.compute(host)


def test_mean_of_values_with_a_weight_each_is_over_all_of_them():
    rng = np.random.default_rng(0)
    values, weight = rng.normal(size=(6, 5)), rng.uniform(0, 1, (6, 5))
    weight[2], values[2], values[0, 0], weight[0, 0] = 0, np.nan, np.inf, 0
    known = weight > 0
    expected = np.average(values[known], weights=weight[known])
    assert reduced(Mean.per_example(values, weight), 6) == pytest.approx(expected, rel=1e-6)
    mask = jnp.array([True] * 4 + [False] * 2)
    inside = known & np.asarray(mask)[:, None]
    expected = np.average(values[inside], weights=weight[inside])
    assert reduced(Mean.per_example(values, weight), 6, mask) == pytest.approx(expected, rel=1e-6)
    assert reduced(Perplexity.per_example(values, weight), 6, mask) == pytest.approx(
        np.exp(expected), rel=1e-6
    )
    pairs = np.stack([values, 2 * values], axis=-1)
    np.testing.assert_allclose(
        reduced(Mean.per_example(pairs, weight), 6, mask), [expected, 2 * expected], rtol=1e-6
    )
    with pytest.raises(
        LossError, match=r"a mean has shape \(5, 6\).*Pass one weight per example, \(6,\), or"
    ):
        Mean.per_example(values, weight.T)


def test_gradient_of_a_weighted_mean_is_finite_where_a_value_without_weight_is_not():
    def loss(w: Any) -> Any:
        values = w + jnp.array([[1.0, jnp.inf], [2.0, 3.0]])
        declared = Mean.per_example(values, jnp.array([[1.0, 0.0], [1.0, 1.0]]))
        return declared.reduce(jnp.ones(2, bool)).compute()

    assert jax.value_and_grad(loss)(1.0) == (3.0, 1.0)


def test_l2_penalty_of_half_precision_is_added_up_in_float32():
    params = {"kernel": jnp.full((300, 10), 0.1, jnp.bfloat16)}
    expected = 0.5 * (np.asarray(params["kernel"], np.float64) ** 2).sum()
    assert float(l2_loss(params, 1.0)) == pytest.approx(expected, rel=1e-6)
