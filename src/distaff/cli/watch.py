"""The command `distaff watch`: the live view of a run that another process trains."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from distaff.core.paths import shown
from distaff.errors import RunDirectoryError
from distaff.report.summary import is_run, newest_run

_LATEST = "latest"


def watch(
    run: tyro.conf.Positional[str] = _LATEST, root: Path = Path("runs"), wait: bool = False
) -> int:
    """Shows a run that another process trains, as its own terminal does, until it ends.

    Args:
        run: path of a run, or of a folder for its newest run; "latest" for the newest below --root.
        root: folder of all runs.
        wait: keep watching a run that failed, was interrupted or was killed, until it is resumed
            and finishes.
    """
    from distaff.report import live  # needs JAX, which the help does not load
    from distaff.report.follow import Follower, printable

    path = Path(run)
    if run == _LATEST or not is_run(path):
        path = _newest(root if run == _LATEST else path)
    clock = live.Clock()
    try:
        with contextlib.closing(_display(clock)) as display:
            display.print(f"watching {printable(shown(path.absolute()))}")
            return live.follow(live.View(Follower(path), display, clock), wait=wait)
    except KeyboardInterrupt:
        return 130


def main(words: Sequence[str]) -> int:
    """Runs `distaff watch` with these arguments; returns the exit status.

    Raises:
        DistaffError: there is no such run.
    """
    return tyro.cli(watch, prog="distaff watch", args=list(words))


def _newest(folder: Path) -> Path:
    found = newest_run(folder)
    if found is None:
        raise RunDirectoryError(
            f"There is no run below {str(folder)!r}. Pass the path of a run, such as "
            "runs/digits/0001, or the folder of all runs as --root."
        )
    return found


def _display(clock: Callable[[], float]) -> Any:
    """Returns the display of a run's own terminal, or plain lines for a pipe.

    Unlike that of a run, it raises if its reader is gone.
    """
    from distaff.run.display import PlainDisplay, TerminalDisplay

    console = Console()
    if console.is_terminal and not console.is_dumb_terminal:
        return TerminalDisplay(console, clock=clock)
    return PlainDisplay(sys.stdout, clock=clock)
