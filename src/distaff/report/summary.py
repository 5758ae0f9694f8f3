"""Reads the summary of a run from its files."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shlex
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from distaff.core.paths import shown
from distaff.core.views.amounts import clock_time
from distaff.errors import RunDirectoryError
from distaff.report.tags import TAGS_FILE, Tags
from distaff.run.directory.run_directory import RunDirectory
from distaff.run.directory.run_lock import is_running


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """One run, as its files describe it.

    Attributes:
        path: the run's directory.
        name: name of the run, without the version.
        status: "running", "finished", "stopped", "pruned", "interrupted", "failed", or "unknown".
        reason: why it ended; empty if it finished.
        epoch: completed epochs.
        step: completed steps.
        started: local time of the first start, to the minute.
        time: time from the first start to the end; empty if it has not ended.
        metrics: the last metrics by name.
        best: metrics of the best model by name.
        command: the command line of the first start.
        tags: its tags.
        archived: whether it is archived, and does not train again.
    """

    path: Path
    name: str
    status: str
    reason: str
    epoch: int
    step: int
    started: str
    time: str
    metrics: dict[str, float]
    best: dict[str, float]
    command: str
    tags: tuple[str, ...]
    archived: bool

    @classmethod
    def read(cls, path: Path) -> Summary:
        """Reads the summary of the run at this path. A damaged status is "unknown".

        Raises:
            RunDirectoryError: there is no run.
        """
        run = RunDirectory.open(path)
        if not (run.path / "config.json").is_file():
            raise RunDirectoryError(
                f"There is no run at {str(path)!r}: it has no config.json. Check the path, such as "
                "runs/digits/0001."
            )
        status = read_mapping(run, "status.json")
        starts = read_mapping(run, "env.json").get("starts")
        argv = _dict(starts[0] if isinstance(starts, list) and starts else None).get("argv")
        options = _dict(read_mapping(run, "config.json").get("options"))
        tags = Tags.of(read_mapping(run, TAGS_FILE))
        trains_again = status.get("status") == "running" and is_running(run.path)
        return cls(
            path=run.path,
            name=str(options.get("name") or run.path.parent.name),
            status=str(status.get("status", "unknown")),
            reason=str(status.get("reason") or ""),
            epoch=_whole(status.get("epoch")),
            step=_whole(status.get("step")),
            started=_local(status.get("started")),
            time=_between(status.get("started"), status.get("ended")),
            metrics=_numbers(status.get("metrics")),
            best=_numbers(_dict(status.get("best")).get("metrics")),
            command=shlex.join(map(str, argv)) if isinstance(argv, list) else "",
            tags=tags.tags,
            archived=tags.archived and not trains_again,
        )

    def cells(self) -> tuple[str, ...]:
        """Returns the first columns of its row in a list of runs."""
        counts = f"{self.epoch:,}", f"{self.step:,}"
        return (shown(self.path), self.status, *counts, self.started, self.time)


def find_runs(root: Path) -> Iterator[Summary]:
    """Yields the runs below a folder, in the order of their start.

    Raises:
        RunDirectoryError: there is no such folder.
    """
    if not root.is_dir():
        raise RunDirectoryError(
            f"There is no folder {str(root)!r}. Run the command where your runs are, or pass "
            "--root."
        )
    found = map(Summary.read, _paths(root))
    yield from sorted(found, key=lambda run: (run.started, str(run.path)))


def newest_run(root: Path) -> Path | None:
    """Returns the run below a folder that was last written to; None without one."""
    return max(_paths(root), key=_last_change, default=None)


def is_run(path: Path) -> bool:
    """Whether this is a run directory, and not that of a population, whose members are runs."""
    return (path / "config.json").is_file() and not (path / "population.json").is_file()


def _paths(root: Path) -> Iterator[Path]:
    for folder, folders, _ in os.walk(root):
        if is_run(Path(folder)):
            folders.clear()
            yield Path(folder)
        folders[:] = sorted(each for each in folders if not each.startswith("."))


def _last_change(path: Path) -> float:
    """Returns when a run last wrote its status or its metrics, in Unix time."""
    times = [0.0]
    for name in ("status.json", "metrics.jsonl"):
        with contextlib.suppress(OSError):  # it is not there yet, or was removed
            times.append((path / name).stat().st_mtime)
    return max(times)


def flat_config(path: Path) -> dict[str, Any]:
    """Returns the options of a run by dotted name, without its identity and example batch."""
    config = dict(read_mapping(RunDirectory.open(path), "config.json"))
    for key in ("identity", "example_batch", "callback_names"):
        config.pop(key, None)
    flat: dict[str, Any] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key, inner in value.items():
                add(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            flat[prefix.removeprefix("options.")] = value

    add("", config)
    return flat


def start_times(path: Path) -> list[float]:
    """Returns when a run was started and resumed, in Unix time; empty if that is unknown."""
    starts = read_mapping(RunDirectory.open(path), "env.json").get("starts")
    known = starts if isinstance(starts, list) else []
    return sorted(filter(None, (_unix(_dict(each).get("time")) for each in known)))


def num_bytes(folder: Path) -> int:
    """Returns the size of all files below a folder, in bytes; links are not followed."""
    total = 0
    for place, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # a checkpoint that just expired
                total += os.lstat(os.path.join(place, file)).st_size
    return total


def read_mapping(run: RunDirectory, name: str) -> Mapping[str, Any]:
    """Returns the JSON object in a file of a run; an empty one if it is missing or damaged."""
    try:
        value = run.read_json(name)
    except RunDirectoryError:
        return {}
    return _dict(value)


def _dict(value: Any) -> Mapping[str, Any]:
    """Returns the value if it is a mapping, or an empty one: a file may be damaged."""
    return value if isinstance(value, Mapping) else {}


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _numbers(value: Any) -> dict[str, float]:
    return {
        str(name): float(number)
        for name, number in _dict(value).items()
        if isinstance(number, (int, float)) and math.isfinite(number)
    }


def _unix(text: Any) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError):
        return 0.0


def _local(text: Any) -> str:
    try:
        return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M")
    except (TypeError, ValueError):
        return ""


def _between(start: Any, end: Any) -> str:
    try:
        seconds = (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
    except (TypeError, ValueError):
        return ""
    return clock_time(seconds)
