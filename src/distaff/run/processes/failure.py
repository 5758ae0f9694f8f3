"""Ends a process with an uncaught error at once, so that other processes do not wait for it."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from types import TracebackType

_CTRL_C = 130

_installed: list[object] = []


def leave_on_errors() -> None:
    """Installs a hook for uncaught errors: it shows the traceback, and ends the process.

    Otherwise the process waits in the shutdown of `jax.distributed` for the others, which wait in a
    collective for this one, for five minutes. Errors that the program catches are not affected, and
    `finally` and `with` blocks run first; functions of `atexit` do not run.
    """
    if sys.excepthook in _installed:
        return
    shown = sys.excepthook

    def leave(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        with suppress(Exception):
            shown(kind, error, traceback)
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):  # missing or closed
                stream.flush()
        os._exit(_CTRL_C if issubclass(kind, KeyboardInterrupt) else 1)

    sys.excepthook = leave
    _installed.append(leave)
