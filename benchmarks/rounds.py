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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.systems import find
from benchmarks.workloads import Workload

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".venv-peers" / "bin" / "python"

_TOO_SLOW, _LONG_SECONDS = 6.0, 5.0
"""A system whose round takes this many times as long as the fastest one's, and this long, gets one
round only."""

_WARM_UPS = 2

_PER_ROUND = ("epoch_end_seconds", "write_seconds", "rss_mb")


class WorkerError(Exception):
    """A worker has died; the message ends with what it printed last."""


def python_of(environment: str) -> str | None:
    """Returns the interpreter of an environment; None if it has not been made."""
    if environment == "core":
        return sys.executable
    return str(PEERS) if PEERS.exists() else None


def environment_of_a_user() -> dict[str, str]:
    """Returns the environment of workers: this one, with a terminal, and this checkout.

    What would keep Python from writing its bytecode is left out: it would have to compile every
    module at every start, Distaff's and no one else's where the others came with theirs.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "TERM": "xterm-256color", "COLUMNS": "100"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    return env


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

    def dismiss(self) -> None:
        """Asks the process to end; `close` waits for that."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    def close(self) -> None:
        """Ends the process."""
        self.dismiss()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
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
    skipped = {s: _MISSING for s in systems if python_of(find(s).environment) is None}
    wanted = [s for s in systems if s not in skipped]
    workers: dict[str, Worker] = {}
    measured: dict[str, dict[str, Any]] = {}
    try:
        _start(wanted, workload, folder, workers, skipped)
        for name, worker in workers.items():
            if name not in skipped:
                entry = _asked(name, skipped, lambda worker=worker: _warm_up(worker))
                measured.update({} if entry is None else {name: entry})
            say(f"  {name}: {_state(name, measured, skipped, workload)}")
        for number in range(rounds):
            for name in _still_measured(measured, skipped, number):
                reply = _asked(name, skipped, workers[name].round)
                if reply is not None:
                    _take(measured[name], "seconds", reply)
            say(f"  round {number + 1} of {rounds}")
    finally:
        for worker in workers.values():
            worker.dismiss()
        for worker in workers.values():
            worker.close()
    return {"systems": {n: m for n, m in measured.items() if n not in skipped}, "skipped": skipped}


_MISSING = "its environment is missing; make bench-peers makes it"


def _start(
    systems: Sequence[str],
    workload: Workload,
    folder: Path,
    workers: dict[str, Worker],
    skipped: dict[str, str],
) -> None:
    """Starts the workers, two at a time, up to the end of their imports."""
    for first in range(0, len(systems), 2):
        pair = systems[first : first + 2]
        for name in pair:
            place = "".join(letter if letter.isalnum() else "_" for letter in name)
            workers[name] = Worker(name, workload, folder / workload.name / place)
        for name in pair:
            hello = _asked(name, skipped, workers[name].answer) or {}
            if hello.get("allocator", "tuned") != "tuned":
                skipped[name] = f"the allocator is {hello['allocator']}"


def _asked(name: str, skipped: dict[str, str], ask: Callable[[], Any]) -> Any:
    """Returns what a worker answers; None, and the reason in `skipped`, if it has died."""
    try:
        return ask()
    except WorkerError as error:
        skipped[name] = str(error)
        return None


def _warm_up(worker: Worker) -> dict[str, Any]:
    entry: dict[str, Any] = {"seconds": [], "warmup_seconds": [], "losses": []}
    for _ in range(_WARM_UPS):
        _take(entry, "warmup_seconds", worker.round())
    return entry


def _state(
    name: str, measured: Mapping[str, Any], skipped: Mapping[str, str], workload: Workload
) -> str:
    if name in skipped:
        return f"skipped, {skipped[name].splitlines()[0]}"
    return f"warm, {1e3 * measured[name]['warmup_seconds'][-1] / workload.steps:.3g} ms per step"


def _still_measured(
    measured: Mapping[str, Any], skipped: Mapping[str, str], number: int
) -> list[str]:
    """Returns who takes part in a round: who is alive, and not so slow that one round is enough."""
    warm = {n: m["warmup_seconds"][-1] for n, m in measured.items() if n not in skipped}
    limit = max(_LONG_SECONDS, _TOO_SLOW * min(warm.values(), default=0.0))
    return [name for name, seconds in warm.items() if number == 0 or seconds < limit]


def _take(entry: dict[str, Any], kind: str, reply: dict[str, Any]) -> None:
    entry[kind].append(reply["seconds"])
    entry["losses"].append(reply["loss"])
    for key, value in reply.items():
        if key in _PER_ROUND:
            entry.setdefault(key, []).append(value)
        elif key not in ("seconds", "loss"):
            entry[key] = value
