"""Recording: what a run leaves behind, and the one place that opens and closes it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from distaff import checkpoint, config
from distaff.checkpoint import CheckpointStore, MemoryStore, NullStore, Store, forget_after, tidy
from distaff.errors import CheckpointError, RunDirectoryError, RunInUseError
from distaff.loggers import Logger, ManyLoggers, NullLogger, TolerantLogger
from distaff.outlets import Outlets
from distaff.run_directory import RunDirectory
from distaff.run_lock import locked
from distaff.run_version import reserve
from distaff.trainer_config import TrainerConfig

_log = logging.getLogger("distaff")


_HOW_IT_RUNS = {
    f"options.{name}"
    for name in (
        *("log_every_n_steps", "steps_per_call", "table_depth", "root"),
        *("keep_last", "keep_best", "keep_every", "on_failed_save", "on_failed_log"),
        *(
            "enable_progress_bar",
            "debug",
            "recompile",
            "tune_process",
            "check_validation",
            "save_every",
            "stuck_after",
        ),
        *("on_bad_numbers", "on_loss_spike", "spike_threshold", "max_skips", "on_bad_input"),
    )
}
"""Options that lead to the same model, or are what one changes to go on after a bad step."""

_HOW_IT_GOES_ON = (
    *("options.resume", "options.allow_inexact_resume", "options.max_time"),
    "distaff",
)
"""What is not named where it has changed."""


class Found(NamedTuple):
    """What a run goes on from.

    Attributes:
        step: of the checkpoint.
        skipped: what is wrong with the newer ones.
        changes: options that differ from those of the run before it, as `name: old -> new`.
    """

    step: int
    skipped: list[str]
    changes: list[str]

    def text(self, epoch: int) -> str:
        """Returns in a few lines what is gone on from."""
        lines = [f"going on from the checkpoint of step {self.step}, epoch {epoch}"]
        return "\n".join([*lines, *self.skipped, *(f"changed: {each}" for each in self.changes)])


class Recording(Protocol):
    """The outlets of a run. Nothing is written before `open`.

    `throughput` is apart from `logger`, which equal runs write equally. `found` is what the run
    goes on from.
    """

    logger: ManyLoggers
    throughput: Logger
    store: Store
    found: Found | None

    @property
    def path(self) -> Path | None:
        """The run's directory, once it is open; None for a run without."""
        ...

    def open(self, record: Mapping[str, Any], texts: Mapping[str, str]) -> None:
        """Starts to record.

        Args:
            record: the run's resolved configuration.
            texts: what to keep as text files, by file name.
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

    @property
    def path(self) -> Path | None:
        """None."""
        return None

    def open(self, record: Mapping[str, Any], texts: Mapping[str, str]) -> None:
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
        warns: whether a file that the disk does not take is a warning.
    """

    def __init__(
        self,
        directory: RunDirectory,
        loggers: Sequence[Logger] = (),
        *,
        make_store: Callable[[Path], CheckpointStore] = CheckpointStore,
        resume: str | int = "never",
        warns: bool = False,
    ) -> None:
        self.directory = directory
        self.outlets = Outlets(directory, loggers, warns=warns)
        self.logger, self.throughput = self.outlets.logger, self.outlets.throughput
        self.store: Store = NullStore()
        self.found: Found | None = None
        self._make_store, self._resume = make_store, resume
        self._lock, self._is_taken = ExitStack(), False

    @property
    def path(self) -> Path | None:
        """The run's directory, once it is open."""
        return self.directory.path if self.directory.created else None

    def open(self, record: Mapping[str, Any], texts: Mapping[str, str]) -> None:
        """Reserves a directory, or takes that of a run that did not come to its end.

        Then it writes configuration, environment and status.

        Raises:
            RunDirectoryError: it cannot be written, or another run is in it.
            CheckpointError: there is nothing to go on from, and there must be.
        """
        self.directory.check_writable()
        changes = self._take(record)
        changes += self.directory.environment_changes() if self._is_taken else []
        self.store = store = self._make_store(self.directory.path / "checkpoints")
        self.found = self._look(store, changes)
        if self.found is None:
            self.confirm(record)
        self.outlets.open(texts, is_taken=self._is_taken)
        if self._is_taken and self.found is None:
            self.logger.resume(0)  # what a run has logged that was killed before its first save
        self.logger.log_config(record)
        self.outlets.keep_states()
        _log.info("run %s", self.directory.path)

    def _take(self, record: Mapping[str, Any]) -> list[str]:
        """Locks a directory for this run, and returns how its configuration differs from it."""
        if self.directory.created or self._resume == "never":
            reserve(self.directory, self._lock)
            return []
        for place in self.directory.unfinished():
            old = checkpoint.recorded(place)
            changes = _changes(old, record)
            if old.get("first_epoch") != record["first_epoch"]:
                continue
            if self._resume == "auto" and not _is_same_run(changes):
                _log.warning(
                    "%s did not come to its end, and is another run (%s): this one begins anew; "
                    "resume='must' goes on with it all the same",
                    *(place, "; ".join(_shown(changes))),
                )
                continue
            try:
                self._lock.enter_context(locked(place))
            except RunInUseError:
                if self._resume == "auto":
                    continue
                raise
            if place not in self.directory.unfinished() or _has_only_failed(place):
                self._lock.close()  # it came to its end before the lock was ours
                continue
            _check_links(place)
            is_back = isinstance(self._resume, int) and self._resume == _recorded_resume(old)
            self._resume = "must" if is_back else self._resume  # go on, and not back once more
            self.directory.take(place)
            self._is_taken = True
            return _shown(changes)
        if self._resume != "auto":
            raise CheckpointError(
                f"resume={self._resume!r} needs a run of this name that did not come to its end; "
                "there is none. Check root and name, or pass resume='auto' to begin one."
            )
        reserve(self.directory, self._lock)
        return []

    def _look(self, store: CheckpointStore, changes: list[str]) -> Found | None:
        """Returns the checkpoint to go on from."""
        if isinstance(self._resume, int):
            return Found(self._resume, [], changes)
        step, skipped = store.newest_valid()
        tidy(store)
        return None if step is None else Found(step, skipped, changes)

    def confirm(self, record: Mapping[str, Any]) -> None:
        """Writes `config.json`, and puts aside the checkpoints after the one gone back to."""
        if isinstance(self.store, CheckpointStore) and isinstance(self._resume, int):
            forget_after(self.store, self._resume)
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
            self.outlets.close(self.store, status, facts)


