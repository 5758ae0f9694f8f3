"""The run that a program must resume, as `distaff fit --resume` asks for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Sequence
from contextvars import ContextVar
from pathlib import Path

from distaff.core.paths import shown
from distaff.errors import CheckpointError
from distaff.run.directory.run_directory import RunDirectory
from distaff.run.identity.candidates import Candidate, EarlierRuns
from distaff.run.identity.launch import Seat


class Request:
    """A run to resume.

    Args:
        path: the run's directory.

    Attributes:
        is_met: whether a training has resumed it.
    """

    def __init__(self, path: Path) -> None:
        self._path, self.is_met = path, False

    def concerns(self, directory: RunDirectory) -> bool:
        """Whether the run has yet to be resumed, and has the name of this directory."""
        return not self.is_met and any(map(self.names, directory.versions()))

    def names(self, path: Path) -> bool:
        """Whether this is the run to resume."""
        return path.name == self._path.name and os.path.samefile(path, self._path)

    def choose(
        self, choice: EarlierRuns, candidates: Sequence[Candidate], seat: Seat
    ) -> EarlierRuns:
        """Chooses the run if the new one is the same.

        A finished run of the same program is loaded, even if that program has ended.

        Args:
            choice: what is chosen without a request.
            candidates: the earlier runs of the name.
            seat: the position of the new run in its program.
        """
        first = next(iter(choice.candidates), None)
        wanted = next((each for each in candidates if self.names(each.path)), None)
        is_chosen = first is not None and self.names(first.path)
        if choice.finished is not None or wanted is None or is_chosen:
            return choice
        place = seat.place_in(wanted.status)
        for each in candidates:
            is_in_place = place is not None and each.status.get("launch") == place
            comparable = is_in_place and each.is_finished
            if comparable and not (each.comparison.changes or each.comparison.doubts):
                return EarlierRuns(finished=each)
        is_same = wanted.may_resume and wanted.status.get("key") == seat.key
        if is_same and not wanted.comparison.changes:
            return EarlierRuns(candidates=[wanted])
        return choice

    def check_met(self, candidates: Sequence[Candidate] = ()) -> None:
        """Checks that the run was resumed.

        Args:
            candidates: the earlier runs of its name, instead of which a new one would begin.

        Raises:
            CheckpointError: it was not; the message says what differs.
        """
        if self.is_met:
            return
        found = next((each for each in candidates if self.names(each.path)), None)
        changes = found.comparison.changes if found is not None else []
        if changes:
            listed = "".join(f"\n  {each}" for each in changes)
            raise CheckpointError(
                f"--resume resumes only the same run, but {shown(self._path)} differs:{listed}\n"
                "Revert the changes, or leave out --resume to start a new run."
            )
        raise CheckpointError(
            f"The recipe did not resume {shown(self._path)}: it trains no run of that name, or the "
            "run has ended. Check the recipe, its root, and the status of the run."
        )


_request: ContextVar[Request | None] = ContextVar("request", default=None)


@contextlib.contextmanager
def resuming(path: Path) -> Generator[None]:
    """Requires that a training in the block resumes this run.

    Raises:
        CheckpointError: a training of its name would start a new run instead, or none resumed it.
    """
    request = Request(path)
    token = _request.set(request)
    try:
        yield
    finally:
        _request.reset(token)
    request.check_met()


def request_for(directory: RunDirectory) -> Request | None:
    """Returns the request that a new run in this directory concerns; None without one."""
    request = _request.get()
    return request if request is not None and request.concerns(directory) else None
