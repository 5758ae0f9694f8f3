"""Keeps other libraries from changing the program's logging."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Generator

_LIBRARIES = ("orbax", "grain", "etils", "tensorstore")


class _Configured(list):
    """The handlers of the root logger; true even if empty.

    absl would call `logging.basicConfig`, and add a handler, if the list were false. The program's
    own `logging.basicConfig` checks the length, and works as usual.
    """

    def __bool__(self) -> bool:
        return True


class _Warnings(logging.Filter):
    """Drops log records of some libraries below the level WARNING."""

    def filter(self, record: logging.LogRecord) -> bool:
        path = record.pathname.replace("\\", "/")
        is_theirs = any(f"/{name}/" in path for name in _LIBRARIES)
        return record.levelno >= logging.WARNING or not is_theirs


class _SteadyLogger(logging.Logger):
    """A logger that ignores errors of handlers whose stream, such as standard error, is closed.

    `logging` itself ignores them only while it can report them on standard error.
    """

    def callHandlers(self, record: logging.LogRecord) -> None:  # noqa: N802 the name in logging
        with contextlib.suppress(OSError, ValueError):
            super().callHandlers(record)


_own = logging.getLogger("distaff")
if type(_own) is logging.Logger:
    _own.__class__ = _SteadyLogger

_lock = threading.Lock()
_filter = _Warnings()
_depth = 0
_handlers: list[logging.Handler] = []


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Runs code of Orbax or Grain without affecting the program's logging.

    They log through absl, which adds a handler to the root logger, and log many lines per
    checkpoint at level INFO. Their warnings are still shown. The block restores the handlers.
    """
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _depth, _handlers
    with _lock:
        _depth += 1
        if _depth == 1:
            _handlers = logging.root.handlers
            logging.root.handlers = _Configured(_handlers)
            logging.getLogger("absl").addFilter(_filter)


def _leave() -> None:
    global _depth
    with _lock:
        _depth -= 1
        if _depth == 0:
            logging.getLogger("absl").removeFilter(_filter)
            if isinstance(logging.root.handlers, _Configured):  # else the program replaced it
                _handlers[:] = logging.root.handlers
                logging.root.handlers = _handlers
