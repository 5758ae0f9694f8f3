"""The log that every system writes: mean loss and accuracy of each 50 steps, as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workloads import LOG_EVERY


class MetricLog:
    """Writes a line per 50 steps, and knows the mean loss of a round.

    Args:
        folder: where `metrics.jsonl` is written.
    """

    def __init__(self, folder: Path) -> None:
        self._file = (folder / "metrics.jsonl").open("w")
        self._step, self._rows, self._losses = 0, [], []

    def add(self, rows: np.ndarray) -> None:
        """Takes loss and accuracy of some steps, `[steps, 2]`."""
        self._rows.extend(rows)
        while len(self._rows) >= LOG_EVERY:
            self._close(self._rows[:LOG_EVERY])
            del self._rows[:LOG_EVERY]

    def add_sum(self, sums: Any, steps: int) -> None:
        """Takes the sums of loss and accuracy over the steps of a line, `[2]`."""
        self._write(np.asarray(sums) / steps, steps)

    def end_round(self) -> float:
        """Writes what is left, and returns the mean loss of the steps since the last call."""
        if self._rows:
            self._close(self._rows)
            self._rows = []
        loss = sum(loss * steps for loss, steps in self._losses)
        count = sum(steps for _, steps in self._losses)
        self._losses = []
        return loss / count

    def _close(self, rows: list[np.ndarray]) -> None:
        self._write(np.mean(rows, axis=0), len(rows))

    def _write(self, means: np.ndarray, steps: int) -> None:
        loss, accuracy = map(float, means)
        self._step += steps
        self._losses.append((loss, steps))
        line = {"step": self._step, "loss": loss, "accuracy": accuracy}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
