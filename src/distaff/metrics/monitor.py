"""Monitor: which metric makes a model better, and in which direction."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import InitVar, dataclass
from typing import Any, Literal

import numpy as np

from distaff.errors import ConfigError, MetricError, nearest

_LARGER = """
    accuracy acc auc auroc auprc f1 f2 fscore precision recall sensitivity specificity top1 top3
    top5 iou miou dice map psnr ssim r2 bleu rouge likelihood elbo reward kappa mcc ndcg mrr
"""
_SMALLER = "loss error err nll mse mae rmse msle mape perplexity ppl wer cer fid kl bce"
_OPPOSITE = frozenset(("neg", "negative", "minus"))


def direction(name: str) -> Literal["min", "max"] | None:
    """Returns in which direction a metric is better, as far as its name says so.

    Args:
        name: such as `val/top5_accuracy`; the last word that says anything counts.

    Returns:
        None where no word of it does.
    """
    words = re.findall(
        r"[a-z]+[0-9]*", re.sub(r"([a-z])([A-Z])", r"\1_\2", name.split("/")[-1]).lower()
    )
    larger, smaller = _LARGER.split(), _SMALLER.split()
    said = [word for word in words if word in larger + smaller]
    if not said:
        return None
    is_larger = (said[-1] in larger) != bool(_OPPOSITE & set(words))
    return "max" if is_larger else "min"


def as_monitor(given: Any) -> Monitor:
    """Returns a monitor, also of the name of a metric.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(given, str):
        return Monitor(given)
    if not isinstance(given, Monitor):
        raise ConfigError(
            f"A monitor is a Monitor or the name of a metric; got {given!r}. Write "
            "Monitor('val/loss')."
        )
    return given


@dataclass(frozen=True)
class Monitor:
    """The metric a model is judged by.

    >>> Monitor("val/accuracy").mode, Monitor("val/loss").mode
    ('max', 'min')

    Args:
        name: as logged, with its prefix: `"val/loss"`, or `"train/loss"` for the average over the
            training epoch.
        mode: whether smaller (`"min"`) or larger (`"max"`) is better. By default what the name
            says, `"max"` for accuracy, F1, AUROC and the like; `"min"` for every other name.
        insist: take `mode` although the name says the opposite.

    Raises:
        ConfigError: `mode` is neither, or the name says the opposite.
    """

    name: str
    mode: Literal["min", "max"] = None  # ty: ignore[invalid-assignment]  # replaced below
    insist: InitVar[bool] = False

    def __post_init__(self, insist: bool) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(
                f"Monitor takes the name of a metric; got {self.name!r}. Write Monitor('val/loss')."
            )
        said, mode = direction(self.name), self.mode
        if mode is None:
            object.__setattr__(self, "mode", said or "min")
        elif mode not in ("min", "max"):
            raise ConfigError(f"Monitor({self.name!r}): mode is 'min' or 'max'; got {mode!r}.")
        elif said not in (None, mode) and not insist:
            raise ConfigError(
                f"Monitor({self.name!r}, mode={mode!r}) keeps the worst model, as its name says. "
                f"Write mode={said!r}; or, if {mode!r} is meant, "
                f"Monitor({self.name!r}, mode={mode!r}, insist=True)."
            )

    @property
    def is_of_training(self) -> bool:
        """Whether the metric is one of the training epoch, and not of a validation."""
        return self.name.startswith("train/")

    def judged(
        self, metrics: Mapping[str, Any], validation: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Returns what a model is judged by: its validation, and what is monitored of training.

        Args:
            metrics: of the training epoch.
            validation: of the validation after it; empty without.
        """
        is_there = self.is_of_training and self.name in metrics
        return {self.name: metrics[self.name], **validation} if is_there else validation

    def check(self, known: Iterable[str]) -> None:
        """Checks that the metric exists.

        Raises:
            MetricError: it does not; the known names are listed.
        """
        names = list(known)
        if self.name not in names:
            raise MetricError(
                f"The monitored metric {self.name!r} is not among the validation metrics. "
                f"{nearest(self.name, names)} "
                "Return it from the loss function, or set monitor = Monitor(...) to a known one."
            )

    def value(self, metrics: Mapping[str, Any]) -> float:
        """Returns the monitored value.

        Raises:
            MetricError: it is missing, or is not one number.
        """
        self.check(metrics)
        value = metrics[self.name]
        if np.ndim(value) != 0:
            raise MetricError(
                f"A monitored metric is one number; {self.name!r} has shape {np.shape(value)}."
            )
        return float(value)

    def better(self, new: float, old: float | None, min_delta: float = 0.0) -> bool:
        """Tells whether `new` is better than `old` by more than `min_delta`.

        Anything is better than nothing; a number is better than NaN; a tie keeps the older.
        """
        if old is None:
            return True
        if math.isnan(new):
            return False
        if math.isnan(old):
            return True
        return (old - new if self.mode == "min" else new - old) > min_delta
