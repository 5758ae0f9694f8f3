"""On-disk cache of measured choices."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from distaff.core.files import write_whole

_MAX_ENTRIES = 256
_MAX_BYTES = 2**20
_MAX_AGE_SECONDS = 30 * 24 * 3600.0
_ADDRESS = re.compile(r"0x[0-9a-f]+")


class Entry:
    """One entry of the cache. An unreadable file counts as empty, and failed writes are ignored.

    The file is a JSON object of entries by key, and can be deleted at any time. If two processes
    write at the same time, the last one wins, and the other choice is measured again.

    Args:
        file: accessible to its owner only; None to disable.
        key: identifies the choice.
        clock: returns the seconds since 1970.
    """

    def __init__(
        self, file: Path | None, key: str, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._file, self._key, self._clock = file, key, clock

    def read(self) -> Any:
        """Returns the value, as JSON; None if it is missing or older than 30 days."""
        return self._entries().get(self._key, {}).get("value")

    def write(self, value: Any) -> None:
        """Writes a value, and drops the oldest entries if there are more than 256."""
        if self._file is None:
            return
        entries = {**self._entries(), self._key: {"saved": self._clock(), "value": value}}
        newest = sorted(entries, key=lambda key: entries[key]["saved"])[-_MAX_ENTRIES:]
        text = json.dumps({key: entries[key] for key in newest}, indent=1)
        with suppress(OSError):
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(self._file, text, mode=0o600)

    def _entries(self) -> dict[str, dict[str, Any]]:
        if self._file is None:
            return {}
        try:
            read = json.loads(_read(self._file))
        except (OSError, ValueError, RecursionError):
            return {}
        entries = read if isinstance(read, dict) else {}
        return {key: entry for key, entry in entries.items() if self._is_valid(entry)}

    def _is_valid(self, entry: Any) -> bool:
        saved = entry.get("saved") if isinstance(entry, dict) else None
        is_time = isinstance(saved, float | int)
        return is_time and 0 <= self._clock() - saved <= _MAX_AGE_SECONDS


def program_key(jaxpr: Any, *further: Any) -> str:
    """Returns a digest of a program, this machine, and the versions of the software involved.

    Args:
        jaxpr: the program; its text includes the shapes and dtypes of all arrays, and the mesh.
        *further: other values on which the choice depends, as JSON.
    """
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processes = jax.process_count(), jax.device_count()
    versions = [importlib.metadata.version(name) for name in ("distaff", "jax", "jaxlib")]
    machine = [device.platform, device.device_kind, os.cpu_count(), cores, _processor(), processes]
    flags = os.environ.get("XLA_FLAGS", "")
    parts = [_ADDRESS.sub("0x", str(jaxpr)), versions, machine, flags, further]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _processor() -> str:
    """Returns the CPU model, because machines may share a home directory."""
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        return found[1] if found else ""
    return platform.processor()


def _read(file: Path) -> bytes:
    """Returns the content of a regular file that this user owns, of a plausible size.

    Raises:
        OSError: otherwise, or if it cannot be read.
    """
    # Do not follow a link, nor wait for the other end of a pipe.
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with open(os.open(file, os.O_RDONLY | flags), "rb") as opened:
        status = os.fstat(opened.fileno())
        is_own = not hasattr(os, "getuid") or status.st_uid == os.getuid()
        if not (stat.S_ISREG(status.st_mode) and is_own and status.st_size <= _MAX_BYTES):
            raise OSError(f"{file} is not a regular file of this user, or is too large.")
        return opened.read()
