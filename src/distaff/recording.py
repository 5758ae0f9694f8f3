"""Recording: what a run leaves behind, and the one place that opens and closes it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from distaff.checkpoint import CheckpointStore, MemoryStore, NullStore, Store
from distaff.loggers import FilesLogger, JsonlLogger, Logger, ManyLoggers, NullLogger
from distaff.run_directory import RunDirectory

_log = logging.getLogger("distaff")


class Recording(Protocol):
    """The outlets of a run. Nothing is written before `open`.

    `throughput` is apart from `logger`, which equal runs write equally.
    """

    logger: ManyLoggers
    throughput: Logger
    store: Store

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

    @property
    def path(self) -> Path | None:
        """None."""
        return None

    def open(self, record: Mapping[str, Any], texts: Mapping[str, str]) -> None:
        """Forgets the checkpoints of the run before, and hands the configuration to the loggers."""
        self.store = MemoryStore()
        self.logger.log_config(record)

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
        keep_last: newest checkpoints to keep, beside the best.
    """

    def __init__(
        self, directory: RunDirectory, loggers: Sequence[Logger] = (), *, keep_last: int = 1
    ) -> None:
        self.directory = directory
        self.logger = ManyLoggers(
            JsonlLogger(lambda: directory.location / "metrics.jsonl"),
            FilesLogger(lambda: directory.location),
            *loggers,
        )
        self.throughput: Logger = JsonlLogger(lambda: directory.location / "throughput.jsonl")
        self.store: Store = NullStore()
        self._keep_last = keep_last
        self._closing = ExitStack()

    @property
    def path(self) -> Path | None:
        """The run's directory, once it is open."""
        return self.directory.path if self.directory.created else None

    def open(self, record: Mapping[str, Any], texts: Mapping[str, str]) -> None:
        """Reserves the directory, and writes configuration, environment and status.

        Raises:
            RunDirectoryError: it cannot be written.
        """
        self.directory.check_writable()
        self.directory.create()
        self.directory.write_json("config.json", record)
        self.directory.write_environment()
        self.directory.set_status("running")
        for name, content in texts.items():
            self.directory.write_text(name, content)
        self._closing.enter_context(self.directory.open_log())
        self.store = CheckpointStore(
            self.directory.location / "checkpoints", keep_last=self._keep_last
        )
        self.logger.log_config(record)
        _log.info("run %s", self.path)

    def save_metrics(self, name: str, metrics: Mapping[str, Any]) -> None:
        """Writes `metrics/<name>.json`, whole or not at all."""
        self.directory.write_json(f"metrics/{name}.json", metrics)

    def close(self, status: str, **facts: Any) -> None:
        """Finishes checkpoints, loggers and log file in this order, then writes the status.

        A recording that could not be opened has only loggers to close.

        Raises:
            CheckpointError: the last checkpoint could not be written; the status is then `failed`.
        """
        if not self.directory.created:
            self.logger.close(status)
            return
        _log.info("%s at step %s", status, facts.get("step"))
        try:
            with self._closing as closing:
                closing.callback(self.logger.close, status)
                closing.callback(self.throughput.close, status)
                closing.callback(self.store.close)
        except BaseException:
            self.directory.set_status("failed", **facts)
            raise
        self.directory.set_status(status, **facts)


def make_recording(
    root: str | None, name: str, loggers: Sequence[Logger], *, keep_last: int
) -> Recording:
    """Returns the recording of a run below `root`, or one that writes nothing if that is None."""
    if root is None:
        return NullRecording(loggers)
    return DirectoryRecording(RunDirectory(root, name), loggers, keep_last=keep_last)


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
        recording.close(**{**outcome(), "status": status, "reason": reason})
        raise
    recording.close(**outcome())
