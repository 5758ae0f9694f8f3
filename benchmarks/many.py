"""Several seeds of one MLP: the whole time in one program, run by run, by hand, and in peers.

    .venv/bin/python -m benchmarks.many [--seeds 16] [--epochs 20] [--rounds 3] [--only population]

Each system trains all seeds in one process; see `benchmarks/scripts/seeds.py`. Processes take
turns, so that a slow minute affects all. `by_hand` compiles its programs for each seed, and
`by_hand_once` once for all. No cache of compiled programs is kept between them. Keras
and Lightning need `make bench-peers`.
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
SCRIPT = Path(__file__).parent / "scripts" / "seeds.py"


def measure(systems: list[str], num_seeds: int, num_epochs: int, num_rounds: int) -> dict[str, Any]:
    """Returns the seconds of each round, and the accuracies, by system."""
    found: dict[str, Any] = {name: {"seconds": []} for name in systems}
    for _ in range(num_rounds):
        for name in systems:
            once = run(name, num_seeds, num_epochs)
            found[name]["seconds"].append(once["seconds"])
            found[name]["accuracies"] = once["accuracies"]
    return found


def run(system: str, num_seeds: int, num_epochs: int) -> dict[str, Any]:
    """Runs one system in a process of its own."""
    python = python_of(ENVIRONMENTS[system])
    assert python is not None
    env = environment_of_a_user()
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    with tempfile.TemporaryDirectory() as folder:
        env["XDG_CACHE_HOME"] = str(Path(folder, "cache"))
        command = [python, str(SCRIPT), system, str(num_seeds), str(num_epochs), folder]
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
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(ENVIRONMENTS), help="systems, by commas")
    args = parser.parse_args()
    systems = [name for name in args.only.split(",") if python_of(ENVIRONMENTS[name]) is not None]
    print(table(measure(systems, args.seeds, args.epochs, args.rounds)))


if __name__ == "__main__":
    main()
