"""Memory of the device: how much is free, and how much a program needs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax

from distaff.errors import ConfigError

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes() -> int:
    """Returns the bytes that are free on the default device; on the CPU, in the host's memory.

    On Linux the limits of a container count, too.

    Raises:
        ConfigError: the backend does not say.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    found = _host_bytes() if device.platform == "cpu" else []
    if not found:
        raise ConfigError(
            f"The memory of this {device.platform} device is not known. Pass limit_bytes, such as "
            "limit_bytes=8 * 2**30 for 8 GiB."
        )
    return min(found)


def program_bytes(compiled: Any) -> int:
    """Returns the bytes that a compiled program needs while it runs.

    These are its arguments, its results except for those in donated memory, and its temporary
    arrays.

    Args:
        compiled: the result of `jax.jit(function).lower(...).compile()`.

    Raises:
        ConfigError: the backend does not say.
    """
    found = compiled.memory_analysis()
    if found is None:
        raise ConfigError("The compiler of this backend does not report the memory of a program.")
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return kept + found.temp_size_in_bytes


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that memory ran out, on the device or on the host."""
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError)
        and ("RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower())
    )


def _host_bytes() -> list[int]:
    """Returns the free bytes of the host, and those that its container leaves, where known."""
    found = []
    try:
        lines = dict(
            line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line
        )
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
    except (OSError, KeyError, ValueError):
        try:
            found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (AttributeError, OSError, ValueError):  # Windows, macOS
            return []
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, taken = ((_CGROUP / name).read_text() for name in (limit, used))
            found.append(max(int(most) - int(taken), 0))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return found
