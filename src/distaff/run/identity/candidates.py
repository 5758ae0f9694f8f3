"""Candidates: which earlier run of a name a start resumes, and why not another one."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distaff.checkpoint import CheckpointStore, recorded
from distaff.errors import CheckpointError
from distaff.run.directory.run_directory import RunDirectory, noted_status
from distaff.run.identity.comparison import RecordComparison
from distaff.run.identity.launch import Seat

_log = logging.getLogger("distaff")


_MOST = 256


class Candidate:
    """An earlier run of the same name.

    Args:
        path: its directory.
        status: what its `status.json` holds.
        compare: compares its record with that of the run to be.
    """

    def __init__(
        self,
        path: Path,
        status: Mapping[str, Any],
        compare: Callable[[Mapping[str, Any]], RecordComparison],
    ) -> None:
        self.path, self.status, self._compare = path, status, compare

    @functools.cached_property
    def comparison(self) -> RecordComparison:
        """How the run to be differs from it; its record is read for that."""
        return self._compare(recorded(self.path))

    @property
    def is_unfinished(self) -> bool:
        """Whether a start resumes it by itself: it was cut off, and not by the user's own code."""
        status = self.status["status"]
        is_cut = status == "failed" and self.status.get("resumable", True)
        return status in ("running", "interrupted") or is_cut

    @property
    def may_resume(self) -> bool:
        """Whether it can be resumed where that is asked for."""
        return self.is_unfinished or self.status["status"] in ("failed", "pruned")

    @property
    def is_finished(self) -> bool:
        """Whether it has a result."""
        return self.status["status"] in ("finished", "stopped")

    def described(self) -> str:
        """Returns in a few words which run it is, and how it ended."""
        status, reason = self.status["status"], self.status.get("reason") or ""
        ended = {"running": "was killed", "failed": "failed"}.get(status, f"was {status}")
        step = self.status.get("step")
        at = "" if step is None else f" at step {step}"
        return f"{self.path.name}, which {ended}{at}{f' ({reason})' if reason else ''}"


class EarlierRuns(NamedTuple):
    """What a start may take up.

    Attributes:
        finished: the run whose result is that of the run to be; None where there is none.
        candidates: those to resume, the best one first: the first that nobody uses is taken.
        remark: which run it is not, and why; empty where there is nothing to say.
    """

    finished: Candidate | None = None
    candidates: Sequence[Candidate] = ()
    remark: str = ""


def found(
    directory: RunDirectory, compare: Callable[[Mapping[str, Any]], RecordComparison]
) -> list[Candidate]:
    """Returns the last earlier runs of a name whose status is known, the newest first.

    Args:
        directory: of the run to be.
        compare: compares the record of an earlier run with that of the run to be.

    Raises:
        RunDirectoryError: the directory of all of them cannot be read.
    """
    candidates = []
    for path in directory.versions()[:_MOST]:
        status = noted_status(path)
        if status is not None:
            candidates.append(Candidate(path, status, compare))
    return candidates


def chosen(candidates: Sequence[Candidate], seat: Seat, *, must: bool, rerun: bool) -> EarlierRuns:
    """Chooses among earlier runs of a name.

    Where the same run has ended, older ones are of the past, unless its program has died.

    Args:
        candidates: the newest first.
        seat: the place of the run to be in its program.
        must: whether one has to be resumed, whatever differs.
        rerun: whether to train again what is finished.
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
    """Whether an earlier run may be taken up: there is no need to compare older ones."""
    if candidate.may_resume or not candidate.is_finished:
        return candidate.may_resume
    return seat.key is not None or seat.standing(candidate.status) == "open"


def check_changes(candidate: Candidate, *, allowed: bool) -> None:
    """Checks that a run may be resumed although something has changed.

    Raises:
        CheckpointError: something has, and that is not allowed; all of it is listed.
    """
    changes = candidate.comparison.changes
    if changes and not allowed:
        listed = "".join(f"\n  {each}" for each in changes)
        raise CheckpointError(
            f"resume='must' resumes the same run only, and {candidate.path} was another one:"
            f"{listed}\nRestore what was changed, pass allow_changes=True to resume it all the "
            "same, or resume='auto' to begin a new run."
        )


def has_only_failed(path: Path) -> bool:
    """Whether a run ended by an error, before it had a checkpoint: its record stays as it is."""
    status = noted_status(path) or {"status": "running"}
    return status["status"] == "failed" and not CheckpointStore(path / "checkpoints").steps()


def _remark(candidates: Sequence[Candidate], seat: Seat) -> str:
    """Returns why a run that could have been taken up is not: that of its place, or the newest.

    Runs before one that has finished in order are of the past.
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
            return f"a new run, and not {each.described()}: {'; '.join(changes)}"
        if each.may_resume and not each.is_unfinished:
            return f"a new run, and not {each.described()}; resume='must' resumes that one"
    return ""
