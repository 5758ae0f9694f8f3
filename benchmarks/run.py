"""Measures Distaff beside hand-written loops and other frameworks.

    .venv/bin/python -m benchmarks.run [--quick] [--only W1,process] [--rounds 5]

The results are shown as tables and written to `benchmarks/results/<date>.json`, of which
`benchmarks/table.py` makes Markdown and `benchmarks/chart.py` a picture.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine, memory, process, report
from benchmarks.rounds import ROOT, measure
from benchmarks.systems import QUICK, SECTIONS, SYSTEMS
from benchmarks.workloads import ALL, WORKLOADS

RESULTS = ROOT / "benchmarks" / "results"

_OTHERS = ("process", "import", "memory")
_PARTS = (*WORKLOADS, *SECTIONS, *_OTHERS)
_ON_ACCELERATOR = 20.0
"""How many times as many steps a round has where a step is that much faster."""


def main(argv: Sequence[str] | None = None) -> Path:
    """Measures what the command line asks for.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        The file of the results.
    """
    args = _parse(argv)
    console = Console()
    device = machine.device()
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": {"device": device, **machine.describe(), "load_before": machine.load()},
        "versions": machine.versions(),
        "settings": {name: value for name, value in vars(args).items() if name != "output"},
        "workloads": {},
        "sections": {},
        "others": {},
    }
    on_cpu = device.startswith("cpu")
    scale = args.scale or (1.0 if on_cpu else _ON_ACCELERATOR)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            console.rule(name)
            _measure_part(name, results, args, (scale, on_cpu), Path(folder))
            results["machine"]["load_after"] = machine.load()
            # What has been measured is kept if a later part fails.
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(results, indent=1) + "\n")
    show(results, console)
    console.print(f"written: {args.output}")
    return args.output


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    names = ", ".join(_PARTS)
    parser.add_argument("--only", help=f"parts, separated by commas, of {names}")
    parser.add_argument("--systems", help="systems of the workloads, separated by commas and `;`")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each system")
    parser.add_argument("--scale", type=float, help="times the steps of a round")
    parser.add_argument("--quick", action="store_true", help="W1 and W2, beside hand-written loops")
    now = datetime.datetime.now().strftime("%Y-%m-%d_%H%M%S")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{now}.json")
    args = parser.parse_args(argv)
    args.only = args.only.split(",") if args.only else ["W1", "W2"] if args.quick else list(_PARTS)
    unknown = sorted(set(args.only) - set(_PARTS))
    args.systems = (
        args.systems.split(";") if args.systems else list(QUICK if args.quick else SYSTEMS)
    )
    unknown += sorted(set(args.systems) - set(SYSTEMS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; parts are {names}")
    return args


def _measure_part(
    name: str,
    results: dict[str, Any],
    args: argparse.Namespace,
    conditions: tuple[float, bool],
    folder: Path,
) -> None:
    if name == "process":
        results["others"][name] = process.whole_process(args.rounds)
    elif name == "import":
        results["others"][name] = process.imports(args.rounds)
    elif name == "memory":
        results["others"][name] = memory.growth(folder / name)
    elif name in SECTIONS:
        section = SECTIONS[name]
        workload = ALL[section.workload]
        measured = measure(workload, list(section.systems), args.rounds, folder / name)
        report.summarise(measured, workload.steps, section.reference)
        results["sections"][name] = {"steps": workload.steps, **measured}
    else:
        scale, on_cpu = conditions
        workload = WORKLOADS[name].scaled(scale)
        systems = [s for s in args.systems if _runs(s, name, on_cpu)]
        measured = measure(workload, systems, args.rounds, folder)
        measured["steps"] = workload.steps
        report.summarise(measured, workload.steps)
        measured["loss_differences"] = report.loss_differences(measured)
        results["workloads"][name] = measured


def _runs(name: str, workload: str, on_cpu: bool) -> bool:
    """Returns whether a system runs on a workload here."""
    system = SYSTEMS[name]
    if system.workloads and workload not in system.workloads:
        return False
    if not on_cpu:
        return not system.tuned
    return WORKLOADS[workload].rolls_on_cpu or not system.rolled


def show(results: dict[str, Any], console: Console) -> None:
    """Prints the tables, and which systems were skipped or compute something else."""
    for title, columns, rows in report.tables(results):
        table = Table(title=title, title_justify="left")
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number else "left", no_wrap=not number)
        for row in rows:
            table.add_row(*row, style="bold" if row[0].startswith("distaff") else None)
        console.print(table)
    for part in (*results["workloads"].items(), *results["sections"].items()):
        for system, reason in part[1]["skipped"].items():
            console.print(f"{part[0]}: {system} was skipped: {reason}", markup=False)
        for system, difference in part[1].get("loss_differences", {}).items():
            if difference > 1e-3:
                console.print(f"{part[0]}: the loss of {system} differs by {difference:.2%}")


if __name__ == "__main__":
    main(sys.argv[1:])
