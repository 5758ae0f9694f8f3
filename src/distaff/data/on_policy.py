"""OnPolicy: batches that depend on the training so far, each made after the step before it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

from distaff.core.typing import Batch
from distaff.data.loader import Loader, as_loader, first_batch, num_batches
from distaff.data.stream import Stream
from distaff.errors import ChangedBatchesError, StateError

T = TypeVar("T")

_AHEAD, _AFTER = "ahead", "after"

_reading: ContextVar[str] = ContextVar("reading", default="")
"""Whether a batch of the training is being fetched in this thread, and when."""


class OnPolicy:
    """A loader that may read the trainer's state: in reinforcement learning, by its own policy.

    Batches are not fetched ahead, and steps run one by one: a batch is asked for once the step
    before it is done, so that `trainer.state` is the state it will be trained on. Give the trainer
    an `example_batch`: the state is then there for the first batch, too.

    Args:
        source: an iterable of batches, or a function that returns one, as for `Stream`; or a
            loader. To resume a run exactly, it must be a loader whose `get_state` holds all that
            its batches depend on besides the trainer's state, such as the environment's.

    Raises:
        BatchError: the source is neither.
    """

    def __init__(self, source: Iterable[Batch] | Callable[[], Iterable[Batch]] | Loader) -> None:
        self.loader = as_loader(source, name="train")

    def __len__(self) -> int:
        length = num_batches(self.loader)
        if length is None:
            raise TypeError("The length of this loader is unknown: pass steps_per_epoch.")
        return length

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.loader)

    def peek(self) -> Batch:
        """Returns the first batch to come, without handing it out."""
        return first_batch(self.loader)

    def get_state(self) -> Mapping[str, Any]:
        """Returns the position of the loader."""
        return self.loader.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a position.

        Raises:
            ChangedBatchesError: the source cannot be read again, since its batches depend on states
                of the trainer that are gone.
        """
        if isinstance(self.loader, Stream) and dict(state) != self.loader.get_state():
            raise ChangedBatchesError(
                "Batches that depend on the trainer's state cannot be read again, and this source "
                "knows no position. Write a loader whose get_state and set_state keep what its "
                "batches depend on, or pass allow_inexact_resume=True to the trainer."
            )
        self.loader.set_state(state)


def is_on_policy(loader: Any) -> bool:
    """Whether the batches of a loader, or of one that it wraps, may depend on the training."""
    if isinstance(loader, OnPolicy):
        return True
    inner = getattr(loader, "loaders", None)
    inner = inner if isinstance(inner, tuple) else (getattr(loader, "loader", None),)
    return any(is_on_policy(each) for each in inner if each is not None)


def first_to_train(loader: Loader) -> Batch:
    """Returns the first batch of a training to come; see `first_batch`."""

    def peeked() -> Iterator[Batch]:
        yield first_batch(loader, name="train")

    return next(marked(peeked(), loader))


def marked(items: Iterator[T], loader: Any) -> Generator[T]:
    """Yields items that a loader of the training makes, each marked while it is made."""
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


def check_reader(*, is_there: bool) -> None:
    """Checks that what a step changes may be read by this thread now.

    Args:
        is_there: whether there is something to read.

    Raises:
        StateError: a loader that is read ahead asks for it, or one asks before it is there.
    """
    mark = _reading.get()
    if mark == _AHEAD:
        raise StateError(
            "The train loader reads the trainer's state or step while it makes a batch. Batches "
            "are fetched ahead of the steps, so that it would see old parameters, or arrays that a "
            "step has taken. Wrap the loader: train_model(data.OnPolicy(loader), ...)."
        )
    if mark == _AFTER and not is_there:
        raise StateError(
            "The train loader reads the trainer's state for its first batch, and there is none "
            "yet: the model is made for that batch. Pass example_batch=... to the trainer's "
            "constructor."
        )
