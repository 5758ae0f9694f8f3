"""Metrics as lines of JSON."""

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

from distaff.core.config import strict_json
from distaff.core.typing import Values
from distaff.errors import RunDirectoryError
from distaff.loggers.disk import Location, explained, is_file, locator, open_private, replace
from distaff.loggers.protocol import JSON
from distaff.loggers.row import as_row

_log = logging.getLogger("distaff")

_BLOCK = 2**16  # bytes searched at once for the end of a line
_MAX_PENDING = 2**24


class JsonlLogger:
    """Appends one line of strict JSON to a file per call of `log_metrics`.

    A line is `{"step": 60, "epoch": 3, "time": 1767225600.0, "train/loss": 0.31}`. NaN and infinity
    are written as the strings `"nan"`, `"inf"` and `"-inf"`, which Python's `float` reads back. The
    first line creates the file and its directory; a resumed run appends. A line that cannot be
    written raises, and is retried before the next one.

    Args:
        path: the file, or a function that returns it, called when the file is opened: the directory
            of a run gets its name only once training starts.
        clock: returns the Unix time in seconds.
    """

    def __init__(self, path: Location, *, clock: Callable[[], float] = time.time) -> None:
        self._locate = locator(path)
        self._path = Path()
        self._clock = clock
        self._file: FileIO | None = None
        self._pending = b""  # lines that a full disk did not take

    def log_metrics(self, metrics: Values, *, step: int, epoch: int) -> None:
        """Writes one line; it is in the file when the call returns.

        Raises:
            MetricError: a metric is not a number, or has a reserved name: `step`, `epoch`, `time`.
            RunDirectoryError: the file cannot be written.
        """
        row = as_row(metrics, step=step, epoch=epoch, time=self._clock())
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        if self._file is None:
            self._path = Path(self._locate())
        with explained(self._path):
            self._append(line)

    def log_config(self, config: Mapping[str, JSON]) -> None:
        """Does nothing: a run directory has its own file for the configuration."""

    def close(self, status: str) -> None:
        """Closes the file; later metrics open it again."""
        file = self._file
        if file is None and not self._pending:
            return
        with explained(self._path):
            try:
                self._append(b"")
            finally:
                self._pending = b""
                self._file = None
                if file is not None:
                    file.close()

    def position(self) -> int:
        """Flushes all lines, and returns the byte offset of the next one."""
        if self._file is not None:
            if self._pending:
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
        """Drops later lines, and an incomplete last line; see `ResumingLogger`.

        A position that is not the end of a line is ignored with a warning.

        Raises:
            RunDirectoryError: lines cannot be read, or the file cannot be written; the file is
                unchanged.
        """
        self.close("interrupted")
        path = Path(self._locate())
        with explained(path):
            if is_file(path) and (position is None or not _cut_at(path, position)):
                replace(path, _lines_up_to(path, step))

    def _append(self, line: bytes) -> None:
        """Writes the pending lines and a new one."""
        if len(self._pending) < _MAX_PENDING:
            self._pending += line
        if self._file is None and self._pending:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(  # noqa: SIM115 kept open
                self._path, "a+b", buffering=0, opener=open_private
            )
            end = _end_of_lines(self._file)
            if end < self._file.seek(0, os.SEEK_END):
                self._file.truncate(end)
        if self._file is not None and self._pending:
            _append_all(self._file, self._pending)
            self._pending = b""


def _append_all(file: FileIO, content: bytes) -> None:
    """Appends all of the content or nothing."""
    view = memoryview(content)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError:
        with suppress(OSError):
            file.truncate(file.seek(0, os.SEEK_END) - (len(content) - len(view)))
        raise


def _end_of_lines(file: FileIO | BinaryIO) -> int:
    """Returns the offset after the last complete line; a killed run may leave a partial one."""
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
    """Cuts a file at the end of a line; returns False if the position is not one."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if type(position) is int and 0 <= position <= size:
            file.seek(max(0, position - 1))
            if position == 0 or file.read(1) == b"\n":
                file.truncate(position)
                os.fsync(file.fileno())
                return True
    _log.warning("%s has no line that ends at byte %r; dropping lines by step", path, position)
    return False


def _lines_up_to(path: Path, step: int) -> Iterator[bytes]:
    unreadable = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                row = strict_json.loads(line)
                known = type(row["step"]) is int
            except (ValueError, TypeError, LookupError):
                known = False
            if not known:
                unreadable.append(number)
            elif row["step"] <= step:
                yield line
    if unreadable:
        shown = ", ".join(map(str, unreadable[:10]))
        raise RunDirectoryError(
            f"Each line of metrics must be JSON with a step; {len(unreadable)} lines of "
            f"{str(path)!r} are not (the first: {shown}). The file is unchanged. "
            f"Repair or remove these lines."
        )
