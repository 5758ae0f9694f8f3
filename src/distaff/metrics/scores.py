"""Metrics of scores and probabilities: AUROC, average precision, top-k accuracy, calibration."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from typing import Any, ClassVar, Literal, Self, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.config.checks import whole
from distaff.core.pytrees import static
from distaff.errors import ConfigError, LossError, MetricError
from distaff.metrics.accumulators import (
    Metric,
    PerExample,
    WeightedMean,
    masked,
    mean_over_all,
    namespace,
    pytree,
)
from distaff.metrics.arguments import as_numbers, floating
from distaff.metrics.classification import weight_per_label
from distaff.metrics.exact_sums import sum_by_cell

ScoreAverage: TypeAlias = Literal["micro", "macro"] | None
"""How to average the values of several classes; None for one value per class."""


def _refusal(name: str) -> str:
    return (
        f"{name} stores every score, so it grows with the run, and can only be merged on the host. "
        "Use it in evaluation: return it from the loss function only if not ctx.train. In your own "
        "loop, merge what metrics.to_host returns."
    )


@pytree
class _Scores(Metric):
    parts: tuple[Any, ...]
    average: ScoreAverage = static(default="micro")

    compares: ClassVar[str] = "labels, scores"

    @classmethod
    def per_example(
        cls, labels: Any, scores: Any, *, weight: Any = None, average: ScoreAverage = "micro"
    ) -> PerExample:
        """Collects scores and labels.

        Args:
            labels: 1 or true for a positive example, 0 for a negative one, `[batch, ...]`.
            scores: logits or probabilities of the positive class, with the shape of `labels`.
            weight: numbers or bool, with the leading axes of `labels`; 1 by default. Scores of
                weight 0 are ignored, even NaN.
            average: `"micro"`, one value of all labels; for labels `[batch, ..., classes]` of
                several classes also `"macro"`, the mean over the classes that have a value, or
                None, the values `[classes]`.

        Raises:
            ConfigError: `average` is unknown.
            LossError: the shapes differ, or there is no axis of classes to average over.
        """
        is_known = isinstance(average, str) and average in get_args(get_args(ScoreAverage)[0])
        if average is not None and not is_known:
            raise ConfigError(
                f"average={average!r} is not 'micro' or 'macro', or None for one value per class."
            )
        labels, scores = floating(labels), floating(scores)
        if labels.shape != scores.shape:
            raise LossError(
                f"{cls.__name__} needs one score per label; labels have shape {labels.shape}, "
                f"scores {scores.shape}. Pass the scores of the positive class, such as "
                "logits[:, 1] - logits[:, 0]."
            )
        if average != "micro" and labels.ndim < 2:
            raise LossError(
                f"average={average!r} needs labels [batch, classes]; got {labels.shape}. Pass "
                "average='micro'."
            )
        values = scores, labels, floating(weight_per_label(weight, labels))
        return PerExample(values, cls, (("average", average),))

    @classmethod
    def reduce(cls, mask: jax.Array, *values: jax.Array, average: ScoreAverage = "micro") -> Self:
        scores, labels, weight = values
        rows = scores, labels, masked(mask, weight, 0)
        if average == "micro":
            return cls((jnp.stack([row.ravel() for row in rows]),), average)
        by_class = [row.reshape(-1, row.shape[-1]).T for row in rows]
        return cls((jnp.stack(by_class, axis=1),), average)

    def merge(self, other: Self) -> Self:
        self._check_on_host()
        other._check_on_host()
        return dataclasses.replace(self, parts=self.parts + other.parts)

    def empty_like(self) -> Self:
        self._check_on_host()
        return dataclasses.replace(self, parts=())

    def _check_on_host(self) -> None:
        if any(isinstance(part, jax.Array) for part in self.parts):
            raise MetricError(self.refused_in_training)

    def compute(self) -> Any:
        """Returns the value.

        Raises:
            MetricError: a label with a weight is neither 0 nor 1.
        """
        if not self.parts:
            return np.float64("nan")
        examples = np.concatenate([np.asarray(part, np.float64) for part in self.parts], axis=-1)
        stacked = examples.reshape(math.prod(examples.shape[:-2]), *examples.shape[-2:])
        found = [self._of(*rows[:, rows[2] != 0]) for rows in stacked]
        values = np.reshape(found, examples.shape[:-2])
        if self.average != "macro":
            return values
        is_known = ~np.isnan(values)
        total, number = np.where(is_known, values, 0).sum(-1), is_known.sum(-1)
        return np.where(number == 0, np.nan, total / np.maximum(number, 1))

    def _of(self, scores: np.ndarray, labels: np.ndarray, weight: np.ndarray) -> float:
        others = np.setdiff1d(labels, (0, 1))
        if others.size:
            raise MetricError(
                f"{type(self).__name__} needs labels 0 and 1; got {others[:5].tolist()}. Pass "
                "labels == positive_class, or a weight of 0 to ignore them."
            )
        if np.isnan(scores).any():
            return float("nan")
        ranks = np.unique(scores, return_inverse=True)[1]
        positive = np.bincount(ranks, weight * labels)
        negative = np.bincount(ranks, weight * (1 - labels))
        return self._score(positive, negative)

    @staticmethod
    @abstractmethod
    def _score(positive: np.ndarray, negative: np.ndarray) -> float:
        """Returns the value, given the weights of both classes by score, in ascending order."""


@pytree
class AUROC(_Scores):
    """The area under the receiver operating characteristic, for two classes.

    It is the probability that a positive example has a higher score than a negative one, ties
    counting one half (Hanley and McNeil, "The meaning and use of the area under a receiver
    operating characteristic (ROC) curve", Radiology 143, 1982). It is NaN if one class is missing
    or a score is NaN.

    It stores every score, so use it only in evaluation; a training step that returns it raises an
    error.

    Args:
        parts: arrays `[3, examples]`, or `[classes, 3, examples]`, of scores, labels and weights.
        average: as in `per_example`.
    """

    refused_in_training: ClassVar[str] = _refusal("AUROC")

    @staticmethod
    def _score(positive: np.ndarray, negative: np.ndarray) -> float:
        pairs = positive.sum() * negative.sum()
        if pairs == 0:
            return float("nan")
        return float(positive @ (np.cumsum(negative) - negative / 2) / pairs)


@pytree
class AveragePrecision(_Scores):
    """The area under the precision-recall curve, for two classes.

    It is the mean precision at the scores of the positive examples, without interpolation, as in
    `sklearn.metrics.average_precision_score`. It is NaN without positive examples, or if a score is
    NaN.

    It stores every score, so use it only in evaluation; a training step that returns it raises an
    error.

    Args:
        parts: arrays `[3, examples]`, or `[classes, 3, examples]`, of scores, labels and weights.
        average: as in `per_example`.
    """

    refused_in_training: ClassVar[str] = _refusal("AveragePrecision")

    @staticmethod
    def _score(positive: np.ndarray, negative: np.ndarray) -> float:
        if positive.sum() == 0:
            return float("nan")
        true, false = np.cumsum(positive[::-1]), np.cumsum(negative[::-1])
        return float(positive[::-1] @ (true / (true + false)) / positive.sum())


@pytree
class TopK(WeightedMean):
    """The fraction of examples whose class has one of the `k` highest scores.

    Of equal scores, that of the lower class counts as the higher one, as in `argmax`. So `k=1` is
    the accuracy.
    """

    compares: ClassVar[str] = "labels, logits"

    @classmethod
    def per_example(cls, labels: Any, logits: Any, *, k: int = 5, weight: Any = None) -> PerExample:
        """Compares labels with the classes of the highest scores.

        Args:
            labels: class indices, int `[batch, ...]`. A class that has no score makes the metric
                NaN, unless its weight is 0.
            logits: scores `[batch, ..., classes]`. A row with NaN counts as a miss.
            k: number of classes, less than the number of scores.
            weight: numbers or bool, with the leading axes of `labels`; 1 by default. Labels of
                weight 0 are ignored, whatever their value.

        Returns:
            Values per example. Return them from `loss_fn` among its metrics, by name; outside of a
            step, `compute()` returns their value.

        Raises:
            ConfigError: `k` is less than 1, or not less than the number of classes.
            LossError: the shapes differ, or labels are not integers.
        """
        labels, logits = _checked(cls, labels, logits)
        whole("k", k)
        if k >= logits.shape[-1]:
            raise ConfigError(
                f"TopK(k={k}) of {logits.shape[-1]} classes is always 1. Pass a smaller k."
            )
        known, index = _index(labels, logits)
        own = jnp.take_along_axis(logits, index[..., None], axis=-1)
        classes = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        is_before = (logits > own) | ((logits == own) & (classes < index[..., None]))
        hits = (is_before.sum(-1) < k) & ~jnp.isnan(logits).any(-1)
        values = jnp.where(known, hits.astype(jnp.float32), jnp.nan)
        return mean_over_all(cls, values, weight)


@pytree
class CalibrationError(Metric):
    """The expected calibration error: the mean distance of confidence and accuracy, by bins.

    Confidences are sorted into bins of equal width, `(low, high]`; the distance of a bin is that of
    its mean confidence and its fraction of hits, weighted by examples (M. P. Naeini et al.,
    Obtaining Well Calibrated Probabilities Using Bayesian Binning, AAAI 2015; C. Guo et al., On
    Calibration of Modern Neural Networks, ICML 2017).

    Args:
        sums: the weight, weighted confidence and weighted hits of each bin, `[3, bins]`.
    """

    sums: Any

    compares: ClassVar[str] = "labels, probabilities"

    @classmethod
    def per_example(
        cls, labels: Any, probabilities: Any, *, bins: int = 15, weight: Any = None
    ) -> PerExample:
        """Compares probabilities with labels.

        Args:
            labels: class indices, int or bool `[batch, ...]`. A label that is no class makes the
                metric NaN, unless its weight is 0.
            probabilities: `[batch, ..., classes]`: the confidence is the largest one, and a hit is
                its class. Or `[batch, ...]`, with the shape of `labels`, for the class 1 of two: it
                is the confidence, and a label 1 is a hit. A number outside of [0, 1], as of logits,
                makes the metric NaN.
            bins: number of bins.
            weight: numbers or bool, with the leading axes of `labels`; 1 by default. Labels of
                weight 0 are ignored, whatever their value.

        Returns:
            Values per example. Return them from `loss_fn` among its metrics, by name; outside of a
            step, `compute()` returns their value.

        Raises:
            ConfigError: `bins` is less than 1.
            LossError: the shapes differ, or labels are not integers.
        """
        whole("bins", bins)
        labels, probabilities = as_numbers(labels), floating(probabilities)
        if labels.shape == probabilities.shape:
            labels, probabilities = _checked(cls, labels, probabilities[..., None])
            confidence, hits = probabilities[..., 0], labels == 1
            known = (labels == 0) | (labels == 1)
        else:
            labels, probabilities = _checked(cls, labels, probabilities)
            known, index = _index(labels, probabilities)
            confidence, hits = probabilities.max(-1), probabilities.argmax(-1) == index
        confidence = jnp.where(known, confidence, jnp.nan)
        values = confidence, hits, floating(weight_per_label(weight, labels))
        return PerExample(values, cls, (("bins", bins),))

    @classmethod
    def reduce(cls, mask: jax.Array, *values: jax.Array, bins: int = 15) -> Self:
        confidence, hits, weight = values
        kept = masked(mask, weight, 0).ravel()
        hits = hits.ravel()
        confidence = jnp.where(kept != 0, confidence.ravel(), 0)
        is_valid = (confidence >= 0) & (confidence <= 1)
        edges = jnp.asarray(np.linspace(0, 1, bins + 1)[1:-1], confidence.dtype)
        cells = jnp.searchsorted(edges, confidence).astype(jnp.int32)
        confidence = jnp.where(is_valid, confidence, jnp.nan)
        parts = kept, kept * confidence, jnp.where(hits, kept, 0)
        sums = jnp.stack([sum_by_cell(cells, part, bins) for part in parts])
        return cls(jnp.where(is_valid.all(), sums, jnp.nan))

    def merge(self, other: Self) -> Self:
        return type(self)(self.sums + other.sums)

    def over_rows(self) -> Self:
        return type(self)(self.sums.sum(0))

    def compute(self) -> Any:
        numpy = namespace(self.sums)
        weight, confidence, hits = (self.sums[..., i, :] for i in range(3))
        total = weight.sum(-1)
        distance = abs(confidence - hits).sum(-1) / numpy.where(total == 0, 1, total)
        return numpy.where(total == 0, float("nan"), distance)

    def empty_like(self) -> Self:
        return dataclasses.replace(self, sums=jnp.zeros_like(self.sums))


def _checked(cls: type[Metric], labels: Any, scores: Any) -> tuple[jax.Array, jax.Array]:
    """Returns labels `[batch, ...]`, int32, and scores `[batch, ..., classes]`, float32."""
    labels, scores = as_numbers(labels), floating(scores)
    if not scores.ndim or labels.shape != scores.shape[:-1]:
        raise LossError(
            f"{cls.__name__} needs the scores of all classes for each label: labels [batch] and "
            f"scores [batch, classes]; got {labels.shape} and {scores.shape}."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer) and labels.dtype != bool:
        raise LossError(
            f"The labels of {cls.__name__} must be class indices, integers or booleans; got "
            f"{labels.dtype}. Pass labels.argmax(-1) if they are one-hot."
        )
    return labels.astype(jnp.int32), scores


def _index(labels: jax.Array, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns which labels have a score, and the labels with 0 for the others."""
    known = (labels >= 0) & (labels < scores.shape[-1])
    return known, jnp.where(known, labels, 0)
