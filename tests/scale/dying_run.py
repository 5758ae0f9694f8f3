"""One of two processes of a run, which `distaff launch` starts; the first start ends early."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from tests.scale.ordered_run import BATCH, ROWS, At, make

from distaff import data, distributed
from distaff.checkpoint import arrays

STEP = 21
"""Where a process ends: in an epoch, and between two checkpoints."""

EARLY = 9
"""Where a process is asked to end: the other one hears of it a few steps later."""

ENDED = Path("ended")
"""Holds the time at which a process has ended, and that it has."""


def kill() -> None:
    """Ends this process without a chance to react."""
    ENDED.write_text(repr(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    """Asks this process to end, once."""
    if not ENDED.exists():
        ENDED.write_text(repr(time.time()))
        os.kill(os.getpid(), signal.SIGTERM)


def fail() -> None:
    """Raises an error."""
    ENDED.write_text(repr(time.time()))
    raise ValueError("broken")


def nothing() -> None:
    """Does nothing."""


def nap() -> None:
    """Makes steps slow, so that some are left when both processes agree to end."""
    time.sleep(0.3)


def sleep() -> None:
    """Stays in the code of the host for longer than any test lasts."""
    time.sleep(600)


FAULTS: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
    "never": (nothing, nothing),
    "step": (nothing, kill),
    "callback": (sleep, kill),
    "loader": (sleep, kill),
    "save": (nothing, kill),
    "coordinator": (kill, nothing),
    "terminate": (nap, terminate),
    "error": (nothing, fail),
}
"""What each of the two processes does, once."""


class Examples:
    """The rows, by index. Calls a function when a number of them were read.

    Args:
        function: the function.
        number: the number.
    """

    def __init__(self, function: Callable[[], None], number: float) -> None:
        self._function, self._left = function, number

    def __len__(self) -> int:
        return len(ROWS["id"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        self._left -= 1
        if not self._left:
            self._function()
        return {name: leaf[index] for name, leaf in ROWS.items()}


class Ends(At):
    """Calls a function after a step; writes the last step of this process to a file."""

    @contextmanager
    def _around(self, steps: range) -> Generator[None]:
        Path(f"last-{jax.process_index()}").write_text(str(steps[-1]))
        with super()._around(steps):
            yield


def in_saves(function: Callable[[], None]) -> None:
    """Calls a function in the first save of an epoch after the first, before arrays are written."""
    write = arrays.write

    def patched(path: Path, tree: Any, info: Any) -> None:
        if info["step"] >= STEP:
            function()
        write(path, tree, info)

    arrays.write = patched


def main() -> None:
    """Trains; the first time, until a process ends in the way that the argument names."""
    (where,) = sys.argv[1:]
    distributed.initialize()
    jax.config.update("jax_thread_guard", True)
    function = nothing if ENDED.exists() else FAULTS[where][jax.process_index()]
    in_loader = BATCH * STEP if where == "loader" and function is not nothing else float("inf")
    if where == "save":
        in_saves(function)
    step = EARLY if where == "terminate" else STEP
    at = Ends(step, nothing if where in ("loader", "save") else function)
    options = {"name": "dying", "save_every": "5 steps", "steps_per_call": 2, "keep_last": 100}
    loader = data.from_examples(Examples(function, in_loader), BATCH, shuffle=True)
    trainer = make("runs", at, **options)
    trainer.train_model(loader, data.ArrayLoader(ROWS, BATCH), num_epochs=6)


if __name__ == "__main__":
    main()
