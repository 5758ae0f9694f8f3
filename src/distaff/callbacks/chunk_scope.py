"""Context managers around the chunks of an epoch, which leave fused steps fused."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

from distaff.execution.timers import Timers

ChunkScope: TypeAlias = Callable[[range], AbstractContextManager[None]]
"""Returns the context of a chunk, given its steps, counted from 1: one step or one program."""


@runtime_checkable
class WatchesChunks(Protocol):
    """Optional protocol of a callback that runs code around chunks; steps stay fused."""

    def around_epoch(self, directory: Path | None) -> AbstractContextManager[ChunkScope]:
        """Returns a context for the training of an epoch, which yields a context for each chunk.

        It exits when the epoch ends, also if the run is stopped or fails.

        Args:
            directory: absolute run directory; None if nothing is written.
        """
        ...


@contextmanager
def around_epoch(
    watchers: Sequence[WatchesChunks],
    directory: Path | None,
    timers: Timers,
) -> Generator[ChunkScope]:
    """Enters the contexts of all watchers for an epoch, the first one outermost.

    Args:
        watchers: callbacks.
        directory: absolute run directory; None if nothing is written.
        timers: record the time that the watchers take.

    Yields:
        A function that returns the combined context of a chunk.
    """
    with ExitStack() as stack:
        stack.enter_context(timers.spent("callbacks"))
        scopes = [stack.enter_context(watcher.around_epoch(directory)) for watcher in watchers]
        stack.enter_context(timers.spent("other"))

        @contextmanager
        def around_chunk(steps: range) -> Generator[None]:
            with ExitStack() as inner:
                inner.enter_context(timers.spent("callbacks"))
                for scope in scopes:
                    inner.enter_context(scope(steps))
                inner.enter_context(timers.spent("device"))
                yield

        yield around_chunk
