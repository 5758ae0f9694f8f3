"""One process of `distaff launch`: joins the others, and runs the recipe or the script."""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1
"""Of prctl(2): the signal that this process gets if its parent dies."""


def main(words: Sequence[str]) -> int:
    """Runs a process of a job; returns its exit status.

    Args:
        words: the process id of the launcher, the target, and the arguments of the target.
    """
    parent, target, *rest = words
    _end_with(int(parent))
    if target.endswith(".py"):
        return _run_script(Path(target), rest)
    import distaff.cli
    from distaff.distributed import initialize

    sys.argv[:] = ["distaff", "fit", target, *rest]  # what the run records as its command
    initialize()
    return distaff.cli.main(sys.argv[1:])


def _run_script(path: Path, arguments: Sequence[str]) -> int:
    """Runs a script as `python` does; one that fails by `sys.exit` does not wait for the others."""
    sys.argv[:] = [str(path), *arguments]
    sys.path.insert(0, str(path.resolve().parent))
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        if end.code and "jax" in sys.modules:
            from distaff.distributed.failure import leave

            if not isinstance(end.code, int):
                print(end.code, file=sys.stderr)
            leave(end.code if isinstance(end.code, int) else 1)
        raise
    except BaseException as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename != str(path):
            trace = trace.tb_next  # without the frames that lead to the script
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _end_with(parent: int) -> None:
    """Makes the system send SIGTERM if the launcher is killed; Linux only."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
