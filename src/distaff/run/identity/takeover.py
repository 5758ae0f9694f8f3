"""Decides whether a start resumes an earlier run, loads its result, or begins a new one."""

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
from distaff.errors import CheckpointError, ConfigError, RunDirectoryError, RunInUseError, nearest
from distaff.run.directory.run_directory import RunDirectory, read_status
from distaff.run.directory.run_lock import locked
from distaff.run.directory.run_version import reserve
from distaff.run.identity.candidates import (
    Candidate,
    EarlierRuns,
    check_changes,
    choose,
    find_candidates,
    has_only_failed,
)
from distaff.run.identity.comparison import RecordComparison, compare_records
from distaff.run.identity.identity import Subject
from distaff.run.identity.launch import Seat, launch_of
from distaff.run.identity.request import Request, request_for


def _resume(name: str, value: Any) -> Any:
    words = ("auto", "must", "never")
    if value not in words and type(value) is not int:
        known = nearest(str(value), words)
        raise ConfigError(f"{name} has no value {value!r}. {known} Or pass a step number.")
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResumeOptions(Options):
    """Options of which run a start resumes, and what may have changed."""

    resume: Literal["auto", "must", "never"] | int = option(
        "auto",
        """Whether to resume an unfinished run of the same name. "auto" resumes the same run only,
        with the same training step, data, seed and initial weights; otherwise it starts a new run
        and logs what changed. "must" raises an error if there is no such run or something changed;
        "never" starts a new run. A number resumes as "must" does, from the checkpoint of that
        step.""",
        check=_resume,
        resume="ignored",
    )
    allow_inexact_resume: bool = option(
        False,
        """Resume even if a loader restarts from its beginning and yields other batches than
        before, so that examples are missed or repeated; a warning is logged. By default this is an
        error.""",
        resume="ignored",
    )
    allow_changes: bool = option(
        False,
        """With `resume="must"` or a number, resume a run although something changed, such as the
        loss or the data; a warning lists all changes.""",
        resume="ignored",
    )


