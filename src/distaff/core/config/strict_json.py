"""Reads and writes strict JSON, which has no NaN and no infinities."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

_MAX_FILE_BYTES = 2**26


def dumps(value: Any) -> str:
    """Returns indented JSON text with a final newline; raises ValueError for NaN and infinities."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_decoder = json.JSONDecoder(parse_constant=_reject_constant)


def loads(data: bytes) -> Any:
    """Parses strict JSON in UTF-8, which may be hostile.

    Raises:
        ValueError: the text is not strict JSON, or is nested too deeply.
    """
    try:
        return _decoder.decode(data.decode())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def load(path: Path) -> Any:
    """Reads a JSON file of at most 64 MiB.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is too large, not a regular file, or not strict JSON.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise ValueError("it is not a regular file")
    if status.st_size > _MAX_FILE_BYTES:
        raise ValueError(f"it has {status.st_size} bytes, more than {_MAX_FILE_BYTES}")
    return loads(path.read_bytes())
