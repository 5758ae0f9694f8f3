"""Recording: what a run leaves behind, and the one place that opens and closes it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from distaff.checkpoint import MemoryStore, NullStore, Store
from distaff.loggers import Logger, ManyLoggers, NullLogger
from distaff.run.identity.candidates import Candidate
from distaff.run.identity.ending import ending
from distaff.run.identity.identity import Subject

_log = logging.getLogger("distaff")


class ResumePoint(NamedTuple):
    """What a run is resumed from.

    Attributes:
        path: of the run.
        step: of the checkpoint.
        skipped: what is wrong with the newer ones.
        notes: what differs from the run before it, or could not be compared.
    """

    path: Path
    step: int
    skipped: list[str]
    notes: list[str]

    def text(self, epoch: int) -> str:
        """Returns in a few lines what is resumed."""
        line = f"resuming {self.path} from its checkpoint of step {self.step}, epoch {epoch}"
        return "\n".join([line, *self.skipped, *self.notes])


class Recording(Protocol):
    """The outlets of a run. Nothing is written before `open`.

    `throughput` is apart from `logger`, which equal runs write equally. `found` is what the run
    is resumed from; `remark` why it is not one that was there, if there is something to say.
    """

    logger: ManyLoggers
    throughput: Logger
    store: Store
    found: ResumePoint | None

    @property
    def remark(self) -> str:
        """Why the run is not one that was there; empty if there is nothing to say."""
        ...

    @property
    def path(self) -> Path | None:
        """The run's directory, once it is open; None for a run without."""
        ...

    def finished(
        self,
        record: Mapping[str, Any],
        subject: Subject | None,
        *,
        key: str | None = None,
        rerun: bool = False,
    ) -> Candidate | None:
        """Returns the run that is finished already, and whose result that of this one would be.

        Args:
            record: the run's resolved configuration.
            subject: what its identity was found from.
            key: see `train_model`.
            rerun: likewise.
        """
        ...

    def open(
        self, record: Mapping[str, Any], texts: Mapping[str, str], subject: Subject | None = None
    ) -> None:
        """Starts to record.

        Args:
            record: the run's resolved configuration.
            texts: what to keep as text files, by file name.
            subject: what its identity was found from.
        """
        ...

    def confirm(self, record: Mapping[str, Any]) -> None:
        """Replaces the configuration of the run that this one goes on from, once it has done so."""
        ...

    def save_metrics(self, name: str, metrics: Mapping[str, Any]) -> None:
        """Writes metrics under a name of their own."""
        ...

    def close(self, status: str, **facts: Any) -> None:
        """Finishes checkpoints and loggers, and notes how the run ended."""
        ...


class NullRecording:
    """Writes no file: checkpoints stay in memory, and loggers of the user's own are still served.

    Args:
        loggers: the user's loggers.
    """

    def __init__(self, loggers: Sequence[Logger] = ()) -> None:
        self.logger = ManyLoggers(*loggers)
        self.throughput: Logger = NullLogger()
        self.store: Store = NullStore()
        self.found: ResumePoint | None = None

    remark = ""

    @property
    def path(self) -> Path | None:
        """None."""
        return None

    def finished(
        self,
        record: Mapping[str, Any],
        subject: Subject | None,
        *,
        key: str | None = None,
        rerun: bool = False,
    ) -> Candidate | None:
        """Returns None."""
        return None

    def open(
        self, record: Mapping[str, Any], texts: Mapping[str, str], subject: Subject | None = None
    ) -> None:
        """Forgets the checkpoints of the run before, and hands the configuration to the loggers."""
        self.store = MemoryStore()
        self.logger.log_config(record)

    def confirm(self, record: Mapping[str, Any]) -> None:
        """Does nothing."""

    def save_metrics(self, name: str, metrics: Mapping[str, Any]) -> None:
        """Does nothing."""

    def close(self, status: str, **facts: Any) -> None:
        """Closes the loggers."""
        self.logger.close(status)


@contextmanager
def recorded(
    recording: Recording,
    record: Mapping[str, Any],
    texts: Mapping[str, str],
    outcome: Callable[[], dict[str, Any]],
    subject: Subject | None = None,
) -> Generator[None]:
    """Opens a recording, and closes it whatever happens.

    Args:
        recording: what to open.
        record: the run's resolved configuration.
        texts: what to keep as text files, by file name.
        outcome: gives `status`, and facts, of a run that came to its end.
        subject: what its identity was found from.
    """
    try:
        recording.open(record, texts, subject)
        yield
    except BaseException as error:
        try:
            recording.close(**{**outcome(), **ending(error)})
        except Exception as also:  # what ended the run stays the error
            error.add_note(f"When the run was closed: {type(also).__name__}: {also}")
        raise
    recording.close(**outcome())
