"""Measures page faults of training steps, and warns if the untuned allocator slows them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from distaff.execution import allocator
from distaff.execution.feed.chunk import Chunk

_log = logging.getLogger("distaff")

_FIRST_CHUNKS = 2
"""Chunks of an epoch to skip before the measurement: they compile, or touch new memory."""

_MIN_CHUNKS, _MIN_SECONDS = 3, 0.2
"""Fewest chunks, and seconds of processor time, to measure."""

_MIN_SHARE, _MIN_FAULTS = 0.1, 1000
"""Thresholds of the warning: the kernel's share of the processor time, page faults per step."""

_said: list[bool] = []


class Usage(NamedTuple):
    """Resource usage of a process: user seconds, kernel seconds, and minor page faults."""

    user: float
    kernel: float
    faults: int


def watched(
    chunks: Iterable[Chunk], tune_process: bool, usage: Callable[[], Usage] | None = None
) -> Iterable[Chunk]:
    """Returns chunks unchanged; measures page faults if it was too late to tune the allocator.

    Logs a warning, once per process, if page faults slow the steps. Measures nothing if the
    allocator was tuned, or left alone for another reason.

    Args:
        chunks: the chunks of an epoch of training.
        tune_process: the option of this name.
        usage: returns the resource usage of the process; replaced in tests.
    """
    if not (tune_process and allocator.is_late()) or _said:
        return chunks
    return _measured(iter(chunks), usage or _usage)


def _measured(chunks: Iterator[Chunk], usage: Callable[[], Usage]) -> Iterator[Chunk]:
    yield from islice(chunks, _FIRST_CHUNKS)
    before, num_steps = usage(), 0
    for number, chunk in enumerate(chunks, 1):
        yield chunk  # trained on until the next one is requested
        num_steps += chunk.num_steps
        user, kernel, faults = (now - then for now, then in zip(usage(), before, strict=True))
        if number >= _MIN_CHUNKS and user + kernel >= _MIN_SECONDS:
            _judge(kernel / (user + kernel), faults / num_steps)
            break
    yield from chunks


def _judge(share: float, faults: float) -> None:
    if share < _MIN_SHARE or faults < _MIN_FAULTS or _said:
        return
    _said.append(True)
    _log.warning(
        "The kernel takes %.0f %% of the processor time of a training step, mostly for page "
        "faults (%s per step): JAX had started before the trainer was made, too late to tune the "
        "memory allocator. Call distaff.execution.allocator.tune() before any JAX array is made, "
        "or set DISTAFF_MALLOC=off to silence this warning.",
        *(100 * share, f"{faults:,.0f}"),
    )


def _usage() -> Usage:
    import resource  # not on every system; the allocator is tuned on Linux only

    usage = resource.getrusage(resource.RUSAGE_SELF)
    return Usage(usage.ru_utime, usage.ru_stime, usage.ru_minflt)
