"""Shares the GPUs of a machine among its processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from distaff.core.launched import LOCAL_COUNT
from distaff.distributed.launchers import ProcessPlace
from distaff.errors import ConfigError
from distaff.execution.allocator import on_cpu_alone


def visible_gpus(environ: Mapping[str, str]) -> int:
    """Returns the number of CUDA devices that JAX can use here; does not start its backend."""
    if on_cpu_alone():
        return 0
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return len([each for each in listed.split(",") if each.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def gpus_of(place: ProcessPlace, visible: int, environ: Mapping[str, str]) -> list[int] | None:
    """Returns the GPUs of a process, as indices into those that CUDA shows; None leaves it to JAX.

    JAX gives a process of Slurm or Open MPI one GPU, also if it is the only one of its node. Here
    it gets its equal share, or all GPUs that the launcher has bound to it.

    Args:
        place: the place of the process.
        visible: number of GPUs that CUDA shows to it.
        environ: the environment.

    Raises:
        ConfigError: `distaff launch` has started a number of processes that does not divide them.
    """
    count, index = place.local_count, place.local_index
    if not visible or count is None or index is None:
        return None
    if LOCAL_COUNT in environ and visible % count:
        raise ConfigError(
            f"{count} processes cannot share {visible} GPU(s) evenly. Start a number of processes "
            "that divides them, or set --devices-per-process to use the CPU."
        )
    text = environ.get("SLURM_GPUS_ON_NODE", "")
    total = int(text) if text.isdecimal() else visible
    if count == 1 or visible < max(total, count):
        return list(range(visible))
    share, rest = divmod(visible, count)
    return None if rest else list(range(index * share, (index + 1) * share))


def idle_gpus(place: ProcessPlace, visible: int, used: Sequence[int] | None) -> str:
    """Returns a warning if GPUs of this machine stay idle; empty from all but its first process."""
    if place.local_index != 0 or place.local_count is None or not visible:
        return ""
    busy = place.local_count * (1 if used is None else len(used))
    if busy >= visible:
        return ""
    return (
        f"distaff: {visible - busy} of {visible} GPUs of this machine are idle. Start one process "
        "per machine, or a number that divides its GPUs."
    )
