"""Coordinates the processes of a run: checks, barriers, and agreement on when to stop."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from distaff.core.config.durations import Duration, seconds_of
from distaff.core.quiet import quiet
from distaff.errors import BarrierError, ConfigError

SECONDS_BETWEEN = 2.0
"""Approximate time between two exchanges. Each waits for the running steps, plus about 1.5 ms
(two processes on one CPU)."""

MAX_CALLS_BETWEEN = 256
"""Most calls between two exchanges: calls may become slower, for example in an evaluation."""


_ROW_BYTES = 1024
"""Least size of the messages that processes exchange, so that few programs are compiled."""


_PLAIN = "Training without a mesh"


def check_one_process(what: str = _PLAIN) -> None:
    """Checks that there is only one process. Starts JAX's backend.

    Args:
        what: what needs one process, for the error.

    Raises:
        ConfigError: `jax.distributed` has joined several processes.
    """
    number = jax.process_count()
    if number > 1:
        mesh = ' Or pass mesh="dp" or mesh="fsdp" to train one model in all of them.'
        raise ConfigError(
            f"{what} runs in one process; jax.process_count() is {number} (this is process "
            f"{jax.process_index()}). Each process would work on all of the data by itself. Start "
            f"one process without jax.distributed.initialize().{mesh if what == _PLAIN else ''} "
            "For independent runs, such as one seed per GPU, start each without it and under its "
            "own name."
        )


def check_not_joined(what: str) -> None:
    """Checks that there is only one process, without starting JAX's backend.

    Raises:
        ConfigError: `jax.distributed` has joined several processes.
    """
    if jax.distributed.is_initialized():
        check_one_process(what)


def is_first() -> bool:
    """Returns whether this process writes the files of a run, and its lines on the screen."""
    return jax.process_index() == 0


def gathered(value: Any) -> list[Any]:
    """Returns the value of each process, in all of them. Every process must call this.

    Args:
        value: strict JSON; another one in each process.
    """
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([len(text)], np.int32))
    size = _ROW_BYTES
    while size < lengths.max():
        size *= 4
    rows = multihost_utils.process_allgather(
        np.pad(text, (0, size - len(text)), constant_values=32)
    )
    return [json.loads(row.tobytes()) for row in np.asarray(rows)]


def told(value: Any) -> Any:
    """Returns the value of the first process, strict JSON. Every process must call this."""
    return gathered(value if is_first() else None)[0]


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
    with quiet():  # a slow import, for several processes only
        from orbax.checkpoint.multihost import get_barrier_sync_fn

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


class Agreement:
    """Returns the most urgent code of all processes, in all of them at the same call.

    At every n-th call the processes exchange their codes and the seconds since the last exchange.
    Each derives the same n from the longest time. A preemption notice that only `jax.distributed`
    receives (a SIGTERM handled by its own service) counts, too.

    Args:
        preempted: code of a preemption notice from `jax.distributed`; the most urgent one.
    """

    def __init__(self, preempted: int) -> None:
        self._preempted = preempted
        self._calls = self._exchanged = 0
        self._interval = 1
        self._start = time.monotonic()
        self._has_service = True

    def __call__(self, code: int) -> int:
        """Returns the code agreed on; every process must call this equally often.

        Args:
            code: this process's code; 0 for none, larger is more urgent.

        Returns:
            `code` itself if there is one process. With several, 0 until all have agreed on the
            largest code.
        """
        if jax.process_count() == 1:
            return code
        self._calls += 1
        if self._is_preempted():
            return self._preempted
        if self._calls - self._exchanged < self._interval:
            return 0
        return self._exchange(code)

    def _exchange(self, code: int) -> int:
        seconds = time.monotonic() - self._start
        # float32 represents both well enough: codes are small integers.
        gathered = multihost_utils.process_allgather(np.array([code, seconds], np.float32))
        largest, longest = np.max(gathered, axis=0)
        calls = self._calls - self._exchanged
        target = int(calls * SECONDS_BETWEEN / max(float(longest), 1e-6))
        self._interval = max(1, min(target, 8 * calls, MAX_CALLS_BETWEEN))
        self._exchanged, self._start = self._calls, time.monotonic()
        return int(largest)

    def _is_preempted(self) -> bool:
        if not self._has_service:
            return False
        try:
            return multihost_utils.reached_preemption_sync_point(self._calls)
        except RuntimeError:  # jax_enable_preemption_service is off
            self._has_service = False
            return False