class Takeover:
    """Finds the run to resume and takes its directory, or reserves a new one.

    Args:
        directory: the directory of the run, reserved or not.
        resume: as in `TrainerConfig`.
        options: how a resumed run may differ.

    Attributes:
        resume: a step becomes `"must"` once the run has been rolled back to it.
        remark: why no earlier run is resumed; empty if that needs no explanation.
    """

    def __init__(self, directory: RunDirectory, resume: str | int, options: ResumeOptions) -> None:
        self.directory, self.resume, self._options = directory, resume, options
        self.remark = ""
        self._choice: EarlierRuns | None = None
        self._seat: Seat | None = None
        self._request: Request | None = None
        self._candidates: list[Candidate] = []

    @property
    def _must(self) -> bool:
        return self.resume not in ("auto", "never")

    def choose(
        self, record: Mapping[str, Any], subject: Subject | None, *, key: str | None, rerun: bool
    ) -> Candidate | None:
        """Chooses the run to resume, or returns a finished one that equals the new run.

        Raises:
            ConfigError: the key is not a nonempty string.
        """
        if key is not None and (not isinstance(key, str) or not key):
            raise ConfigError(
                f"key must be a nonempty string that names the run; got {key!r}. Pass 'fold-0'."
            )
        self._choice = EarlierRuns()
        if self.directory.created:
            return None
        seat = launch_of(self.directory.root).seat(self.directory.name, key)
        self._seat = seat
        self._request = request_for(self.directory)
        if self.resume == "never" and self._request is None:
            return None
        compare = partial(
            compare_records,
            new=record,
            subject=subject,
            inexact=self._options.allow_inexact_resume,
            options=type(self._options),
        )
        self._candidates = candidates = find_candidates(self.directory, compare)
        self._choice = choose(candidates, seat, must=self._must, rerun=rerun)
        if self._request is not None:
            self._choice = self._request.choose(self._choice, candidates, seat)
        done = self._choice.finished
        if done is not None:
            seat.adopt(done.status)
        return done

    def forget(self) -> None:
        """Starts a new run instead of a finished one that cannot be loaded."""
        self._choice = EarlierRuns(remark="a new run: the finished one has no checkpoints")

    @property
    def may_resume(self) -> bool:
        """Whether there may be a run to resume."""
        if self.directory.created:
            return False
        if request_for(self.directory) is not None:
            return True
        if self.resume == "never":
            return False
        launch = launch_of(self.directory.root)
        return any(
            each.may_resume or each.status.get("key") or launch.inherits(each.status)
            for each in find_candidates(self.directory, _equal)
        )

    def take(
        self, record: Mapping[str, Any], subject: Subject | None, lock: ExitStack
    ) -> RecordComparison | None:
        """Locks the directory of the run, and compares the run with the one it resumes.

        Returns:
            The comparison; None for a new run.

        Raises:
            CheckpointError: a run must be resumed, but none exists, or it differs.
            RunDirectoryError: the directory cannot be created, or is in use.
        """
        if self._choice is None:
            self.choose(record, subject, key=None, rerun=False)
        choice, self._choice = self._choice or EarlierRuns(), None
        for each in choice.candidates:
            check_changes(each, allowed=self._options.allow_changes)
            if self._try_lock(each, lock):
                _check_links(each.path)
                self._take_over(each)
                if self._request is not None and self._request.names(each.path):
                    self._request.is_met = True
                return each.comparison
        if self._must and not self.directory.created:
            raise CheckpointError(
                f"resume={self.resume!r} needs an unfinished run of this name, but found none. "
                "Check root and name, or pass resume='auto' to start one."
            )
        is_new = not self.directory.created
        if is_new and self._request is not None:
            self._request.check_met(self._candidates)
        reserve(self.directory, lock)
        if is_new and self._seat is not None:
            self._join_launch(self._seat)
            self.remark = choice.remark and f"{self.directory.path.name} is {choice.remark}"
        return None

    def ended(self, status: str, facts: Mapping[str, Any]) -> None:
        """Records that the run has ended in this process."""
        place = self.directory.path
        end = Candidate(place, {**facts, "status": status}, _equal)
        if self._seat is not None and not end.is_unfinished:
            self._seat.launch.unfinished.discard(place)

    def _join_launch(self, seat: Seat) -> None:
        """Adds a new run to the launch, unless it is never resumed."""
        if self.resume == "never":
            self.directory.marks = {"launch": None, "key": seat.key}
            return
        seat.launch.begin()
        seat.launch.unfinished.add(self.directory.path)
        self.directory.marks = seat.marks()

    def _take_over(self, candidate: Candidate) -> None:
        """Takes the directory of a resumed run, and its position in the program."""
        if candidate.comparison.changes:
            changes = "; ".join(candidate.comparison.changes)
            warn(
                f"{candidate.path} is resumed with the weights of another run: {changes}",
                stacklevel=2,
            )
        is_back = isinstance(self.resume, int) and self.resume == _recorded_resume(candidate.path)
        self.resume = "must" if is_back else self.resume  # do not roll back again
        self.directory.take(candidate.path)
        seat = self._seat
        if seat is not None and seat.adopt(candidate.status):
            marks = {name: candidate.status.get(name) for name in ("launch", "key")}
            self.directory.marks = marks
            seat.launch.unfinished.add(self.directory.path)
        elif seat is not None:
            self._join_launch(seat)

    def _try_lock(self, candidate: Candidate, lock: ExitStack) -> bool:
        """Locks an existing run. Returns False if another process uses it, or has ended it."""
        is_requested = self._request is not None and self._request.names(candidate.path)
        must = self._must or is_requested
        try:
            lock.enter_context(locked(candidate.path))
        except RunInUseError:
            if must:
                raise
            return False
        candidate.status = read_status(candidate.path) or {"status": "running"}
        is_wanted = candidate.may_resume if must else candidate.is_unfinished
        if is_wanted and not has_only_failed(candidate.path):
            return True
        lock.close()  # another process finished it before the lock was taken
        return False


def _equal(old: Mapping[str, Any]) -> RecordComparison:
    return RecordComparison([], [], [])


def _recorded_resume(place: Path) -> Any:
    options = recorded(place).get("options")
    return options.get("resume") if isinstance(options, Mapping) else None


def _check_links(path: Path) -> None:
    """Checks that no file of a run is a link, and removes partial files of a killed write.

    Raises:
        RunDirectoryError: a file of the run is a link.
    """
    for name in ("checkpoints", "metrics", *(entry.name for entry in path.iterdir())):
        if (path / name).is_symlink():
            raise RunDirectoryError(
                f"A run writes to its own directory only, but {str(path / name)!r} is a link. "
                "Remove it, or start a new run with resume='never'."
            )
    for left in (*path.glob(".*.tmp"), *path.glob("metrics/.*.tmp")):
        left.unlink(missing_ok=True)
