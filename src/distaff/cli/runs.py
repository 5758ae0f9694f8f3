"""The command `distaff runs`: lists, shows, compares, measures and removes runs."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distaff.core.paths import shown
from distaff.core.views.amounts import byte_text
from distaff.errors import ConfigError, nearest
from distaff.report.summary import Summary, find_runs, flat_config, num_bytes
from distaff.run.directory.run_lock import locked

Runs = tyro.conf.Positional[tuple[Path, ...]]
Root = Annotated[Path, tyro.conf.arg(help="Folder of all runs.")]


def list_runs(
    root: Root = Path("runs"),
    name: str = "*",
    status: str | None = None,
    sort: str | None = None,
    reverse: bool = False,
    metrics: tuple[str, ...] = (),
    as_json: bool = False,
) -> int:
    """Lists runs as a table.

    Args:
        root: folder of all runs.
        name: shell pattern for the names of runs, such as "digits*".
        status: only runs with this status, such as "finished".
        sort: metric to sort by, such as val/loss; by default runs are in the order of their start.
        reverse: sort from the largest to the smallest value.
        metrics: metrics to show; by default the metrics of the best model.
        as_json: print one JSON object per run instead.
    """
    found = [run for run in find_runs(root) if fnmatch.fnmatchcase(run.name, name)]
    found = [run for run in found if status is None or run.status == status]
    known = {metric for run in found for metric in run.metrics}
    for metric in (*metrics, *([sort] if sort else [])):
        if metric not in known:
            raise ConfigError(f"No run has the metric {metric!r}. {nearest(metric, known)}")
    if sort:
        missing = [run for run in found if sort not in run.metrics]
        have = [run for run in found if sort in run.metrics]
        found = sorted(have, key=lambda run: run.metrics[sort], reverse=reverse) + missing
    elif reverse:
        found.reverse()
    if as_json:
        for run in found:
            print(json.dumps({**dataclasses.asdict(run), "path": str(run.path)}))
        return 0
    columns = metrics or tuple(dict.fromkeys(m for run in found for m in run.best))
    columns = tuple(dict.fromkeys((*([sort] if sort else []), *columns)))
    rows = [
        (*run.cells(), *(_number(run.metrics.get(metric)) for metric in columns)) for run in found
    ]
    _print_table(("run", "status", "epoch", "step", "started", "time", *columns), rows)
    print(f"{len(found)} {'run' if len(found) == 1 else 'runs'} in {shown(root)}")
    return 0


def show(run: tyro.conf.Positional[Path]) -> int:
    """Shows one run: its status, metrics, options and files.

    Args:
        run: path of the run, such as runs/digits/0001.
    """
    summary = Summary.read(run)
    facts = {
        "status": f"{summary.status} ({summary.reason})" if summary.reason else summary.status,
        "started": summary.started,
        "time": summary.time,
        "progress": f"epoch {summary.epoch}, step {summary.step}",
        "size": byte_text(num_bytes(summary.path)),
        "command": summary.command,
    }
    _print_table(("", shown(summary.path)), list(facts.items()))
    print()
    best = summary.best
    rows = [(m, _number(value), _number(best.get(m))) for m, value in summary.metrics.items()]
    _print_table(("metric", "last", "best"), rows)
    print()
    options = flat_config(summary.path)
    _print_table(("option", "value"), [(key, str(value)) for key, value in options.items()])
    return 0


def diff(first: tyro.conf.Positional[Path], second: tyro.conf.Positional[Path]) -> int:
    """Shows the options and metrics in which two runs differ.

    Args:
        first: path of a run.
        second: path of another run.
    """
    pair = Summary.read(first), Summary.read(second)
    options = [flat_config(summary.path) for summary in pair]
    heads = [shown(summary.path) for summary in pair]
    _print_table(("option", *heads), _differences(options[0], options[1]))
    print()
    _print_table(("metric", *heads), _differences(pair[0].metrics, pair[1].metrics))
    return 0


def du(root: Root = Path("runs")) -> int:
    """Shows the space that each run takes, the largest first.

    Args:
        root: folder of all runs.
    """
    sizes = [
        (run, num_bytes(run.path), num_bytes(run.path / "checkpoints")) for run in find_runs(root)
    ]
    sizes.sort(key=lambda each: -each[1])
    rows = [(shown(run.path), byte_text(whole), byte_text(part)) for run, whole, part in sizes]
    whole, part = (byte_text(sum(each[i] for each in sizes)) for i in (1, 2))
    rows.append(("all", whole, part))
    _print_table(("run", "size", "checkpoints"), rows)
    return 0


def remove(runs: Runs, yes: bool = False) -> int:
    """Removes runs with all their files, after you confirm.

    Args:
        runs: paths of the runs.
        yes: remove without asking.
    """
    if not runs:
        raise ConfigError("Name at least one run to remove, such as runs/digits/0001.")
    chosen = [Summary.read(run) for run in runs]
    for summary in chosen:
        print(f"{shown(summary.path)}  {summary.status}  {byte_text(num_bytes(summary.path))}")
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError("There is no terminal to confirm at. Pass --yes to remove the runs.")
        if input(f"Remove {len(chosen)} with all files? [y/N] ").strip().lower() not in (
            "y",
            "yes",
        ):
            print("Nothing was removed.")
            return 0
    for summary in chosen:
        with locked(summary.path):
            shutil.rmtree(summary.path)
        print(f"removed {shown(summary.path)}")
    return 0


COMMANDS = {"list": list_runs, "show": show, "diff": diff, "du": du, "rm": remove}


def main(words: Sequence[str]) -> int:
    """Runs `distaff runs` with these arguments; returns the exit status.

    Raises:
        DistaffError: there is no such command or run, or a run is in use.
    """
    if not words or words[0] in ("-h", "--help"):
        print("usage: distaff runs COMMAND [OPTIONS]\n\ncommands:")
        for name, command in COMMANDS.items():
            print(f"  {name:<6} {str(command.__doc__).splitlines()[0]}")
        print("\ndistaff runs COMMAND --help lists the options of a command.")
        return 0
    if words[0] not in COMMANDS:
        raise ConfigError(f"There is no command 'runs {words[0]}'. {nearest(words[0], COMMANDS)}")
    return tyro.cli(COMMANDS[words[0]], prog=f"distaff runs {words[0]}", args=list(words[1:]))


def _differences(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for key in dict.fromkeys((*first, *second)):
        a, b = first.get(key), second.get(key)
        if a != b:
            rows.append((key, _number(a), _number(b)))
    return rows or [("", "no difference", "")]


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table: as wide as the terminal, or as wide as it needs in a pipe."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads:
        table.add_column(Text(head), overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(width=None if sys.stdout.isatty() else 10_000, highlight=False)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))
