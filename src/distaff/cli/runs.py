"""The command `distaff runs`: lists, shows, compares, measures, tags, archives, removes runs."""

from __future__ import annotations

import dataclasses
import fnmatch
import io
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distaff.core.paths import shown
from distaff.core.views.amounts import byte_text
from distaff.errors import ConfigError, nearest
from distaff.report.summary import Summary, find_runs, flat_config, num_bytes
from distaff.report.tags import change_tags, set_archived
from distaff.run.directory.run_lock import locked

Run = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
Runs = Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN ...")]
TagNames = Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TAG ...")]
Root = Annotated[Path, tyro.conf.arg(help="Folder of all runs.")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listing:
    """Lists runs as a table.

    Args:
        root: folder of all runs.
        name: shell pattern for the names of runs, such as "digits*".
        status: only runs with this status, such as "finished".
        tag: only runs with all of these tags.
        archived: list archived runs instead of the others.
        sort: metric to sort by, such as val/loss; by default runs are in the order of their start.
        reverse: sort from the largest to the smallest value.
        metrics: metrics to show; by default the metrics of the best model.
        as_json: print one JSON object per run instead.
    """

    root: Path = Path("runs")
    name: str = "*"
    status: str | None = None
    tag: tuple[str, ...] = ()
    archived: bool = False
    sort: str | None = None
    reverse: bool = False
    metrics: tuple[str, ...] = ()
    as_json: bool = False

    def run(self) -> int:
        """Prints the list.

        Raises:
            DistaffError: there is no such folder, metric or tag.
        """
        every = list(find_runs(self.root))
        _check("tag", self.tag, {tag for run in every for tag in run.tags})
        found = self._sorted(list(filter(self._is_chosen, every)))
        if self.as_json:
            for run in found:
                print(json.dumps({**dataclasses.asdict(run), "path": str(run.path)}))
            return 0
        columns = self.metrics or tuple(dict.fromkeys(m for run in found for m in run.best))
        columns = tuple(dict.fromkeys((*([self.sort] if self.sort else []), *columns)))
        tags = ("tags",) if any(run.tags for run in found) else ()
        rows = [
            (
                *run.cells(),
                *(" ".join(run.tags) for _ in tags),
                *(_number(run.metrics.get(metric)) for metric in columns),
            )
            for run in found
        ]
        _print_list(("run", "status", "epoch", "step", "started", "time", *tags, *columns), rows)
        hidden = 0 if self.archived else sum(run.archived for run in every)
        rest = f"; {hidden} archived (--archived)" if hidden else ""
        print(f"{len(found)} {'run' if len(found) == 1 else 'runs'} in {shown(self.root)}{rest}")
        return 0

    def _is_chosen(self, run: Summary) -> bool:
        return (
            fnmatch.fnmatchcase(run.name, self.name)
            and self.status in (None, run.status)
            and set(self.tag) <= set(run.tags)
            and run.archived == self.archived
        )

    def _sorted(self, found: list[Summary]) -> list[Summary]:
        """Returns the runs in the order to print them."""
        wanted = (*self.metrics, *([self.sort] if self.sort else []))
        _check("metric", wanted, {metric for run in found for metric in run.metrics})
        if self.sort is None:
            return found[::-1] if self.reverse else found
        key = self.sort
        missing = [run for run in found if key not in run.metrics]
        have = [run for run in found if key in run.metrics]
        return sorted(have, key=lambda run: run.metrics[key], reverse=self.reverse) + missing


def _check(kind: str, wanted: Sequence[str], known: set[str]) -> None:
    for name in wanted:
        if name not in known:
            raise ConfigError(f"No run has the {kind} {name!r}. {nearest(name, known)}")


def show(run: Run) -> int:
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
        **({"tags": " ".join(summary.tags)} if summary.tags else {}),
        **({"archived": "yes"} if summary.archived else {}),
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


def diff(first: Run, second: Run) -> int:
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


def tag(
    run: Run,
    tags: TagNames,
    remove: bool = False,
) -> int:
    """Tags a run, such as with "best", to find it with `distaff runs list --tag best`.

    Args:
        run: path of the run, such as runs/digits/0001.
        tags: the tags to add.
        remove: remove these tags instead.
    """
    if not tags:
        raise ConfigError("Name at least one tag, such as best.")
    path = Summary.read(run).path
    print(f"{shown(path)}: {' '.join(change_tags(path, tags, remove=remove)) or 'no tags'}")
    return 0


def archive(runs: Runs, restore: bool = False) -> int:
    """Leaves runs out of lists and reports of folders; all their files stay where they are.

    Args:
        runs: paths of the runs.
        restore: list the runs again instead.
    """
    if not runs:
        raise ConfigError("Name at least one run, such as runs/digits/0001.")
    for path in [Summary.read(run).path for run in runs]:
        is_new = set_archived(path, not restore)
        word = "restored" if restore else "archived"
        print(f"{shown(path)}: {word if is_new else 'no change'}")
    return 0


COMMANDS = {
    "list": Listing,
    "show": show,
    "diff": diff,
    "du": du,
    "tag": tag,
    "archive": archive,
    "rm": remove,
}


def main(words: Sequence[str]) -> int:
    """Runs `distaff runs` with these arguments; returns the exit status.

    Raises:
        DistaffError: there is no such command or run, or a run is in use.
    """
    if not words or words[0] in ("-h", "--help"):
        print("usage: distaff runs COMMAND [OPTIONS]\n\ncommands:")
        for name, command in COMMANDS.items():
            print(f"  {name:<8} {str(command.__doc__).splitlines()[0]}")
        print("\ndistaff runs COMMAND --help lists the options of a command.")
        return 0
    if words[0] not in COMMANDS:
        raise ConfigError(f"There is no command 'runs {words[0]}'. {nearest(words[0], COMMANDS)}")
    made: Any = tyro.cli(COMMANDS[words[0]], prog=f"distaff runs {words[0]}", args=list(words[1:]))
    return made.run() if isinstance(made, Listing) else made


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


def _print_list(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table, or, if it is wider than the terminal, a paragraph per row."""
    columns = [[cell_len(text) for text in column] for column in zip(heads, *rows, strict=True)]
    width = shutil.get_terminal_size().columns
    if not _is_terminal() or sum(max(each) + 2 for each in columns) - 2 <= width:
        _print_table(heads, rows)
        return
    for first, *rest in rows:
        print(first)
        facts = [f"{head} {text}" for head, text in zip(heads[1:], rest, strict=True) if text]
        wrap = textwrap.TextWrapper(width, initial_indent="  ", subsequent_indent="  ")
        print(wrap.fill("  ".join(facts)))


def _is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


def _print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table: as wide as the terminal, or as wide as it needs in a pipe."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads:
        table.add_column(Text(head), overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    wide, text = _is_terminal(), io.StringIO()
    console = Console(
        file=text, width=None if wide else 10_000, force_terminal=wide, highlight=False
    )
    console.print(table)
    print("\n".join(line.rstrip() for line in text.getvalue().splitlines()))
