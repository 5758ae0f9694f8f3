"""The directory of a run, `<root>/<name>/0001`, whose files are written atomically."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import tempfile
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from distaff.core import files
from distaff.core.config import strict_json
from distaff.core.files import write_whole
from distaff.core.paths import as_path
from distaff.errors import ConfigError, RunDirectoryError, StateError, nearest
from distaff.run.directory import environment

STATUSES = ("running", "finished", "stopped", "pruned", "interrupted", "failed")

_BEFORE_STATUS = ("run.lock", "run.lock.claim", "config.json")
_UNFINISHED = ("running", "interrupted", "failed")
_log = logging.getLogger("distaff")
explained = partial(
    files.explained, rule="A run directory must be one that can be {}", other="root"
)
# Never world-writable, whatever the umask.
_DIRECTORY_MODE = 0o775


class RunDirectory:
    """The directory of a run's files. Before `create`, methods that need it raise StateError.

    A run named "digits" is written to `runs/digits/0001`, the next one to `runs/digits/0002`; none
    is overwritten. It holds `config.json`, `env.json`, `status.json`, `metrics.jsonl`,
    `metrics/*.json`, `throughput.jsonl`, `checkpoints/step_00001200/` and `log.txt`.

    Args:
        root: directory of all runs.
        name: name of the run: one path component, or several joined by "/".

    Raises:
        ConfigError: the name is not such a path.
    """

    def __init__(self, root: Path | str = "runs", name: str = "run") -> None:
        # Absolute: the program may change its working directory.
        self._parent = as_path(root, "root") / _checked(name)
        self.name = name
        self.marks: dict[str, Any] = {}
        self._path: Path | None = None
        self._counted = False

    @classmethod
    def open(cls, path: Path | str) -> RunDirectory:
        """Opens the directory of an existing run, such as `runs/digits/0001`.

        Raises:
            RunDirectoryError: there is no such directory.
        """
        place = as_path(path, "The path of a run")
        if not place.is_dir():
            raise RunDirectoryError(f"There is no run directory at {str(path)!r}. Check the path.")
        run = cls()
        run._path, run._parent = place, place.parent
        return run

    @property
    def created(self) -> bool:
        """Whether the directory exists, so that files can be written."""
        return self._path is not None

    @property
    def root(self) -> Path:
        """The absolute path of the directory of all runs."""
        return self._parent.parents[self.name.count("/")]

    @property
    def path(self) -> Path:
        """The absolute path of this run.

        Raises:
            StateError: the directory has not been created yet.
        """
        if self._path is None:
            raise StateError(
                f"The run below {str(self._parent)!r} has no path before its directory is created. "
                f"Call create() first."
            )
        return self._path

    def check_writable(self) -> None:
        """Checks that `create` can succeed. Leaves nothing behind.

        Raises:
            RunDirectoryError: a file is in the way, or the file system does not allow writing.
        """
        nearest_existing = self._path or self._parent
        while not os.path.lexists(nearest_existing):
            nearest_existing = nearest_existing.parent
        with explained(nearest_existing):
            os.rmdir(tempfile.mkdtemp(prefix=".distaff-", dir=nearest_existing))

    def create(self) -> Path:
        """Reserves the next version, unless this object has already done so, and returns its path.

        Raises:
            RunDirectoryError: it cannot be created.
        """
        if self._path is None:
            with explained(self._parent):
                self._path = _next_version(self._parent)
        return self._path

    def write_json(self, name: str, value: Any) -> Path:
        """Writes a value to a JSON file such as `metrics/test.json`, and returns its path.

        Raises:
            RunDirectoryError: the file cannot be written.
        """
        from distaff.core.config.encoding import to_json  # needs JAX

        return self.write_text(name, strict_json.dumps(to_json(value)))

    def write_text(self, name: str, text: str) -> Path:
        """Writes a text file in UTF-8 atomically, and returns its path.

        Raises:
            RunDirectoryError: the file cannot be written.
        """
        target = self.path / _checked(name)
        with explained(target):
            target.parent.mkdir(_DIRECTORY_MODE, parents=True, exist_ok=True)
            write_whole(target, text)
        return target

    def read_json(self, name: str) -> Any:
        """Reads a JSON file.

        Raises:
            RunDirectoryError: the file is missing or not JSON.
        """
        target = self.path / _checked(name)
        try:
            with explained(target, "read"):
                return strict_json.load(target)
        except ValueError as error:
            raise RunDirectoryError(
                f"A run's file must be JSON; {str(target)!r} is not: {error}. Remove it."
            ) from error

    def write_environment(self, now: dict[str, Any] | None = None) -> Path:
        """Adds the present environment to `env.json`, after the ones of earlier starts.

        Args:
            now: what `environment.describe` returns, for many runs that start together.
        """
        time = datetime.now(UTC).isoformat(timespec="seconds")
        content = environment.with_start(self._environment(), time, now)
        return self.write_json("env.json", content)

    def environment_changes(self) -> list[str]:
        """Returns the differences to the environment of the previous start, by name."""
        return environment.changes(self._environment(), environment.describe())

    def _environment(self) -> Any:
        with contextlib.suppress(RunDirectoryError):
            return self.read_json("env.json")
        return None

    def set_status(self, status: str, **facts: Any) -> None:
        """Writes `status.json`: the status, times of start and end, and further facts.

        When a run is started again, the first start time is kept. `starts` counts the objects of
        this class that have set the status to "running".

        Args:
            status: one of `STATUSES`.
            **facts: further entries, such as `step` and `epoch`.

        Raises:
            ConfigError: the status is unknown.
            RunDirectoryError: the file cannot be written.
        """
        if status not in STATUSES:
            raise ConfigError(f"There is no run status {status!r}. {nearest(status, STATUSES)}")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        started, starts = self._starts(now)
        if status == "running" and not self._counted:
            self._counted = True
            starts += 1
        times = {"started": started, "ended": None if status == "running" else now}
        known = {"status": status, **times, "starts": starts, **self.marks}
        self.write_json("status.json", {**known, **facts})

    def unfinished(self) -> list[Path]:
        """Returns the versions after the last one that ended, newest first.

        Their status is running, interrupted or failed; `run_lock.locked` checks whether a running
        one is alive. If `status.json` is damaged or missing, a run with checkpoints counts as
        unfinished, with a warning, and one without is skipped.

        Raises:
            RunDirectoryError: the directory of the versions cannot be read.
        """
        found = []
        for path in _versions(self._parent):
            status = read_status(path)
            if status is not None and status["status"] not in _UNFINISHED:
                break
            found += [] if status is None else [path]
        return found

    def versions(self) -> list[Path]:
        """Returns the directories of all runs of this name, newest first.

        Raises:
            RunDirectoryError: the directory of the versions cannot be read.
        """
        return _versions(self._parent)

    def left_over(self) -> list[Path]:
        """Returns the newest versions that are empty, oldest first.

        Their runs were killed at once, or are just starting.
        """
        versions = itertools.takewhile(is_left_over, _versions(self._parent))
        return list(versions)[::-1]

    def take(self, path: Path | None) -> None:
        """Uses an existing version, such as one of `unfinished`; None to release it."""
        self._path = path

    def _starts(self, now: str) -> tuple[str, int]:
        """Returns the first start time and the number of starts, as far as recorded."""
        before = None
        with contextlib.suppress(RunDirectoryError):  # there is no status yet
            before = self.read_json("status.json")
        if not isinstance(before, dict):
            return now, 0
        started, starts = before.get("started"), before.get("starts", 1)
        known = type(starts) is int and starts > 0
        return started if isinstance(started, str) else now, starts if known else 1


def _checked(name: str) -> str:
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or {"", ".", ".."} & set(parts):
        raise ConfigError(
            f"A name within a run directory must be simple path components joined by '/', "
            f"without '..'; got {name!r}. For example: 'digits' or 'sweep/digits'."
        )
    return name


def _versions(parent: Path) -> list[Path]:
    """Returns the directories of a run's versions, newest first."""
    with explained(parent, "read"):
        if not parent.is_dir():
            return []
        entries = [entry for entry in os.listdir(parent) if _is_version(entry)]
        paths = [parent / entry for entry in sorted(entries, key=int, reverse=True)]
        return [path for path in paths if path.is_dir()]


