"""Records a run in its own directory."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

from distaff.checkpoint import CheckpointStore, NullStore, Store, forget_after, tidy
from distaff.core.config.cadence import Cadence
from distaff.core.config.options import at_least, one_of, option, or_none
from distaff.core.config.options import path as checked_path
from distaff.errors import ConfigError
from distaff.loggers import Logger, TolerantLogger
from distaff.loggers.named import build_loggers
from distaff.run.directory.outlets import Outlets
from distaff.run.directory.protocol import NullRecording, Recording, ResumePoint
from distaff.run.directory.run_directory import RunDirectory
from distaff.run.events import PlanOptions
from distaff.run.identity.candidates import Candidate
from distaff.run.identity.identity import Subject
from distaff.run.identity.takeover import ResumeOptions, Takeover

_log = logging.getLogger("distaff")


_KEEP_EVERY = Cadence(
    ("steps",), number="steps", why="Checkpoints are named, and so kept, by their steps."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordingOptions(PlanOptions, ResumeOptions):
    """Options of where runs are written and which checkpoints they keep."""

    name: str = option(
        "", "Folder of the runs, `<root>/<name>/<version>`; defaults to the name of the class."
    )
    root: str | None = option(
        "runs",
        "Folder of all runs; None to write nothing.",
        check=or_none(checked_path),
        resume="same run",
    )
    keep_last: int = option(
        2,
        """Number of newest checkpoints to keep, in addition to the best. Older ones are removed
        after a new one is complete.""",
        check=at_least(1),
        resume="same run",
    )
    keep_best: int = option(
        1, "Number of best checkpoints to keep, at least 1.", check=at_least(1), resume="same run"
    )
    keep_every: int | str | None = option(
        None,
        """Also keep checkpoints whose step is a multiple of this number: 1000, or "1000 steps".
        Checkpoints to keep are written with each validation, see `val_every`; other multiples have
        none. None to disable.""",
        check=or_none(_KEEP_EVERY.check),
        resume="same run",
    )
    save_curves: bool = option(
        True,
        "Whether to draw the learning curves into `figures/` of the run directory at its end.",
        resume="same run",
    )
    save_report: bool = option(
        False,
        """Whether to write `report.html` into the run directory when the run ends, even if it
        fails: its curves, tables and figures in one file, as `distaff report` writes it.""",
        resume="same run",
    )
    on_failed_save: Literal["raise", "warn"] = option(
        "raise",
        """What to do when a checkpoint cannot be written, such as on a full disk. "raise" ends the
        run within one step; "warn" logs a warning, and continues with the next checkpoint. Applies
        to all other files of a run, too, which are written later if possible. A run that lost its
        best model ends with the best one that was saved, or with the last weights, and logs it.""",
        check=one_of(Literal["raise", "warn"]),
        resume="same run",
    )
    on_failed_log: Literal["raise", "warn"] = option(
        "warn",
        """What to do when your own logger raises an error, such as when its server is down. "warn"
        logs a warning, and continues with the next call; "raise" ends the run.""",
        check=one_of(Literal["raise", "warn"]),
        resume="same run",
    )

    @property
    def writes(self) -> bool:
        """Whether runs have a directory."""
        return self.root is not None and not self.fast_dev_run


class DirectoryRecording(Recording):
    """Records a run in its own directory; see `RunDirectory` for its files.

    Args:
        directory: the directory, which `open` reserves.
        loggers: the user's loggers.
        make_store: creates the store in the directory of the checkpoints.
        resume: as in `TrainerConfig`.
        options: how a resumed run may differ.
        warns: whether a storage error, such as a full disk, is only a warning.

    Attributes:
        store_kind: the class of its checkpoint stores.
    """

    store_kind: type[CheckpointStore] = CheckpointStore

    def __init__(
        self,
        directory: RunDirectory,
        loggers: Sequence[Logger] = (),
        *,
        make_store: Callable[[Path], CheckpointStore] = CheckpointStore,
        resume: str | int = "never",
        options: ResumeOptions | None = None,
        warns: bool = False,
    ) -> None:
        self.directory = directory
        self.outlets = Outlets(directory, loggers, warns=warns)
        self.logger, self.throughput = self.outlets.logger, self.outlets.throughput
        self.store: Store = NullStore()
        self.found: ResumePoint | None = None
        self._make_store = make_store
        self._takeover = Takeover(directory, resume, options or ResumeOptions())
        self._lock = ExitStack()

    @property
    def path(self) -> Path | None:
        return self.directory.path if self.directory.created else None

    @property
    def remark(self) -> str:
        return self._takeover.remark

    def finished(
        self, record: Mapping[str, Any], subject: Subject | None, *, key: str | None, rerun: bool
    ) -> Candidate | None:
        done = self._takeover.choose(record, subject, key=key, rerun=rerun)
        if done is None:
            return None
        store = self._make_store(done.path / "checkpoints")
        if store.newest_valid()[0] is None:  # someone has removed them
            self._takeover.forget()
            return None
        self.directory.take(done.path)
        self.store = store
        return done

    @property
    def may_resume(self) -> bool:
        """Whether there may be a run to resume, with weights in its checkpoints."""
        return self._takeover.may_resume

    def open(
        self, record: Mapping[str, Any], texts: Mapping[str, str], subject: Subject | None = None
    ) -> None:
        """Reserves a directory, or takes that of the run to resume, and writes the first files.

        Raises:
            RunDirectoryError: the directory cannot be written, or is in use.
            CheckpointError: a run must be resumed, but none exists, or it differs.
        """
        self.directory.check_writable()
        taken = self._takeover.take(record, subject, self._lock)
        self.store = store = self._make_store(self.directory.path / "checkpoints")
        changes = [f"changed: {each}" for each in self.directory.environment_changes()]
        self.found = self._resume_point(store, [] if taken is None else [*taken.lines(), *changes])
        if self.found is None:
            self.confirm(record)
        self.outlets.open(texts, is_taken=taken is not None)
        if taken is not None and self.found is None:
            self.logger.resume(0)  # drops the logs of a run that was killed before its first save
        self.logger.log_config({name: x for name, x in record.items() if name != "identity"})
        self.outlets.keep_states()
        _log.info("run %s", self.directory.path)

    def _resume_point(self, store: CheckpointStore, notes: list[str]) -> ResumePoint | None:
        if isinstance(self._takeover.resume, int):
            return ResumePoint(self.directory.path, self._takeover.resume, [], notes)
        step, skipped = store.newest_valid()
        tidy(store)
        return None if step is None else ResumePoint(self.directory.path, step, skipped, notes)

    def confirm(self, record: Mapping[str, Any]) -> None:
        """Writes `config.json`, and sets aside the checkpoints after a rollback."""
        if isinstance(self.store, CheckpointStore) and isinstance(self._takeover.resume, int):
            forget_after(self.store, self._takeover.resume)
        self.outlets.files.write_json("config.json", record)

    def save_metrics(self, name: str, metrics: Mapping[str, Any]) -> None:
        self.outlets.files.write_json(f"metrics/{name}.json", metrics)
        self.outlets.keep_states()

    def close(self, status: str, **facts: Any) -> None:
        """Closes checkpoints, loggers and log file in this order, then writes the status.

        Raises:
            CheckpointError: the last checkpoint could not be written; the status is "failed".
            Exception: a logger could not be closed; the status does not change.
        """
        with self._lock:  # until the status is written
            if not self.directory.created:  # it could not be opened
                self.logger.close(status)
                return
            _log.info("%s at step %s", status, facts.get("step"))
            try:
                self.outlets.close(self.store, status, facts)
            finally:
                if self.outlets.status == status:
                    self._takeover.ended(status, facts)


def _keep_every(options: RecordingOptions) -> int | None:
    every = options.keep_every
    return None if every is None else int(_KEEP_EVERY.parse("keep_every", every).count)


def make_recording(
    options: RecordingOptions,
    name: str,
    loggers: Sequence[Logger | str],
    *,
    resume: str | int,
    kind: type[DirectoryRecording] = DirectoryRecording,
) -> Recording:
    """Returns the recording of a run below `root`, or one that writes no files.

    Args:
        options: the options of the run.
        name: name of the run.
        loggers: the user's loggers.
        resume: as in `TrainerConfig`.
        kind: the class of a recording in a directory.

    Raises:
        ConfigError: the report, or a logger given by name, needs a run directory, but `root` is
            None.
    """
    if options.save_report and options.root is None:
        raise ConfigError(
            "save_report=True writes into the run directory; got root=None. Pass a root, or "
            "save_report=False."
        )
    root = options.root if options.writes else None
    directory = None if root is None else RunDirectory(root, name)
    folder = None if directory is None else lambda: directory.path
    outlets = build_loggers(loggers, folder, name, is_trial=options.fast_dev_run)
    if options.on_failed_log == "warn":
        outlets = [TolerantLogger(each, "on_failed_log") for each in outlets]
    if directory is None:
        return NullRecording(outlets)
    make_store = partial(
        kind.store_kind,
        keep_last=options.keep_last,
        keep_best=options.keep_best,
        keep_every=_keep_every(options),
        on_failed_save=options.on_failed_save,
    )
    warns = options.on_failed_save == "warn"
    parts = {"make_store": make_store, "resume": resume, "options": options, "warns": warns}
    return kind(directory, outlets, **parts)
