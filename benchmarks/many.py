"""Several seeds of one MLP: the whole time in one program, run by run, by hand, and in peers.

    .venv/bin/python -m benchmarks.many [--seeds 16] [--epochs 20] [--rounds 3] [--only population]
    .venv/bin/python -m benchmarks.many --trials 64 [--epochs 10] [--only in_batches,by_hand]

Each system trains all seeds in one process; see `benchmarks/scripts/seeds.py`. `by_hand` compiles
its programs for each seed, and `by_hand_once` once for all. With `--trials`, it tunes the MLP
instead; see `benchmarks/scripts/trials.py`. Processes take turns, so that a slow minute affects
all. No cache of compiled programs is kept between them. Keras and Lightning need
`make bench-peers`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.rounds import environment_of_a_user, python_of

ENVIRONMENTS = {
    "population": "core",
    "distaff": "core",
    "by_hand": "core",
    "by_hand_once": "core",
    "keras": "peers",
    "lightning": "peers",
}
STUDIES = dict.fromkeys(("in_batches", "one_by_one", "by_hand", "by_hand_once"), "core")


def measure(
    systems: list[str], number: int, num_epochs: int, num_rounds: int, script: str
) -> dict[str, Any]:
    """Returns the seconds of each round, of the CPU for trials, and the accuracies, by system."""
    clock = "cpu_seconds" if script == "trials" else "seconds"
    found: dict[str, Any] = {name: {"seconds": []} for name in systems}
    for _ in range(num_rounds):
        for name in systems:
            once = run(name, number, num_epochs, script)
            found[name]["seconds"].append(once[clock])
            found[name]["accuracies"] = once["accuracies"]
    return found


def run(system: str, number: int, num_epochs: int, script: str) -> dict[str, Any]:
    """Runs one system in a process of its own."""
    python = python_of({**STUDIES, **ENVIRONMENTS}[system])
    assert python is not None
    env = environment_of_a_user()
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    with tempfile.TemporaryDirectory() as folder:
        env["XDG_CACHE_HOME"] = str(Path(folder, "cache"))
        module = f"benchmarks.scripts.{script}"
        command = [python, "-m", module, system, str(number), str(num_epochs), folder]
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{system} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(found: dict[str, Any]) -> str:
    """Returns a table in Markdown; ratios are medians over the pairs of rounds."""
    base = next(iter(found.values()))["seconds"]
    first = next(iter(found))
    lines = [f"| system | median s | x {first} | mean accuracy |", "| --- | ---: | ---: | ---: |"]
    for name, each in found.items():
        seconds = each["seconds"]
        ratio = statistics.median(a / b for a, b in zip(seconds, base, strict=True))
        accuracy = statistics.mean(each["accuracies"])
        lines.append(
            f"| {name} | {statistics.median(seconds):.1f} | {ratio:.2f} | {accuracy:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--trials", type=int, help="tunes with this many trials instead")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="systems, by commas")
    args = parser.parse_args()
    known, script = (STUDIES, "trials") if args.trials else (ENVIRONMENTS, "seeds")
    names = args.only.split(",") if args.only else known
    systems = [name for name in names if python_of(known[name]) is not None]
    number = args.trials or args.seeds
    print(table(measure(systems, number, args.epochs, args.rounds, script)))


if __name__ == "__main__":
    main()
