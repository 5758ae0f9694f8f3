"""Takeover: whether a start resumes an earlier run, has its result, or begins a new one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

from distaff.checkpoint import recorded
from distaff.core.config.options import Options, option
from distaff.core.warnings import warn
from distaff.errors import (
    CheckpointError,
    ConfigError,
    RunDirectoryError,
    RunInUseError,
    nearest,
)
from distaff.run.directory.run_directory import RunDirectory, noted_status
from distaff.run.directory.run_lock import locked
from distaff.run.directory.run_version import reserve
from distaff.run.identity.candidates import (
    Candidate,
    EarlierRuns,
    check_changes,
    chosen,
    found,
    has_only_failed,
)
from distaff.run.identity.comparison import RecordComparison, compared
from distaff.run.identity.identity import Subject
from distaff.run.identity.launch import Seat, launch_of


def _resume(name: str, value: Any) -> Any:
    words = ("auto", "must", "never")
    if value not in words and type(value) is not int:
        known = nearest(str(value), words)
        raise ConfigError(f"{name} has no value {value!r}. {known} Or pass a step.")
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResumeOptions(Options):
    """Which run a start resumes, and how it may differ from it."""

    resume: Literal["auto", "must", "never"] | int = option(
        "auto",
        """Whether to resume an unfinished run of the same name. "auto" resumes the same run only:
        of the same training step, data, seed and start weights; anything else begins a new run,
        and a line says what changed. "must" raises an error where there is none, or where something
        changed; "never" begins a new run. A number resumes as "must" does, from the checkpoint of
        that step.""",
        check=_resume,
        resume="ignored",
    )
    allow_inexact_resume: bool = option(
        False,
        """Resume also with a loader that is read from its start and yields other batches than
        before, so that examples are missed or seen twice; a line then says so. By default this is
        an error.""",
        resume="ignored",
    )
    allow_changes: bool = option(
        False,
        """Under `resume="must"` or a number, resume a run although something changed, such as the
        loss or the data; a warning lists all of it.""",
        resume="ignored",
    )


class Takeover:
    """Finds the run that a start takes up, and takes its directory, or reserves a new one.

    Args:
        directory: of the run; not reserved yet, or its own already.
        resume: as in `TrainerConfig`.
        options: how a run that is resumed may differ; those of the trainer.

    Attributes:
        resume: `"must"` instead of a step, once the run has gone back to that.
        remark: why the run is not one that was there, if there is something to say.
    """

    def __init__(self, directory: RunDirectory, resume: str | int, options: ResumeOptions) -> None:
        self.directory, self.resume, self._options = directory, resume, options
        self.remark = ""
        self._choice: EarlierRuns | None = None
        self._seat: Seat | None = None

    @property
    def _must(self) -> bool:
        return self.resume not in ("auto", "never")

    def choose(
        self,
        record: Mapping[str, Any],
        subject: Subject | None,
        *,
        key: str | None = None,
        rerun: bool = False,
    ) -> Candidate | None:
        """Looks for the run to take up; returns one that is finished, whose result it is.

        Args:
            record: of the run to be.
            subject: what its identity was found from.
            key: see `train_model`.
            rerun: likewise.

        Raises:
            ConfigError: the key is no text.
        """
        if key is not None and (not isinstance(key, str) or not key):
            raise ConfigError(
                f"key names a run within a program; got {key!r}. Pass a text, such as 'fold-0'."
            )
        self._choice = EarlierRuns()
        if self.directory.created:
            return None
        seat = launch_of(self.directory.root).seat(self.directory.name, key)
        self._seat = seat
        if self.resume == "never":
            return None
        compare = partial(
            compared,
            new=record,
            subject=subject,
            inexact=self._options.allow_inexact_resume,
            options=type(self._options),
        )
        candidates = found(self.directory, compare)
        self._choice = chosen(candidates, seat, must=self._must, rerun=rerun)
        done = self._choice.finished
        if done is not None:
            seat.adopt(done.status)
        return done

    def forget(self) -> None:
        """Begins a new run in the place of one that is finished and cannot be loaded."""
        self._choice = EarlierRuns(
            remark="a new run: the checkpoints of the finished one are not there"
        )

    @property
    def may_resume(self) -> bool:
        """Whether there may be a run to take up."""
        if self.directory.created or self.resume == "never":
            return False
        launch = launch_of(self.directory.root)
        return any(
            each.may_resume or each.status.get("key") or launch.inherits(each.status)
            for each in found(self.directory, _equal)
        )

    def take(
        self, record: Mapping[str, Any], subject: Subject | None, lock: ExitStack
    ) -> RecordComparison | None:
        """Locks the directory of the run, and returns how it differs from the one it resumes.

        Args:
            record: of the run to be.
            subject: what its identity was found from.
            lock: where the lock is held.

        Returns:
            None for a new run.

        Raises:
            CheckpointError: there is nothing to resume, and there must be; or it is another run.
            RunDirectoryError: the directory cannot be made, or is in use.
        """
        if self._choice is None:
            self.choose(record, subject)
        choice, self._choice = self._choice or EarlierRuns(), None
        for each in choice.candidates:
            check_changes(each, allowed=self._options.allow_changes)
            if self._locks(each, lock):
                _check_links(each.path)
                self._resumed(each)
                return each.comparison
        if self._must and not self.directory.created:
            raise CheckpointError(
                f"resume={self.resume!r} needs a run of this name that did not come to its end; "
                "there is none. Check root and name, or pass resume='auto' to begin one."
            )
        is_new = not self.directory.created
        reserve(self.directory, lock)
        if is_new and self._seat is not None:
            self._begun(self._seat)
            self.remark = choice.remark and f"{self.directory.path.name} is {choice.remark}"
        return None

    def ended(self, status: str, facts: Mapping[str, Any]) -> None:
        """Notes that the run has ended in this process."""
        place = self.directory.path
        end = Candidate(place, {**facts, "status": status}, _equal)
        if self._seat is not None and not end.is_unfinished:
            self._seat.launch.ended(place)

    def _begun(self, seat: Seat) -> None:
        """Gives a new run its place in the program; one that is never resumed has none."""
        if self.resume == "never":
            self.directory.marks = {"launch": None, "key": seat.key}
            return
        seat.launch.begin()
        seat.launch.opened(self.directory.path)
        self.directory.marks = seat.marks()

    def _resumed(self, candidate: Candidate) -> None:
        """Takes the directory of a run, and its place in the program."""
        if candidate.comparison.changes:
            changes = "; ".join(candidate.comparison.changes)
            warn(
                f"{candidate.path} is resumed with the weights of another run: {changes}",
                stacklevel=2,
            )
        is_back = isinstance(self.resume, int) and self.resume == _recorded_resume(candidate.path)
        self.resume = "must" if is_back else self.resume  # and not back once more
        self.directory.take(candidate.path)
        seat = self._seat
        if seat is not None and seat.adopt(candidate.status):
            marks = {name: candidate.status.get(name) for name in ("launch", "key")}
            self.directory.marks = marks
            seat.launch.opened(self.directory.path)
        elif seat is not None:
            self._begun(seat)

    def _locks(self, candidate: Candidate, lock: ExitStack) -> bool:
        """Locks a run that is there; False where somebody else has it, or has had it meanwhile."""
        try:
            lock.enter_context(locked(candidate.path))
        except RunInUseError:
            if self._must:
                raise
            return False
        candidate.status = noted_status(candidate.path) or {"status": "running"}
        is_wanted = candidate.may_resume if self._must else candidate.is_unfinished
        if is_wanted and not has_only_failed(candidate.path):
            return True
        lock.close()  # it came to its end before the lock was ours
        return False


def _equal(old: Mapping[str, Any]) -> RecordComparison:
    return RecordComparison([], [], [])


def _recorded_resume(place: Path) -> Any:
    options = recorded(place).get("options")
    return options.get("resume") if isinstance(options, Mapping) else None


def _check_links(path: Path) -> None:
    """Refuses to write where a link leads elsewhere; removes what a killed write has left.

    Raises:
        RunDirectoryError: something that a run writes is a link.
    """
    for name in ("checkpoints", "metrics", *(entry.name for entry in path.iterdir())):
        if (path / name).is_symlink():
            raise RunDirectoryError(
                f"A run writes into its own directory; {str(path / name)!r} is a link out of it. "
                "Remove it, or begin a new run: resume='never'."
            )
    for left in (*path.glob(".*.tmp"), *path.glob("metrics/.*.tmp")):
        left.unlink(missing_ok=True)
