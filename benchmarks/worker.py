"""One system in a process of its own: it trains a round whenever the coordinator asks for one.

    python -m benchmarks.worker '{"system": "hand loop", "workload": "W1", "steps": 640, ...}'

The coordinator writes a line for each round it wants, and closes the pipe at the end; the answers
are JSON lines. A worker that waits is blocked in a read and uses no processor. What a system shows
on the terminal goes to standard error, which the coordinator makes a terminal.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from benchmarks.systems import find
from benchmarks.workloads import ALL


def memory(field: str) -> float:
    """Returns a figure of `/proc/self/status` in MB, such as `VmHWM`; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    sizes = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(sizes[0]) / 1024 if sizes else 0.0


class Turnwise(ABC):
    """The rounds of a system, as epochs: it trains one whenever it is asked for it."""

    @abstractmethod
    def asked(self) -> bool:
        """Waits for the next round; False if no more are wanted."""

    def __iter__(self) -> Iterator[int]:
        epoch = 0
        while self.asked():
            yield epoch
            epoch += 1


class Rounds(Turnwise):
    """A worker's side of the conversation.

    Args:
        commands: a line for each round that is wanted.
        replies: where the answers go.
    """

    def __init__(self, commands: TextIO, replies: TextIO) -> None:
        self._commands, self._replies = commands, replies
        self._reply: dict[str, Any] | None = None
        self._start = 0.0

    def asked(self) -> bool:
        """Answers with the last round, waits for the next command, and starts the clock.

        Returns:
            False when no more rounds are wanted.
        """
        if self._reply is not None:
            self.send(peak_mb=memory("VmHWM"), rss_mb=memory("VmRSS"), **self._reply)
            self._reply = None
        if not self._commands.readline():
            return False
        self.start()
        return True

    def start(self) -> None:
        """Starts the clock again: what came before it was preparation."""
        self._start = time.perf_counter()

    def done(self, loss: float, **facts: Any) -> None:
        """Stops the clock. The device has finished.

        Args:
            loss: mean over the steps of the round.
            **facts: further figures of the round.
        """
        seconds = time.perf_counter() - self._start
        self._reply = {"seconds": seconds, "loss": float(loss), **facts}

    def note(self, **facts: Any) -> None:
        """Adds figures to the round that is done."""
        assert self._reply is not None
        self._reply.update(facts)

    def send(self, **reply: Any) -> None:
        """Sends a line."""
        self._replies.write(json.dumps(reply) + "\n")
        self._replies.flush()


def main() -> None:
    """Runs the system that the only argument names."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.loads(sys.argv[1])
    workload = dataclasses.replace(ALL[request["workload"]], steps=request["steps"])
    system = find(request["system"])
    facts = {}
    if system.tuned:
        from benchmarks.models import without_distaff

        without_distaff()
        facts["allocator"] = importlib.import_module("distaff.execution.allocator").tune()
    run = getattr(importlib.import_module(f"benchmarks.systems.{system.module}"), system.function)
    rounds = Rounds(sys.stdin, replies)
    rounds.send(ready=True, **facts)
    run(workload, rounds, Path(request["folder"]), **system.options)


if __name__ == "__main__":
    main()
