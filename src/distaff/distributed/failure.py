"""Ends a process of several that has failed, so that the others do not wait for it."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from types import TracebackType

import jax

from distaff.errors import ConfigError

_installed: list[object] = []


def leave_on_errors() -> None:
    """Makes an exception that nobody catches end the process at once, after its traceback.

    Otherwise the process would wait in JAX's shutdown for the others, which wait for it in a
    collective: 300 s by default. `finally` and `with` blocks run first; functions of `atexit` do
    not. Can be called again.
    """
    previous = sys.excepthook
    if previous in _installed:
        return

    def leave_after(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        previous(kind, error, traceback)
        leave(status_of(error))

    _installed.append(leave_after)
    sys.excepthook = leave_after


def status_of(error: BaseException) -> int:
    """Returns the exit status for an exception that nobody has caught: 1, 2 or 130."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, ConfigError) else 1


def leave(status: int) -> None:
    """Ends the process at once if it has failed and is one of several; else does nothing.

    Args:
        status: the exit status; 0 if it has not failed.
    """
    if status and jax.distributed.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError, ValueError):  # missing or closed
                stream.flush()
        os._exit(status)
