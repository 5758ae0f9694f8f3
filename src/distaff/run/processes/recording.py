"""Records a run of several processes: the first one writes the files, except for checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from distaff.errors import RunDirectoryError
from distaff.execution.processes import barrier, is_first, told
from distaff.loggers import Logger, ManyLoggers, NullLogger
from distaff.run.directory.protocol import ResumePoint
from distaff.run.directory.recording import DirectoryRecording
from distaff.run.directory.run_directory import RunDirectory, read_status
from distaff.run.identity.candidates import Candidate
from distaff.run.identity.comparison import RecordComparison
from distaff.run.identity.identity import Subject
from distaff.run.processes.store import SharedStore


class FirstRecording(DirectoryRecording):
    """The recording of the first process: writes all files, and shares what it has found."""

    store_kind = SharedStore
    _is_open = False

    def finished(
        self, record: Mapping[str, Any], subject: Subject | None, *, key: str | None, rerun: bool
    ) -> Candidate | None:
        with _telling_errors():
            done = super().finished(record, subject, key=key, rerun=rerun)
        told({"path": None if done is None else str(done.path)})
        return done

    def open(
        self, record: Mapping[str, Any], texts: Mapping[str, str], subject: Subject | None = None
    ) -> None:
        """Opens the recording; see `DirectoryRecording.open`. The others wait for it."""
        with _telling_errors():
            super().open(record, texts, subject)
        store: Any = self.store
        step = None if self.found is None else self.found.step
        told({"path": str(self.directory.path), "step": step, "damaged": store.damaged})
        self._is_open = True

    def confirm(self, record: Mapping[str, Any]) -> None:
        """Replaces the configuration, once all processes have loaded the checkpoint."""
        if self._is_open:
            barrier(_LOADED)
        super().confirm(record)

    def close(self, status: str, **facts: Any) -> None:
        """Closes the recording; see `DirectoryRecording.close`."""
        super().close(status, **facts)
        _meet_at_the_end()


class FollowingRecording(DirectoryRecording):
    """The recording of another process: only its parts of the checkpoints are written."""

    store_kind = SharedStore

    def __init__(
        self, directory: RunDirectory, loggers: Sequence[Logger] = (), **parts: Any
    ) -> None:
        super().__init__(directory, (), **parts)
        self.logger, self.throughput = ManyLoggers(), NullLogger()

    def finished(
        self, record: Mapping[str, Any], subject: Subject | None, *, key: str | None, rerun: bool
    ) -> Candidate | None:
        path = _heard()["path"]
        if path is None:
            return None
        self._take(Path(path))
        return Candidate(Path(path), read_status(Path(path)) or {}, _unchanged)

    def open(
        self, record: Mapping[str, Any], texts: Mapping[str, str], subject: Subject | None = None
    ) -> None:
        """Waits for the first process to open the recording.

        Raises:
            RunDirectoryError: it could not.
        """
        facts = _heard()
        path, step = Path(facts["path"]), facts["step"]
        self._take(path).note_damaged(facts["damaged"])
        self.found = None if step is None else ResumePoint(path, step, [], [])

    def confirm(self, record: Mapping[str, Any]) -> None:
        """Waits until all processes have loaded the checkpoint."""
        barrier(_LOADED)

    def save_metrics(self, name: str, metrics: Mapping[str, Any]) -> None:
        """Does nothing: the first process writes the metrics."""

    def close(self, status: str, **facts: Any) -> None:
        """Waits until the first process has written all files of the run."""
        _meet_at_the_end()

    def _take(self, path: Path) -> Any:
        self.directory.take(path)
        self.store = self._make_store(path / "checkpoints")
        return self.store


_LOADED = "the checkpoint to resume from is loaded"


def recording_kind(*, has_mesh: bool) -> type[DirectoryRecording]:
    """Returns the kind of recording of a run in this process."""
    if not has_mesh or jax.process_count() == 1:
        return DirectoryRecording
    return FirstRecording if is_first() else FollowingRecording


def _heard() -> dict[str, Any]:
    """Returns what the first process shares.

    Raises:
        RunDirectoryError: it has failed.
    """
    facts = told(None)
    if "error" in facts:
        raise RunDirectoryError(f"The first process could not open the run. {facts['error']}")
    return facts


@contextmanager
def _telling_errors() -> Generator[None]:
    """Shares an error with the other processes, which wait for this one."""
    try:
        yield
    except Exception as error:
        told({"error": f"{type(error).__name__}: {error}"})
        raise


def _meet_at_the_end() -> None:
    """Waits for the other processes, unless an error ends this one."""
    if sys.exc_info()[0] is None:
        barrier("the run is closed")


def _unchanged(old: Mapping[str, Any]) -> RecordComparison:
    return RecordComparison([], [], [])
