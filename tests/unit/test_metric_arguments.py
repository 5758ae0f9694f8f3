"""Wrong arguments of metrics: each raises an error of Distaff that says what to write."""

from __future__ import annotations

import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff import metrics
from distaff.errors import ConfigError, LossError, MetricError
from distaff.metrics.accumulators import Metric, pytree

LABELS, GUESSES = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0])
NUMBERS = np.float32([0.1, 0.8, 0.4, 0.2])
LOGITS = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
PAIRS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    **dict.fromkeys(("MAE", "RMSE", "R2"), (NUMBERS[::-1], NUMBERS, {})),
    **dict.fromkeys(("AUROC", "AveragePrecision", "CalibrationError"), (LABELS, NUMBERS, {})),
    **dict.fromkeys(
        ("ConfusionMatrix", "BalancedAccuracy", "F1", "IoU", "Precision", "Recall"),
        (LABELS, GUESSES, {"num_classes": 2}),
    ),
    "TopK": (LABELS, LOGITS, {"k": 1}),
}
COUNTED = [name for name, (*_, settings) in PAIRS.items() if "num_classes" in settings]
SINGLE = ("Mean", "Sum", "Min", "Max", "Perplexity")
NOT_NUMBERS = {
    "None": None,
    "text": np.array(["a", "b", "a", "b"]),
    "ragged": [[1, 2], [3]],
    "objects": np.array([1, None, 2, 3], object),
    "complex": np.ones(4, complex),
    "dates": np.array(["2020-01-01"] * 4, "M8[D]"),
    "dict": {"a": 1},
}


def test_every_metric_is_covered():
    kinds = {
        name
        for name in metrics.__all__
        if inspect.isclass(getattr(metrics, name)) and hasattr(getattr(metrics, name), "reduce")
    }
    assert kinds - {"Metric", "PerExample", "Last"} == {*PAIRS, *SINGLE}


@pytest.mark.parametrize("name", PAIRS)
def test_a_metric_called_like_a_function_names_per_example(name):
    first, second, settings = PAIRS[name]
    for call in (
        lambda: getattr(metrics, name)(first, second),
        lambda: getattr(metrics, name)(first.tolist(), second.tolist()),
        lambda: getattr(metrics, name)(first, second, NUMBERS),
        lambda: getattr(metrics, name)(first, outputs=second, **settings),
        lambda: getattr(metrics, name)(),
    ):
        with pytest.raises(MetricError, match=rf"return metrics\.{name}\.per_example\([lt]"):
            call()


@pytest.mark.parametrize("name", SINGLE)
def test_a_wrong_construction_of_a_metric_of_one_array_names_per_example(name):
    with pytest.raises(MetricError, match=rf"metrics\.{name}\.per_example\(values\)\.compute"):
        getattr(metrics, name)(1, 2, 3)


def test_signatures_and_other_type_errors_stay():
    assert list(inspect.signature(metrics.Mean).parameters) == ["total", "weight"]

    @pytree
    class Own(Metric):
        total: Any

        def __post_init__(self) -> None:
            self.total + 1

        merge = compute = empty_like = reduce = None  # type: ignore[assignment]

    assert Own(1).total == 1
    for call in (lambda: Own("text"), lambda: Own()):
        with pytest.raises(TypeError):
            call()


@pytest.mark.parametrize("name", COUNTED)
def test_num_classes_is_required_and_an_integer(name):
    metric, guesses = getattr(metrics, name), jnp.array(GUESSES)
    with pytest.raises(ConfigError, match=rf"metrics\.{name}\.per_example needs num_classes"):
        metric.per_example(LABELS, guesses)
    with pytest.raises(ConfigError, match="needs num_classes"):
        jax.eval_shape(metric.per_example, LABELS, guesses)
    for value, message in ((2.0, "integer; got 2.0"), ("2", "got '2'"), (True, "got True")):
        with pytest.raises(ConfigError, match=f"num_classes must be an {message}|{message}"):
            metric.per_example(LABELS, guesses, num_classes=value)
    assert metric.per_example(LABELS, guesses, num_classes=np.int64(2)).settings[0][1] == 2


@pytest.mark.parametrize("kind", NOT_NUMBERS)
@pytest.mark.parametrize("name", [*PAIRS, *SINGLE])
def test_values_that_are_no_numbers_are_errors(name, kind):
    metric, bad = getattr(metrics, name), NOT_NUMBERS[kind]
    if name in SINGLE:
        with pytest.raises(LossError, match=r"A metric needs (an array of|real) numbers"):
            metric.per_example(bad)
        return
    first, second, settings = PAIRS[name]
    attempts = [((bad, second), {}), ((first, bad), {})]
    if bad is not None:
        attempts.append(((first, second), {"weight": bad}))
    for pair, weight in attempts:
        # An integer label cannot be complex, which its own check says.
        with pytest.raises(LossError):
            metric.per_example(*pair, **settings, **weight)


@pytest.mark.parametrize("name", PAIRS)
def test_a_number_instead_of_an_array_is_an_error(name):
    *_, settings = PAIRS[name]
    with pytest.raises(LossError, match=r"per example|\[batch, classes\]"):
        getattr(metrics, name).per_example(1, 1, **settings).compute()


@pytest.mark.parametrize("name", [*PAIRS, *SINGLE])
def test_an_empty_batch_computes_to_nothing(name):
    metric = getattr(metrics, name)
    if name in SINGLE:
        empty = metric.per_example(np.zeros(0, np.float32))
    else:
        first, second, settings = PAIRS[name]
        empty = metric.per_example(first[:0], second[:0], **settings)
    value = np.asarray(empty.compute())
    assert (value == 0).all() if name in ("Sum", "ConfusionMatrix") else np.isnan(value).all()


@pytest.mark.parametrize("average", [["macro"], np.array(["macro"]), 3, {}])
def test_averages_that_are_no_names_are_errors(average):
    with pytest.raises(ConfigError, match="average="):
        metrics.F1.per_example(LABELS, GUESSES, num_classes=2, average=average)
    with pytest.raises(ConfigError, match="average="):
        metrics.AUROC.per_example(LABELS, NUMBERS, average=average)


def test_a_returned_value_that_is_no_number_is_named():
    with pytest.raises(LossError, match=re.escape("The metric 'hits' needs an array of numbers")):
        metrics.declare("hits", None, 4)
