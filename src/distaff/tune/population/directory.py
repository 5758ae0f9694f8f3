"""The directory of a population, from which it resumes; each member is a run below it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from distaff.core.config.encoding import to_json
from distaff.execution.placement import like
from distaff.metrics import as_json
from distaff.run.directory.environment import describe
from distaff.run.directory.protocol import Recording, recorded
from distaff.run.directory.recording import make_recording
from distaff.run.directory.run_directory import RunDirectory
from distaff.trainer.module import TrainerModule
from distaff.trainer.trials import PreparedRun
from distaff.tune.population.member import TrainedMember
from distaff.tune.population.member_files import MemberFiles, name_of
from distaff.tune.population.settings import Setting
from distaff.tune.population.training import PopulationRun

KEY = "population"
_FILE = "population.json"

_SAVE_SECONDS = 1.0
"""Least time between two checkpoints of epochs that are short."""

_AT_ONCE = 16
"""Checkpoints of members that are written at the same time."""


def recording_of(trainer: TrainerModule) -> Recording:
    """Returns the recording of a population below `<root>/<name>/population`."""
    name = f"{name_of(trainer)}/{KEY}"
    return make_recording(trainer.config, name, (), resume=trainer.config.resume)


class PopulationDirectory:
    """Saves a population while it trains, and writes its members.

    Args:
        prepared: the prepared run of one member.
        run: trains the members.
        settings: the members.
        indices: their indices among all members, which name their directories.
        extra: further entries of the record, which must be equal to resume.
    """

    def __init__(
        self,
        prepared: PreparedRun,
        run: PopulationRun,
        settings: Sequence[Setting],
        indices: Sequence[int],
        extra: dict[str, Any],
    ) -> None:
        self._prepared, self._run, self._settings = prepared, run, settings
        self._indices, self._saved_at = indices, -np.inf
        self._recording = prepared.workspace.recording
        self._files: list[MemberFiles] = []
        members = [
            {"index": index, "seed": each.seed, "settings": to_json(dict(each.values))}
            for index, each in zip(indices, settings, strict=True)
        ]
        self.record = {
            **prepared.run.recorder.record,
            "options": to_json(settings[0].trainer.config),
            "population": {**extra, "form": run.form, "members": members},
        }

    @contextmanager
    def opened(self, show: Callable[[str], None], key: str = KEY) -> Generator[None]:
        """Opens the directory, and restores a population that was interrupted or has finished.

        Args:
            show: shows a line.
            key: the name by which a later start finds it.

        Raises:
            CheckpointError: its checkpoint cannot be read.
            RunDirectoryError: the directory cannot be written.
        """
        recording, subject = self._recording, self._prepared.preparation.subject
        done = recording.finished(self.record, subject, key=key, rerun=False)
        if done is not None:
            self._restore(recording.store.latest())
            self._read_logs()
            show(f"{done.path} has already finished; loading its result without training")
            yield
            return
        with recorded(recording, self.record, {}, self._outcome, subject):
            if recording.path is not None:
                self._begin(recording.path, show)
            yield

    def _begin(self, path: Path, show: Callable[[str], None]) -> None:
        """Writes the first files, and restores the checkpoint to resume from."""
        about = {"distaff": self.record["distaff"], **self.record["population"]}
        RunDirectory.open(path).write_json(_FILE, about)
        for setting, place in zip(self._settings, self._places(path), strict=True):
            place.mkdir(parents=True, exist_ok=True)
            directory, is_first = RunDirectory.open(place), not self._files
            self._files.append(MemberFiles(directory, setting, self.record, is_first=is_first))
        environment = describe()
        logs = [files.begin(environment) for files in self._files]
        found, positions = self._recording.found, [0] * len(logs)
        if found is not None:
            positions = self._restore(found.step)
            self._recording.confirm(self.record)
            show(found.text(self._run.epoch))
        elif self._recording.remark:
            show(self._recording.remark)
        for log, position in zip(logs, positions, strict=True):
            log.resume(self._run.step, position)
        self._read_logs()
        for member, log in zip(self._run.members, logs, strict=True):
            member.log = log

    @property
    def paths(self) -> list[Path] | None:
        """The directories of the members once it is open; None if nothing is written."""
        path = self._recording.path
        return None if path is None else self._places(path)

    def _places(self, path: Path) -> list[Path]:
        return [path / "members" / f"{index:04d}" for index in self._indices]

    def _read_logs(self) -> None:
        assert self._recording.path is not None
        for member, place in zip(
            self._run.members, self._places(self._recording.path), strict=True
        ):
            member.read_log(place)

    def _restore(self, step: int | None) -> list[int]:
        """Restores a checkpoint, and returns the lengths of the logs of the members."""
        assert step is not None
        store, wanted = self._recording.store, self._run.arrays()
        info = store.info(step)
        self._run.restore(info, like(store.load(step, wanted), wanted))
        return [int(each["log"]) for each in info["members"]]

    def save(self, *, is_last: bool) -> None:
        """Saves the population at the end of an epoch, unless it was saved just before."""
        recording, now = self._recording, time.monotonic()
        if recording.path is None or (now < self._saved_at + _SAVE_SECONDS and not is_last):
            return
        self._saved_at = now
        facts = {**self._run.facts(), "record": self.record, "provisional": False}
        recording.store.save(self._run.step, self._run.arrays(), facts)

    def write(self, members: Sequence[TrainedMember]) -> tuple[TrainedMember, ...]:
        """Writes the members as runs, and returns them with their directories."""
        path = self._recording.path
        if path is None:
            return tuple(members)
        pairs = list(zip(self._files, members, strict=False))
        for start in range(0, len(pairs), _AT_ONCE):
            some = pairs[start : start + _AT_ONCE]
            for files, member in some:
                files.save(member)
            for files, member in some:
                files.end(member)
        places = self._places(path)
        return tuple(x._replace(path=place) for x, place in zip(members, places, strict=True))

    def _outcome(self) -> dict[str, Any]:
        """Returns what `status.json` of the population says, as strict JSON."""
        members = self._run.members
        names = dict.fromkeys(n for each in members for n in each.last_metrics)
        values = {n: [x.last_metrics[n] for x in members if n in x.last_metrics] for n in names}
        means = {n: np.mean(x) for n, x in values.items() if not any(map(np.ndim, x))}
        return {
            "status": "finished",
            "reason": "",
            "step": self._run.step,
            "epoch": self._run.epoch,
            "metrics": as_json(means),
            "members": ["finished" if x.is_running else x.status for x in members],
        }
