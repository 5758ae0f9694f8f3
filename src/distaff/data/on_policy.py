"""OnPolicy: yields batches that depend on the trainer's state, one after each step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

from distaff.core.typing import Batch
from distaff.data.loader import Loader, as_loader, first_batch, inner_loaders, num_batches
from distaff.data.stream import Stream
from distaff.errors import ChangedBatchesError, StateError

T = TypeVar("T")

_AHEAD, _AFTER = "ahead", "after"

_reading: ContextVar[str] = ContextVar("reading", default="")
"""How this thread is fetching a training batch: ahead of the steps, after one, or not at all."""


class OnPolicy:
    """A loader that may read the trainer's state, such as the policy in reinforcement learning.

    Batches are not prefetched, and steps run one at a time: each batch is requested after the step
    before it, so `trainer.state` is the state that the batch will train. Pass `example_batch` to
    the trainer: the state then exists before the first batch, too.

    Args:
        source: an iterable of batches, or a function that returns one, as for `Stream`; or a
            loader. To resume a run exactly, it must be a loader whose `get_state` holds everything
            that its batches depend on besides the trainer's state, such as the environment's state.

    Raises:
        BatchError: the source is not one of these.
    """

    def __init__(self, source: Iterable[Batch] | Callable[[], Iterable[Batch]] | Loader) -> None:
        self.loader = as_loader(source, name="train")

    def __len__(self) -> int:
        length = num_batches(self.loader)
        if length is None:
            raise TypeError("The number of batches is unknown: pass steps_per_epoch.")
        return length

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.loader)

    def peek(self) -> Batch:
        """Returns the next batch without consuming it."""
        return first_batch(self.loader)

    def get_state(self) -> Mapping[str, Any]:
        """Returns the position of the loader."""
        return self.loader.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores a position.

        Raises:
            ChangedBatchesError: the source cannot be read again, since its batches depend on past
                states of the trainer.
        """
        if isinstance(self.loader, Stream) and dict(state) != self.loader.get_state():
            raise ChangedBatchesError(
                "Batches that depend on the trainer's state cannot be read again, and this source "
                "has no position. Write a loader whose get_state and set_state save what its "
                "batches depend on, or pass allow_inexact_resume=True to the trainer."
            )
        self.loader.set_state(state)


def is_on_policy(loader: Any) -> bool:
    """Whether a loader, or one that it wraps, is an `OnPolicy` loader."""
    if isinstance(loader, OnPolicy):
        return True
    return any(is_on_policy(each) for each in inner_loaders(loader) if each is not None)


def first_to_train(loader: Loader) -> Batch:
    """Returns the next training batch without consuming it; see `first_batch`."""

    def peeked() -> Iterator[Batch]:
        yield first_batch(loader, name="train")

    return next(marked(peeked(), loader))


def marked(items: Iterator[T], loader: Any) -> Generator[T]:
    """Yields the items of a training loader, which `check_reader` may forbid to read the state."""
    mark, end = _AFTER if is_on_policy(loader) else _AHEAD, object()
    while True:
        token = _reading.set(mark)
        try:
            item: Any = next(items, end)
        finally:
            _reading.reset(token)
        if item is end:
            return
        yield item


def check_reader(*, exists: bool) -> None:
    """Checks that this thread may read the trainer's state now, and that it `exists`.

    Raises:
        StateError: a prefetched loader reads the state, or a loader reads it before it exists.
    """
    mark = _reading.get()
    if mark == _AHEAD:
        raise StateError(
            "The train loader reads the trainer's state or step while it makes a batch. Batches "
            "are prefetched, so it would see old parameters, or arrays donated to a step. Wrap the "
            "loader: train_model(data.OnPolicy(loader), ...)."
        )
    if mark == _AFTER and not exists:
        raise StateError(
            "The train loader reads the trainer's state for its first batch, but the state does "
            "not exist yet: the model is initialized with that batch. Pass example_batch=... to "
            "the trainer's constructor."
        )
