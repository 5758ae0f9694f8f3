"""Recording: what a run leaves behind, and the one place that opens and closes it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from distaff.candidates import Candidate
from distaff.checkpoint import CheckpointStore, MemoryStore, NullStore, Store, forget_after, tidy
from distaff.ending import ending
from distaff.identity import Subject
from distaff.loggers import Logger, ManyLoggers, NullLogger, TolerantLogger
from distaff.outlets import Outlets
from distaff.run_directory import RunDirectory
from distaff.takeover import Allowed, Takeover
from distaff.trainer_config import TrainerConfig

_log = logging.getLogger("distaff")


class Found(NamedTuple):
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
    found: Found | None

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
        self.found: Found | None = None

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


class DirectoryRecording:
    """Records a run in a directory of its own; see `RunDirectory` for what it holds.

    Args:
        directory: where. It is reserved by `open`.
        loggers: the user's loggers, beside `metrics.jsonl`.
        make_store: makes a store of the directory of the checkpoints.
        resume: as in `TrainerConfig`.
        allowed: how a run that is resumed may differ.
        warns: whether a file that the disk does not take is a warning.
    """

    def __init__(
        self,
        directory: RunDirectory,
        loggers: Sequence[Logger] = (),
        *,
        make_store: Callable[[Path], CheckpointStore] = CheckpointStore,
        resume: str | int = "never",
        allowed: Allowed | None = None,
        warns: bool = False,
    ) -> None:
        self.directory = directory
        self.outlets = Outlets(directory, loggers, warns=warns)
        self.logger, self.throughput = self.outlets.logger, self.outlets.throughput
        self.store: Store = NullStore()
        self.found: Found | None = None
        self._make_store = make_store
        self._takeover = Takeover(directory, resume, allowed or Allowed())
        self._lock = ExitStack()

    @property
    def path(self) -> Path | None:
        """The run's directory, once it is open."""
        return self.directory.path if self.directory.created else None

    @property
    def remark(self) -> str:
        """Why the run is not one that was there; empty if there is nothing to say."""
        return self._takeover.remark

    def finished(
        self,
        record: Mapping[str, Any],
        subject: Subject | None,
        *,
        key: str | None = None,
        rerun: bool = False,
    ) -> Candidate | None:
        """Returns the run that is finished already, and whose result that of this one would be.

        Its checkpoints are then those of the store; nothing is written.
        """
        done = self._takeover.choose(record, subject, key=key, rerun=rerun)
        if done is None:
            return None
        store = self._make_store(done.path / "checkpoints")
        if store.newest_valid()[0] is None:  # somebody has removed them
            self._takeover.forget()
            return None
        self.directory.take(done.path)
        self.store = store
        return done

    @property
    def may_resume(self) -> bool:
        """Whether there is a run to take up, whose weights are in its checkpoints."""
        return self._takeover.may_resume

    def open(
        self, record: Mapping[str, Any], texts: Mapping[str, str], subject: Subject | None = None
    ) -> None:
        """Reserves a directory, or takes that of the same run, which did not come to its end.

        Then it writes configuration, environment and status.

        Raises:
            RunDirectoryError: it cannot be written, or another run is in it.
            CheckpointError: there is nothing to resume, and there must be.
        """
        self.directory.check_writable()
        taken = self._takeover.take(record, subject, self._lock)
        self.store = store = self._make_store(self.directory.path / "checkpoints")
        changes = [f"changed: {each}" for each in self.directory.environment_changes()]
        self.found = self._look(store, [] if taken is None else [*taken.lines(), *changes])
        if self.found is None:
            self.confirm(record)
        self.outlets.open(texts, is_taken=taken is not None)
        if taken is not None and self.found is None:
            self.logger.resume(0)  # what a run has logged that was killed before its first save
        self.logger.log_config({name: x for name, x in record.items() if name != "identity"})
        self.outlets.keep_states()
        _log.info("run %s", self.directory.path)

    def _look(self, store: CheckpointStore, notes: list[str]) -> Found | None:
        """Returns the checkpoint to resume from."""
        if isinstance(self._takeover.resume, int):
            return Found(self.directory.path, self._takeover.resume, [], notes)
        step, skipped = store.newest_valid()
        tidy(store)
        return None if step is None else Found(self.directory.path, step, skipped, notes)

    def confirm(self, record: Mapping[str, Any]) -> None:
        """Writes `config.json`, and puts aside the checkpoints after the one gone back to."""
        if isinstance(self.store, CheckpointStore) and isinstance(self._takeover.resume, int):
            forget_after(self.store, self._takeover.resume)
        self.outlets.files.write_json("config.json", record)

    def save_metrics(self, name: str, metrics: Mapping[str, Any]) -> None:
        """Writes `metrics/<name>.json`, whole or not at all."""
        self.outlets.files.write_json(f"metrics/{name}.json", metrics)
        self.outlets.keep_states()

    def close(self, status: str, **facts: Any) -> None:
        """Finishes checkpoints, loggers and log file in this order, then writes the status.

        A recording that could not be opened has only loggers to close.

        Raises:
            CheckpointError: the last checkpoint could not be written; the status is then `failed`.
            Exception: a logger of the user's could not be closed; the status is as it was to be.
        """
        with self._lock:  # until the status says that the run is over
            if not self.directory.created:
                self.logger.close(status)
                return
            _log.info("%s at step %s", status, facts.get("step"))
            try:
                self.outlets.close(self.store, status, facts)
            finally:
                if self.outlets.status == status:
                    self._takeover.ended(status, facts)


def make_recording(
    options: TrainerConfig, name: str, loggers: Sequence[Logger], *, resume: str | int
) -> Recording:
    """Returns the recording of a run below `root`, or one that writes nothing if that is None.

    Args:
        options: `root` is read, and what they say of checkpoints.
        name: of the run.
        loggers: the user's loggers.
        resume: as in `TrainerConfig`.
    """
    if options.on_failed_log == "warn":
        loggers = [TolerantLogger(each, "on_failed_log") for each in loggers]
    if options.root is None or not options.writes:
        return NullRecording(loggers)
    make_store = partial(
        CheckpointStore,
        keep_last=options.keep_last,
        keep_best=options.keep_best,
        keep_every=options.keep_every,
        on_failed_save=options.on_failed_save,
    )
    warns = options.on_failed_save == "warn"
    directory = RunDirectory(options.root, name)
    allowed = Allowed(options.allow_changes, options.allow_inexact_resume)
    parts = {"make_store": make_store, "resume": resume, "allowed": allowed, "warns": warns}
    return DirectoryRecording(directory, loggers, **parts)


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
