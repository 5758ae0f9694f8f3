"""`initialize`: makes this process one of several that train together."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import jax

from distaff.core import optional
from distaff.core.config.durations import Duration, seconds_of
from distaff.core.launched import COUNT, HEARTBEAT, INDEX, START_TIMEOUT
from distaff.distributed.failure import leave_on_errors
from distaff.distributed.gpus import gpus_of, idle_gpus, visible_gpus
from distaff.distributed.launchers import LAUNCHER, RAY, ProcessPlace, checked, place_of
from distaff.errors import ConfigError
from distaff.execution.allocator import has_started, on_cpu_alone

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    local_device_ids: Sequence[int] | None = None,
    heartbeat: Duration | None = None,
    start_timeout: Duration | None = None,
) -> None:
    """Makes this process one of several that train together, through `jax.distributed`.

    Call it first in the program, before anything that starts JAX, in every process. It needs no
    arguments under `distaff launch`, Slurm, Open MPI, Kubernetes and Ray Train, and on TPU pods.
    Without a launcher, the program runs in one process.

    It prints which process this is, and a warning if GPUs of the machine stay idle. From then on,
    an exception that nobody catches ends the process right after its traceback: otherwise all
    processes would wait for each other for minutes. Raise an exception rather than call
    `sys.exit(1)`, which has to wait.

    Args:
        coordinator_address: host and port of process 0, such as `"10.0.0.1:1234"`. Needed, with
            the next two, only without a launcher.
        num_processes: number of processes.
        process_id: index of this process, from 0.
        local_device_ids: indices of the devices that this process uses. By default the processes
            of a machine share its GPUs evenly.
        heartbeat: time without a sign of life after which JAX ends the job; 10 s by default.
        start_timeout: time in which all processes must have called this; 5 minutes by default.
            The process then ends with status 1 and names what to check.

    Raises:
        ConfigError: it was called before, JAX has started, or the launcher's variables are
            incomplete or left over.
    """
    given = coordinator_address, num_processes, process_id
    is_given = any(each is not None for each in given)
    place = _given(*given) if is_given else _in_ray() or place_of(os.environ)
    if jax.distributed.is_initialized():
        if place is not None and place.launcher in (LAUNCHER, RAY):
            return  # the command has done it before it called the recipe; so has Ray's JaxTrainer
        raise ConfigError(
            "This process has joined the others already. Call distaff.distributed.initialize() or "
            "jax.distributed.initialize() once, at the start of the program."
        )
    if place is None:
        if _may_be_tpu() and _join(
            ProcessPlace("TPU pod"), local_device_ids, heartbeat, start_timeout
        ):
            return
        print("distaff: one process", file=sys.stderr, flush=True)
        return
    _join(place, local_device_ids, heartbeat, start_timeout)


def check_joined() -> None:
    """Checks that a process of `distaff launch` has called `initialize`.

    Raises:
        ConfigError: it has not, and would train a model of its own.
    """
    if os.environ.get(COUNT, "1") == "1" or jax.distributed.is_initialized():
        return
    raise ConfigError(
        f"This is process {os.environ.get(INDEX)} of {os.environ[COUNT]}, but it has not joined "
        "the others. Call distaff.distributed.initialize() at the start of the program."
    )


def _in_ray() -> ProcessPlace | None:
    """Returns the place of a worker of Ray Train; None outside of it."""
    if "ray.train" not in sys.modules:
        return None
    return optional.load("deployment.ray", extra="ray").place()


def _given(address: str | None, count: int | None, index: int | None) -> ProcessPlace:
    if address is None or count is None or index is None:
        raise ConfigError(
            "coordinator_address, num_processes and process_id belong together; got "
            f"{address!r}, {count!r} and {index!r}. Pass all three, or none under a launcher."
        )
    return checked(ProcessPlace("process_id", "deactivate", address, count, index))


def _join(
    place: ProcessPlace,
    devices: Sequence[int] | None,
    heartbeat: Duration | None,
    start_timeout: Duration | None,
) -> bool:
    """Joins the others and reports it; returns whether there are any."""
    if has_started():
        raise ConfigError(
            "JAX has started, so this process cannot join others any more. Call "
            "distaff.distributed.initialize() at the start of the program, before any JAX array."
        )
    visible = visible_gpus(os.environ)
    used = gpus_of(place, visible, os.environ) if devices is None else list(devices)
    seconds = _seconds(start_timeout, "start_timeout", START_TIMEOUT, 300.0)
    options: dict[str, Any] = {
        "local_device_ids": used,
        "cluster_detection_method": place.method,
        "heartbeat_timeout_seconds": _seconds(heartbeat, "heartbeat", HEARTBEAT, 10.0),
        "initialization_timeout": seconds + 60,  # JAX aborts then; see _deadline
    }
    if place.address is not None:
        options |= {
            "coordinator_address": place.address,
            "num_processes": place.count,
            "process_id": place.index,
        }
        if place.address.rpartition(":")[0] in _LOOPBACK:  # else all interfaces
            options["coordinator_bind_address"] = place.address
    if place.launcher == LAUNCHER:  # which passes SIGTERM to every process
        jax.config.update("jax_enable_preemption_service", False)
    try:
        with _deadline(place, seconds):
            jax.distributed.initialize(**options)
    except ValueError as error:
        if place.launcher == "TPU pod":
            return False
        raise ConfigError(_unknown(place, error)) from error
    leave_on_errors()
    _report(place, visible, used)
    return True


def _report(place: ProcessPlace, visible: int, used: Sequence[int] | None) -> None:
    """Prints which process this is, from the first one, and whether GPUs of a machine are idle."""
    if place.index == 0:
        count = f"process 0 of {place.count}" if place.count else "process 0"
        gpus = ""
        if visible:
            gpus = f", {1 if used is None else len(used)} of the {visible} GPUs of this machine"
        print(
            f"distaff: {count} on {socket.gethostname()} ({place.launcher}){gpus}",
            file=sys.stderr,
            flush=True,
        )
    if warning := idle_gpus(place, visible, used):
        print(warning, file=sys.stderr, flush=True)


def _unknown(place: ProcessPlace, error: ValueError) -> str:
    remedy = ""
    if place.launcher == "Kubernetes":
        remedy = (
            ' Install the package "kubernetes", or set the variables of '
            "distaff.distributed.initialize() in the job."
        )
    return f"JAX could not join the processes of {place.launcher}: {error}{remedy}"


@contextmanager
def _deadline(place: ProcessPlace, seconds: int) -> Generator[None]:
    """Ends the process with a plain message if the block takes too long: JAX would abort."""
    done = threading.Event()

    def wait() -> None:
        if not done.wait(seconds):
            which = "This process" if place.index is None else f"Process {place.index}"
            where = f" at {place.address}" if place.address else ""
            print(
                f"distaff: {which} waited {seconds} s for the others{where}. Check the logs of the "
                "others: each must call distaff.distributed.initialize(), and reach the address "
                "of process 0. A larger start_timeout waits longer.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)

    threading.Thread(target=wait, daemon=True, name="distaff-start").start()
    try:
        yield
    finally:
        done.set()


def _seconds(value: Duration | None, name: str, variable: str, default: float) -> int:
    chosen = os.environ.get(variable, default) if value is None else value
    return max(1, round(seconds_of(chosen, name)))


def _may_be_tpu() -> bool:
    return not on_cpu_alone() and importlib.util.find_spec("libtpu") is not None
