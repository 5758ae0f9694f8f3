"""Barriers across processes, with a timeout."""

from __future__ import annotations

import re

import jax
from jax.experimental import multihost_utils

from distaff.core.config.durations import Duration, seconds_of
from distaff.core.quiet import quiet
from distaff.errors import BarrierError


def barrier(name: str, timeout: Duration = "10m") -> None:
    """Waits until every process has called this. Returns at once with one process.

    The processes wait at the coordinator of `jax.distributed`, through Orbax's barrier; no device
    is involved. If `jax.distributed` is not initialized (possible on TPU pods), the devices
    synchronize instead, without a timeout.

    Args:
        name: the same in all processes. It can be reused.
        timeout: the longest time to wait; see `seconds_of`.

    Raises:
        BarrierError: a process did not arrive in time. The message names the missing processes if
            they are known.
        ConfigError: `timeout` is not a duration.
    """
    seconds = seconds_of(timeout, "timeout")
    if jax.process_count() == 1:
        return
    if not jax.distributed.is_initialized():
        multihost_utils.sync_global_devices(name)
        return
    with quiet():
        from orbax.checkpoint.multihost import (
            get_barrier_sync_fn,
        )  # slow, and unused with one process

    try:
        get_barrier_sync_fn()(key=name, timeout_ms=max(1, round(1000 * seconds)))
    except jax.errors.JaxRuntimeError as error:
        missing = missing_processes(str(error))
        absent = f"missing: {', '.join(map(str, missing))}" if missing else "it is unknown which"
        raise BarrierError(
            f"All {jax.process_count()} processes must reach the barrier {name!r} within "
            f"{seconds:g} s, but not all did ({absent}; this is process {jax.process_index()}). "
            "Check the log of a missing process: it has failed, hangs, or takes another path "
            f"through the program. {str(error).splitlines()[0]}"
        ) from error


def missing_processes(message: str) -> tuple[int, ...]:
    """Returns the missing processes that a coordinator's timeout message names.

    Args:
        message: of the error. If many processes are missing, it names only some of them.
    """
    _, _, names = message.partition("timed out task names:")
    found = re.findall(r"^(?:\S*task:)?(\d+)\s*$", names, re.MULTILINE)
    return tuple(sorted({int(index) for index in found}))
