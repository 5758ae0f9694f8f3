"""Follows a run that another process trains, by its files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distaff.core.config import strict_json
from distaff.report.summary import read_mapping, start_times
from distaff.run.directory.run_directory import STATUSES, RunDirectory
from distaff.run.directory.run_lock import is_running

ENDED = tuple(status for status in STATUSES if status != "running")
"""Statuses of runs that have ended."""

_LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ) ([A-Z]+) [\w.]+: (.*)")
_BEGINNING = re.compile(r"run (/|[A-Za-z]:)")
_EPOCH = re.compile(r"epoch (\d+)(?:/\d+)? step (\d+) ")
_UNSHOWN = re.compile(rf"step fusion: |({'|'.join(STATUSES)}) at step \d")
"""Lines of `log.txt` that the display of a run does not show."""


class Event(NamedTuple):
    """What a run wrote: a row of its metrics, or a line of its log.

    Attributes:
        row: the row as `metrics.jsonl` has it; None for a line of the log.
        text: the line of the log without its time; empty for a row.
    """

    row: Mapping[str, Any] | None = None
    text: str = ""

    @property
    def is_epoch(self) -> bool:
        """Whether it is the row of an epoch or a validation."""
        return any(name.startswith(("train/", "val")) for name in self.row or ())


class Lines:
    """The complete lines that another process appends to a file, which it may also cut."""

    def __init__(self, path: Path) -> None:
        self._path, self._end, self._last = path, 0, b""

    def read(self) -> tuple[list[bytes], bool]:
        """Returns the new lines; all lines, and True, if the file was cut or replaced."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._end - len(self._last))
                was_cut = file.read(len(self._last)) != self._last
                if was_cut:
                    self._end = 0
                    file.seek(0)
                text = file.read()
        except FileNotFoundError:
            return [], False
        lines = text[: text.rfind(b"\n") + 1].splitlines(keepends=True)
        self._end += sum(map(len, lines))
        self._last = lines[-1] if lines else b"" if was_cut else self._last
        return lines, was_cut


class Follower:
    """Reads what a run adds to its files; it writes nothing.

    Args:
        path: the run directory.

    Raises:
        RunDirectoryError: there is no such directory.
    """

    def __init__(self, path: Path) -> None:
        self._run = RunDirectory.open(path)
        self.path = self._run.path
        self._metrics = Lines(self.path / "metrics.jsonl")
        self._log = Lines(self.path / "log.txt")
        self._latest, self._has_begun = 0.0, False

    def config(self) -> Mapping[str, Any]:
        """Returns `config.json`; empty if it is missing or damaged."""
        return read_mapping(self._run, "config.json")

    def status(self) -> Mapping[str, Any]:
        """Returns `status.json`; empty if it is missing or damaged."""
        return read_mapping(self._run, "status.json")

    def starts(self) -> list[float]:
        """Returns when the run was started and resumed, in Unix time."""
        return start_times(self.path)

    def is_gone(self) -> bool:
        """Whether the process of a run that has not ended is known to be dead."""
        is_dead = is_running(self.path) is False
        return is_dead and self.status().get("status") not in ENDED  # it may just have ended

    def events(self) -> list[Event]:
        """Returns what is new, in order. Rows are not repeated when a resume has cut some.

        Raises:
            OSError: a file cannot be read.
        """
        return list(_merged(self._texts(), list(self._rows())))

    def _rows(self) -> Iterator[Event]:
        lines, was_cut = self._metrics.read()
        shown_until = self._latest
        for line in lines:
            row = _row(line)
            if row is None:
                yield Event(text="A row of metrics.jsonl is damaged, and skipped.")
            elif not was_cut or row["time"] > shown_until:
                self._latest = max(self._latest, row["time"])
                yield Event(row)

    def _texts(self) -> list[str]:
        """Returns the new lines of the log, at first without earlier starts."""
        lines, _ = self._log.read()
        texts = [_without_time(line.decode("utf-8", errors="replace")) for line in lines]
        begins = [i for i, text in enumerate(texts) if _BEGINNING.match(text)]
        if not self._has_begun and begins:
            texts = texts[begins[-1] :]
        self._has_begun = self._has_begun or bool(begins)
        return [text for text in texts if not (_BEGINNING.match(text) or _UNSHOWN.match(text))]


def _merged(texts: Iterable[str], rows: Sequence[Event]) -> Iterator[Event]:
    """Yields the rows of an epoch where the log has a line about it."""
    ends = {_place(each): i + 1 for i, each in enumerate(rows) if each.is_epoch}
    done = 0
    for text in texts:
        found = _EPOCH.match(text)
        if found is None:
            yield Event(text=text)
            continue
        end = ends.get((int(found[1]), int(found[2])), 0)
        yield from rows[done:end]
        done = max(done, end)
    yield from rows[done:]


def _place(event: Event) -> tuple[int, int] | None:
    row = event.row
    return None if row is None else (row["epoch"], row["step"])


def _row(line: bytes) -> dict[str, Any] | None:
    """Returns a row with its step, epoch and time, and metrics by printable names."""
    try:
        row = strict_json.loads(line)
        step, epoch, time = int(row["step"]), int(row["epoch"]), float(row["time"])
    except (ValueError, TypeError, LookupError):
        return None
    metrics = {printable(name): value for name, value in row.items()}
    return {**metrics, "step": step, "epoch": epoch, "time": time}


def _without_time(line: str) -> str:
    found = _LINE.fullmatch(line.rstrip("\n"))
    if found is None:
        return printable(line.rstrip("\n"))
    level = "" if found[2] == "INFO" else f"{found[2].lower()}: "
    return printable(f"{level}{found[3]}")


def printable(text: str) -> str:
    """Returns a text with control characters as escapes, so that none reaches the terminal."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
