"""Writes the lines of the logger `distaff` to `log.txt` in the run directory."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Generator
from pathlib import Path

from distaff.core.files import FILE_MODE
from distaff.run.directory.run_directory import explained

_LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _File(logging.FileHandler):
    """A log file on a disk that may be full: lines that cannot be written are lost."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 the name in logging
        """Does nothing. The standard handler would print a traceback to standard error."""


class _Relay(logging.Handler):
    """Passes records to the handlers of parent loggers, at the program's own log level.

    During a run the level of the logger `distaff` is lowered so that `log.txt` gets every line.
    """

    def __init__(self, level: int) -> None:
        super().__init__()
        self._level = level  # of the logger, before it was lowered

    def emit(self, record: logging.LogRecord) -> None:
        """Passes a record to the handlers of parent loggers, if there are any."""
        parent = _logger.parent
        if parent is None or not parent.hasHandlers():
            return
        if record.levelno >= (self._level or parent.getEffectiveLevel()):
            with contextlib.suppress(Exception):  # such as a closed standard error
                parent.callHandlers(record)


@contextlib.contextmanager
def open_log(directory: Path) -> Generator[logging.Logger]:
    """Appends the lines of the logger `distaff`, from level INFO, to `log.txt` while in the block.

    The program's own handlers get the same lines as without a run.

    Yields:
        The logger.

    Raises:
        RunDirectoryError: `log.txt` cannot be written.
    """
    target = directory / "log.txt"
    with explained(target):
        target.touch(FILE_MODE)
        file = _File(target, encoding="utf-8", errors="backslashreplace")
    formatter = logging.Formatter(_LINE, datefmt="%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    file.setFormatter(formatter)
    with _lowered():
        _logger.addHandler(file)
        try:
            yield _logger
        finally:
            _logger.removeHandler(file)
            file.close()


@contextlib.contextmanager
def _lowered() -> Generator[None]:
    """Lowers the level of the logger while any run of this process has a log open."""
    with _lock:
        if not _before:
            _before.append((_logger.level, _logger.propagate, _Relay(_logger.level)))
            if _logger.propagate:
                _logger.addHandler(_before[0][2])
            _logger.setLevel(_logger.level or logging.INFO)
            _logger.propagate = False
        else:
            _before.append(_before[0])
    try:
        yield
    finally:
        with _lock:
            level, propagate, relay = _before.pop()
            if not _before:
                _logger.removeHandler(relay)
                _logger.propagate = propagate
                _logger.setLevel(level)


_logger = logging.getLogger("distaff")
_lock = threading.Lock()
_before: list[tuple[int, bool, _Relay]] = []
"""Level, propagation and relay of the logger before the first log, once per open log."""
