"""Monitor: the metric that ranks models, and its direction."""

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
_SMALLER = "loss error err nll mse mae rmse msle mape perplexity ppl wer cer fid kl bce ece"
_OPPOSITE = frozenset(("neg", "negative", "minus"))


def direction(name: str) -> Literal["min", "max"] | None:
    """Returns whether a larger or smaller metric is better, judged by its name.

    Args:
        name: such as `val/top5_accuracy`; the last known word decides.

    Returns:
        None if the name has no known word.
    """
    words = re.findall(
        r"[a-z]+[0-9]*", re.sub(r"([a-z])([A-Z])", r"\1_\2", name.split("/")[-1]).lower()
    )
    larger, smaller = _LARGER.split(), _SMALLER.split()
    known = [word for word in words if word in larger + smaller]
    if not known:
        return None
    is_larger = (known[-1] in larger) != bool(_OPPOSITE & set(words))
    return "max" if is_larger else "min"


def as_monitor(given: Any) -> Monitor:
    """Returns a monitor, given one or the name of a metric.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(given, str):
        return Monitor(given)
    if not isinstance(given, Monitor):
        raise ConfigError(
            f"monitor must be a Monitor or the name of a metric; got {given!r}. Write "
            "Monitor('val/loss')."
        )
    return given


@dataclass(frozen=True)
class Monitor:
    """The metric that ranks models.

    >>> Monitor("val/accuracy").mode, Monitor("val/loss").mode
    ('max', 'min')

    Args:
        name: as logged, with its prefix: `"val/loss"`, or `"train/loss"` for the average over the
            training epoch.
        mode: whether smaller (`"min"`) or larger (`"max"`) is better. By default inferred from the
            name: `"max"` for accuracy, F1, AUROC and similar metrics, `"min"` for all others.
        insist: use `mode` even if the name suggests the opposite.

    Raises:
        ConfigError: `mode` is neither, or the name suggests the opposite.
    """

    name: str
    mode: Literal["min", "max"] = None  # ty: ignore[invalid-assignment]  # replaced below
    insist: InitVar[bool] = False

    def __post_init__(self, insist: bool) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(
                f"Monitor takes the name of a metric; got {self.name!r}. Write Monitor('val/loss')."
            )
        inferred, mode = direction(self.name), self.mode
        if mode is None:
            object.__setattr__(self, "mode", inferred or "min")
        elif mode not in ("min", "max"):
            raise ConfigError(f"Monitor({self.name!r}): mode must be 'min' or 'max'; got {mode!r}.")
        elif inferred not in (None, mode) and not insist:
            raise ConfigError(
                f"Monitor({self.name!r}, mode={mode!r}) keeps the worst model, judging by the name."
                f" Write mode={inferred!r}; or, if {mode!r} is meant, "
                f"Monitor({self.name!r}, mode={mode!r}, insist=True)."
            )

    @property
    def is_of_training(self) -> bool:
        """Whether the metric is that of the training epoch rather than of a validation."""
        return self.name.startswith("train/")

    def judged(
        self, metrics: Mapping[str, Any], validation: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Returns the validation metrics, and the monitored metric if it is one of training."""
        if self.is_of_training and self.name in metrics:
            return {self.name: metrics[self.name], **validation}
        return validation

    def check(self, known: Iterable[str]) -> None:
        """Checks that the metric exists.

        Raises:
            MetricError: it does not; the message lists the known names.
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
            MetricError: it is missing, or not a scalar.
        """
        self.check(metrics)
        value = metrics[self.name]
        if np.ndim(value) != 0:
            raise MetricError(
                f"The monitored metric {self.name!r} has shape {np.shape(value)}. Monitor a scalar."
            )
        return float(value)

    def better(self, new: float, old: float | None, min_delta: float = 0.0) -> bool:
        """Returns whether `new` is better than `old` by more than `min_delta`.

        Any value is better than None, and any number better than NaN; a tie keeps the old value.
        """
        if old is None:
            return True
        if math.isnan(new):
            return False
        if math.isnan(old):
            return True
        return (old - new if self.mode == "min" else new - old) > min_delta
