"""The files and loggers that a run in a directory writes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

from distaff.checkpoint import Store
from distaff.errors import RunDirectoryError
from distaff.loggers import FilesLogger, JsonlLogger, Logger, ManyLoggers, TolerantLogger
from distaff.loggers.tolerant import is_of_storage
from distaff.run.directory.run_directory import RunDirectory
from distaff.run.directory.run_files import RunFiles
from distaff.run.directory.run_log import open_log

_STATES = "loggers.json"


class Outlets:
    """The files and loggers of a run.

    Args:
        directory: the directory of the run; it need not exist yet.
        loggers: the user's loggers.
        warns: whether a storage error, such as a full disk, is only a warning.

    Attributes:
        logger: logs metrics; identical runs write identical files.
        throughput: logs the throughput.
        files: the files of the run.
        status: how the run ended, after `close`.
    """

    def __init__(self, directory: RunDirectory, loggers: Sequence[Logger], *, warns: bool) -> None:
        self.files = RunFiles(directory, warns=warns)
        own: list[Any] = [
            JsonlLogger(lambda: directory.path / "metrics.jsonl"),
            FilesLogger(lambda: directory.path),
            JsonlLogger(lambda: directory.path / "throughput.jsonl"),
        ]
        if warns:
            own = [TolerantLogger(each, "on_failed_save", is_of_storage) for each in own]
        self.logger = ManyLoggers(*own[:2], *loggers)
        self.throughput: Logger = own[2]
        self._directory = directory
        self.status = ""
        self._states: dict[str, Any] = {}
        self._closing = ExitStack()

    def open(self, texts: Mapping[str, str], *, is_taken: bool) -> None:
        """Writes status, environment and texts, and opens the log.

        Raises:
            RunDirectoryError: a file cannot be written.
        """
        path = self._directory.path
        self.files.write("status.json", partial(self._directory.set_status, "running"))
        self.files.write("env.json", self._directory.write_environment)
        for name, content in texts.items():
            self.files.write_text(name, content)
        self.files.write("log.txt", lambda: self._closing.enter_context(open_log(path)))
        if is_taken:
            with suppress(RunDirectoryError):  # no logger has a state
                self.logger.set_state(self._directory.read_json(_STATES))

    def keep_states(self) -> None:
        """Saves the states of the loggers, so that the next start continues their runs."""
        states = self.logger.get_state()
        if states and states != self._states:
            self._states = states
            self.files.write_json(_STATES, states)

    def close(self, store: Store, status: str, facts: Mapping[str, Any]) -> None:
        """Closes the store, the loggers and the log, and always writes the status.

        Args:
            store: the checkpoint store.
            status: how the run ended. It becomes "failed" if the last checkpoint cannot be
                written, but not if a logger cannot be closed.
            facts: further entries of `status.json`.

        Raises:
            CheckpointError: the last checkpoint could not be written.
            Exception: an error raised by a logger.
        """
        ended = [status]
        with ExitStack() as last:
            last.callback(lambda: self._end(store, ended[0], facts))
            self.keep_states()
            with self._closing as closing:
                closing.callback(self.logger.close, status)
                closing.callback(self.throughput.close, status)
                try:
                    store.close()
                except BaseException:
                    ended[:] = ["failed"]
                    raise

    def _end(self, store: Store, status: str, facts: Mapping[str, Any]) -> None:
        known = dict(facts)
        with suppress(OSError):  # drop a best model that could not be written
            best = known.get("best")
            if best is not None and best["step"] not in store.steps():
                known["best"] = None
        self.status = status
        self.files.write("status.json", partial(self._directory.set_status, status, **known))
