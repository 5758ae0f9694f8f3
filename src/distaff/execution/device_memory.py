"""Memory of the device: how much is free, and how much a program needs."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax

from distaff.core.config.argument import Argument
from distaff.core.config.options import Options, option
from distaff.core.config.sizes import bytes_of
from distaff.errors import ConfigError

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


_SHARE = 0.9
"""Share of the free memory that a step may need; batches are read ahead into the rest."""


def _fit_memory(name: str, value: Any) -> Any:
    if not isinstance(value, bool):
        bytes_of(value, name)
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitOptions(Options):
    """Whether a run makes its step fit into memory."""

    fit_memory: Argument[bool | int | str] = option(
        False,
        """Whether to make the training step fit into the memory of each device, before the first
        step: if it needs more, as the compiler says, the run sets `remat`, and then `micro_batch`,
        unless you set them yourself. What it chose is shown and recorded, and a resumed run keeps
        it. True takes the memory that is free; a size such as "12 GiB" takes that.""",
        check=_fit_memory,
        resume="same run",
    )


def bytes_for_a_step(fit_memory: bool | int | str, held: int = 0) -> int:
    """Returns the bytes that a training step may need on each device.

    Args:
        fit_memory: as in `FitOptions`; False for the memory that is free.
        held: bytes on a device that the step reuses, such as the bytes of the state.

    Raises:
        ConfigError: the backend does not say how much memory it has.
    """
    if not isinstance(fit_memory, bool):
        return bytes_of(fit_memory)
    devices = jax.local_devices()
    # Simulated devices share the memory of the host.
    shared_by = len(devices) if devices[0].platform == "cpu" else 1
    return max(int(_SHARE * (free_bytes() + held)) // shared_by, 1)


def device_name() -> str:
    """Returns the number and the kind of all devices, such as `"8 x NVIDIA H100"`."""
    return f"{jax.device_count()} x {jax.local_devices()[0].device_kind}"


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
            f"The memory of this {device.platform} device is not known. Pass it: "
            "limit_bytes=8 * 2**30 to find_batch_size, or fit_memory='8 GiB' to a trainer."
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
