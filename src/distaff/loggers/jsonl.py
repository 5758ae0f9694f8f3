"""Metrics as lines of JSON: the file every tool can read, with no dependency."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from distaff.loggers.disk import Location, explained, locator
from distaff.loggers.protocol import JSON
from distaff.loggers.row import as_row
from distaff.typing import Values


class JsonlLogger:
    """Appends one line of strict JSON to a file per call of `log_metrics`.

    A line is `{"step": 60, "epoch": 3, "time": 1767225600.0, "train/loss": 0.31}`. JSON has no NaN
    and no infinity: they are written as the strings `"nan"`, `"inf"` and `"-inf"`, which Python's
    `float` reads back. The file and its directory are made by the first line, and a run that goes
    on appends. The configuration and the status have files of their own in a run directory, so that
    every line here is a row of one table.

    Args:
        path: the file, or a function that gives it, called when the file is opened: the directory
            of a run has its name only once training starts.
        clock: gives the Unix time in seconds.
    """

    def __init__(self, path: Location, *, clock: Callable[[], float] = time.time) -> None:
        self._locate = locator(path)
        self._path = Path()
        self._clock = clock
        self._file: BinaryIO | None = None

    def log_metrics(self, metrics: Values, *, step: int, epoch: int) -> None:
        """Writes one line; it is in the file when the call returns.

        Raises:
            MetricError: a metric is not a number, or has the name of a column of the logger's own.
            RunDirectoryError: the file cannot be written.
        """
        row = as_row(metrics, step=step, epoch=epoch, time=self._clock())
        self._write(json.dumps(row, allow_nan=False).encode() + b"\n")

    def log_config(self, config: Mapping[str, JSON]) -> None:
        """Does nothing: see the class."""

    def close(self, status: str) -> None:
        """Closes the file. Metrics logged afterwards open it again."""
        file, self._file = self._file, None
        if file is not None:
            with explained(self._path):
                file.close()

    def _write(self, line: bytes) -> None:
        if self._file is None:
            self._path = Path(self._locate())
        with explained(self._path):
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a+b")
                _drop_torn_line(self._file)
            self._file.write(line)
            self._file.flush()


def _drop_torn_line(file: BinaryIO) -> None:
    """Cuts off a last line without an end, which a run killed while writing leaves behind."""
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return
    file.seek(end - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
