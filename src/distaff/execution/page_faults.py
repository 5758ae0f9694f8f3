"""Page faults of training steps: what an allocator that could not be tuned costs, measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from distaff.execution import allocator
from distaff.execution.feed.chunk import Chunk

_log = logging.getLogger("distaff")

_FIRST_CHUNKS = 2
"""Chunks of an epoch before the measurement: they compile, or their memory is new."""

_MIN_CHUNKS, _MIN_SECONDS = 3, 0.2
"""Chunks, and seconds of processor time, that are measured at least."""

_MIN_SHARE, _MIN_FAULTS = 0.1, 1000
"""The kernel's share of the processor time, and page faults per step, that are worth a warning."""


_said: list[bool] = []


class Usage(NamedTuple):
    """What a process has used of its machine: seconds of the program, of the kernel, and faults."""

    user: float
    kernel: float
    faults: int


def watched(
    chunks: Iterable[Chunk], tune_process: bool, usage: Callable[[], Usage] | None = None
) -> Iterable[Chunk]:
    """Returns the chunks of an epoch; some are measured where the allocator could not be tuned.

    Where page faults slow their steps, a warning is logged, once in a process. Nothing else
    changes, and where the allocator was tuned, or left alone, nothing is measured.

    Args:
        chunks: that are trained on.
        tune_process: whether the process was to be tuned.
        usage: reads what the process has used.
    """
    if not (tune_process and allocator.is_late()) or _said:
        return chunks
    return _measured(iter(chunks), usage or _usage)


def _measured(chunks: Iterator[Chunk], usage: Callable[[], Usage]) -> Iterator[Chunk]:
    yield from islice(chunks, _FIRST_CHUNKS)
    before, num_steps = usage(), 0
    for number, chunk in enumerate(chunks, 1):
        yield chunk  # and is trained on until the next one is asked for
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
        "memory allocator. Call distaff.allocator.tune() before any JAX array is made, or set "
        "DISTAFF_MALLOC=off to silence this warning.",
        *(100 * share, f"{faults:,.0f}"),
    )


def _usage() -> Usage:
    import resource  # not on every system; where it is missing nothing is tuned

    found = resource.getrusage(resource.RUSAGE_SELF)
    return Usage(found.ru_utime, found.ru_stime, found.ru_minflt)
