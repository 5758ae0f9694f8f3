"""The directory of one run: `<root>/<name>/0001`, whose files are whole or absent."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Generator, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distaff import config, environment
from distaff.errors import ConfigError, RunDirectoryError, StateError, nearest

STATUSES = ("running", "finished", "stopped", "pruned", "interrupted", "failed")

_UNFINISHED = ("running", "interrupted", "failed")
_log = logging.getLogger("distaff")
_REMEDIES = {
    errno.EEXIST: "Move that file away, or choose another root.",
    errno.ENOTDIR: "Move that file away, or choose another root.",
    errno.ENOSPC: "Free some space, or choose a root on another disk.",
    errno.EDQUOT: "Free some space, or choose a root on another disk.",
    errno.ENOENT: "Check the path.",
}
_LOG_LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# Never writable by everybody, whatever the umask.
_DIRECTORY_MODE, FILE_MODE = 0o775, 0o664


class RunDirectory:
    """The place of a run's files; nothing is written before `create`.

    A run called "digits" is put in `runs/digits/0001`, the next one in `runs/digits/0002`; none is
    overwritten. It holds `config.json`, `env.json`, `status.json`, `metrics.jsonl`,
    `metrics/*.json`, `throughput.jsonl`, `checkpoints/step_00001200/` and `log.txt`.

    Args:
        root: the directory that holds all runs.
        name: the run's name: one path component, or several joined by "/".

    Raises:
        ConfigError: the name is not such a path.
    """

    def __init__(self, root: Path | str = "runs", name: str = "run") -> None:
        self._parent = Path(root) / _checked(name)
        self.name = name
        self.marks: dict[str, Any] = {}
        self._path: Path | None = None
        # A relative root stays where it was when the program goes to another directory.
        self._origin = Path.cwd()
        self._counted = False

    @classmethod
    def open(cls, path: Path | str) -> RunDirectory:
        """Returns the run that a directory already holds.

        Args:
            path: the directory of the run, such as `runs/digits/0001`.

        Raises:
            RunDirectoryError: there is no such directory.
        """
        if not Path(path).is_dir():
            raise RunDirectoryError(
                f"An existing run must be a directory; {str(path)!r} is not. Check the path."
            )
        run = cls()
        run._path = Path(path)
        run._parent = run._path.parent
        return run

    @property
    def created(self) -> bool:
        """Whether the directory exists, so that files can be written."""
        return self._path is not None

    @property
    def root(self) -> Path:
        """The absolute path of the directory that holds all runs."""
        return (self._origin / self._parent).parents[self.name.count("/")]

    @property
    def path(self) -> Path:
        """The directory of this run, relative where the root is.

        Raises:
            StateError: it is not created yet.
        """
        if self._path is None:
            raise StateError(
                f"A run's path is known once it is created; the run below {str(self._parent)!r} "
                f"is not. Call create() first."
            )
        return self._path

    @property
    def location(self) -> Path:
        """The absolute path of this run, which holds whatever the current directory is.

        Raises:
            StateError: it is not created yet.
        """
        return self._origin / self.path

    def check_writable(self) -> None:
        """Tries whether `create` can succeed, and leaves nothing behind.

        Raises:
            RunDirectoryError: a file is in the way, or the file system refuses.
        """
        nearest_existing = self._origin / (self._path or self._parent)
        while not os.path.lexists(nearest_existing):
            nearest_existing = nearest_existing.parent
        with explained(nearest_existing):
            os.rmdir(tempfile.mkdtemp(prefix=".distaff-", dir=nearest_existing))

    def create(self) -> Path:
        """Reserves the next version, or returns the one that this object has reserved before.

        Returns:
            The new, empty directory.

        Raises:
            RunDirectoryError: it cannot be created.
        """
        if self._path is None:
            with explained(self._parent):
                self._path = self._parent / _next_version(self._origin / self._parent).name
        return self._path

    def write_json(self, name: str, value: Any) -> Path:
        """Writes a value as `config.to_json` records it; the file is whole or as it was.

        Args:
            name: the file relative to the run, such as `metrics/test.json`.
            value: anything that `config.to_json` takes.

        Returns:
            The file.

        Raises:
            RunDirectoryError: it cannot be written.
            StateError: the run is not created yet.
        """
        return self.write_text(name, config.dumps(config.to_json(value)))

    def write_text(self, name: str, text: str) -> Path:
        """Writes a text in UTF-8; the file is whole or as it was.

        Args:
            name: the file relative to the run.
            text: its new content.

        Returns:
            The file.

        Raises:
            RunDirectoryError: it cannot be written.
            StateError: the run is not created yet.
        """
        target = self.location / _checked(name)
        with explained(target):
            target.parent.mkdir(_DIRECTORY_MODE, parents=True, exist_ok=True)
            write_whole(target, text)
        return target

    def read_json(self, name: str) -> Any:
        """Returns the parsed content of a JSON file.

        Args:
            name: the file relative to the run.

        Raises:
            RunDirectoryError: it is absent or is not JSON.
            StateError: the run is not created yet.
        """
        target = self.location / _checked(name)
        try:
            with explained(target, "read"):
                return config.load(target)
        except ValueError as error:
            raise RunDirectoryError(
                f"A file of a run must be JSON; {str(target)!r} is not: {error}. Remove it."
            ) from error

    def write_environment(self) -> Path:
        """Writes `env.json`: versions, platform, devices, processes, command line, commit."""
        return self.write_json("env.json", environment.describe())

    def set_status(self, status: str, **facts: Any) -> None:
        """Writes `status.json`: the status, when the run started and ended, and further facts.

        A run that is started again keeps when it started first; `starts` counts how often an object
        of this class has called it `"running"`.

        Args:
            status: one of `STATUSES`.
            **facts: what to record beside it, such as `step` and `epoch`.

        Raises:
            ConfigError: the status is unknown.
            RunDirectoryError: it cannot be written.
        """
        if status not in STATUSES:
            raise ConfigError(f"A run has no status {status!r}. {nearest(status, STATUSES)}")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        started, starts = self._starts(now)
        if status == "running" and not self._counted:
            self._counted = True
            starts += 1
        times = {"started": started, "ended": None if status == "running" else now}
        known = {"status": status, **times, "starts": starts, **self.marks}
        self.write_json("status.json", {**known, **facts})

    def unfinished(self) -> list[Path]:
        """Returns the versions after the last one that came to its end, the newest first.

        Those are the ones that are noted as running, interrupted or failed. Whether one that is
        "running" still lives is what `run_lock.locked` tells. One whose `status.json` is missing,
        or cannot be read, is passed over, and named in the log.

        Raises:
            RunDirectoryError: the directory of all versions cannot be read.
        """
        found = []
        for path in self.versions():
            path = self.location_of(path)
            try:
                status = RunDirectory.open(path).read_json("status.json")
            except RunDirectoryError as error:
                _log.warning("%s cannot be continued: %s", path, error)
                continue
            named = status.get("status") if isinstance(status, dict) else None
            if named not in STATUSES:
                _log.warning("%s cannot be continued: its status is not known", path)
            elif named in _UNFINISHED:
                found.append(self._parent / path.name)
            else:
                break
        return found

    def versions(self) -> list[Path]:
        """Returns the directories of all runs of this name, the newest first.

        Raises:
            RunDirectoryError: the directory of all versions cannot be read.
        """
        return [self._parent / path.name for path in _versions(self._origin / self._parent)]

    def take(self, path: Path) -> None:
        """Takes a version that is there already for its own, such as one of `unfinished`."""
        self._path = path

    def location_of(self, path: Path) -> Path:
        """Returns the absolute path of a version, such as one of `unfinished`."""
        return self._origin / path

    def _starts(self, now: str) -> tuple[str, int]:
        """Returns when the run started first, and how often it did, as far as that was noted."""
        before = None
        with contextlib.suppress(RunDirectoryError):  # no status yet
            before = self.read_json("status.json")
        if not isinstance(before, dict):
            return now, 0
        started, starts = before.get("started"), before.get("starts", 1)
        known = type(starts) is int and starts > 0
        return started if isinstance(started, str) else now, starts if known else 1

    @contextlib.contextmanager
    def open_log(self) -> Generator[logging.Logger]:
        """Appends what the logger `distaff` says to `log.txt`, from level INFO, while in the block.

        Yields:
            The logger.

        Raises:
            RunDirectoryError: `log.txt` cannot be written.
        """
        target = self.location / "log.txt"
        with explained(target):
            target.touch(FILE_MODE)
            handler = logging.FileHandler(target, encoding="utf-8", errors="backslashreplace")
        formatter = logging.Formatter(_LOG_LINE, datefmt="%Y-%m-%dT%H:%M:%SZ")
        formatter.converter = time.gmtime
        handler.setFormatter(formatter)
        logger = logging.getLogger("distaff")
        level = logger.level
        logger.setLevel(level or logging.INFO)
        # The display shows the same to whoever watches; the root logger would repeat it.
        propagate, logger.propagate = logger.propagate, False
        logger.addHandler(handler)
        try:
            yield logger
        finally:
            logger.removeHandler(handler)
            logger.propagate = propagate
            logger.setLevel(level)
            handler.close()


def _checked(name: str) -> str:
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or {"", ".", ".."} & set(parts):
        raise ConfigError(
            f"A name within a run directory must be simple path components joined by '/', "
            f"without '..', but it is {name!r}. For example: 'digits' or 'sweep/digits'."
        )
    return name


@contextlib.contextmanager
def explained(path: Path, verb: str = "written") -> Generator[None]:
    """Turns what the file system refuses in the block into an error with a remedy.

    Args:
        path: the file or directory in question.
        verb: what cannot be done with it.

    Raises:
        RunDirectoryError: there was an OSError.
    """
    try:
        yield
    except RunDirectoryError:
        raise
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "Choose another root, or change its permissions.")
        raise RunDirectoryError(
            f"A run directory must be one that can be {verb}; {str(path)!r} cannot: "
            f"{error.strerror or error}. {remedy}"
        ) from error


def _versions(parent: Path) -> list[Path]:
    """Returns the directories of a run's versions, the newest first."""
    with explained(parent, "read"):
        if not parent.is_dir():
            return []
        entries = [entry for entry in os.listdir(parent) if _is_version(entry)]
        paths = [parent / entry for entry in sorted(entries, key=int, reverse=True)]
        return [path for path in paths if path.is_dir()]


def _is_version(entry: str) -> bool:
    return entry.isascii() and entry.isdecimal() and len(entry) < 20


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


def write_whole(
    target: Path, content: str | bytes | Iterable[bytes], *, mode: int = FILE_MODE
) -> None:
    """Writes a file that is, whatever happens, whole or as it was.

    Args:
        target: the file.
        content: its new content; a text is written in UTF-8.
        mode: its permissions, which the umask lessens.

    Raises:
        OSError: it cannot be written.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
        with open(descriptor, "wb") as file:
            content = content.encode() if isinstance(content, str) else content
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