def _recorded_resume(record: Mapping[str, Any]) -> Any:
    options = record.get("options")
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


def _has_only_failed(path: Path) -> bool:
    """Whether a run ended by an error, before it had a checkpoint: its record stays as it is."""
    if CheckpointStore(path / "checkpoints").steps():
        return False
    return RunDirectory.open(path).read_json("status.json")["status"] == "failed"


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns what of a run's configuration differs, but for what says how it goes on."""
    was, now = old.get("options"), new.get("options")
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        # An option that the old run did not know yet was at its default.
        defaults = config.to_json(TrainerConfig())
        old = {**old, "options": {**{n: defaults[n] for n in now if n in defaults}, **was}}
    found = config.diff(old, config.to_json(new))
    return {name: values for name, values in found.items() if name not in _HOW_IT_GOES_ON}


def _is_same_run(changes: Mapping[str, Any]) -> bool:
    """Whether the same run may differ so: in how long it is, what it shows, or how it runs."""
    return all(name == "num_epochs" or name in _HOW_IT_RUNS for name in changes)


def _shown(changes: Mapping[str, tuple[Any, Any]]) -> list[str]:
    return [f"{name}: {old!r} -> {new!r}" for name, (old, new) in changes.items()]


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
    directory = RunDirectory(options.root, name)
    warns = options.on_failed_save == "warn"
    return DirectoryRecording(directory, loggers, make_store=make_store, resume=resume, warns=warns)


@contextmanager
def recorded(
    recording: Recording,
    record: Mapping[str, Any],
    texts: Mapping[str, str],
    outcome: Callable[[], dict[str, Any]],
) -> Generator[None]:
    """Opens a recording, and closes it whatever happens.

    Args:
        recording: what to open.
        record: the run's resolved configuration.
        texts: what to keep as text files, by file name.
        outcome: gives `status`, and facts, of a run that came to its end.
    """
    try:
        recording.open(record, texts)
        yield
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        reason = f"{type(error).__name__}: {error}"
        try:
            recording.close(**{**outcome(), "status": status, "reason": reason})
        except Exception as also:
            error.add_note(f"When the run was closed: {type(also).__name__}: {also}")
        raise
    recording.close(**outcome())
