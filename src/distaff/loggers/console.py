"""Metrics as lines of text."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TextIO

import numpy as np

from distaff.core.typing import Values
from distaff.loggers.protocol import JSON


class ConsoleLogger:
    """Writes one line per call of `log_metrics`: `step 60  epoch 3  train/loss 0.3127`.

    Args:
        stream: a text stream; None for standard error.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def log_metrics(self, metrics: Values, *, step: int, epoch: int) -> None:
        """Writes the metrics that are one number, with four significant digits."""
        numbers = {name: value for name, value in metrics.items() if np.ndim(value) == 0}
        values = "".join(f"  {name} {value:.4g}" for name, value in numbers.items())
        print(f"step {step}  epoch {epoch}{values}", file=self._stream or sys.stderr, flush=True)

    def log_config(self, config: Mapping[str, JSON]) -> None:
        """Does nothing."""

    def close(self, status: str) -> None:
        """Does nothing: every line is flushed, and the stream stays open."""
