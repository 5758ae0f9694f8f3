"""What options cost: the time of a step with an option, over that without, in one process.

    .venv/bin/python -m benchmarks.options [--blocks 60] [--steps 640] [--workload W1]

Each system has a thread, and trains a block of steps when it is its turn: A B C A B C ... A ratio
is taken within a round of turns, so that a slow second affects both sides; the table has the median
of the ratios, and their quartiles. On a busy machine, trust the ratio of processor times, and that
of the fastest blocks. The last losses of all systems are printed: they should be equal.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe
from benchmarks.systems import by_hand, distaff_system
from benchmarks.worker import Turnwise
from benchmarks.workloads import WORKLOADS

BASE = "distaff"
OPTIONS: dict[str, dict[str, Any]] = {
    BASE: {},
    "ema=0.999": {"ema": 0.999},
    "log_norms=True": {"log_norms": True},
    "both": {"ema": 0.999, "log_norms": True},
}
WARM_UP = 2


class Turns(Turnwise):
    """The side of a system: `benchmarks.worker.Rounds`, by events instead of pipes."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.processor: list[float] = []
        self.losses: list[float] = []
        self._mine, self._over = threading.Event(), threading.Event()
        self._is_last, self._start, self._processor_start = False, 0.0, 0.0
        self.error: BaseException | None = None

    def asked(self) -> bool:
        """Waits for the next turn, and starts the clock; False after the last one."""
        self._over.set()
        self._mine.wait()
        self._mine.clear()
        self.start()
        return not self._is_last

    def start(self) -> None:
        """Starts the clock again: what came before was preparation."""
        self._start, self._processor_start = time.perf_counter(), time.process_time()

    def done(self, loss: float, **facts: Any) -> None:
        """Stops the clock."""
        self.seconds.append(time.perf_counter() - self._start)
        self.processor.append(time.process_time() - self._processor_start)
        self.losses.append(loss)

    def note(self, **facts: Any) -> None:
        """Ignores further figures."""

    def run(self, system: Callable[..., None]) -> None:
        """Runs a system in this thread, to its end."""
        try:
            system(self)
        except BaseException as error:
            self.error = error
        self._over.set()

    def give(self, *, is_last: bool = False) -> None:
        """Gives a turn to the system, and waits until it is over.

        Raises:
            RuntimeError: the system failed.
        """
        self._over.wait()
        self._over.clear()
        self._is_last = is_last
        self._mine.set()
        self._over.wait()
        if self.error is not None:
            raise RuntimeError("A system failed.") from self.error


def measure(name: str, num_steps: int, num_blocks: int) -> dict[str, Turns]:
    """Returns the seconds and losses of each system, block by block."""
    workload = dataclasses.replace(WORKLOADS[name], steps=num_steps)
    with tempfile.TemporaryDirectory() as root:
        systems: dict[str, Callable[..., None]] = {
            "hand loop": partial(by_hand.loop, workload, folder=Path(root, "loop")),
            "hand scan": partial(by_hand.scan, workload, folder=Path(root, "scan"), unroll=False),
        }
        for option, values in OPTIONS.items():
            options = {"enable_progress_bar": False, "tune_process": False, **values}
            folder = Path(root, option)
            systems[option] = partial(distaff_system.run, workload, folder=folder, **options)
        turns = {system: Turns() for system in systems}
        for folder in ("loop", "scan"):
            Path(root, folder).mkdir()
        for system, run in systems.items():
            each = partial(_called, run)
            threading.Thread(target=turns[system].run, args=(each,), daemon=True).start()
        for _ in range(num_blocks + WARM_UP):
            for each in turns.values():
                each.give()
        for each in turns.values():
            with contextlib.suppress(RuntimeError):
                each.give(is_last=True)
    return turns


def _called(run: Callable[..., None], turns: Turns) -> None:
    run(rounds=turns)


def table(turns: dict[str, Turns], num_steps: int) -> str:
    """Returns the table of medians and ratios."""
    seconds, processor = (
        {name: np.array(getattr(each, field)[WARM_UP:]) for name, each in turns.items()}
        for field in ("seconds", "processor")
    )
    lines = [
        "| system | us per step | x distaff (quartiles) | fastest | processor | x hand scan |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, own in seconds.items():
        low, middle, high = np.percentile(own / seconds[BASE], (25, 50, 75))
        fastest = own.min() / seconds[BASE].min()
        busy = np.median(processor[name] / processor[BASE])
        scan = np.median(own / seconds["hand scan"])
        ratios = f"{middle:.2f} ({low:.2f}-{high:.2f}) | {fastest:.2f} | {busy:.2f} | {scan:.2f}"
        lines.append(f"| {name} | {np.median(own) / num_steps * 1e6:.1f} | {ratios} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", default="W1", choices=sorted(WORKLOADS))
    parser.add_argument("--blocks", type=int, default=60)
    parser.add_argument("--steps", type=int, default=640, help="steps of a block")
    arguments = parser.parse_args()
    turns = measure(arguments.workload, arguments.steps, arguments.blocks)
    print(describe())
    print(table(turns, arguments.steps))
    final = {name: each.losses[-1] for name, each in turns.items()}
    print("last losses: ", ", ".join(f"{name} {loss:.6f}" for name, loss in final.items()))


if __name__ == "__main__":
    main()
