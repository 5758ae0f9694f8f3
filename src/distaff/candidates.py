"""Candidates: which earlier run of a name a start resumes, and why not another one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from distaff.checkpoint import CheckpointStore
from distaff.comparison import Comparison, compared
from distaff.errors import CheckpointError, RunDirectoryError
from distaff.identity import Subject
from distaff.run_directory import STATUSES, RunDirectory

_log = logging.getLogger("distaff")


class Candidate(NamedTuple):
    """An earlier run of the same name.

    Attributes:
        path: its directory, relative where the root is.
        place: its directory, absolute.
        status: what its `status.json` holds.
        comparison: how the run to be differs from it.
    """

    path: Path
    place: Path
    status: Mapping[str, Any]
    comparison: Comparison

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

    def described(self) -> str:
        """Returns in a few words which run it is, and how it ended."""
        status, reason = self.status["status"], self.status.get("reason") or ""
        ended = "was killed" if status == "running" else f"is {status}"
        step = self.status.get("step")
        at = "" if step is None else f" at step {step}"
        return f"{self.path.name}, which {ended}{at}{f' ({reason})' if reason else ''}"


class Choice(NamedTuple):
    """What a start may resume.

    Attributes:
        candidates: the best one first; the first that nobody is using is taken.
        remark: which run it is not, and why; empty where there is nothing to say.
    """

    candidates: list[Candidate]
    remark: str


def found(
    directory: RunDirectory, record: Mapping[str, Any], subject: Subject | None, *, inexact: bool
) -> list[Candidate]:
    """Returns the earlier runs of a name whose status is known, the newest first.

    Raises:
        RunDirectoryError: the directory of all of them cannot be read.
    """
    candidates = []
    for path in directory.versions():
        place = directory.location_of(path)
        status = _read(place, "status.json")
        if status is None:
            continue
        if status.get("status") not in STATUSES:
            _log.warning("%s cannot be resumed: its status is not known", place)
            continue
        comparison = compared(_read(place, "config.json") or {}, record, subject, inexact=inexact)
        candidates.append(Candidate(path, place, status, comparison))
    return candidates


def chosen(candidates: list[Candidate], *, must: bool) -> Choice:
    """Chooses among earlier runs of a name.

    Where one of the same identity has ended, older ones are of the past.

    Args:
        candidates: the newest first.
        must: whether one has to be resumed, whatever differs.
    """
    same, other = [], []
    for each in candidates:
        wanted = each.may_resume if must else each.is_unfinished
        if each.comparison.changes:
            other.append(each)
        elif wanted:
            same.append(each)
        else:
            break
    if must:
        ended = next((n for n, each in enumerate(candidates) if not each.may_resume), None)
        return Choice([*same, *(each for each in candidates[:ended] if each not in same)], "")
    return Choice(same, _remark(candidates, other))


def check_changes(candidate: Candidate, *, allowed: bool) -> None:
    """Checks that a run may be resumed although something has changed.

    Raises:
        CheckpointError: something has, and that is not allowed; all of it is listed.
    """
    changes = candidate.comparison.changes
    if changes and not allowed:
        listed = "".join(f"\n  {each}" for each in changes)
        raise CheckpointError(
            f"resume='must' resumes the same run, and {candidate.path} was another one:{listed}\n"
            "Start the program that made it, pass resume='auto' for a new run, or "
            "allow_changes=True to resume it with these changes."
        )


def has_only_failed(place: Path) -> bool:
    """Whether a run ended by an error, before it had a checkpoint: its record stays as it is."""
    status = RunDirectory.open(place).read_json("status.json")
    return status["status"] == "failed" and not CheckpointStore(place / "checkpoints").steps()


def _remark(candidates: list[Candidate], other: list[Candidate]) -> str:
    """Returns why the newest run that has not finished is not resumed."""
    newest = candidates[0] if candidates else None
    if newest is None or not newest.may_resume:
        return ""
    if newest in other:
        changes = "; ".join(newest.comparison.changes)
        return f"a new run, and not {newest.described()}: {changes}"
    if newest.is_unfinished:
        return ""
    return f"a new run, and not {newest.described()}; resume='must' resumes that one"


def _read(place: Path, name: str) -> dict[str, Any] | None:
    try:
        value = RunDirectory.open(place).read_json(name)
    except RunDirectoryError as error:
        _log.warning("%s cannot be resumed: %s", place, error)
        return None
    return value if isinstance(value, dict) else {}
