"""Whole processes: how long a first and a second run take, and what an import costs."""

from __future__ import annotations

import os
import pty
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.rounds import environment_of_a_user, python_of

_SCRIPTS = {"distaff": "core", "by_hand": "core", "keras": "peers"}
_FOLDER = Path(__file__).parent / "scripts"

_IMPORTS = """
import time
import jax, jax.numpy, flax.linen, optax, rich.console, rich.table, rich.progress
from orbax.checkpoint import v1
start = time.perf_counter()
import distaff
print(time.perf_counter() - start)
"""

_DEPENDENCIES = """
import time
start = time.perf_counter()
import jax, jax.numpy, flax.linen, optax, rich.console, rich.table, rich.progress
from orbax.checkpoint import v1
print(time.perf_counter() - start)
"""


def whole_process(rounds: int) -> dict[str, Any]:
    """Runs the scripts of digits, 20 epochs, in turn, each with an empty cache and then a full one.

    The cache is JAX's, for compiled programs, in a folder of each round's own. Distaff keeps one by
    itself; the others are given the same by the environment, and once none, as most scripts run.

    Args:
        rounds: how often; at least three.
    """
    seconds: dict[str, list[float]] = {}
    for _ in range(max(rounds, 3)):
        for script, environment in _SCRIPTS.items():
            python = python_of(environment)
            if python is None:
                continue
            with tempfile.TemporaryDirectory() as folder:
                for cache in ("cold", "warm") if script == "distaff" else ("none", "cold", "warm"):
                    taken = _run_script(python, script, Path(folder), cache != "none")
                    seconds.setdefault(f"{script.replace('_', ' ')}, cache {cache}", []).append(
                        taken
                    )
    columns = ["script", "median s", "best s", "rounds"]
    rows = [[name, statistics.median(s), min(s), len(s)] for name, s in seconds.items()]
    title = "Whole process: MLP on digits, 20 epochs, validation, best weights, test"
    return {"title": title, "columns": columns, "rows": rows, "raw": seconds}


def _run_script(python: str, script: str, folder: Path, cached: bool) -> float:
    env = environment_of_a_user()
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    env["XDG_CACHE_HOME"] = str(folder / "cache")
    if cached and script != "distaff":
        env["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache" / "jax")
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    runs = folder / f"runs_{time.monotonic_ns()}"
    screen, terminal = pty.openpty()
    watcher = threading.Thread(target=_watch, args=(screen,), daemon=True)
    watcher.start()
    start = time.perf_counter()
    subprocess.run(
        [python, str(_FOLDER / f"digits_{script}.py"), str(runs)],
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
        env=env,
        cwd=folder,
        check=True,
    )
    taken = time.perf_counter() - start
    os.close(terminal)
    watcher.join(timeout=5)
    return taken


def _watch(screen: int) -> None:
    try:
        while os.read(screen, 4096):
            pass
    except OSError:  # the other end is closed
        pass
    os.close(screen)


def imports(rounds: int) -> dict[str, Any]:
    """Measures `import distaff` after its dependencies, and these by themselves.

    Args:
        rounds: how often; at least five.
    """
    seconds: dict[str, list[float]] = {}
    for number in range(1 + max(rounds, 5)):
        for name, code in (("dependencies", _DEPENDENCIES), ("distaff, after them", _IMPORTS)):
            command = [sys.executable, "-c", code]
            env = environment_of_a_user()
            output = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
            if number:  # the first one may have written bytecode
                seconds.setdefault(name, []).append(float(output.stdout))
    rows = [[name, 1e3 * statistics.median(s), 1e3 * min(s)] for name, s in seconds.items()]
    columns = ["import", "median ms", "best ms"]
    return {"title": "Import", "columns": columns, "rows": rows, "raw": seconds}
