"""Selects the earlier run that a start resumes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distaff.checkpoint import CheckpointStore, recorded
from distaff.errors import CheckpointError
from distaff.run.directory.run_directory import RunDirectory, read_status
from distaff.run.identity.comparison import RecordComparison
from distaff.run.identity.launch import Seat

_MAX_CANDIDATES = 256


class Candidate:
    """An earlier run of the same name."""

    def __init__(
        self,
        path: Path,
        status: Mapping[str, Any],
        compare: Callable[[Mapping[str, Any]], RecordComparison],
    ) -> None:
        self.path, self.status, self._compare = path, status, compare

    @functools.cached_property
    def comparison(self) -> RecordComparison:
        """How the new run differs from it. Reads its record."""
        return self._compare(recorded(self.path))

    @property
    def is_unfinished(self) -> bool:
        """Whether a start resumes it by default: it was cut off, but not by the user's code."""
        status = self.status["status"]
        is_cut = status == "failed" and self.status.get("resumable", True)
        return status in ("running", "interrupted") or is_cut

    @property
    def may_resume(self) -> bool:
        """Whether it can be resumed on request."""
        return self.is_unfinished or self.status["status"] in ("failed", "pruned")

    @property
    def is_finished(self) -> bool:
        """Whether it has a result."""
        return self.status["status"] in ("finished", "stopped")

    def described(self) -> str:
        """Returns a short text with its name and how it ended."""
        status, reason = self.status["status"], self.status.get("reason") or ""
        ended = {"running": "was killed", "failed": "failed"}.get(status, f"was {status}")
        step = self.status.get("step")
        at = "" if step is None else f" at step {step}"
        return f"{self.path.name}, which {ended}{at}{f' ({reason})' if reason else ''}"


class EarlierRuns(NamedTuple):
    """The earlier runs that a start can use.

    Attributes:
        finished: the finished run that equals the new one, or None.
        candidates: runs to resume, best first. The first that is not in use is resumed.
        remark: why no earlier run is resumed; empty if that needs no explanation.
    """

    finished: Candidate | None = None
    candidates: Sequence[Candidate] = ()
    remark: str = ""


def find_candidates(
    directory: RunDirectory, compare: Callable[[Mapping[str, Any]], RecordComparison]
) -> list[Candidate]:
    """Returns the latest earlier runs of a name that have a readable status, newest first.

    Raises:
        RunDirectoryError: the directory of the runs cannot be read.
    """
    candidates = []
    for path in directory.versions()[:_MAX_CANDIDATES]:
        status = read_status(path)
        if status is not None:
            candidates.append(Candidate(path, status, compare))
    return candidates


def choose(candidates: Sequence[Candidate], seat: Seat, *, must: bool, rerun: bool) -> EarlierRuns:
    """Chooses among the earlier runs of a name.

    If the same run has finished, older ones are ignored, unless its program was killed.

    Args:
        candidates: the earlier runs, newest first.
        seat: the position of the new run in its program.
        must: whether a run must be resumed, whatever has changed.
        rerun: whether to train again although the run has finished.
    """
    own = [each for each in candidates if each.status.get("key") == seat.key]
    last = max((n for n, each in enumerate(own) if _counts(each, seat)), default=-1)
    same: list[Candidate] = []
    for each in own[: last + 1]:
        if each.comparison.changes:
            continue
        standing = seat.standing(each.status)
        in_place = seat.key is not None or (standing == "open" and seat.is_of(each.status))
        if each.may_resume if must else each.is_unfinished:
            if standing == "alive" and seat.key is None:
                continue
            same = [each, *same] if in_place else [*same, each]
            if in_place:
                break
        elif in_place and each.is_finished and not (rerun or each.comparison.doubts):
            return EarlierRuns(finished=each)
        elif standing == "closed":
            break
    if must:
        ended = next((n for n, each in enumerate(own) if not each.may_resume), None)
        others = [each for each in own[:ended] if each not in same]
        return EarlierRuns(candidates=[*same, *others])
    return EarlierRuns(candidates=same, remark="" if same else _remark(own, seat))


def _counts(candidate: Candidate, seat: Seat) -> bool:
    """Whether an earlier run is usable. Older ones need not be compared."""
    if candidate.may_resume or not candidate.is_finished:
        return candidate.may_resume
    return seat.key is not None or seat.standing(candidate.status) == "open"


def check_changes(candidate: Candidate, *, allowed: bool) -> None:
    """Checks that the changes to a resumed run are allowed.

    Raises:
        CheckpointError: there are changes, and `allowed` is False; the message lists them.
    """
    changes = candidate.comparison.changes
    if changes and not allowed:
        listed = "".join(f"\n  {each}" for each in changes)
        raise CheckpointError(
            f"resume='must' resumes only the same run, but {candidate.path} differs:"
            f"{listed}\nRevert the changes, pass allow_changes=True to resume it anyway, or "
            "resume='auto' to start a new run."
        )


def has_only_failed(path: Path) -> bool:
    """Whether a run failed before its first checkpoint."""
    status = read_status(path) or {"status": "running"}
    return status["status"] == "failed" and not CheckpointStore(path / "checkpoints").steps()


def _remark(candidates: Sequence[Candidate], seat: Seat) -> str:
    """Returns why a usable run is not resumed: the one in the same position, or the newest.

    Runs before one that finished normally are ignored.
    """

    def is_recent(each: Candidate) -> bool:
        return not (each.is_finished and seat.standing(each.status) == "closed")

    recent = itertools.takewhile(is_recent, candidates)
    dead = [each for each in recent if seat.standing(each.status) != "alive"]
    in_place = [
        each for each in dead if seat.is_of(each.status) and seat.standing(each.status) == "open"
    ]
    newest = dead[:1] if dead and dead[0].may_resume else []
    for each in in_place or newest:
        changes = [*each.comparison.changes, *each.comparison.doubts]
        if changes:
            return f"a new run instead of {each.described()}: {'; '.join(changes)}"
        if each.may_resume and not each.is_unfinished:
            return f"a new run instead of {each.described()}; resume='must' resumes that one"
    return ""
