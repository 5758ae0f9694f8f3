"""Reads from the environment which launcher has started this process, and as which of how many."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from distaff.core.launched import COORDINATOR, COUNT, INDEX, LOCAL_COUNT
from distaff.errors import ConfigError

LAUNCHER = "distaff launch"
"""The launcher of this package, for messages."""

RAY = "Ray Train"


class ProcessPlace(NamedTuple):
    """The place of a process in its job; a field is None if JAX finds it.

    Attributes:
        launcher: what has started the processes, for messages.
        method: the name of JAX's own detection; "deactivate" if nothing is left to detect. JAX's
            detection of Kubernetes has no name.
        address: host and port of process 0.
        count: number of processes.
        index: index of this process.
        local_count: number of processes on this machine.
        local_index: index of this process among them.
    """

    launcher: str
    method: str | None = None
    address: str | None = None
    count: int | None = None
    index: int | None = None
    local_count: int | None = None
    local_index: int | None = None


def place_of(environ: Mapping[str, str]) -> ProcessPlace | None:
    """Returns the place of this process; None without a launcher, or if it is the only process.

    Raises:
        ConfigError: the variables contradict each other, are incomplete, or are left over.
    """
    if any(name in environ for name in (COORDINATOR, COUNT, INDEX)):
        return _own(environ)
    if "OMPI_COMM_WORLD_SIZE" in environ:
        return _open_mpi(environ)
    if "SLURM_JOB_ID" in environ:
        return _slurm(environ)
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return ProcessPlace("Kubernetes", index=_number(environ, "JOB_COMPLETION_INDEX"))
    if "JAX_COORDINATOR_ADDRESS" in environ:
        raise ConfigError(
            "JAX_COORDINATOR_ADDRESS is set, but no launcher says which process this is, and of "
            f"how many. Set {COUNT} and {INDEX}, too, or unset JAX_COORDINATOR_ADDRESS."
        )
    return None


def _own(environ: Mapping[str, str]) -> ProcessPlace | None:
    address = environ.get(COORDINATOR) or environ.get("JAX_COORDINATOR_ADDRESS")
    missing = [name for name in (COUNT, INDEX) if name not in environ]
    missing += [] if address else [COORDINATOR]
    if missing:
        raise ConfigError(
            f"Several processes need {COORDINATOR}, {COUNT} and {INDEX} in the environment; "
            f"{' and '.join(missing)} is missing. Set all three, or unset all for one process."
        )
    count, index = _number(environ, COUNT), _number(environ, INDEX)
    local = _number(environ, LOCAL_COUNT) if LOCAL_COUNT in environ else None
    launcher = LAUNCHER if local else "the environment"
    return checked(
        ProcessPlace(launcher, "deactivate", address, count, index, local, index if local else None)
    )


def _open_mpi(environ: Mapping[str, str]) -> ProcessPlace | None:
    names = ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")
    count, index, local_count, local_index = (
        _number(environ, f"OMPI_COMM_WORLD_{name}") for name in names
    )
    if count == 1:
        return None
    address = environ.get("JAX_COORDINATOR_ADDRESS")
    if address is None and "OMPI_MCA_orte_hnp_uri" not in environ:
        raise ConfigError(
            "Open MPI from 5.0 on does not set the address of process 0. Pass it: "
            "mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT ..., with the first host of the job and a "
            "free port."
        )
    method = "deactivate" if address else "ompi"
    return checked(
        ProcessPlace("Open MPI", method, address, count, index, local_count, local_index)
    )


def _slurm(environ: Mapping[str, str]) -> ProcessPlace | None:
    tasks = _number(environ, "SLURM_NTASKS") if "SLURM_NTASKS" in environ else 1
    is_in_step = "SLURM_STEP_NODELIST" in environ and "SLURM_PROCID" in environ
    started = _number(environ, "SLURM_STEP_NUM_TASKS") if is_in_step else 1
    if tasks == 1:
        return None
    if started == 1:
        raise ConfigError(
            f"This process is alone in a Slurm job of {tasks} tasks. To start all of them, put "
            "`srun` before the command. To train in one process, such as in an interactive shell, "
            "unset SLURM_NTASKS."
        )
    return checked(
        ProcessPlace(
            "Slurm",
            "slurm",
            count=tasks,
            index=_number(environ, "SLURM_PROCID"),
            local_count=_tasks_of_node(environ),
            local_index=_number(environ, "SLURM_LOCALID"),
        )
    )


def _tasks_of_node(environ: Mapping[str, str]) -> int | None:
    """Returns the number of tasks on this node, from a list such as "2(x3),1"; None if unknown."""
    counts: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            return None
        counts += [int(match[1])] * int(match[2] or 1)
    node = environ.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else None


def checked(place: ProcessPlace) -> ProcessPlace:
    """Returns the place.

    Raises:
        ConfigError: the index is not below the number of processes.
    """
    index, count = place.index, place.count
    if index is not None and count is not None and not 0 <= index < count:
        raise ConfigError(
            f"The index of a process must be from 0 to {count - 1}, for {count} processes; "
            f"{place.launcher} gives {index}."
        )
    return place


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not text.isdecimal():
        raise ConfigError(
            f"The environment variable {name} must be a whole number; it is {text!r}. If it is "
            "left over from another job, unset it."
        )
    return int(text)
