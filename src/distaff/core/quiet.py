"""Keeps other libraries from changing the program's logging while Distaff uses them."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Generator

_LIBRARIES = ("orbax", "grain", "etils", "tensorstore")


class _Configured(list):
    """The handlers of the root logger, true also if there are none.

    absl calls `logging.basicConfig` wherever that list is false, and would add a handler. The
    program's own `logging.basicConfig` asks for the length, so it works as ever.
    """

    def __bool__(self) -> bool:
        return True


class _Warnings(logging.Filter):
    """Lets only warnings of some libraries through."""

    def filter(self, record: logging.LogRecord) -> bool:
        path = record.pathname.replace("\\", "/")
        is_theirs = any(f"/{name}/" in path for name in _LIBRARIES)
        return record.levelno >= logging.WARNING or not is_theirs


class _SteadyLogger(logging.Logger):
    """A logger whose handlers end no run where their stream, such as standard error, is closed.

    `logging` itself swallows their errors, unless it cannot write these to standard error either.
    """

    def callHandlers(self, record: logging.LogRecord) -> None:  # noqa: N802 the name in logging
        """Hands a record to each handler."""
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
    """Runs code of Orbax or Grain without a trace in the program's logging.

    They log by absl, whose first line adds a handler to the root logger, and tens of lines per
    checkpoint at level INFO. Their warnings get through. All is as before after the block.
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
