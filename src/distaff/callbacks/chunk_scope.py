"""Scopes around the chunks of an epoch: for what must not stand between a step and the next one."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

from distaff.execution.timers import Timers

ChunkScope: TypeAlias = Callable[[range], AbstractContextManager[None]]
"""Gives what a chunk shall run in, by its steps: one, or many as one program, counted from 1."""


@runtime_checkable
class WatchesChunks(Protocol):
    """What a callback may be besides: steps stay fused, since it looks at none of them."""

    def around_epoch(self, directory: Path | None) -> AbstractContextManager[ChunkScope]:
        """Returns what an epoch's training runs in; its value gives what each chunk runs in.

        The context is left when the epoch ends, in whatever way: complete, stopped, by an error.

        Args:
            directory: of the run, absolute; None if nothing is written.
        """
        ...


@contextmanager
def around_epoch(
    watchers: Sequence[WatchesChunks],
    directory: Path | None,
    guard: Callable[[], AbstractContextManager[None]],
    timers: Timers,
) -> Generator[ChunkScope]:
    """Runs an epoch inside of its watchers, the first one outermost.

    Args:
        watchers: callbacks.
        directory: of the run, absolute; None if nothing is written.
        guard: what each chunk runs in besides, innermost.
        timers: hears what the watchers spend.

    Yields:
        What gives all that a chunk runs in.
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
                inner.enter_context(guard())
                yield

        yield around_chunk
