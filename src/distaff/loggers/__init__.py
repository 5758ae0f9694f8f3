"""Loggers: JSONL, CSV, console, memory, files, and third-party services.

`TensorBoardLogger`, `WandbLogger`, `MlflowLogger` and `TrackioLogger` are available here too; each
needs the extra of its name, `pip install "distaff[wandb]"`, and is imported on first use.
"""

from __future__ import annotations

from typing import Any

from distaff.core import optional
from distaff.errors import nearest
from distaff.loggers.console import ConsoleLogger
from distaff.loggers.csv import CsvLogger
from distaff.loggers.files import FilesLogger
from distaff.loggers.jsonl import JsonlLogger
from distaff.loggers.many import ManyLoggers
from distaff.loggers.memory import Medium, MemoryLogger, Record
from distaff.loggers.protocol import (
    GroupedLogger,
    Logger,
    MediaLogger,
    NullLogger,
    ResumingLogger,
    StatefulLogger,
)
from distaff.loggers.tolerant import TolerantLogger

__all__ = [
    "ConsoleLogger",
    "CsvLogger",
    "FilesLogger",
    "GroupedLogger",
    "JsonlLogger",
    "Logger",
    "ManyLoggers",
    "MediaLogger",
    "Medium",
    "MemoryLogger",
    "NullLogger",
    "Record",
    "ResumingLogger",
    "StatefulLogger",
    "TolerantLogger",
]

_INTEGRATIONS = {
    "MlflowLogger": "mlflow",
    "TensorBoardLogger": "tensorboard",
    "TrackioLogger": "trackio",
    "WandbLogger": "wandb",
}


def __getattr__(name: str) -> Any:
    """Imports a third-party logger; raises MissingExtraError if it is not installed."""
    if name in _INTEGRATIONS:
        integration = _INTEGRATIONS[name]
        return getattr(optional.load(integration, extra=integration), name)
    known = (*__all__, *_INTEGRATIONS)
    raise AttributeError(f"{__name__} has no attribute {name!r}. {nearest(name, known)}")