def _is_version(entry: str) -> bool:
    return entry.isascii() and entry.isdecimal() and len(entry) < 20


def is_left_over(path: Path) -> bool:
    """Whether a version holds only what a run writes before its status."""
    with contextlib.suppress(OSError):
        names = [name for name in os.listdir(path) if name not in _BEFORE_STATUS]
        return all(name.startswith(".") and name.endswith(".tmp") for name in names)
    return False


def read_status(path: Path) -> dict[str, Any] | None:
    """Returns the content of `status.json`, including the status at least.

    Returns:
        If the file is damaged or missing, the status "running" for a run with checkpoints, and
        None for one without.
    """
    problem = ""
    is_there = (path / "status.json").exists()  # else it is just starting, or was killed at once
    try:
        status = RunDirectory.open(path).read_json("status.json")
        if isinstance(status, dict) and status.get("status") in STATUSES:
            return status
        problem = f"the status in {str(path / 'status.json')!r} is unknown"
    except RunDirectoryError as error:
        problem = str(error)
    if any((path / "checkpoints").glob("step_*")):
        _log.warning("%s has checkpoints, and counts as unfinished: %s", path, problem)
        return {"status": "running"}
    if is_there:
        _log.warning("%s cannot be resumed: %s", path, problem)
    return None


def _next_version(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    taken = [int(entry) for entry in os.listdir(parent) if _is_version(entry)]
    version = max(taken, default=0) + 1
    while True:
        path = parent / f"{version:04d}"
        try:
            os.mkdir(path, _DIRECTORY_MODE)  # atomic: one of two processes gets this version
        except FileExistsError:
            version += 1
        else:
            return path
