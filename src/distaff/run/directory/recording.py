"""The recording of a run in a directory of its own, and the options that say which."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

from distaff.checkpoint import CheckpointStore, NullStore, Store, forget_after, tidy
from distaff.core.config.options import at_least, one_of, option, or_none
from distaff.core.config.options import path as checked_path
from distaff.loggers import Logger, TolerantLogger
from distaff.run.directory.outlets import Outlets
from distaff.run.directory.protocol import NullRecording, Recording, ResumePoint
from distaff.run.directory.run_directory import RunDirectory
from distaff.run.events import PlanOptions
from distaff.run.identity.candidates import Candidate
from distaff.run.identity.identity import Subject
from distaff.run.identity.takeover import ResumeOptions, Takeover

_log = logging.getLogger("distaff")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordingOptions(PlanOptions, ResumeOptions):
    """Where runs are written, and which checkpoints they keep."""

    name: str = option(
        "", "The folder of its runs, `<root>/<name>/<version>`; by default the class's name."
    )
    root: str | None = option(
        "runs",
        "The folder of all runs; None to write nothing.",
        check=or_none(checked_path),
        resume="same run",
    )
    keep_last: int = option(
        2,
        """Newest checkpoints to keep, beside the best. Older ones are removed once a new one is in
        place.""",
        check=at_least(1),
        resume="same run",
    )
    keep_best: int = option(
        1,
        "How many of the best models' checkpoints to keep, at least 1.",
        check=at_least(1),
        resume="same run",
    )
    keep_every: int | None = option(
        None,
        """Keep also the checkpoints whose step is a multiple of it. Checkpoints are made at the
        ends of epochs: a multiple that lies within one has none, and keeps nothing.""",
        check=or_none(at_least(1)),
        resume="same run",
    )
    on_failed_save: Literal["raise", "warn"] = option(
        "raise",
        """What to do when a checkpoint cannot be written, such as on a full disk: "raise" ends the
        run, within one step; "warn" warns, and tries the next one. It holds for every other file
        of a run too, which is written later if it can be. A run whose best model was lost that way
        ends with the best of those that were written, or with the last weights, and says so.""",
        check=one_of(Literal["raise", "warn"]),
        resume="same run",
    )
    on_failed_log: Literal["raise", "warn"] = option(
        "warn",
        """What to do when a logger of your own raises an error, such as one whose server is away:
        "warn" warns, leaves a gap there and tries the next call; "raise" ends the run.""",
        check=one_of(Literal["raise", "warn"]),
        resume="same run",
    )

    @property
    def writes(self) -> bool:
        """Whether runs have a directory."""
        return self.root is not None and not self.fast_dev_run


class DirectoryRecording:
    """Records a run in a directory of its own; see `RunDirectory` for what it holds.

    Args:
        directory: where. It is reserved by `open`.
        loggers: the user's loggers, beside `metrics.jsonl`.
        make_store: makes a store of the directory of the checkpoints.
        resume: as in `TrainerConfig`.
        options: how a run that is resumed may differ; those of the trainer.
        warns: whether a file that the disk does not take is a warning.
    """

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

    def _look(self, store: CheckpointStore, notes: list[str]) -> ResumePoint | None:
        """Returns the checkpoint to resume from."""
        if isinstance(self._takeover.resume, int):
            return ResumePoint(self.directory.path, self._takeover.resume, [], notes)
        step, skipped = store.newest_valid()
        tidy(store)
        return None if step is None else ResumePoint(self.directory.path, step, skipped, notes)

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
    options: RecordingOptions, name: str, loggers: Sequence[Logger], *, resume: str | int
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
    parts = {"make_store": make_store, "resume": resume, "options": options, "warns": warns}
    return DirectoryRecording(directory, loggers, **parts)
