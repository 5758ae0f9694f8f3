"""Metrics of classification and segmentation, exact over uneven batches.

All of them accumulate one table of counts. See `distaff.metrics.scores` for metrics of scores.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Any, ClassVar, Literal, Self, TypeAlias

import jax
import jax.numpy as jnp

from distaff.core.pytrees import static
from distaff.errors import ConfigError, LossError, nearest
from distaff.metrics.accumulators import (
    Metric,
    PerExample,
    aligned,
    masked,
    namespace,
    pytree,
)
from distaff.metrics.arguments import as_numbers, check_num_classes, floating, is_whole
from distaff.metrics.exact_sums import sum_by_cell

Average: TypeAlias = Literal["binary", "micro", "macro", "weighted"] | None
"""How to average the scores of the classes; None for one score per class."""

_AVERAGES = ("binary", "micro", "macro", "weighted")


@pytree
class _Counts(Metric):
    counts: Any

    compares: ClassVar[str] = "labels, predictions, num_classes=..."

    @classmethod
    def reduce(
        cls, mask: jax.Array, *values: jax.Array, num_classes: int = 2, **settings: Any
    ) -> Self:
        labels, predictions, weight = values
        kept = masked(mask, weight, 0)
        known = (labels >= 0) & (labels < num_classes)
        known &= (predictions >= 0) & (predictions < num_classes)
        cells = jnp.where(known, labels * num_classes + predictions, num_classes**2)
        counts = sum_by_cell(cells.ravel(), kept.ravel(), num_classes**2)
        is_wrong = jnp.any((kept != 0) & ~known)
        counts = jnp.where(is_wrong, float("nan"), counts)
        return cls(counts.reshape(num_classes, num_classes), **settings)

    def merge(self, other: Self) -> Self:
        return dataclasses.replace(self, counts=self.counts + other.counts)

    def over_rows(self) -> Self:
        return dataclasses.replace(self, counts=self.counts.sum(0))

    def empty_like(self) -> Self:
        return dataclasses.replace(self, counts=jnp.zeros_like(self.counts))


@pytree
class _CountTable(_Counts):
    @classmethod
    def per_example(
        cls, labels: Any, predictions: Any, *, num_classes: int | None = None, weight: Any = None
    ) -> PerExample:
        """Counts how often each label meets each prediction.

        Args:
            labels: int or bool, `[batch]`, or `[batch, ...]` for one label per pixel or token.
            predictions: predicted classes, with the shape of `labels`.
            num_classes: number of classes, required. A class outside of `0 ... num_classes - 1`
                makes the metric NaN, unless its weight is 0.
            weight: numbers or bool, with the leading axes of `labels`; 1 by default. Labels of
                weight 0 are ignored, whatever their value: `weight=labels != 255`.

        Returns:
            Values per example. Return them from `loss_fn` among its metrics, by name; outside of a
            step, `compute()` returns their value.

        Raises:
            ConfigError: `num_classes` is missing or less than 2.
            LossError: labels or predictions are not integers, or shapes differ.
        """
        num_classes = check_num_classes(f"metrics.{cls.__name__}", num_classes)
        values = _classes(labels, predictions, weight)
        return PerExample(values, cls, (("num_classes", num_classes),))


@pytree
class ConfusionMatrix(_CountTable):
    """Counts of labels (rows) and predictions (columns), `[classes, classes]`.

    The layout is that of `sklearn.metrics.confusion_matrix`.

    Args:
        counts: float `[classes, classes]`; rounded to float32 once per batch.
    """

    def compute(self) -> Any:
        return self.counts


@pytree
class BalancedAccuracy(_CountTable):
    """The mean recall of the classes, which counts rare classes as much as frequent ones.

    Classes without examples are left out, as in `sklearn.metrics.balanced_accuracy_score`. Without
    any examples it is NaN.
    """

    def compute(self) -> Any:
        numpy = namespace(self.counts)
        hits = numpy.diagonal(self.counts, axis1=-2, axis2=-1)
        actual = self.counts.sum(axis=-1)
        # A NaN of an unknown class stays: it is not 0.
        is_missing = actual == 0
        recalls = numpy.where(is_missing, 0, hits) / numpy.where(is_missing, 1, actual)
        num_present = (~is_missing).sum(axis=-1)
        mean = recalls.sum(axis=-1) / numpy.where(num_present == 0, 1, num_present)
        return numpy.where(num_present == 0, float("nan"), mean)


@pytree
class _Score(_Counts):
    average: Average = static(default="binary")

    def __post_init__(self) -> None:
        _check_average(self.average)

    @classmethod
    def per_example(
        cls,
        labels: Any,
        predictions: Any,
        *,
        num_classes: int | None = None,
        average: Average = "binary",
        weight: Any = None,
    ) -> PerExample:
        """Compares predicted classes with labels.

        The value equals that of scikit-learn's function with `labels=range(num_classes)` and
        `zero_division=0`. Without examples it is NaN.

        Args:
            labels: int or bool, `[batch]`, or `[batch, ...]` for one label per pixel or token.
            predictions: predicted classes, with the shape of `labels`.
            num_classes: number of classes, required. A class outside of `0 ... num_classes - 1`
                makes the metric NaN, unless its weight is 0.
            average: `"binary"`, the score of class 1 of two; `"micro"`, one score from the counts
                of all classes; `"macro"`, the mean over all classes, including those without
                examples; `"weighted"`, the mean weighted by examples; None, the scores `[classes]`.
            weight: numbers or bool, with the leading axes of `labels`; 1 by default. Labels of
                weight 0 are ignored, whatever their value: `weight=labels != 255`.

        Returns:
            Values per example. Return them from `loss_fn` among its metrics, by name; outside of a
            step, `compute()` returns their value.

        Raises:
            ConfigError: `num_classes` is missing or less than 2, `average` is unknown, or
                `"binary"` is used with more than two classes.
            LossError: labels or predictions are not integers, or shapes differ.
        """
        num_classes = check_num_classes(f"metrics.{cls.__name__}", num_classes)
        values = _classes(labels, predictions, weight)
        _check_average(average)
        if average == "binary" and num_classes != 2:
            raise ConfigError(
                f"average='binary' scores class 1 of two, but num_classes is {num_classes}. Pass "
                "average='macro', 'micro', 'weighted', or None for one score per class."
            )
        return PerExample(values, cls, (("num_classes", num_classes), ("average", average)))

    def compute(self) -> Any:
        numpy = namespace(self.counts)
        hits = numpy.diagonal(self.counts, axis1=-2, axis2=-1)
        predicted, actual = self.counts.sum(axis=-2), self.counts.sum(axis=-1)
        above, below = self._fraction(hits, predicted, actual)
        if self.average == "micro":
            above, below = above.sum(axis=-1), below.sum(axis=-1)
        scores = above / numpy.where(below == 0, 1, below)
        total = actual.sum(axis=-1)
        if self.average == "binary":
            scores = scores[..., 1]
        elif self.average == "macro":
            scores = scores.mean(axis=-1)
        elif self.average == "weighted":
            scores = (scores * actual).sum(axis=-1) / numpy.where(total == 0, 1, total)
        return numpy.where(aligned(total, scores) == 0, float("nan"), scores)

    @staticmethod
    @abstractmethod
    def _fraction(hits: Any, predicted: Any, actual: Any) -> tuple[Any, Any]:
        """Returns the numerator and denominator of the score of each class, `[classes]`."""


@pytree
class Precision(_Score):
    """The fraction of the predictions of a class that are right.

    >>> score = Precision.per_example([0, 1, 1, 1], [1, 1, 1, 0], num_classes=2)
    >>> round(score.compute(), 4)
    0.6667
    """

    @staticmethod
    def _fraction(hits: Any, predicted: Any, actual: Any) -> tuple[Any, Any]:
        return hits, predicted


@pytree
class Recall(_Score):
    """The fraction of the examples of a class that are predicted as this class."""

    @staticmethod
    def _fraction(hits: Any, predicted: Any, actual: Any) -> tuple[Any, Any]:
        return hits, actual


@pytree
class F1(_Score):
    """The harmonic mean of precision and recall; for masks, the Dice coefficient."""

    @staticmethod
    def _fraction(hits: Any, predicted: Any, actual: Any) -> tuple[Any, Any]:
        return 2 * hits, predicted + actual


@pytree
class IoU(_Score):
    """Intersection over union (Jaccard index); `average="macro"` is the mean IoU."""

    @staticmethod
    def _fraction(hits: Any, predicted: Any, actual: Any) -> tuple[Any, Any]:
        return hits, predicted + actual - hits


def _check_average(average: Any) -> None:
    is_known = isinstance(average, str) and average in _AVERAGES
    if average is not None and not is_known:
        raise ConfigError(
            f"average={average!r} is not one of {_AVERAGES}, or None for one score per class. "
            f"{nearest(str(average), _AVERAGES)}"
        )


def _classes(labels: Any, predictions: Any, weight: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    labels, predictions = as_numbers(labels), as_numbers(predictions)
    for name, array in (("labels", labels), ("predictions", predictions)):
        if not jnp.issubdtype(array.dtype, jnp.integer) and array.dtype != bool:
            raise LossError(
                f"{name} must be integers or booleans; they have dtype {array.dtype} and shape "
                f"{array.shape}. Pass logits.argmax(-1), or logits > 0 for two classes, as "
                "predictions."
            )
    if labels.shape != predictions.shape:
        raise LossError(
            f"labels and predictions must have the same shape; got {labels.shape} and "
            f"{predictions.shape}. Pass logits.argmax(-1) as predictions."
        )
    weights = weight_per_label(weight, labels)
    return labels.astype(jnp.int32), predictions.astype(jnp.int32), weights


def weight_per_label(weight: Any, labels: jax.Array) -> jax.Array:
    """Returns one weight per label: bool, int32, or float of at least 32 bits."""
    weight = jnp.ones(labels.shape, bool) if weight is None else as_numbers(weight)
    if weight.shape != labels.shape[: weight.ndim]:
        raise LossError(
            f"weight has shape {weight.shape}, which does not match the leading axes of the labels,"
            f" {labels.shape}. Pass one weight per example, [batch], or one per label."
        )
    if weight.dtype != bool:
        weight = weight.astype(jnp.int32) if is_whole(weight) else floating(weight)
    return jnp.broadcast_to(aligned(weight, labels), labels.shape)
