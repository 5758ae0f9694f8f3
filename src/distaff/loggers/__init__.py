"""Where the metrics of a run go."""

from __future__ import annotations

from distaff.loggers.jsonl import JsonlLogger
from distaff.loggers.many import ManyLoggers
from distaff.loggers.memory import MemoryLogger, Record
from distaff.loggers.protocol import Logger, NullLogger

__all__ = ["JsonlLogger", "Logger", "ManyLoggers", "MemoryLogger", "NullLogger", "Record"]
