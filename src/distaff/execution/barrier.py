"""Barriers: where the processes of a run wait for each other, by name and not for ever."""

from __future__ import annotations

import re

import jax
from jax.experimental import multihost_utils

from distaff.core.config.durations import Duration, seconds_of
from distaff.core.quiet import quiet
from distaff.errors import BarrierError


def barrier(name: str, timeout: Duration = "10m") -> None:
    """Waits until every process is here. With one process it returns at once.

    No device takes part: it is the coordinator of `jax.distributed` that counts, through the
    barrier that Orbax makes public. Without `jax.distributed`, as on a TPU pod that nobody has
    initialized, devices wait for each other, without a limit.

    Args:
        name: what all of them call this place. It may be used again.
        timeout: the longest to wait; see `seconds_of`.

    Raises:
        BarrierError: not all came in time; those who did not are named, as far as is known.
        ConfigError: `timeout` is no duration.
    """
    seconds = seconds_of(timeout, "timeout")
    if jax.process_count() == 1:
        return
    if not jax.distributed.is_initialized():
        multihost_utils.sync_global_devices(name)
        return
    with quiet():
        from orbax.checkpoint.multihost import get_barrier_sync_fn  # slow, and for several alone

    try:
        get_barrier_sync_fn()(key=name, timeout_ms=max(1, round(1000 * seconds)))
    except jax.errors.JaxRuntimeError as error:
        missing = missing_processes(str(error))
        absent = f"missing: {', '.join(map(str, missing))}" if missing else "which, is not known"
        raise BarrierError(
            f"All {jax.process_count()} processes must come to the barrier {name!r} within "
            f"{seconds:g} s, but not all did ({absent}; this is process {jax.process_index()}). "
            "Look at the log of a missing one: it has failed, hangs, or goes another way through "
            f"the program. {str(error).splitlines()[0]}"
        ) from error


def missing_processes(message: str) -> tuple[int, ...]:
    """Returns which processes a coordinator's message says have not come to a barrier in time.

    Args:
        message: of the error. The coordinator names some of them where they are many.
    """
    _, _, names = message.partition("timed out task names:")
    found = re.findall(r"^(?:\S*task:)?(\d+)\s*$", names, re.MULTILINE)
    return tuple(sorted({int(index) for index in found}))
