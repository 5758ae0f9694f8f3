"""The coordinator's side: workers that stay alive, and rounds in turn."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.systems import find
from benchmarks.workloads import Workload

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".venv-peers" / "bin" / "python"

_TOO_SLOW = 6.0
"""A system that takes this many times as long as the fastest one gets one round only."""

_MAX_WARM_UPS = 6

_PER_ROUND = ("epoch_end_seconds", "write_seconds", "rss_mb")


class WorkerError(Exception):
    """A worker has died; the message ends with what it printed last."""


def python_of(environment: str) -> str | None:
    """Returns the interpreter of an environment; None if it has not been made."""
    if environment == "core":
        return sys.executable
    return str(PEERS) if PEERS.exists() else None


def environment_of_a_user() -> dict[str, str]:
    """Returns the environment of workers: this one, with a terminal, and this checkout."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "TERM": "xterm-256color", "COLUMNS": "100"}


class Worker:
    """A process that trains one system, shown a terminal, whose screen nobody looks at.

    Args:
        system: its name.
        workload: what it trains.
        folder: for the files it writes.
    """

    def __init__(self, system: str, workload: Workload, folder: Path) -> None:
        self.system = system
        request = {
            "system": system,
            "workload": workload.name,
            "steps": workload.steps,
            "folder": str(folder),
        }
        folder.mkdir(parents=True)
        screen, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        python = python_of(find(system).environment)
        assert python is not None
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.worker", json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=terminal,
            cwd=folder,
            env=environment_of_a_user(),
            text=True,
        )
        os.close(terminal)
        self._shown: deque[bytes] = deque(maxlen=40)
        self._screen = threading.Thread(target=self._watch, args=(screen,), daemon=True)
        self._screen.start()

    def _watch(self, screen: int) -> None:
        try:
            while data := os.read(screen, 4096):
                self._shown.append(data)
        except OSError:  # the other end is closed
            pass
        os.close(screen)

    def ask(self) -> None:
        """Asks for a round."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("round\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None

    def answer(self) -> dict[str, Any]:
        """Waits for the answer.

        Raises:
            WorkerError: there is none.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._died()
        return json.loads(line)

    def round(self) -> dict[str, Any]:
        """Has a round trained, and returns its figures."""
        self.ask()
        return self.answer()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._screen.join(timeout=5)

    def _died(self) -> WorkerError:
        self._process.wait()
        self._screen.join(timeout=5)
        shown = b"".join(self._shown).decode(errors="replace")
        return WorkerError(f"{self.system} has ended with {self._process.returncode}:\n{shown}")


def measure(
    workload: Workload,
    systems: Sequence[str],
    rounds: int,
    folder: Path,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measures systems side by side: A B C A B C ..., one process each.

    Args:
        workload: what they train.
        systems: their names; one whose environment is missing is skipped.
        rounds: how many of each, after the warm-up.
        folder: for the files they write.
        say: told what happens.

    Returns:
        `systems`, by name `seconds` of each round, `warmup_seconds`, `losses` of every round from
        the first warm-up on, `peak_mb` and what else a worker reports; `skipped`, by name why.
    """
    measured: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    workers: dict[str, Worker] = {}
    try:
        for name in systems:
            reason = _start(name, workload, folder, workers, measured)
            if reason:
                skipped[name] = reason
                say(f"  {name}: skipped, {reason.splitlines()[0]}")
            else:
                warm_up = 1e3 * measured[name]["warmup_seconds"][-1] / workload.steps
                say(f"  {name}: warm, {warm_up:.3g} ms per step")
        fastest = min((m["warmup_seconds"][-1] for m in measured.values()), default=0.0)
        for number in range(rounds):
            for name, worker in workers.items():
                slow = measured[name]["warmup_seconds"][-1] > _TOO_SLOW * fastest
                if name in skipped or (slow and number and not _is_short(measured[name])):
                    continue
                try:
                    _take(measured[name], "seconds", worker.round())
                except WorkerError as error:
                    skipped[name] = str(error)
            say(f"  round {number + 1} of {rounds}")
    finally:
        for worker in workers.values():
            worker.close()
    return {
        "systems": {n: m for n, m in measured.items() if n not in skipped},
        "skipped": skipped,
    }


def _is_short(measured: dict[str, Any]) -> bool:
    return measured["warmup_seconds"][-1] < 5.0


def _start(
    name: str,
    workload: Workload,
    folder: Path,
    workers: dict[str, Worker],
    measured: dict[str, dict[str, Any]],
) -> str:
    """Starts a worker and warms it up; returns the reason where it must be skipped."""
    if python_of(find(name).environment) is None:
        return "its environment is missing; make bench-peers makes it"
    place = folder / workload.name / name.replace(" ", "_").replace(",", "").replace("=", "")
    worker = Worker(name, workload, place)
    try:
        hello = worker.answer()
        if hello.get("allocator", "tuned") != "tuned":
            worker.close()
            return f"the allocator is {hello['allocator']}"
        entry: dict[str, Any] = {"seconds": [], "warmup_seconds": [], "losses": []}
        for _ in range(_MAX_WARM_UPS):
            reply = worker.round()
            _take(entry, "warmup_seconds", reply)
            if reply.get("settled", True) and len(entry["warmup_seconds"]) > 1:
                break
    except WorkerError as error:
        worker.close()
        return str(error)
    workers[name], measured[name] = worker, entry
    return ""


def _take(entry: dict[str, Any], kind: str, reply: dict[str, Any]) -> None:
    entry[kind].append(reply["seconds"])
    entry["losses"].append(reply["loss"])
    for key, value in reply.items():
        if key in _PER_ROUND:
            entry.setdefault(key, []).append(value)
        elif key not in ("seconds", "loss", "settled"):
            entry[key] = value
