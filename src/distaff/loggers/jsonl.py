"""Metrics as lines of JSON: the file every tool can read, with no dependency."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from distaff.core.config import encoding
from distaff.core.typing import Values
from distaff.errors import RunDirectoryError
from distaff.loggers.disk import Location, explained, is_file, locator, open_private, replace
from distaff.loggers.protocol import JSON
from distaff.loggers.row import as_row

_log = logging.getLogger("distaff")

_BLOCK = 2**16  # bytes that are searched at once for the end of a line
_MOST_HELD = 2**24


class JsonlLogger:
    """Appends one line of strict JSON to a file per call of `log_metrics`.

    A line that cannot be written is an error, and is written before the next one if that can be.

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
        self._file: FileIO | None = None
        self._held = b""  # what a full disk did not take

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
        file = self._file
        if file is None and not self._held:
            return
        with explained(self._path):
            try:
                self._append(b"")
            finally:
                self._held = b""
                self._file = None
                if file is not None:
                    file.close()

    def position(self) -> int:
        """Returns where the next line begins, in bytes; all before it has left the process."""
        if self._file is not None:
            with explained(self._path):
                self._append(b"")
                return self._file.seek(0, os.SEEK_END)
        path = Path(self._locate())
        with explained(path):
            if not is_file(path):
                return 0
            with path.open("rb") as file:
                return _end_of_lines(file)

    def resume(self, step: int, position: JSON = None) -> None:
        """Drops the lines after a position, or those of later steps, wherever they stand.

        A position that is no longer the end of a line is passed over, and the log says so. A last
        line without an end is dropped in any case.

        Args:
            step: lines of greater steps are dropped; not looked at where the position is right.
            position: what `position` returned.

        Raises:
            RunDirectoryError: lines cannot be read, which are named; or the file cannot be written.
                It is then as it was.
        """
        self.close("interrupted")
        path = Path(self._locate())
        with explained(path):
            if is_file(path) and (position is None or not _cut_at(path, position)):
                replace(path, _lines_up_to(path, step))

    def _write(self, line: bytes) -> None:
        if self._file is None:
            self._path = Path(self._locate())
        with explained(self._path):
            self._append(line)

    def _append(self, line: bytes) -> None:
        """Writes a line, and those before it that could not be written."""
        if len(self._held) < _MOST_HELD:
            self._held += line
        if self._file is None and self._held:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(  # noqa: SIM115 kept open
                self._path, "a+b", buffering=0, opener=open_private
            )
            end = _end_of_lines(self._file)
            if end < self._file.seek(0, os.SEEK_END):
                self._file.truncate(end)
        if self._file is not None and self._held:
            _append(self._file, self._held)
            self._held = b""


def _append(file: FileIO, content: bytes) -> None:
    """Writes at the end of a file, all of it or nothing.

    Raises:
        OSError: it cannot be written.
    """
    end, view = file.seek(0, os.SEEK_END), memoryview(content)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError:
        with suppress(OSError):
            file.truncate(end)
        raise


def _end_of_lines(file: FileIO | BinaryIO) -> int:
    """Returns where a last line without an end begins, which a killed run leaves behind."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - _BLOCK)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _cut_at(path: Path, position: JSON) -> bool:
    """Cuts a file at the end of a line; False where the position is not one."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if type(position) is int and 0 <= position <= size:
            file.seek(max(0, position - 1))
            if position == 0 or file.read(1) == b"\n":
                file.truncate(position)
                os.fsync(file.fileno())
                return True
    _log.warning("%s has no line that ends at byte %r: it is cut by step", path, position)
    return False


def _lines_up_to(path: Path, step: int) -> Iterator[bytes]:
    unreadable = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                row = encoding.loads(line)
                known = type(row["step"]) is int
            except (ValueError, TypeError, LookupError):
                known = False
            if not known:
                unreadable.append(number)
            elif row["step"] <= step:
                yield line
    if unreadable:
        shown = ", ".join(str(number) for number in unreadable[:10])
        raise RunDirectoryError(
            f"A line of metrics must be JSON with a step; of the {len(unreadable)} lines in "
            f"{str(path)!r} that are not, the first are {shown}. The file is as it was: "
            f"mend or remove them."
        )
