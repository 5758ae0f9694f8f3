"""The interface of recordings: the files, loggers and checkpoints of a run."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from distaff.checkpoint import MemoryStore, NullStore, Store
from distaff.loggers import Logger, ManyLoggers, NullLogger
from distaff.loggers.history import ColumnLogger, History
from distaff.run.identity.candidates import Candidate
from distaff.run.identity.ending import ending
from distaff.run.identity.identity import Subject


class ResumePoint(NamedTuple):
    """The checkpoint that a run resumes from.

    Attributes:
        path: the run directory.
        step: step of the checkpoint.
        skipped: why newer checkpoints are not used.
        notes: what has changed since, or could not be compared.
    """

    path: Path
    step: int
    skipped: list[str]
    notes: list[str]

    def text(self, epoch: int) -> str:
        """Returns the lines to show when the run resumes."""
        line = f"resuming {self.path} from its checkpoint of step {self.step}, epoch {epoch}"
        return "\n".join([line, *self.skipped, *self.notes])


class Recording:
    """Where a run is recorded. Nothing is written before `open`.

    Attributes:
        logger: logs metrics; identical runs write identical files.
        throughput: logs the throughput.
        store: the checkpoint store.
        found: the checkpoint that the run resumes from; None for a new run.
    """

    logger: ManyLoggers
    throughput: Logger
    store: Store
    found: ResumePoint | None

    @property
    def remark(self) -> str:
        """Why no earlier run is resumed; empty if that needs no explanation."""
        return ""

    @property
    def path(self) -> Path | None:
        """The run directory once it is open; None if nothing is written."""
        return None

    def history(self, title: str, best_epoch: int | None) -> History:
        """Returns the metrics logged so far, also before the run was resumed.

        Args:
            title: the title of its figures.
            best_epoch: epoch of the best model; None if unknown.
        """
        return History(self.path or ColumnLogger(), title=title, best_epoch=best_epoch)

    def finished(
        self, record: Mapping[str, Any], subject: Subject | None, *, key: str | None, rerun: bool
    ) -> Candidate | None:
        """Returns the finished run that equals this one, or None.

        Args:
            record: the run's resolved configuration.
            subject: the source of its identity.
            key: see `train_model`.
            rerun: see `train_model`.
        """
        return None

    def open(
        self, record: Mapping[str, Any], texts: Mapping[str, str], subject: Subject | None = None
    ) -> None:
        """Starts recording."""

    def confirm(self, record: Mapping[str, Any]) -> None:
        """Replaces the configuration of a resumed run, once resuming has succeeded."""

    def save_metrics(self, name: str, metrics: Mapping[str, Any]) -> None:
        """Writes metrics to a file of this name."""

    def close(self, status: str, **facts: Any) -> None:
        """Closes checkpoints and loggers, and records how the run ended."""


class NullRecording(Recording):
    """Writes no files: keeps checkpoints and metrics in memory, and uses the user's loggers."""

    def __init__(self, loggers: Sequence[Logger] = ()) -> None:
        self._loggers, self._columns = loggers, ColumnLogger()
        self.logger = ManyLoggers(*loggers)
        self.throughput: Logger = NullLogger()
        self.store: Store = NullStore()
        self.found: ResumePoint | None = None

    def open(
        self, record: Mapping[str, Any], texts: Mapping[str, str], subject: Subject | None = None
    ) -> None:
        self.store, self._columns = MemoryStore(), ColumnLogger()
        self.logger = ManyLoggers(*self._loggers, self._columns)
        self.logger.log_config(record)

    def history(self, title: str, best_epoch: int | None) -> History:
        return History(self._columns, title=title, best_epoch=best_epoch)

    def close(self, status: str, **facts: Any) -> None:
        self.logger.close(status)


@contextmanager
def recorded(
    recording: Recording,
    record: Mapping[str, Any],
    texts: Mapping[str, str],
    outcome: Callable[[], dict[str, Any]],
    subject: Subject | None = None,
) -> Generator[None]:
    """Opens a recording, and always closes it."""
    try:
        recording.open(record, texts, subject)
        yield
    except BaseException as error:
        try:
            recording.close(**{**outcome(), **ending(error)})
        except Exception as also:  # keep raising the first error
            error.add_note(f"When the run was closed: {type(also).__name__}: {also}")
        raise
    recording.close(**outcome())
