"""Writes a report into the directory of a run when it ends."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager

from distaff.core.files import write_whole
from distaff.report import IMAGE_BYTES
from distaff.report.facts import gather
from distaff.report.page import page
from distaff.run.directory.protocol import Recording

_log = logging.getLogger("distaff")

REPORT = "report.html"


@contextmanager
def saved_report(recording: Recording, enabled: bool) -> Generator[None]:
    """Writes `report.html` into the run directory at exit, however the run ended.

    Enter it before the recording is opened, so that the status of the run is written by then. A
    report that cannot be written is a warning.
    """
    try:
        yield
    finally:
        if enabled and recording.path is not None:
            target = recording.path / REPORT
            try:
                write_whole(target, page(gather([recording.path], IMAGE_BYTES)))
            except Exception as error:
                _log.warning("%s cannot be written: %s: %s", target, type(error).__name__, error)
