"""Writes the small files of a run, even if the disk is full for a while."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from distaff.core.warnings import warn
from distaff.errors import RunDirectoryError
from distaff.run.directory.run_directory import RunDirectory

_log = logging.getLogger("distaff")


class RunFiles:
    """Writes files of a run. Files that cannot be written raise an error, or are written later.

    Args:
        directory: the directory of the run.
        warns: whether a storage error is only a warning. The file is then written together with
            the next one that succeeds, with the content it has by then.
    """

    def __init__(self, directory: RunDirectory, *, warns: bool) -> None:
        self._directory, self._warns = directory, warns
        self._waiting: dict[str, Callable[[], object]] = {}

    def write_json(self, name: str, value: Any) -> None:
        """Writes a value as JSON; see `RunDirectory.write_json`."""
        self.write(name, partial(self._directory.write_json, name, value))

    def write_text(self, name: str, text: str) -> None:
        """Writes a text; see `RunDirectory.write_text`."""
        self.write(name, partial(self._directory.write_text, name, text))

    def write(self, name: str, write: Callable[[], object]) -> None:
        """Writes a file, and earlier ones that failed.

        Raises:
            RunDirectoryError: the file cannot be written.
        """
        was_waiting = self._waiting.pop(name, None) is not None
        try:
            write()
        except RunDirectoryError as error:
            if not self._warns or error.__cause__ is None:
                raise
            self._waiting[name] = write
            if not was_waiting:
                warned(error)
            return
        for other, again in list(self._waiting.items()):
            try:
                again()
            except RunDirectoryError:
                return
            del self._waiting[other]


def warned(error: Exception) -> None:
    """Logs a warning for a file that could not be written."""
    text = f"{error} The run continues because on_failed_save='warn'."
    _log.warning("%s", text)
    warn(text, stacklevel=2)
